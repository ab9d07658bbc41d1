"""Runs on this machine: a queue of runs, one worker process per device, and a table of how far they
are.

The launcher writes the name of a run to a worker's stdin and reads from its stdout when the run
starts and ends. A worker does many runs, so that JAX starts once per device. An empty line ends it;
where the launcher dies, stdin ends without one, and the worker stops at a checkpoint.
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
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flexmemory.errors import UserError
from flexmemory.files import write_json
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
    out, free, waiting, workers = Path(out), deque(places(devices)), deque(names), {}
    refused, answered = "", 0
    with (
        caught(signal.SIGINT, signal.SIGTERM, signal.SIGUSR2) as signals,
        Board(out, names, steps) as board,
        ThreadPoolExecutor(len(free)) as pool,
    ):
        try:
            while workers or (waiting and free and not signals):
                while waiting and free and not signals:
                    one = Worker(free.popleft(), out, worker)
                    task = pool.submit(one.serve, waiting.popleft(), waiting, signals, board)
                    workers[task] = one
                if answered < len(signals):
                    answered += 1
                    first = answered == 1
                    now = "at a checkpoint; again to stop at once" if first else "at once"
                    board.say(f"stopping {now}")
                    for one in workers.values():
                        one.process.send_signal(signal.SIGINT) if first else one.kill()
                ended, _ = wait(workers, POLL, FIRST_COMPLETED)
                for one in workers.values():
                    if one.process.poll() is not None:
                        one.kill()  # its children, which may hold its stdout open
                for task in ended:
                    one, code = workers.pop(task), task.result()
                    if code in INTERRUPTED and not signals:
                        time.sleep(1)  # a signal to a whole job reaches the launcher a little later
                    if one.name is None or signals:
                        free.append(one.place)
                    elif one.ready:
                        save_failure(out, one, code)
                        board.event("failed", one.name, f"worker {ending(code)}")
                        free.append(one.place)
                    else:  # the device or the installation is bad, not the run
                        why = (one.errors(1) or ["no message"])[0]
                        refused = f"{one.place.name}, {ending(code)}: {why}"
                        board.say(f"no worker starts on {refused}")
                        waiting.appendleft(one.name)
                board.tick()
        finally:
            for one in workers.values():
                one.kill()
    if signals:
        raise KeyboardInterrupt
    if waiting:
        raise UserError(f"no worker starts; the last one, on {refused}")
    return [name for name in names if board.states[name] == "failed"]


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
    yield from iter(names.get, "")


@contextlib.contextmanager
def caught(*numbers: int) -> Iterator[list[int]]:
    """A list of the signals of these numbers that came; they do nothing else meanwhile."""
    signals: list[int] = []
    before = {n: signal.signal(n, lambda n, _: signals.append(n)) for n in numbers}
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
    available = accelerators()
    if available:
        most = len(available)
        count = devices or most
    else:
        pins = hasattr(os, "sched_getaffinity")  # Linux alone
        cores = sorted(os.sched_getaffinity(0)) if pins else []
        most = len(cores) or os.cpu_count() or 1
        count = devices or min(most, MAX_CPU_WORKERS)
        ends = [i * len(cores) // max(count, 1) for i in range(count + 1)]
        available = [
            Place(f"CPU {i}", {}, tuple(cores[ends[i] : ends[i + 1]])) for i in range(count)
        ]
    if not 1 <= count <= most:
        raise UserError(f"--devices: {devices} is outside 1..{most}, what there is on this machine")
    return available[:count]


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


class Worker:
    """A worker process on its place. ``name``: its run; ``ready``: it has ever started one."""

    def __init__(self, place: Place, out: Path, command: tuple[str, ...]):
        self.place, self.name, self.ready = place, None, False
        self.stderr = tempfile.TemporaryFile()  # what it says outside of runs
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [*command, str(out), "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            errors="replace",
            env=os.environ | place.env | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C comes to the launcher alone
        )
        if place.cores:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(self.process.pid, place.cores)

    def serve(self, name: str, waiting: deque, signals: list, board: "Board") -> int:
        """Does a run and then those that wait; returns the exit code, negative for a signal."""
        self.name = name
        with contextlib.suppress(BrokenPipeError):  # it died, as the end of its stdout says
            print(name, file=self.process.stdin, flush=True)
            for line in self.process.stdout:
                word, run, rest = (*line.rstrip("\n").split(" ", 2), "", "")[:3]
                if word not in STATES:
                    continue
                self.ready = True
                board.event(word, run, rest)
                if word in ("done", "failed"):
                    self.name = None
                    with contextlib.suppress(IndexError):
                        self.name = None if signals else waiting.popleft()
                    print(self.name or "", file=self.process.stdin, flush=True)
            self.process.stdin.close()
        code = self.process.wait()
        self.kill()  # what it started, where that is left
        self.process.stdout.close()
        return code

    def errors(self, lines: int) -> list[str]:
        self.stderr.seek(0)
        return self.stderr.read().decode(errors="replace").splitlines()[-lines:]

    def kill(self) -> None:
        """Ends it and the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def save_failure(out: Path, worker: Worker, code: int) -> None:
    """Writes failed.json of the run that a worker died in, with the last lines of output."""
    lines = [f"worker {ending(code)}", *(tail(out / worker.name) or worker.errors(TAIL))]
    (out / worker.name).mkdir(parents=True, exist_ok=True)
    failure = {"name": worker.name, "exit": code, "error": "\n".join(lines)}
    write_json(out / worker.name / "failed.json", failure)


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
    """The latest "step", "loss", "tokens_per_s", "step_tokens" of a run, those that are there."""
    latest: dict[str, float] = {}
    for line in last_lines(folder / "metrics.jsonl", 8192):
        with contextlib.suppress(ValueError, AttributeError, KeyError):  # a line that is cut
            row = json.loads(line)
            keys = ("step", "loss", "tokens_per_s")
            latest |= {key: row[key] for key in keys if row.get(key) is not None}
            latest |= {"step_tokens": row["tokens"] / row["step"]} if "tokens" in row else {}
    return latest


