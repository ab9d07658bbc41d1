"""Runs an experiment's sweep: python -m experiments.run cm_ratio --scale=quickstart --out=runs/demo [--dry_run] [--only=NAME]

Each run is a process of its own: finished ones are skipped, broken ones resumed, a failed one is reported and the rest go on.
"""

import argparse
import collections
import importlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from flexmemory.cli.flags import Parser
from flexmemory.cli.main import start_process
from flexmemory.errors import UserError, nearest
from flexmemory.files import write_json
from flexmemory.progress import eta

EXPERIMENTS = ("cm_ratio",)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m experiments.run", __doc__)
    parser.add_argument("experiment", help=", ".join(EXPERIMENTS))
    parser.add_argument("--scale", default="quickstart")
    parser.add_argument("--out", required=True, help="folder of the sweep; an existing one is continued")
    parser.add_argument("--source", help="other text than the scale's, as for flexmemory prepare")
    parser.add_argument("--seeds", help="fewer seeds than the scale's, e.g. 0 or 0,1")
    parser.add_argument("--only", help="run just this one, in this process")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and stop")
    try:
        return run(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def load(experiment: str, scale: str, source: str | None = None, seeds: str | None = None) -> dict:
    """The experiment's sweep at a scale, with other text or fewer seeds where given. Raises UserError on an unknown name."""
    if experiment not in EXPERIMENTS:
        raise UserError(f"experiment {experiment!r}: {nearest(experiment, EXPERIMENTS)}")
    module = importlib.import_module(f"experiments.{experiment}")
    if scale not in module.SCALES:
        raise UserError(f"--scale {scale!r}: {nearest(scale, module.SCALES)}")
    spec = module.sweep(scale)
    if source:
        spec["data"] = spec["data"] | {"source": source}
    if seeds:
        known = sorted({str(row["seed"]) for row in spec["runs"]})
        for seed in seeds.split(","):
            if seed not in known:
                raise UserError(f"--seeds {seed!r}: this scale has {', '.join(known)}")
        spec["runs"] = [row for row in spec["runs"] if str(row["seed"]) in seeds.split(",")]
    return {"experiment": experiment, "scale": scale, **spec}


def run(args: argparse.Namespace) -> int:
    spec, out = load(args.experiment, args.scale, args.source, args.seeds), Path(args.out)
    if args.only and args.only not in (names := [run["name"] for run in spec["runs"]]):
        raise UserError(f"--only {args.only!r}: {nearest(args.only, names)}")
    if args.dry_run:
        print(command("flexmemory.cli.main", "prepare", *(f"--{k}={v}" for k, v in spec["data"].items()), f"--out={out / 'data'}"))
        for row in spec["runs"]:
            print(command(*child(args, row["name"])))
        return 0
    claim(out, spec)
    start_process()
    from flexmemory.data.prepare import prepare

    prepare(out=out / "data", progress=not args.only, **spec["data"])
    if args.only:
        from experiments.variant import run_variant

        (out / args.only / "failed.json").unlink(missing_ok=True)
        run_variant(out, spec, next(row for row in spec["runs"] if row["name"] == args.only))
        return 0
    failed = run_all(out, spec, args)
    from experiments.report import headline, write

    print(headline(write(out)))
    print(f"\nreport: {out / 'report.html'}\nnumbers: {out / 'results.json'}")
    return 1 if failed else 0


def claim(out: Path, spec: dict) -> None:
    """Creates the sweep folder or checks that it holds this sweep. Raises UserError naming what differs."""
    path, wanted = out / "sweep.json", json.loads(json.dumps(spec))
    if path.exists():
        known = json.loads(path.read_text())
        for key, value in wanted.items():
            if known.get(key) != value:
                raise UserError(f"--out {out}: holds another sweep ({key} differs); give a new folder")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: not empty and not a sweep; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, spec)


def child(args: argparse.Namespace, name: str) -> tuple[str, ...]:
    more = [f"--{name}={value}" for name in ("source", "seeds") if (value := getattr(args, name))]
    return ("experiments.run", args.experiment, f"--scale={args.scale}", f"--out={args.out}", *more, f"--only={name}")


def command(module: str, *rest: str) -> str:
    return shlex.join(["python", "-m", module, *rest])


def run_all(out: Path, spec: dict, args: argparse.Namespace) -> list[str]:
    """Runs what is not finished, one process after another; returns the names that failed."""
    began, failed, ran = time.perf_counter(), [], 0
    todo = [row["name"] for row in spec["runs"] if not (out / row["name"] / "variant.json").exists()]
    for name in todo:
        left = f", about {eta((time.perf_counter() - began) / ran * (len(todo) - ran))} left" if ran else ""
        print(f"[{ran + 1}/{len(todo)}] {name}{left}", file=sys.stderr, flush=True)
        folder = out / name
        folder.mkdir(exist_ok=True)
        (folder / "failed.json").unlink(missing_ok=True)
        code, tail = run_child([sys.executable, "-m", *child(args, name)], out / f"{name}.log")
        ran += 1
        if code:
            failed.append(name)
            write_json(folder / "failed.json", {"name": name, "exit": code, "error": "\n".join(tail)})
            print(f"{name} failed (exit {code}); log: {out / f'{name}.log'}; the others go on", file=sys.stderr)
    return failed


def run_child(arguments: list[str], log: Path) -> tuple[int, list[str]]:
    """Runs one process, its output both shown and kept in ``log``. Returns (exit code, last lines)."""
    tail: collections.deque[str] = collections.deque(maxlen=12)
    with open(log, "a") as file, subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print("  " + line, end="", file=sys.stderr, flush=True)
            file.write(line)
            tail.append(line.rstrip())
    return process.returncode, list(tail)


if __name__ == "__main__":
    sys.exit(main())
