"""Runs on a cluster with SLURM, through submitit's public interface: one array job per call, each
task of it a run or a few.

A task is the local launcher (experiments.local) with the devices that SLURM gave it. OUT must be
seen by all nodes at the same path; OUT/slurm holds submitit's files and logs, and JOB.json for
every job, {"job", "tasks": [[run, ...], ...]}.

What ends a job early lets its runs stop at a checkpoint, from which they go on. SLURM itself
requeues a preempted job. The task requeues itself before the time limit (SLURM warns it by SIGUSR2
90 seconds earlier) and where it is told to end while the job goes on, as in a grace time.

submitit's job.state asks sacct alone, and a site without accounts would see every job as unknown
and submit it again. So states come from squeue first.
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
from pathlib import Path
from types import ModuleType

from experiments.local import ROOT, WORKER, accelerators, run_local, tail
from flexmemory.errors import UserError
from flexmemory.files import write_json

TIME = "4:00:00"
NO_SLURM = "--launcher=slurm: no {} on this machine; run on a login node, or use --launcher=local"
TIMEOUTS = 100  # time limits after which a task is given up
OURS = set("array error nodes ntasks ntasks_per_node open_mode output requeue signal".split())
QUEUED = set("PENDING REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD SPECIAL_EXIT".split())
RUNNING = set(
    "RUNNING COMPLETING CONFIGURING RESIZING SIGNALING STAGE_OUT STOPPED SUSPENDED".split()
)


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
    sbatch, numbers = {}, {}
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
            sbatch[key] = value
    minutes(sbatch.get("time", TIME))
    return Options(sbatch, **numbers)


def launch(out: Path, names: list[str], options: Options, worker: tuple[str, ...] = WORKER) -> str:
    """Submits what is missing of the runs, and says what that was and where the others are."""
    from experiments import runs as run_list

    lines = [
        f"failed before: {name}: {(more.splitlines() or [''])[-1]}"
        for name, (state, more) in states(out, names).items()
        if state == "failed"
    ]
    if job := submit(out, names, run_list.steps(run_list.read(out)), options, worker):
        count = sum(task.partition("_")[0] == job for task in submitted(out).values())
        lines.append(f"job {job}: {count} runs submitted; its logs are in {out / 'slurm'}")
    now = [state for state, _ in states(out, names).values()]
    counts = ", ".join(f"{now.count(state)} {state}" for state in dict.fromkeys(now))
    lines.append(f"{len(names)} unfinished runs: {counts}" if now else "all are finished")
    lines.append("the same command again shows where they are and submits what is missing")
    return "\n".join(lines)


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
            raise UserError(NO_SLURM.format(program))
    names = missing(out, names)
    if not names:
        return None
    for name in names:  # of an earlier try, or of other settings, or the run would not be asked for
        (out / name / "failed.json").unlink(missing_ok=True)
        (out / name / "done.json").unlink(missing_ok=True)
    tasks, folder = tasks_of(names, options), out.absolute() / "slurm"
    executor = submitit.SlurmExecutor(folder, max_num_timeout=TIMEOUTS)
    executor.update_parameters(**parameters(out, options, len(tasks)))
    steps = {name: steps.get(name, 0) for name in names}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            jobs = executor.map_array(Task(str(out.absolute()), steps, worker), tasks)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(f"sbatch: {one_line(str(error))}") from None
    job = jobs[0].job_id.partition("_")[0]
    write_json(folder / f"{job}.json", {"job": job, "tasks": tasks})
    return job


def dry(out: Path, names: list[str], options: Options, worker: tuple[str, ...] = WORKER) -> str:
    """The options that :func:`submit` would give sbatch for these runs, and the worker's command of
    each task; nothing is written.
    """
    if not names:
        return "nothing to submit"
    tasks = tasks_of(names, options)
    fields = parameters(out, options, len(tasks))
    array = f"0-{len(tasks) - 1}%{fields['array_parallelism']}"
    words = {"job-name": fields["job_name"], "time": fields["time"], "array": array}
    words |= fields["additional_parameters"]
    flags = [f"--{k}" if v is True else f"--{k}={v}" for k, v in words.items()]
    lines = [f"sbatch {shlex.join(flag.replace('_', '-') for flag in flags)}"]
    commands = (shlex.join([*worker, str(out.absolute()), *task]) for task in tasks)
    return "\n".join([*lines, *(f"# task {i}: {command}" for i, command in enumerate(commands))])


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
    busy: set[str] = set()

    def state_of(name: str) -> tuple[str, str]:
        task, failed = tasks.get(name), read_failed(out / name)
        state = known.get(task, "")
        if (out / name / "done.json").exists():
            return "finished", ""
        if state in QUEUED:
            return "queued", task
        if failed is not None:
            return "failed", failed
        if state in RUNNING:  # of a task's runs the first that is open, and those that have begun
            waits = task in busy and not (out / name / "log.txt").exists()
            busy.add(task)
            return "queued" if waits else "running", task
        if task is None:
            return "not submitted", ""
        if state and state != "COMPLETED":
            return "failed", "\n".join([f"task {task}: {state}", *tail(out / name)])
        gone = f"task {task} is no longer in the queue, and SLURM keeps no account of it"
        return "unknown", trouble or gone

    return {name: state_of(name) for name in names}


def missing(out: Path, names: list[str]) -> list[str]:
    """Those of the runs that are neither queued nor running. Raises UserError where SLURM does not
    say.
    """
    tasks = submitted(out)
    known = queue({tasks[name] for name in names if name in tasks})
    return [name for name in names if known.get(tasks.get(name)) not in QUEUED | RUNNING]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a task of the array does with its runs; pickled by submitit."""

    out: str
    steps: dict[str, int]
    worker: tuple[str, ...]

    def __call__(self, names: list[str]) -> list[str]:
        """Does the runs that are not done; returns those that failed."""
        out = Path(self.out)
        todo = [name for name in names if not (out / name / "done.json").exists()]
        try:
            return run_local(out, todo, self.steps, None if accelerators() else 1, self.worker)
        except KeyboardInterrupt:
            job = load_submitit().JobEnvironment().job_id
            state = ask("squeue", "--noheader", f"--jobs={job}", "--format=%T").strip()
            if state == "RUNNING":  # SLURM does not requeue it by itself
                signal.raise_signal(signal.SIGUSR2)  # submitit saves checkpoint() and requeues
            raise SystemExit(128 + signal.SIGTERM) from None

    def checkpoint(self, names: list[str]):
        return load_submitit().helpers.DelayedSubmission(self, names)  # goes on from the folders


