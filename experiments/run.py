"""Runs experiments: python -m experiments.run e1 e2 --scale=cpu [--out=runs/cpu]
[--launcher=local|slurm|here] [--dry_run]

Experiments that need the same run share it. Finished runs are kept, broken ones resumed; a failed
one is shown and the others go on. The same command again continues, and ends with the report.
"""

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


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m experiments.run", __doc__)
    add = parser.add_argument
    add("experiments", nargs="*", help="names or ids; python -m experiments.list shows them")
    add("--all", action="store_true", help="every experiment of the catalogue that has the scale")
    add("--scale", required=True, help="smoke, cpu, gpu or paper; cm_ratio also quickstart")
    add(
        "--out", type=Path, help="folder of the runs, continued where it exists; default runs/SCALE"
    )
    add("--source", help="other text than the scale's, as for flexmemory prepare")
    add("--seeds", help="in place of the scale's, e.g. 0 or 0,1,2,3,4,5")
    add("--budget", help="what every variant is to cost alike: total, active, flops or bytes")
    launchers = "local (one process per device), slurm, or here (this process)"
    add("--launcher", default="local", choices=("local", "slurm", "here"), help=launchers)
    several = "one of several processes that a TPU pod, SLURM or Kubernetes started; trains only"
    add("--distributed", action="store_true", help=f"with --launcher=here: {several}")
    devices = "default one per accelerator, on a CPU one per core up to 8"
    add("--devices", type=int, help=f"with --launcher=local: processes at a time; {devices}")
    add("--status", action="store_true", help="print where every run stands, and stop")
    add("--dry_run", action="store_true", help="print what would start, and stop")
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
    out, seeds = args.out or Path("runs") / args.scale, seeds_of(args.seeds)
    listed = run_list.make(
        chosen(args), args.scale, source=args.source, seeds=seeds, budget=args.budget
    )
    if args.dry_run or args.status:
        listed = run_list.merged(out, listed)
        print(dry_run(out, listed, args, rest) if args.dry_run else status(out, listed, args))
        return 0
    if args.launcher == "here":
        return here(out, listed, args.distributed)
    run_list.merged(out, listed)  # raises before anything is written
    with run_list.locked(out):
        return launched(out, run_list.claim(out, listed), args, rest)


def launched(out: Path, listed: run_list.RunList, args, rest: list[str]) -> int:
    began = time.perf_counter()
    prepare_texts(out, listed)
    seconds = {"text": time.perf_counter() - began}
    todo, steps = run_list.unfinished(out, listed), run_list.steps(listed)
    if args.launcher == "slurm":
        from experiments import slurm

        print(slurm.launch(out, todo, steps, slurm.options_of(rest)))
        return report(out, [])
    from experiments.local import run_local

    began = time.perf_counter()
    failed = run_local(out, todo, steps, args.devices)
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
    scales = {name: catalogue.scales_of(catalogue.load(name)) for name in catalogue.names()}
    if known := [name for name, have in scales.items() if args.scale in have]:
        return known
    raise UserError(f"--scale {args.scale!r}: {nearest(args.scale, set().union(*scales.values()))}")


def seeds_of(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text!r}: give whole numbers, e.g. 0,1") from None


def texts(out: Path, listed: run_list.RunList) -> dict[Path, dict]:
    """{data folder: arguments of prepare}, each text once."""
    runs = listed.runs.values()
    return {run_list.data_folder(out, run): run_list.prepare_arguments(run) for run in runs}


def prepare_texts(out: Path, listed: run_list.RunList) -> None:
    from flexmemory.data.prepare import prepare

    for folder, arguments in texts(out, listed).items():
        prepare(out=folder, **arguments)


def dry_run(out: Path, listed: run_list.RunList, args, rest: list[str]) -> str:
    """The commands that would start, in their order."""
    lines = []
    for folder, arguments in texts(out, listed).items():
        words = (f"--{key}={value}" for key, value in arguments.items())
        lines.append(command("flexmemory.cli.main", "prepare", *words, f"--out={folder}"))
    todo = run_list.unfinished(out, listed)
    if args.launcher == "slurm":
        from experiments import slurm

        return "\n".join([*lines, slurm.dry(out, todo, slurm.options_of(rest))])
    return "\n".join([*lines, *(command("experiments.worker", str(out), name) for name in todo)])


def command(module: str, *rest: str) -> str:
    return shlex.join(["python", "-m", module, *rest])


def status(out: Path, listed: run_list.RunList, args) -> str:
    """A line per run: finished, failed with its last line, how far it is, or not started; with
    --launcher=slurm what SLURM says of the unfinished.
    """
    from experiments.local import progress

    todo, steps = run_list.unfinished(out, listed), run_list.steps(listed)
    states = dict.fromkeys(listed.runs, ("finished", ""))
    for name in todo:
        step = progress(out / name).get("step")
        states[name] = ("step", f"{step} of {steps[name]}") if step else ("not started", "")
        if failed := run_list.read_json(out / name / "failed.json"):
            states[name] = "failed", failed["error"]
    if args.launcher == "slurm":
        from experiments import slurm

        states |= slurm.states(out, todo)
    width = max(map(len, states), default=0)
    lines = [
        f"{name:<{width}}  {state} {(more.strip().splitlines() or [''])[-1]}".rstrip()
        for name, (state, more) in states.items()
    ]
    return "\n".join([*lines, f"{len(states) - len(todo)} of {len(states)} finished"])


def here(out: Path, listed: run_list.RunList, distributed: bool) -> int:
    """Does the runs in this process, one after another; of several processes each calls this, and
    all train each run together.
    """
    from experiments.worker import work
    from flexmemory import cluster

    if distributed:
        cluster.start()
    cluster.together(lambda: prepare_texts(out, run_list.claim(out, listed)), first_only=True)
    listed = run_list.read(out)
    todo = run_list.unfinished(out, listed)
    cluster.agree({f"out: the runs to do in {out} (is it on a file system that all see?)": todo})
    code = work(out, listed, iter(todo), together=distributed)
    if code == 130:
        return code
    if not distributed:
        return report(out, ["a run"] if code else [])
    if cluster.is_first():
        print("trained; the same without --distributed, on one host, measures and reports")
    return code


if __name__ == "__main__":
    sys.exit(piped(main))
