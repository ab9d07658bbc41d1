"""Runs experiments: python -m experiments.run e1 e2 --scale=cpu [--out=runs/cpu]
[--launcher=local|slurm|here] [--dry_run]

Experiments that need the same run share it. Finished runs are kept, broken ones resumed; a failed
one is shown and the others go on. The same command again continues, and ends with the report.
"""

import json
import shlex
import sys
import time
from pathlib import Path

from experiments import catalogue
from experiments import runs as run_list
from flexmemory.cli.flags import Parser, for_user
from flexmemory.cli.main import piped
from flexmemory.errors import UserError, nearest
from flexmemory.files import write_text
from flexmemory.run_folder import read_metrics

LAUNCHERS = ("local", "slurm", "here")


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m experiments.run", __doc__)
    parser.add_argument(
        "experiments", nargs="*", help="names or ids; python -m experiments.list shows them"
    )
    parser.add_argument(
        "--all", action="store_true", help="every experiment of the catalogue that has the scale"
    )
    parser.add_argument(
        "--scale", required=True, help="smoke, cpu, gpu or paper; cm_ratio also quickstart"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the runs, continued where it exists; default runs/SCALE"
    )
    parser.add_argument("--source", help="other text than the scale's, as for flexmemory prepare")
    parser.add_argument("--seeds", help="in place of the scale's, e.g. 0 or 0,1,2,3,4,5")
    parser.add_argument(
        "--budget",
        help="make every variant cost what the first one does: total, active, flops or bytes",
    )
    parser.add_argument(
        "--launcher",
        default="local",
        help=(
            "local (one process per device), slurm, or here (this process; on every host of a slice"
            " with --distributed)"
        ),
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help=(
            "with --launcher=here: one of several processes that a TPU pod, SLURM or Kubernetes"
            " started; trains only"
        ),
    )
    parser.add_argument(
        "--devices",
        type=int,
        help=(
            "with --launcher=local: processes at a time; default one per accelerator, on a CPU one"
            " per core up to 8"
        ),
    )
    parser.add_argument(
        "--status", action="store_true", help="print where every run stands, and stop"
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would start and stop")
    try:
        args, rest = parser.parse_known_args(argv)
        return run(args, rest)
    except UserError as error:
        print(for_user(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def run(args, rest: list[str]) -> int:
    check(args, rest)
    out = args.out or Path("runs") / args.scale
    listed = run_list.make(
        chosen(args), args.scale, source=args.source, seeds=seeds_of(args.seeds), budget=args.budget
    )
    if args.dry_run:
        print(dry_run(out, run_list.merged(out, listed), args, rest))
        return 0
    if args.status:
        print(status(out, run_list.merged(out, listed), args))
        return 0
    if args.launcher == "here":
        return here(out, listed, args)
    run_list.merged(out, listed)  # raises before anything is written
    with run_list.locked(out):
        return launched(out, run_list.claim(out, listed), args, rest)


def launched(out: Path, listed: run_list.RunList, args, rest: list[str]) -> int:
    began = time.perf_counter()
    for folder, arguments in texts(out, listed).items():
        from flexmemory.data.prepare import prepare

        prepare(out=folder, **arguments)
    seconds = {"text": time.perf_counter() - began}
    todo = run_list.unfinished(out, listed)
    if args.launcher == "slurm":
        from experiments import slurm

        print(slurm.launch(out, todo, slurm.options_of(rest)))
        return report(out, [])
    from experiments.local import run_local

    began = time.perf_counter()
    failed = run_local(out, todo, run_list.steps(listed), args.devices)
    return report(out, failed, seconds | {"runs": time.perf_counter() - began})


def report(out: Path, failed: list[str], seconds: dict[str, float] | None = None) -> int:
    """Writes the report and prints its summary. seconds: what preparing the text and doing the
    runs took.
    """
    from experiments.report import write
    from experiments.summary import ending

    began = time.perf_counter()
    results = write(out, seconds=seconds)
    if seconds:
        results["seconds"]["report"] = time.perf_counter() - began
        write_text(out / "summary.txt", ending(Path(), results) + "\n")
    print(ending(out, results))
    return 1 if failed else 0


def check(args, rest: list[str]) -> None:
    """Raises UserError on words that do not go together."""
    if args.launcher not in LAUNCHERS:
        raise UserError(f"--launcher {args.launcher!r}: {nearest(args.launcher, LAUNCHERS)}")
    if rest and args.launcher != "slurm":
        raise UserError(
            f"argument {rest[0]!r}: not understood; see python -m experiments.run --help"
        )
    if bool(args.experiments) == args.all:
        raise UserError("give names of experiments or --all; python -m experiments.list shows them")
    if args.distributed and args.launcher != "here":
        raise UserError("--distributed: several processes share one run only with --launcher=here")


def chosen(args) -> list[str]:
    if not args.all:
        return args.experiments
    known = [
        name
        for name in catalogue.names()
        if args.scale in catalogue.scales_of(catalogue.load(name))
    ]
    if not known:
        scales = {s for n in catalogue.names() for s in catalogue.scales_of(catalogue.load(n))}
        raise UserError(f"--scale {args.scale!r}: {nearest(args.scale, sorted(scales))}")
    return known


def seeds_of(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text!r}: give whole numbers, e.g. 0,1") from None


def texts(out: Path, listed: run_list.RunList) -> dict[Path, dict]:
    """{data folder: arguments of prepare}, each text once."""
    return {
        run_list.data_folder(out, run): run_list.prepare_arguments(run)
        for run in listed.runs.values()
    }


def dry_run(out: Path, listed: run_list.RunList, args, rest: list[str]) -> str:
    """The commands that would start, in their order."""
    lines = [
        command(
            "flexmemory.cli.main",
            "prepare",
            *(f"--{key}={value}" for key, value in arguments.items()),
            f"--out={folder}",
        )
        for folder, arguments in texts(out, listed).items()
    ]
    todo = run_list.unfinished(out, listed)
    if args.launcher == "slurm":
        from experiments import slurm

        return "\n".join([*lines, slurm.dry(out, todo, slurm.options_of(rest))])
    return "\n".join([*lines, *(command("experiments.worker", str(out), name) for name in todo)])


def status(out: Path, listed: run_list.RunList, args) -> str:
    """A line per run: finished, failed with its last line, how far it is, or not started; with
    --launcher=slurm what SLURM says of the unfinished.
    """
    todo, steps = run_list.unfinished(out, listed), run_list.steps(listed)
    states = {name: ("finished", "") for name in listed.runs if name not in todo}
    if args.launcher == "slurm":
        from experiments import slurm

        states |= slurm.states(out, todo)
    for name in todo:
        if name in states:
            continue
        failed, metrics = out / name / "failed.json", read_metrics(out / name)
        if failed.exists():
            states[name] = "failed", json.loads(failed.read_text())["error"]
        else:
            states[name] = (
                ("step", f"{metrics[-1]['step']} of {steps[name]}")
                if metrics
                else ("not started", "")
            )
    width = max(map(len, listed.runs), default=0)
    lines = [
        f"{name:<{width}}  {state} {(more.strip().splitlines() or [''])[-1]}".rstrip()
        for name in listed.runs
        for state, more in [states[name]]
    ]
    return "\n".join([*lines, f"{len(listed.runs) - len(todo)} of {len(listed.runs)} finished"])


def command(module: str, *rest: str) -> str:
    return shlex.join(["python", "-m", module, *rest])


def here(out: Path, listed: run_list.RunList, args) -> int:
    """Does the runs in this process, one after another; of several processes each calls this, and
    all train each run together.
    """
    from experiments.worker import work
    from flexmemory import cluster

    if args.distributed:
        cluster.start()

    def first() -> run_list.RunList:
        from flexmemory.data.prepare import prepare

        claimed = run_list.claim(out, listed)
        for folder, arguments in texts(out, claimed).items():
            prepare(out=folder, **arguments)
        return claimed

    cluster.together(first, first_only=True)
    listed = run_list.read(out)
    todo = run_list.unfinished(out, listed)
    cluster.agree({f"out: the runs to do in {out} (is it on a file system that all see?)": todo})
    code = work(out, listed, iter(todo), together=args.distributed)
    if code == 130:
        return code
    if args.distributed:
        if cluster.is_first():
            print(
                "trained; the same command without --distributed, on one host, measures and writes"
                " the report"
            )
        return code
    return report(out, ["a run"] if code else [])


if __name__ == "__main__":
    sys.exit(piped(main))
