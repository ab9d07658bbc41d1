"""One progress line for long work, on stderr: a live bar on a terminal where rich is installed
(pip install 'flexmemory[experiments]'), else a line about every 20 seconds.
"""

import sys
import time
from typing import Any


def eta(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def live_bar() -> Any:
    """rich's progress bar on stderr, or None without rich."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
    except ImportError:
        return None
    columns = TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[note]}")
    return Progress(*columns, console=Console(stderr=True))


class ProgressLine:
    """``with ProgressLine("train", total, "steps") as line: line.update(done, "loss 3.2")``.
    ``total`` may be 0: unknown.
    """

    def __init__(
        self,
        label: str,
        total: float,
        unit: str,
        enabled: bool = True,
        every: float = 20.0,
        start: float = 0,
    ):
        self.label, self.total, self.unit, self.every = label, total, unit, every
        self.done = self.first = start
        self.text = ""
        self.enabled = enabled
        self.began = self.printed = time.perf_counter()
        self.bar = live_bar() if enabled and sys.stderr.isatty() else None

    def __enter__(self) -> "ProgressLine":
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(
                self.label, total=self.total or None, completed=int(self.done), note=""
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
        elif self.enabled and self.printed > self.began:  # not only short work
            self._line()

    def note(self) -> str:
        spent = time.perf_counter() - self.began
        rate = (self.done - self.first) / spent if spent else 0.0
        parts = [
            (
                f"{self.done:,.0f}/{self.total:,.0f}"
                if self.total
                else f"{self.done:,.0f} {self.unit}"
            ),
            f"{rate:,.1f} {self.unit}/s",
        ]
        if self.total and rate:
            parts.append(f"ETA {eta((self.total - self.done) / rate)}")
        return "  ".join(parts + [self.text] if self.text else parts)

    def update(self, done: float, text: str | None = None) -> None:
        """``done`` is the absolute count so far; ``text`` stays until another is given."""
        self.done, self.text = done, self.text if text is None else text
        if self.bar:
            self.bar.update(self.task, completed=done, note=self.note())
        elif self.enabled and time.perf_counter() - self.printed >= self.every:
            self._line()

    def _line(self) -> None:
        self.printed = time.perf_counter()
        print(f"{self.label}: {self.note()}", file=sys.stderr, flush=True)