def tasks_of(names: list[str], options: Options) -> list[list[str]]:
    """The runs of each task."""
    n = options.runs_per_job
    return [names[i : i + n] for i in range(0, len(names), n)]


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
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in [*parts, days or "0"]) or len(parts) > 3:
        raise UserError(
            f"--slurm.time: {text!r} is not a time; write minutes, H:MM:SS, or D-HH:MM:SS"
        )
    numbers = [int(part) for part in parts]
    if dash or len(numbers) == 3:
        hours, mins, seconds = [*numbers, 0, 0][:3]
    else:
        hours, (mins, seconds) = 0, [*numbers, 0][:2]
    return max(1, math.ceil(int(days or 0) * 1440 + hours * 60 + mins + seconds / 60))


def submitted(out: Path) -> dict[str, str]:
    """{run: the task of the last job it was submitted in}"""
    task_of = {}
    for path in sorted(out.glob("slurm/*.json"), key=lambda path: int(path.stem)):
        tasks = json.loads(path.read_text())["tasks"]
        for i, names in enumerate(tasks):
            task_of |= dict.fromkeys(names, f"{path.stem}_{i}" if len(tasks) > 1 else path.stem)
    return task_of


def queue(tasks: set[str]) -> dict[str, str]:
    """{task: SLURM's state} of those that the queue still knows, or where the site keeps accounts
    those that it ever knew. Raises UserError where SLURM cannot be asked.
    """
    if not tasks:
        return {}
    jobs = "--jobs=" + ",".join(sorted({task.partition("_")[0] for task in tasks}))
    lines = ""
    try:
        lines = ask("squeue", "--noheader", "--array", "--states=all", jobs, "--format=%i|%T")
    except UserError as error:
        if "Invalid job id" not in str(error):  # that is what it says of a single job that is gone
            raise
    known = dict(line.strip().split("|") for line in lines.splitlines())
    if tasks - known.keys():
        with contextlib.suppress(UserError):  # no accounts are kept
            columns = ("--parsable2", "--format=JobID,State")
            lines = ask("sacct", "--noheader", "--allocations", *columns, jobs)
            pairs = (line.partition("|")[::2] for line in lines.splitlines())
            known = {task: state.partition(" ")[0] for task, state in pairs} | known
    return known


def ask(*command: str) -> str:
    """What a command of SLURM prints. Raises UserError with its words where it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(NO_SLURM.format(command[0])) from None
    if result.returncode:
        raise UserError(f"{command[0]}: {one_line(result.stderr)}")
    return result.stdout


def one_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    lines = [re.sub(r"^\w+(: | error: )(error: )?", "", line) for line in lines]
    return "; ".join(lines) or "no message"


def read_failed(folder: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        return json.loads((folder / "failed.json").read_text())["error"]
    return None


def load_submitit() -> ModuleType:
    try:
        return importlib.import_module("submitit")
    except ImportError:
        message = "--launcher=slurm: needs submitit; pip install 'flexmemory[slurm]'"
        raise UserError(message) from None
