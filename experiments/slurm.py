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
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from types import ModuleType

from experiments.local import WORKER, accelerators, python_path, run_local, tail
from experiments.runs import forget, read_json
from flexmemory.errors import UserError
from flexmemory.files import write_json

TIME = "4:00:00"
NO_SLURM = "--launcher=slurm: no {} on this machine; run on a login node, or use --launcher=local"
RESTARTS = 1000  # after which a task is given up
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
    return Options(sbatch, **numbers)


def launch(
    out: Path,
    names: list[str],
    steps: dict[str, int],
    options: Options,
    worker: tuple[str, ...] = WORKER,
) -> str:
    """Submits what is missing of the runs, and says what that was and where the others are."""
    before = states(out, names).items()
    failed = {name: more.splitlines() for name, (state, more) in before if state == "failed"}
    lines = [f"failed before: {name}: {(said or [''])[-1]}" for name, said in failed.items()]
    if job := submit(out, names, steps, options, worker):
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
    for name in names:
        forget(out / name)  # an earlier try, or other settings: the run would not be asked for
    tasks, folder = tasks_of(names, options), out.absolute() / "slurm"
    executor = submitit.SlurmExecutor(folder, max_num_timeout=RESTARTS)
    executor.update_parameters(**parameters(out, options, len(tasks)))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            jobs = executor.map_array(Task(out.absolute(), steps, worker), tasks)
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
    words = {"job-name": fields["job_name"], "array": array} | fields["additional_parameters"]
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

    def state_of(name: str) -> tuple[str, str]:
        task, folder = tasks.get(name), out / name
        state = known.get(task, "")
        if (folder / "done.json").exists():
            return "finished", ""
        if state in QUEUED:
            return "queued", task
        if failed := read_json(folder / "failed.json"):
            return "failed", failed["error"]
        if state in RUNNING:  # of a task's runs those that have begun
            return "running" if (folder / "log.txt").exists() else "queued", task
        if task is None:
            return "not submitted", ""
        if state and state != "COMPLETED":
            return "failed", "\n".join([f"task {task}: {state}", *tail(folder)])
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

    out: Path
    steps: dict[str, int]
    worker: tuple[str, ...]

    def __call__(self, names: list[str]) -> list[str]:
        """Does the runs that are not done; returns those that failed."""
        todo = [name for name in names if not (self.out / name / "done.json").exists()]
        try:
            return run_local(self.out, todo, self.steps, None if accelerators() else 1, self.worker)
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
    more = {key: value or True for key, value in options.sbatch.items()}
    # since 22.05 a step no longer inherits the job's number of cores
    step = [f"--cpus-per-task={more['cpus_per_task']}"] if "cpus_per_task" in more else []
    return {
        "job_name": out.absolute().name,
        "array_parallelism": options.max_parallel or tasks,
        "setup": [f"export PYTHONPATH={shlex.quote(python_path())}"],
        "srun_args": step,
        "wckey": None,
        "additional_parameters": {"requeue": True, "time": TIME, **more},
    }


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


def load_submitit() -> ModuleType:
    try:
        return importlib.import_module("submitit")
    except ImportError:
        message = "--launcher=slurm: needs submitit; pip install 'flexmemory[slurm]'"
        raise UserError(message) from None
