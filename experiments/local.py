"""Runs on this machine: one worker process per device, fed one run at a time, and a table of how
far they are.

A worker that is idle ends when the launcher does, because its stdin does. A busy one gets SIGINT on
Linux when the launcher dies, however it dies, and stops at a checkpoint; elsewhere it finishes its
run and ends then.
"""

import contextlib
import dataclasses
import glob
import importlib.metadata
import importlib.util
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
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
POLL = 0.2  # seconds in which a signal is noticed at the latest
MOST = 8  # workers on a CPU where nobody says how many
EVERY = 20.0  # seconds between lines of progress where there is no terminal
ASKED = (
    -signal.SIGINT,
    -signal.SIGTERM,
    128 + signal.SIGINT,
    128 + signal.SIGTERM,
)  # how a worker ends that was asked to

# What a worker process does before it becomes the worker: arguments are the launcher's process, the
# cores, the command. SIGUSR2, which SLURM sends to every process of a job, is for the launcher
# alone; a shell's background job would ignore SIGINT.
BEFORE = """
import ctypes, os, signal, sys
launcher, cores, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG
    if os.getppid() != launcher:
        sys.exit("the launcher is gone")
if cores:
    os.sched_setaffinity(0, map(int, cores.split(",")))
os.execvp(command[0], command)
"""


def run_local(
    out: Path,
    names: list[str],
    steps: dict[str, int],
    devices: int | None = None,
    worker: tuple[str, ...] = WORKER,
    interval: float = 0.5,
) -> list[str]:
    """Does the runs, as many at a time as there are devices; returns the names that failed, whose
    failed.json says why.

    steps: training steps of each run, for the table. devices: how many to use, of :func:`places`.
    interval: seconds between two looks at the runs' metrics. The first Ctrl-C or SIGTERM lets every
    worker stop at a checkpoint, a second one kills them; either way KeyboardInterrupt is raised
    when the last has ended. Raises UserError where no worker gets as far as its first run; runs
    that were going on elsewhere are finished before.
    """
    out, free, waiting, refused, told = Path(out), deque(places(devices)), deque(names), "", 0
    with contextlib.ExitStack() as closing:
        asked = closing.enter_context(noted((signal.SIGINT, signal.SIGTERM)))
        board = closing.enter_context(Board(out, names, steps, interval))
        workers = closing.enter_context(selectors.DefaultSelector())
        closing.callback(
            lambda: [one.close() for one in all_of(workers)]
        )  # none is left but after an error in here
        while all_of(workers) or (waiting and free and not asked):
            while waiting and free and not asked:
                one = Worker(free.popleft(), out, worker)
                workers.register(one.process.stdout, selectors.EVENT_READ, one)
                one.feed(waiting.popleft())
            if told < len(asked):
                told += 1
                board.say(
                    "stopping at a checkpoint; again to stop at once"
                    if told == 1
                    else "stopping at once"
                )
                for one in all_of(workers):
                    one.process.send_signal(signal.SIGINT) if told == 1 else one.kill()
            gone = [one for one in all_of(workers) if one.process.poll() is not None]
            ready = [key.data for key, _ in workers.select(POLL)]
            for one in all_of(workers):
                for word, name, rest in one.words() if one in ready else ():
                    one.begun = True
                    if word in ("done", "failed"):
                        one.feed(waiting.popleft() if waiting and not asked else None)
                    board.event(word, name, rest)
                one.ended = one.ended or (
                    one in gone and one not in ready
                )  # what it started may hold its stdout open
                if not one.ended:
                    continue
                workers.unregister(one.process.stdout)
                code = one.close()
                if code in ASKED and not asked:
                    time.sleep(1)  # a signal to all processes of a job comes to them in no order
                if one.name is None or asked:
                    free.append(one.place)
                elif one.begun:
                    bury(out, one, code)
                    board.event("failed", one.name, f"worker {ending(code)}")
                    free.append(one.place)
                # its device or its installation is bad, not the run: the device gets no other
                else:
                    refused = (
                        f"{one.place.name}, {ending(code)}: {(one.errors(1) or ['no message'])[0]}"
                    )
                    board.say(f"no worker starts on {refused}")
                    waiting.appendleft(one.name)
            board.tick()
    if asked:
        raise KeyboardInterrupt
    if waiting:
        raise UserError(f"no worker starts; the last one, on {refused}")
    return [name for name in names if board.states[name] == "failed"]


def all_of(workers: selectors.BaseSelector) -> list["Worker"]:
    return [key.data for key in workers.get_map().values()]