class Board:
    """Where each run stands, on stderr: a live table on a terminal, a few lines elsewhere."""

    def __init__(self, out: Path, names: list[str], steps: dict[str, int]):
        self.out, self.steps, self.states = out, steps, dict.fromkeys(names, "waiting")
        self.began = self.printed = time.monotonic()
        self.seen = {name: progress(out / name) for name in names}
        self.before = sum(seen.get("step", 0) for seen in self.seen.values())
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, auto_refresh=False)
        self.terminal = self.console.is_terminal

    def __enter__(self):
        if self.terminal:
            self.live.start()
        return self

    def __exit__(self, *exc):
        if self.terminal:
            self.draw()
            self.live.stop()

    def say(self, text: str) -> None:
        if self.terminal:
            self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def event(self, word: str, name: str, rest: str) -> None:
        """``word``: start, done, failed or stopped, as workers print them."""
        self.states[name], self.seen[name] = STATES[word], progress(self.out / name)
        if word == "failed":
            log = self.out / name / "log.txt"
            head = f"failed {name}: {rest}; the last lines of {log}:"
            self.say("\n    ".join([head, *tail(self.out / name)]))
        elif not self.terminal:
            after = f" after {eta(float(rest))}" if word == "done" and rest else ""
            self.say(f"{word} {name}{after}")

    def tick(self) -> None:
        """Shows what has changed, where it is time to."""
        if self.terminal:
            self.draw()
        elif time.monotonic() - self.printed >= LOG_EVERY:
            self.printed = time.monotonic()
            self.look()
            self.say(self.summary())

    def look(self) -> None:
        running = [name for name, state in self.states.items() if state == "running"]
        self.seen |= {name: progress(self.out / name) for name in running}

    def step(self, name: str) -> int:
        return self.steps[name] if self.states[name] == "done" else self.seen[name].get("step", 0)

    def summary(self) -> str:
        states, left = list(self.states.values()), self.left()
        order = ("done", "failed", "running", "waiting")
        counts = ", ".join(f"{n} {state}" for state in order if (n := states.count(state)))
        return f"{len(states)} runs: {counts}" + ("" if left is None else f"; {eta(left)} left")

    def left(self) -> float | None:
        """Seconds until all are done, at the rate of the steps since the start; None before the
        first step and after the last.
        """
        going = [name for name, state in self.states.items() if state in ("running", "waiting")]
        remaining = sum(self.steps[name] - self.step(name) for name in going)
        trained = sum(map(self.step, self.states)) - self.before
        if trained <= 0 or remaining <= 0:
            return None
        return remaining * (time.monotonic() - self.began) / trained

    def rows(self, most: int) -> list[tuple[str, ...]]:
        """(run, state, step, loss, rate, left) of at most so many runs: those that run and those
        that failed first.
        """
        order = ("running", "failed", "waiting", "done")
        rows = []
        for name in sorted(self.states, key=lambda name: order.index(self.states[name]))[:most]:
            seen, step, state = self.seen[name], self.step(name), self.states[name]
            rate = seen.get("tokens_per_s") if state == "running" else None
            left = ""
            if rate and "step_tokens" in seen:
                left = eta((self.steps[name] - step) * seen["step_tokens"] / rate)
            loss = f"{seen['loss']:.4f}" if "loss" in seen else ""
            speed = f"{rate:,.0f} tokens/s" if rate else ""
            rows.append((name, state, f"{step:,}/{self.steps[name]:,}", loss, speed, left))
        return rows

    def draw(self) -> None:
        self.look()
        table = Table(box=None, pad_edge=False)
        for column in ("run", "state", "step", "loss", "rate", "left"):
            side = "left" if column in ("run", "state") else "right"
            table.add_column(column, justify=side, no_wrap=True, overflow="ellipsis")
        styles = {"failed": "red", "done": "dim", "waiting": "dim"}
        for row in self.rows(max(1, self.console.height - 3)):
            table.add_row(*map(Text, row), style=styles.get(row[1], ""))
        self.live.update(Group(table, Text(self.summary())), refresh=True)
