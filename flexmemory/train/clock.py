"""Where the time of a run goes, how much work it did, and how far that is from the peak."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax

from flexmemory.models.accounting import train_flops_per_token

# dense bfloat16 peak of one device in FLOP/s by the vendor's data sheet; the first name that is a
# part of jax's device_kind counts
PEAKS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 61.5e12,
}
PARTS = ("setup", "compile", "step", "data_wait", "rows_wait", "eval", "checkpoint", "profile")


def peak_flops() -> float | None:
    """FLOP/s that the devices of the mesh in force can do, or one device without a mesh; None for a
    device that is not in the table."""
    kind, mesh = jax.devices()[0].device_kind, jax.sharding.get_mesh()
    count = 1 if mesh.empty else mesh.size
    return next((peak * count for name, peak in PEAKS.items() if name in kind), None)


class Clock:
    """Gives every moment since its creation to one of PARTS: "step", except inside a span of
    another name. Of nested spans the inner one counts."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now, self._last, self._part = now, now(), "step"
        self._seconds = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def span(self, part: str) -> Iterator[None]:
        outer = self._turn(part)
        try:
            yield
        finally:
            self._turn(outer)

    def seconds(self) -> dict[str, float]:
        """Seconds of each part until now; they add up to the time since the clock was created."""
        self._turn(self._part)
        return dict(self._seconds)

    def working(self) -> float:
        """Seconds of the training loop proper: steps, and waiting for data and for rows."""
        seconds = self.seconds()
        return seconds["step"] + seconds["data_wait"] + seconds["rows_wait"]

    def _turn(self, part: str) -> str:
        """Ends the current part, which it returns, and begins another."""
        now, ended = self._now(), self._part
        self._seconds[ended] += now - self._last
        self._last, self._part = now, part
        return ended


class Work:
    """Tokens and rows of a run, and what they come to per second: since the last reading, and over
    all starts.

    account: numbers of models/accounting. counts: of earlier starts, from their checkpoint; keys
    other than those of ``self.counts`` (an older program's) are dropped."""

    def __init__(self, clock: Clock, account: dict, tokens_per_step: int, counts: dict[str, float]):
        self.clock, self.account, self.tokens_per_step = clock, account, tokens_per_step
        self.peak = peak_flops()
        # tokens and seconds of timed steps; rows of all steps
        names = ("timed_tokens", "timed_seconds", "rows")
        self.counts = {name: counts.get(name, 0.0) for name in names}
        # (step, working seconds, rows) at the last reading
        self._since: tuple[int, float, float] | None = None

    def interrupt(self) -> None:
        """Before a step that must not be timed, such as the first after a compilation: timing
        starts again after that step."""
        self._since = None

    def count(self, step: int, rows: int) -> None:
        """Step number ``step`` has ended; it computed ``rows`` rows."""
        self.counts["rows"] += rows if self.account["row_bytes_per_token"] else 0
        if self._since is None:
            self._since = (step, self.clock.working(), self.counts["rows"])

    def rates(self, step: int) -> dict:
        """{"tokens_per_s", "mfu", "rows_per_token"} of the steps since the last reading; {} where
        there is none."""
        if self._since is None or step == self._since[0]:
            return {}
        since, began, rows = self._since
        now, tokens = self.clock.working(), (step - since) * self.tokens_per_step
        self._since = (step, now, self.counts["rows"])
        self.counts["timed_tokens"] += tokens
        self.counts["timed_seconds"] += now - began
        rate, per_token = tokens / (now - began), (self.counts["rows"] - rows) / tokens
        return {
            "tokens_per_s": rate,
            "mfu": self._mfu(rate, per_token),
            "rows_per_token": per_token,
        }

    def totals(self, steps: int) -> dict:
        """{"train_tokens_per_s", "mfu", "rows_per_token", "flops"} of the whole run of ``steps``
        steps; None for what was not measured."""
        counts, tokens = self.counts, steps * self.tokens_per_step
        rate = counts["timed_tokens"] / counts["timed_seconds"] if counts["timed_seconds"] else None
        rows = counts["rows"] / tokens if steps else None
        return {
            "train_tokens_per_s": rate,
            "mfu": self._mfu(rate, rows) if rate and rows is not None else None,
            "rows_per_token": rows,
            "flops": None if rows is None else flops(self.account, tokens, rows),
        }

    def _mfu(self, tokens_per_s: float, rows_per_token: float) -> float | None:
        """Model FLOPs done over the devices' bfloat16 peak; None where the peak is not known."""
        if self.peak is None:
            return None
        return tokens_per_s * train_flops_per_token(self.account, rows_per_token) / self.peak


def flops(account: dict, tokens: int, rows_per_token: float) -> dict:
    """FLOPs of ``tokens`` trained tokens.

    counted: forward and backward, as MFU counts them. saved: how many more they would be if every
    token computed its own rows; saved_share: as a share of that larger number."""
    counted = tokens * train_flops_per_token(account, rows_per_token)
    naive = tokens * train_flops_per_token(account, 1.0)
    return {"counted": counted, "saved": naive - counted, "saved_share": 1 - counted / naive}
