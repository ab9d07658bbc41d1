"""Runs on a cluster with SLURM, through submitit: one array job per call, each task of it a run or
a few.

A task is the local launcher (experiments.local) with the devices that SLURM gave it. OUT must be
seen by all nodes at the same path; OUT/slurm holds submitit's files and logs, and JOB.json for
every job, {"job", "tasks": [[run, ...], ...]}.

What ends a job early lets its runs stop at a checkpoint first, from which they go on: SLURM itself
puts a preempted job back into the queue; the task does so before the time limit (SLURM's signal
comes 90 seconds earlier) and where it was asked to end while the job goes on, as at the start of a
grace time.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from experiments.local import ROOT, WORKER, accelerators, run_local, tail
from flexmemory.errors import UserError
from flexmemory.files import write_json

TIME = "4:00:00"
TIMEOUTS = 100  # time limits after which a task is given up
OURS = (
    "array",
    "error",
    "nodes",
    "ntasks",
    "ntasks_per_node",
    "open_mode",
    "output",
    "requeue",
    "signal",
)  # of sbatch's options
QUEUED = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
RUNNING = {
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
    "SUSPENDED",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """``sbatch``: its long options by name, "" for one without a value; ``runs_per_job``: of one
    task, one after another where there is one device; ``max_parallel``: tasks at a time, None: as
    many as SLURM lets.
    """

    sbatch: dict[str, str] = dataclasses.field(default_factory=dict)
    runs_per_job: int = 1
    max_parallel: int | None = None


def options_of(words: list[str]) -> Options:
    """The options of a command line: --slurm.KEY=VALUE or --slurm.KEY for sbatch, --runs_per_job=N,
    --max_parallel=N. Raises UserError on anything else.
    """
    made, numbers = {}, {}
    for word in words:
        name, _, value = word.partition("=")
        key = name.removeprefix("--slurm.").replace("-", "_")
        if name in ("--runs_per_job", "--max_parallel"):
            if not value.isdecimal() or not int(value):
                raise UserError(f"{name}: {value!r} is not a positive number")
            numbers[name[2:]] = int(value)
        elif not name.startswith("--slurm.") or not key:
            raise UserError(
                f"argument {word!r}: not understood; of --launcher=slurm there are"
                " --runs_per_job=N, --max_parallel=N and options of sbatch as --slurm.KEY=VALUE,"
                " such as --slurm.partition=gpu"
            )
        elif key in OURS:
            raise UserError(f"{name}: the launcher sets it; leave it out")
        else:
            made[key] = value
    minutes(made.get("time", TIME))
    return Options(made, **numbers)


def launch(out: Path, names: list[str], options: Options, worker: tuple[str, ...] = WORKER) -> str:
    """Submits what is missing of the runs, and says what that was and where the others are."""
    from experiments import plan as plans

    before = states(out, names)
    job = submit(out, names, plans.steps(plans.read(out)), options, worker)
    lines = [
        f"failed before: {name}: {(more.splitlines() or [''])[-1]}"
        for name, (state, more) in before.items()
        if state == "failed"
    ]
    if job:
        count = sum(task.partition("_")[0] == job for task in submitted(out).values())
        lines += [f"job {job}: {count} runs submitted; its logs are in {out / 'slurm'}"]
    after = [state for state, _ in states(out, names).values()]
    where = (
        ", ".join(f"{after.count(state)} {state}" for state in dict.fromkeys(after))
        or "all are finished"
    )
    return "\n".join(
        [
            *lines,
            f"{len(names)} unfinished runs: {where}" if after else where,
            "the same command again shows where they are and submits what is missing",
        ]
    )


def submit(
    out: Path,
    names: list[str],
    steps: dict[str, int],
    options: Options,
    worker: tuple[str, ...] = WORKER,
) -> str | None:
    """Submits those of the runs that are not in the queue already, as one job, and returns its id;
    None where all are.

    steps: training steps of each run, for the logs. Raises UserError without submitit or SLURM, and
    with SLURM's words where it refuses the job.
    """
    submitit = load_submitit()
    for program in ("sbatch", "srun", "squeue"):
        if not shutil.which(program):
            raise UserError(
                f"--launcher=slurm: no {program} on this machine; run on a login node, or use"
                " --launcher=local"
            )
    names = missing(out, names)
    if not names:
        return None
    for name in names:  # of an earlier try, or of other settings, or the run would not be asked for
        (out / name / "failed.json").unlink(missing_ok=True)
        (out / name / "done.json").unlink(missing_ok=True)
    tasks, folder = tasks_of(out, names, steps, options, worker), out.absolute() / "slurm"
    executor = submitit.SlurmExecutor(folder, max_num_timeout=TIMEOUTS)
    executor.update_parameters(**parameters(out, options, len(tasks)))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            jobs = executor.submit_array(tasks)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"sbatch: {one_line(str(error))}") from None
    job = jobs[0].job_id.partition("_")[0]
    write_json(folder / f"{job}.json", {"job": job, "tasks": [list(task.names) for task in tasks]})
    return job


def dry(out: Path, names: list[str], options: Options, worker: tuple[str, ...] = WORKER) -> str:
    """The sbatch file that :func:`submit` would hand in for these runs, and the worker's command of
    each task; nothing is written.
    """
    load_submitit()
    if not names:
        return "nothing to submit"
    from submitit.slurm.slurm import (
        _make_sbatch_string,
    )  # SlurmExecutor, which has it as a method, is not to be had without SLURM

    tasks, folder = tasks_of(out, names, {}, options, worker), out.absolute() / "slurm"
    command = (
        f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    )
    text = _make_sbatch_string(
        command,
        folder,
        map_count=len(tasks) if len(tasks) > 1 else None,
        **parameters(out, options, len(tasks)),
    )
    return (
        text
        + "".join(
            f"\n# task {i}: {shlex.join([*worker, task.out, *task.names])}"
            for i, task in enumerate(tasks)
        )
        + "\n"
    )


def states(out: Path, names: list[str]) -> dict[str, tuple[str, str]]:
    """{run: (state, more)} from the folder and SLURM. The states: "finished"; "failed", with the
    last lines; "running" and "queued", with the task's id; "not submitted"; "unknown", with the
    reason, such as a task that is gone without a trace where SLURM keeps no accounts.
    """
    tasks, trouble, known = submitted(out), "", {}
    try:
        known = queue({tasks[name] for name in names if name in tasks})
    except UserError as error:
        trouble = str(error)
    made, busy = {}, set()
    for name in names:
        task, failed = tasks.get(name), read_failed(out / name)
        state = known.get(task, "")
        if (out / name / "done.json").exists():
            made[name] = "finished", ""
        elif state in QUEUED:
            made[name] = "queued", task
        elif failed is not None:
            made[name] = "failed", failed
        elif state in RUNNING:  # of a task's runs the first that is open, and those that have begun
            made[name] = (
                "queued" if task in busy and not (out / name / "log.txt").exists() else "running",
                task,
            )
            busy.add(task)
        elif task is None:
            made[name] = "not submitted", ""
        elif state and state != "COMPLETED":
            made[name] = "failed", "\n".join([f"task {task}: {state}", *tail(out / name)])
        else:
            made[name] = (
                "unknown",
                trouble
                or f"task {task} is no longer in the queue, and SLURM keeps no account of it",
            )
    return made


def missing(out: Path, names: list[str]) -> list[str]:
    """Those of the runs that are neither queued nor running. Raises UserError where SLURM does not
    say.
    """
    tasks = submitted(out)
    known = queue({tasks[name] for name in names if name in tasks})
    return [name for name in names if known.get(tasks.get(name)) not in QUEUED | RUNNING]


@dataclasses.dataclass(frozen=True)
class Task:
    """What one task of the array does, pickled by submitit."""

    out: str
    names: tuple[str, ...]
    steps: dict[str, int]
    worker: tuple[str, ...]

    def __call__(self) -> list[str]:
        """Does the runs that are not done; returns those that failed."""
        requeue, warned = (
            signal.getsignal(signal.SIGUSR2),
            [],
        )  # submitit's handler keeps what checkpoint() returns, requeues the job, and exits

        def warn(number, _):
            warned.append(number)
            os.kill(os.getpid(), signal.SIGTERM)  # the launcher lets its workers stop

        signal.signal(signal.SIGUSR2, warn)
        out = Path(self.out)
        try:
            names = [name for name in self.names if not (out / name / "done.json").exists()]
            return run_local(out, names, self.steps, None if accelerators() else 1, self.worker)
        except KeyboardInterrupt:
            job = load_submitit().JobEnvironment().job_id
            if (
                warned
                or said("squeue", "--noheader", f"--jobs={job}", "--format=%T").strip() == "RUNNING"
            ):
                requeue(signal.SIGUSR2, None)
            raise SystemExit(128 + signal.SIGTERM) from None

    def checkpoint(self):
        return load_submitit().helpers.DelayedSubmission(self)  # the runs go on from their folders


def tasks_of(
    out: Path, names: list[str], steps: dict[str, int], options: Options, worker: tuple[str, ...]
) -> list[Task]:
    parts = [
        names[i : i + options.runs_per_job] for i in range(0, len(names), options.runs_per_job)
    ]
    return [
        Task(str(out.absolute()), tuple(part), {name: steps.get(name, 0) for name in part}, worker)
        for part in parts
    ]


def parameters(out: Path, options: Options, tasks: int) -> dict:
    """Arguments of submitit's sbatch file."""
    more = {key: value or True for key, value in options.sbatch.items() if key != "time"}
    # since 22.05 a step no longer inherits the job's number of cores
    step = [f"--cpus-per-task={more['cpus_per_task']}"] if "cpus_per_task" in more else []
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        "job_name": out.absolute().name,
        "time": minutes(options.sbatch.get("time", TIME)),
        "array_parallelism": options.max_parallel or tasks,
        "setup": [f"export PYTHONPATH={shlex.quote(path)}"],
        "srun_args": step,
        "wckey": None,
        "additional_parameters": {"requeue": True, **more},
    }


