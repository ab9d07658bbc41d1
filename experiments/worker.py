"""Does whole runs in this process: text, training, measures. python -m experiments.worker OUT NAME
[NAME ...]

With "-" in place of the names they are read from stdin, a line each, up to an empty line, so that a
launcher keeps one process per device (experiments.local). What a run prints goes to
OUT/NAME/log.txt; the words for the launcher, "start NAME", "done NAME SECONDS", "failed NAME
MESSAGE", to stdout. A run that fails does not end the others.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax

from experiments import runs as run_list
from experiments.budgets import solve
from experiments.local import runs_from_launcher
from experiments.sweeps import with_fields
from flexmemory.analysis.trained import load
from flexmemory.cli.flags import Parser, for_user
from flexmemory.cli.main import start_process
from flexmemory.cli.train import asked_to_stop
from flexmemory.cluster import is_first
from flexmemory.config import Config
from flexmemory.data.shards import read_index
from flexmemory.errors import UserError
from flexmemory.files import write_json
from flexmemory.models.accounting import account
from flexmemory.train import loop
from flexmemory.train.loop import TrainingInterrupted


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m experiments.worker", __doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    try:
        args = parser.parse_args(argv)
        listed = run_list.read(args.out)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
        names = runs_from_launcher() if args.names == ["-"] else iter(args.names)
        return work(args.out, listed, names)
    except UserError as error:
        print(for_user(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def work(out: Path, listed: run_list.RunList, names: Iterator[str], together: bool = False) -> int:
    """Does the runs; returns 0 when all came to their end, 1 when one failed, 130 when asked to
    stop.

    together: of several processes that share the devices; the runs are only trained, over all of
    them, and measured another time by one process.
    """
    start_process()
    if listed.scale == "smoke":  # its models run for milliseconds: little care of the compiler's
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    launcher, failed = os.fdopen(os.dup(1), "w", buffering=1), False
    for name in names:
        began = time.perf_counter()
        print(f"start {name}", file=launcher)
        try:
            run = run_list.run_of(listed, name)
            with logged(out / name):
                trained_run(out, run, plan="fsdp") if together else do(out, run)
            print(f"done {name} {time.perf_counter() - began:.1f}", file=launcher)
        except (KeyboardInterrupt, TrainingInterrupted):
            print(f"stopped {name}", file=launcher)
            return 130
        except Exception as error:  # whatever a run dies of, the others go on
            failed, kind = True, "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            if is_first():
                run_list.save_failure(out / name, 1, f"{kind}{error}")
            print(f"failed {name} {kind}{error}".partition("\n")[0], file=launcher)
    return int(failed)


@contextlib.contextmanager
def logged(folder: Path):
    """Sends stdout and stderr, also of C++ code, to the folder's log.txt; of processes after the
    first to log.<process>.txt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_first():
        run_list.forget(folder)
    kept = os.dup(1), os.dup(2)
    sys.stdout.flush(), sys.stderr.flush()
    with open(folder / ("log.txt" if is_first() else f"log.{jax.process_index()}.txt"), "a") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    try:
        yield
    except (KeyboardInterrupt, TrainingInterrupted):
        raise
    except Exception:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for descriptor, place in zip(kept, (1, 2), strict=True):
            os.dup2(descriptor, place)
            os.close(descriptor)


def do(out: Path, run: dict) -> None:
    """One run from text over trained.json and its measures to done.json; what was finished before
    is kept.
    """
    folder, measures = out / run["name"], run_list.measures_of(run)
    cfg, budget, final = trained_run(out, run)
    trained = {
        "name": run["name"],
        "overrides": run["overrides"],
        "config": {key: vars(value) for key, value in vars(cfg).items()},
        "account": account(cfg.model, cfg.data.seq_len),
        "budget": budget,
        "result": final,
        "seconds": {"train": final["seconds"]["total"]},
        "data_fingerprint": run_list.read_json(folder / "run.json")["data_fingerprint"],
    }
    write_json(folder / "trained.json", trained)
    model, identity = None, run_list.identity(final)
    for name, function in measures.items():
        path = folder / "measures" / f"{name}.json"
        if (run_list.read_json(path) or {}).get("of") == identity:
            continue
        print(f"measure {name}", file=sys.stderr, flush=True)
        model = model or load(folder)  # once for all, for what it keeps
        began, result = time.perf_counter(), function(model)
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"seconds": time.perf_counter() - began, "of": identity, "result": result})
    write_json(folder / "done.json", {"name": run["name"], "measures": sorted(measures)})


def trained_run(out: Path, run: dict, plan: str | None = None) -> tuple[Config, dict | None, dict]:
    """(config, what the budget chose, final_result) of one run, trained or found trained. plan: of
    sharding, in place of the config's, for several processes that share the run: there JAX hears
    SIGTERM, for all of them.
    """
    cfg, budget = config_of(out, run)
    if plan:
        cfg = dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, plan=plan))
    with asked_to_stop(() if plan else (signal.SIGINT, signal.SIGTERM)) as asked:
        final = loop.train(cfg, out / run["name"], stop=lambda: bool(asked))
    if asked:  # in the last evaluation, which training finishes
        raise KeyboardInterrupt
    return cfg, budget, final


def config_of(out: Path, run: dict) -> tuple[Config, dict | None]:
    """The run's config with the data's vocabulary, and its budget solved. Raises UserError where
    `prepare` has not made the data.
    """
    data, overrides = run_list.data_folder(out, run), run["overrides"]
    found = {"data.path": str(data.absolute()), "model.vocab_size": read_index(data)["vocab_size"]}
    cfg = with_fields(Config(), found | overrides)
    return solve(cfg, overrides["budget"]) if "budget" in overrides else (cfg, None)


if __name__ == "__main__":
    sys.exit(main())
