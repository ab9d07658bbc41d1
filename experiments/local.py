"""Runs on this machine: one worker process per device, and a table of how far the runs are.

A worker says on its stdout that it is ready, gets the name of a run on stdin, and says when the run
starts and ends. It does many runs, so that JAX starts once per device. An empty name ends it; where
the launcher dies, stdin ends without one, and the worker stops at a checkpoint.
"""

import contextlib
import dataclasses
import glob
import importlib.metadata
import importlib.util
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from experiments.runs import save_failure
from flexmemory.errors import UserError
from flexmemory.progress import eta

WORKER = (sys.executable, "-m", "experiments.worker")
ROOT = Path(__file__).resolve().parents[1]  # where a worker finds this package
TAIL = 12  # lines of a failed run's log that are shown and kept
POLL = 0.2  # seconds between two looks at signals and workers
MAX_CPU_WORKERS = 8  # where --devices does not say how many
LOG_EVERY = 20.0  # seconds between lines of progress where there is no terminal
INTERRUPTED = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGUSR2, 128 + signal.SIGINT)
STATES = {"start": "running", "stopped": "waiting", "done": "done", "failed": "failed"}


def run_local(
    out: Path,
    names: list[str],
    steps: dict[str, int],
    devices: int | None = None,
    worker: tuple[str, ...] = WORKER,
) -> list[str]:
    """Does the runs, as many at a time as there are devices; returns the names of those that
    failed, whose failed.json says why.

    steps: training steps of each run, for the table. devices: how many to use, see :func:`places`.
    worker: the command of a worker. The first Ctrl-C, SIGTERM or SIGUSR2 (SLURM's warning) lets
    every worker stop at a checkpoint, the second kills them; KeyboardInterrupt is raised when the
    last has ended. Raises UserError where no worker starts.
    """
    waiting, refused = deque(names), []
    workers: dict[str, subprocess.Popen] = {}  # by the name of their place

    def next_run() -> str | None:
        with contextlib.suppress(IndexError):
            return None if signals else waiting.popleft()

    def serve(place: Place) -> None:
        """Has a worker at the place while runs wait; another one where it has died."""
        while waiting and not signals:
            with tempfile.TemporaryFile("w+", errors="replace") as stderr:  # outside of runs
                process = workers[place.name] = started(worker, out, place, stderr)
                name, ready = answered(process, next_run, board)
                code = process.wait()
                kill(workers.pop(place.name))  # what it started, where that is left
                stderr.seek(0)
                said = stderr.read().splitlines()
            if code in INTERRUPTED and not signals:
                time.sleep(1)  # a signal to a whole job reaches the launcher a little later
            if name and not signals:
                last = tail(out / name) or said[-TAIL:]
                save_failure(out / name, code, "\n".join([f"worker {ending(code)}", *last]))
                board.event("failed", name, f"worker {ending(code)}")
            elif not ready and not signals:  # the device or the installation is bad, not a run
                refused.append(f"{place.name}, {ending(code)}: {(said or ['no message'])[-1]}")
                board.say(f"no worker starts on {refused[-1]}")
                return

    chosen, told = places(devices)[: max(1, len(names))], False
    board = Board(out, names, steps)
    table = board.table if board.terminal else contextlib.nullcontext()
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR2
    with caught(*numbers) as signals, table, ThreadPoolExecutor(len(chosen)) as pool:
        tasks = [pool.submit(serve, place) for place in chosen]
        try:
            while wait(tasks, POLL).not_done:
                if signals and not told:
                    told = True
                    board.say("stopping at a checkpoint; again to stop at once")
                    for process in list(workers.values()):
                        process.send_signal(signal.SIGINT)
                for process in list(workers.values()):
                    if process.poll() is not None:
                        kill(process)  # its children, which may hold its stdout open
                board.tick()
            board.tick()
        except BaseException:
            waiting.clear()
            for process in list(workers.values()):
                kill(process)
            raise
    if signals:
        raise KeyboardInterrupt
    for task in tasks:
        task.result()  # raises what was raised there
    if waiting:
        raise UserError(f"no worker starts; the last one, on {refused[-1]}")
    return [name for name in names if board.states[name] == "failed"]


def answered(
    process: subprocess.Popen, next_run: Callable[[], str | None], board: "Board"
) -> tuple[str | None, bool]:
    """Hands runs to a worker until its stdout ends: (the run that it ended in, whether it was ever
    ready for one).
    """
    name, ready = None, False
    with contextlib.suppress(BrokenPipeError):  # it died, as the end of its stdout says
        for line in process.stdout:
            word, run, rest = (*line.rstrip("\n").split(" ", 2), "", "")[:3]
            if word == "ready":
                name, ready = next_run(), True
                print(name or "", file=process.stdin, flush=True)
            elif word in STATES:
                board.event(word, run, rest)
                name = None if word in ("done", "failed") else name
    return name, ready


def started(command: tuple[str, ...], out: Path, place: "Place", stderr: IO) -> subprocess.Popen:
    """A worker process on its place."""
    process = subprocess.Popen(
        [*command, str(out), "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        errors="replace",
        env=os.environ | place.env | {"PYTHONPATH": python_path()},
        start_new_session=True,  # Ctrl-C comes to the launcher alone
    )
    if place.cores:
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, place.cores)
    return process