@contextlib.contextmanager
def noted(signals: tuple[int, ...]) -> Iterator[list[int]]:
    """Those of ``signals`` received so far, which do nothing else meanwhile."""
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: asked.append(number)) for number in signals
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a worker runs: a name for people, the environment that leads to the device, and the
    cores it keeps to (empty: all).
    """

    name: str
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    cores: tuple[int, ...] = ()


def places(devices: int | None = None) -> list[Place]:
    """One place per worker: every GPU; or the TPU chips together; or the CPU, by default in shares
    of one core (of more where there are more than MOST), so that no run's number of threads depends
    on how many run beside it. ``devices`` takes the first GPUs, or cuts the cores into so many
    shares. Raises UserError for more than there are.
    """
    found = accelerators()
    if not found:
        cores = (
            sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        )  # Linux alone pins
        most = len(cores) or os.cpu_count() or 1
        count = devices or min(most, MOST)
        found = (
            [
                Place(
                    f"CPU {i}",
                    {},
                    tuple(cores[i * len(cores) // count : (i + 1) * len(cores) // count]),
                )
                for i in range(count)
            ]
            if count <= most
            else []
        )
    else:
        count, most = devices or len(found), len(found)
    if not 1 <= count <= most:
        raise UserError(f"--devices: {devices} is outside 1..{most}, what there is on this machine")
    return found[:count]


def accelerators() -> list[Place]:
    """The places of GPUs or TPU chips, where JAX on this machine would use them. JAX is not asked:
    it would take the devices from the workers.
    """
    wanted = os.environ.get("JAX_PLATFORMS", "").partition(",")[0]
    plugins = {entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")}
    if wanted in ("cuda", "gpu") or (
        not wanted and any(name.startswith("xla_cuda") for name in plugins)
    ):
        return [Place(f"GPU {gpu}", {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus()]
    if wanted == "tpu" or (
        not wanted
        and importlib.util.find_spec("libtpu")
        and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    ):
        return [Place("TPU")]
    return []


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES says, or else the numbers of the NVIDIA GPUs of this machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for word in visible.split(",") if (gpu := word.strip()) and gpu != "-1"]
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, check=False
        ).stdout
        return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]
    return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]


class Worker:
    """A worker process on its place; ``name`` is the run it was given last and has not ended,
    ``begun`` says whether it ever said a word.
    """

    def __init__(self, place: Place, out: Path, command: tuple[str, ...]):
        self.place, self.name, self.begun, self.ended, self.rest = place, None, False, False, b""
        self.stderr = (
            tempfile.TemporaryFile()
        )  # what it says outside of runs, such as why it cannot start
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        # in a session of its own, so that Ctrl-C comes to the launcher alone
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                "-c",
                BEFORE,
                str(os.getpid()),
                ",".join(map(str, place.cores)),
                *command,
                str(out),
                "-",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            env=os.environ | place.env | {"PYTHONPATH": path},
            start_new_session=True,
        )

    def feed(self, name: str | None) -> None:
        """Gives it a run, or with None the end of its input."""
        self.name = name
        with contextlib.suppress(
            BrokenPipeError
        ):  # it is dead, which is seen when it is heard next
            if name is None:
                self.process.stdin.close()
            else:
                self.process.stdin.write(name.encode() + b"\n")
                self.process.stdin.flush()

    def words(self) -> list[tuple[str, str, str]]:
        """(word, run, rest) of the lines that have come; to be asked when there is something to
        read. Sets ``ended`` at the end of them.
        """
        content = os.read(self.process.stdout.fileno(), 65536)
        self.ended = not content
        *lines, self.rest = (self.rest + content).split(b"\n")
        parts = [line.decode(errors="replace").split(" ", 2) for line in lines]
        return [
            (*part, "", "")[:3]
            for part in parts
            if part[0] in ("start", "done", "failed", "stopped")
        ]

    def errors(self, lines: int) -> list[str]:
        self.stderr.seek(0)
        return self.stderr.read().decode(errors="replace").splitlines()[-lines:]

    def kill(self) -> None:
        """Ends it and the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> int:
        """Its exit code, negative for a signal; one that is still there is killed."""
        if not self.ended:
            self.kill()
        code = self.process.wait()
        self.kill()  # what it started, where that is left
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        return code


def bury(out: Path, one: Worker, code: int) -> None:
    """Writes what a worker could not: failed.json of the run it died in, with the last lines that
    were said.
    """
    folder = out / one.name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "failed.json",
        {
            "name": one.name,
            "exit": code,
            "error": "\n".join([f"worker {ending(code)}", *(tail(folder) or one.errors(TAIL))]),
        },
    )


def ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def tail(folder: Path) -> list[str]:
    """The last lines of a run's log."""
    try:
        with open(folder / "log.txt", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 200 * TAIL * 4))
            return file.read().decode(errors="replace").splitlines()[-TAIL:]
    except FileNotFoundError:
        return []