def minutes(text: str) -> int:
    """Of a time as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises UserError on
    anything else.
    """
    found = re.fullmatch(
        r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(?:(\d+):)?(\d+):(\d+)|(\d+))", text
    )
    if not found:
        raise UserError(
            f"--slurm.time: {text!r} is not a time; write minutes, H:MM:SS, or D-HH:MM:SS"
        )
    days, *times = (int(part or 0) for part in found.groups())
    hours, mins, seconds = times[0] + times[3], times[1] + times[4] + times[6], times[2] + times[5]
    return max(1, math.ceil(days * 1440 + hours * 60 + mins + seconds / 60))


def submitted(out: Path) -> dict[str, str]:
    """{run: the task of the last job it was submitted in}"""
    made = {}
    for path in sorted(out.glob("slurm/*.json"), key=lambda path: int(path.stem)):
        tasks = json.loads(path.read_text())["tasks"]
        made |= {
            name: f"{path.stem}_{i}" if len(tasks) > 1 else path.stem
            for i, names in enumerate(tasks)
            for name in names
        }
    return made


def queue(tasks: set[str]) -> dict[str, str]:
    """{task: SLURM's state} of those that the queue still knows, or where the site keeps accounts
    those that it ever knew. Raises UserError where SLURM cannot be asked.
    """
    if not tasks:
        return {}
    jobs = ",".join(sorted({task.partition("_")[0] for task in tasks}))
    try:
        lines = said(
            "squeue", "--noheader", "--array", "--states=all", f"--jobs={jobs}", "--format=%i|%T"
        )
    except UserError as error:
        if "Invalid job id" not in str(error):  # that is what it says of a single job that is gone
            raise
        lines = ""
    known = dict(line.strip().split("|") for line in lines.splitlines())
    if tasks - known.keys():
        with contextlib.suppress(UserError):  # no accounts are kept
            lines = said(
                "sacct",
                "--noheader",
                "--allocations",
                "--parsable2",
                "--format=JobID,State",
                f"--jobs={jobs}",
            )
            known = {
                task: state.partition(" ")[0]
                for task, _, state in (line.partition("|") for line in lines.splitlines())
            } | known
    return known


def said(*command: str) -> str:
    """What a command of SLURM prints. Raises UserError with its words where it fails."""
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"--launcher=slurm: no {command[0]} on this machine; run on a login node, or use"
            " --launcher=local"
        ) from None
    if made.returncode:
        raise UserError(f"{command[0]}: {one_line(made.stderr)}")
    return made.stdout


def one_line(message: str) -> str:
    lines = [
        re.sub(r"^\w+(: | error: )(error: )?", "", line.strip())
        for line in message.splitlines()
        if line.strip()
    ]
    return "; ".join(lines) or "no message"


def read_failed(folder: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        return json.loads((folder / "failed.json").read_text())["error"]
    return None


def load_submitit() -> ModuleType:
    try:
        return importlib.import_module("submitit")
    except ImportError:
        raise UserError(
            "--launcher=slurm: needs submitit; pip install 'flexmemory[slurm]'"
        ) from None