def kill(process: subprocess.Popen) -> None:
    """Ends a worker and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def python_path() -> str:
    """PYTHONPATH with which a worker finds this package."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def runs_from_launcher() -> Iterator[str]:
    """The worker's end: names of runs from stdin, up to an empty line. Where stdin ends before it,
    the launcher is dead, and this process gets SIGINT.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # SLURM sends it to all, for the launcher
    names: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            names.put(line.strip())
            if not line.strip():
                return
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=read, daemon=True).start()
    name = "none yet"
    while name:
        print("ready", flush=True)
        if name := names.get():
            yield name


@contextlib.contextmanager
def caught(*numbers: int) -> Iterator[list[int]]:
    """Holds the first signal of these numbers; from the second on each raises KeyboardInterrupt."""
    signals: list[int] = []

    def hold(number: int, _: object) -> None:
        signals.append(number)
        if len(signals) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, hold) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a worker runs: a name for people, environment variables that choose the device, and the
    cores it is kept on (empty: all).
    """

    name: str
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    cores: tuple[int, ...] = ()


def places(devices: int | None = None) -> list[Place]:
    """One place per worker: every GPU; or all TPU chips together; or the CPU in shares of one core
    (of more where there are more than MAX_CPU_WORKERS), so that a run has the same number of
    threads whatever runs beside it. ``devices`` takes the first GPUs, or cuts the cores into so
    many shares. Raises UserError for more than there are.
    """
    found = accelerators()
    pins = hasattr(os, "sched_getaffinity")  # Linux alone
    cores = sorted(os.sched_getaffinity(0)) if pins else []
    most = len(found) or len(cores) or os.cpu_count() or 1
    count = devices or (most if found else min(most, MAX_CPU_WORKERS))
    if not 1 <= count <= most:
        raise UserError(f"--devices: {devices} is outside 1..{most}, what there is on this machine")
    ends = [i * len(cores) // count for i in range(count + 1)]
    shares = [tuple(cores[ends[i] : ends[i + 1]]) for i in range(count)]
    return found[:count] or [Place(f"CPU {i}", {}, share) for i, share in enumerate(shares)]


def accelerators() -> list[Place]:
    """The places of GPUs or TPU chips, where JAX on this machine would use them. JAX is not asked:
    it would take the devices from the workers.
    """
    platform = os.environ.get("JAX_PLATFORMS", "").partition(",")[0]
    plugins = {entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")}
    cuda = any(name.startswith("xla_cuda") for name in plugins)
    if platform in ("cuda", "gpu") or (not platform and cuda):
        return [Place(f"GPU {gpu}", {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus()]
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if platform == "tpu" or (not platform and chips and importlib.util.find_spec("libtpu")):
        return [Place("TPU")]
    return []


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES says, or else the numbers of the NVIDIA GPUs of this machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for word in visible.split(",") if (gpu := word.strip()) and gpu != "-1"]
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "-L"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]
    return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def last_lines(path: Path, size: int) -> list[str]:
    """The lines in the last bytes of a file; [] where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def tail(folder: Path) -> list[str]:
    """The last lines of a run's log."""
    return last_lines(folder / "log.txt", 800 * TAIL)[-TAIL:]


def progress(folder: Path) -> dict[str, float]:
    """The latest "step", "loss" and "tokens_per_s" of a run, those that are there."""
    latest: dict[str, float] = {}
    for line in last_lines(folder / "metrics.jsonl", 8192):
        with contextlib.suppress(ValueError, AttributeError):  # a line that is cut
            latest |= {key: value for key, value in json.loads(line).items() if value is not None}
    return latest


class Board:
    """Where the runs stand, on stderr: on a terminal a live table of those that run, elsewhere a
    few lines. rich's progress bars count the steps, and so tell the time left.
    """

    def __init__(self, out: Path, names: list[str], steps: dict[str, int]):
        self.out, self.states, self.printed = out, dict.fromkeys(names, "waiting"), time.monotonic()
        self.table = Progress(
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            speed_estimate_period=600,
        )
        self.console, self.terminal = self.table.console, self.table.console.is_terminal
        made = {name: progress(out / name).get("step", 0) for name in names}  # by an earlier start
        add = partial(self.table.add_task, note="")
        self.tasks = {
            name: add(name, total=steps[name], completed=made[name], visible=False)
            for name in names
        }
        whole = sum(steps[name] for name in names)
        self.whole = add(self.summary(), total=whole, completed=sum(made.values()))

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def event(self, word: str, name: str, rest: str) -> None:
        """``word``: start, done, failed or stopped, as workers print them."""
        self.states[name], task = STATES[word], self.tasks[name]
        self.table.update(task, visible=self.states[name] == "running")
        if word == "done":
            self.table.update(task, completed=self.table.tasks[task].total)
        if word == "failed":
            log = self.out / name / "log.txt"
            head = f"failed {name}: {rest}; the last lines of {log}:"
            self.say("\n    ".join([head, *tail(self.out / name)]))
        elif not self.terminal:
            after = f" after {eta(float(rest))}" if word == "done" and rest else ""
            self.say(f"{word} {name}{after}")

    def tick(self) -> None:
        """Looks where the runs are; says so where there is no table and it is time."""
        for name in [name for name, state in self.states.items() if state == "running"]:
            seen = progress(self.out / name)
            rate = f"{seen['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in seen else ""
            note = f"loss {seen['loss']:.4f}  {rate}" if "loss" in seen else rate
            self.table.update(self.tasks[name], completed=seen.get("step", 0), note=note)
        whole = self.table.tasks[self.whole]
        made = sum(self.table.tasks[task].completed for task in self.tasks.values())
        self.table.update(self.whole, completed=made, description=self.summary())
        if not self.terminal and time.monotonic() - self.printed >= LOG_EVERY:
            self.printed, left = time.monotonic(), whole.time_remaining
            self.say(whole.description + (f"; {eta(left)} left" if left else ""))

    def summary(self) -> str:
        states = list(self.states.values())
        order = ("done", "failed", "running", "waiting")
        counts = ", ".join(f"{n} {state}" for state in order if (n := states.count(state)))
        return f"{len(states)} runs: {counts}"