def progress(folder: Path) -> dict[str, float]:
    """The latest "step", "loss", "tokens_per_s" and "step_tokens" of a run, from the end of its
    metrics.jsonl; those that are there.
    """
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines:
        try:
            row = json.loads(line)
            found |= {
                key: row[key]
                for key in ("step", "loss", "tokens_per_s")
                if row.get(key) is not None
            }
            found |= {"step_tokens": row["tokens"] / row["step"]} if "tokens" in row else {}
        except (
            ValueError,
            AttributeError,
            KeyError,
        ):  # cut: the first line by us, the last by its writer
            continue
    return found


class Board:
    """Where each run stands, on stderr: a live table on a terminal, few lines elsewhere."""

    def __init__(self, out: Path, names: list[str], steps: dict[str, int], interval: float):
        self.out, self.steps, self.interval = out, steps, interval
        self.states = dict.fromkeys(names, "waiting")
        self.began = self.looked = self.printed = time.monotonic()
        self.seen = {name: progress(out / name) for name in names}
        self.first = {name: seen.get("step", 0) for name, seen in self.seen.items()}
        self.console = Console(stderr=True)
        self.live = (
            Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        )

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exc):
        if self.live:
            self._draw()
            self.live.stop()

    def say(self, text: str) -> None:
        if self.live:
            self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def event(self, word: str, name: str, rest: str) -> None:
        """``word``: start, done, failed or stopped, as workers say them."""
        self.states[name] = {"start": "running", "stopped": "waiting"}.get(word, word)
        self.seen[name] = progress(self.out / name)
        if word == "failed":
            self.say(
                "\n".join(
                    [
                        f"failed {name}: {rest}; the last lines of {self.out / name / 'log.txt'}:",
                        *(f"    {line}" for line in tail(self.out / name)),
                    ]
                )
            )
        elif not self.live:
            self.say(
                f"{word} {name}" + (f" after {eta(float(rest))}" if word == "done" and rest else "")
            )

    def tick(self) -> None:
        """Shows what has changed, where it is time to."""
        now = time.monotonic()
        if self.live and now - self.looked >= self.interval:
            self.looked = now
            self._draw()
        elif not self.live and now - self.printed >= EVERY:
            self.printed = now
            self._look()
            self.say(self.summary())

    def summary(self) -> str:
        counts = [
            f"{count} {state}"
            for state in ("done", "failed", "running", "waiting")
            if (count := list(self.states.values()).count(state))
        ]
        return f"{len(self.states)} runs: {', '.join(counts)}" + (
            f"; {eta(left)} left" if (left := self.left()) is not None else ""
        )

    def left(self) -> float | None:
        """Seconds until all are done, were each step to take what the steps so far took; None
        before the first or after the last.
        """
        open_steps = sum(
            self.steps[name] - self.seen[name].get("step", 0)
            for name, state in self.states.items()
            if state in ("running", "waiting")
        )
        made = sum(
            self.steps[name] if state == "done" else self.seen[name].get("step", 0)
            for name, state in self.states.items()
        ) - sum(self.first.values())
        return (
            open_steps * (time.monotonic() - self.began) / made
            if made > 0 and open_steps > 0
            else None
        )

    def rows(self, most: int) -> list[tuple[str, ...]]:
        """(run, state, step, loss, rate, left) of at most so many runs: those that run and those
        that failed first.
        """
        order = sorted(
            self.states,
            key=lambda name: ("running", "failed", "waiting", "done").index(self.states[name]),
        )
        made = []
        for name in order[:most]:
            seen, state = self.seen[name], self.states[name]
            rate, step = (
                seen.get("tokens_per_s"),
                self.steps[name] if state == "done" else seen.get("step", 0),
            )
            seconds = (
                (self.steps[name] - step) * seen["step_tokens"] / rate
                if state == "running" and rate and "step_tokens" in seen
                else None
            )
            made.append(
                (
                    name,
                    state,
                    f"{step:,}/{self.steps[name]:,}",
                    f"{seen['loss']:.4f}" if "loss" in seen else "",
                    f"{rate:,.0f} tokens/s" if rate and state == "running" else "",
                    "" if seconds is None else eta(seconds),
                )
            )
        return made

    def _look(self) -> None:
        for name, state in self.states.items():
            if state == "running":
                self.seen[name] = progress(self.out / name)

    def _draw(self) -> None:
        self._look()
        table = Table(box=None, pad_edge=False)
        for column, right in (
            ("run", False),
            ("state", False),
            ("step", True),
            ("loss", True),
            ("rate", True),
            ("left", True),
        ):
            table.add_column(
                column, justify="right" if right else "left", no_wrap=True, overflow="ellipsis"
            )
        for row in self.rows(max(1, self.console.height - 3)):
            table.add_row(
                *map(Text, row),
                style={"failed": "red", "done": "dim", "waiting": "dim"}.get(row[1], ""),
            )
        self.live.update(Group(table, Text(self.summary())), refresh=True)
