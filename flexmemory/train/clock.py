"""Where the time of a run goes, how much work it did in it, and how far from the device's peak that
is.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import jax

from flexmemory.models.accounting import train_flops_per_token

# dense bfloat16 peak of one device in FLOP/s, by a part of jax's device_kind, the first that fits;
# vendor data sheets
PEAK_FLOPS = (
    ("B200", 2.25e15),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("TPU v6", 918e12),
    ("TPU v5p", 459e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
    ("TPU v3", 61.5e12),
)
PARTS = ("setup", "compile", "step", "data_wait", "rows_wait", "eval", "checkpoint", "profile")


def peak_flops() -> float | None:
    """Peak of the devices of the mesh in force, or of one device without a mesh; None when the
    device is not in the table.
    """
    kind, mesh = jax.devices()[0].device_kind, jax.sharding.get_mesh()
    return next(
        (peak * (1 if mesh.empty else mesh.size) for name, peak in PEAK_FLOPS if name in kind), None
    )


class Clock:
    """Gives every moment since its making to one of PARTS: "step", but for the spans of another
    name. In nested spans the inner one counts.
    """

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
        """Seconds of each part until now; they add up to the time since the clock was made."""
        self._turn(self._part)
        return dict(self._seconds)

    def working(self) -> float:
        """Seconds of the training loop proper, with its waiting for data and for rows; compilation,
        evaluation, checkpoints and the like left out.
        """
        seconds = self.seconds()
        return seconds["step"] + seconds["data_wait"] + seconds["rows_wait"]

    def _turn(self, part: str) -> str:
        """Ends the part under way, which it returns, and begins another."""
        now, ended = self._now(), self._part
        self._seconds[ended] += now - self._last
        self._last, self._part = now, part
        return ended


class Work:
    """Tokens, rows and FLOPs of a run, and what they come to per second: since the last reading,
    and over all starts.

    account: numbers of models/accounting. counts: those of an earlier start, from its checkpoint.
    """

    def __init__(self, clock: Clock, account: dict, tokens_per_step: int, counts: dict[str, float]):
        self.clock, self.account, self.tokens_per_step, self.peak = (
            clock,
            account,
            tokens_per_step,
            peak_flops(),
        )
        # tokens and seconds of timed steps; rows and XLA's FLOPs (see train/compiled.py) of all
        # steps
        self.counts = {
            "timed_tokens": 0.0,
            "timed_seconds": 0.0,
            "rows": 0.0,
            "xla_flops": 0.0,
        } | counts
        self._since = None  # (step, working seconds, rows) at the last reading

    def interrupt(self) -> None:
        """Before a step that must not be timed, as the first after a compilation: the next step
        that is counted starts the time.
        """
        self._since = None

    def count(self, step: int, rows: int, xla_flops: float | None) -> None:
        """Step number ``step`` has ended."""
        self.counts["rows"] += rows if self.account["row_bytes_per_token"] else 0
        self.counts["xla_flops"] += math.nan if xla_flops is None else xla_flops
        if self._since is None:
            self._since = (step, self.clock.working(), self.counts["rows"])

    def rates(self, step: int) -> dict:
        """{"tokens_per_s", "mfu", "rows_per_token"} of the steps since the last reading, none where
        there is none.
        """
        since, began, rows = self._since
        if step == since:
            return {}
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
        steps; None for what was not measured.
        """
        counts, tokens = self.counts, steps * self.tokens_per_step
        rate = counts["timed_tokens"] / counts["timed_seconds"] if counts["timed_seconds"] else None
        rows = counts["rows"] / tokens if steps else None
        return {
            "train_tokens_per_s": rate,
            "mfu": self._mfu(rate, rows) if rate else None,
            "rows_per_token": rows,
            "flops": flops(self.account, tokens, rows, counts["xla_flops"]) if steps else None,
        }

    def _mfu(self, tokens_per_s: float, rows_per_token: float) -> float | None:
        """Model FLOPs really done over the devices' bfloat16 peak; None on a device without a known
        peak.
        """
        if self.peak is None:
            return None
        return tokens_per_s * train_flops_per_token(self.account, rows_per_token) / self.peak


def flops(account: dict, tokens: int, rows_per_token: float, xla: float | None) -> dict:
    """FLOPs of ``tokens`` trained tokens.

    counted: forward and backward as MFU counts them. saved: how many more it would be if every
    token computed rows of its own; saved_share: as a share of that larger number. xla: as given,
    XLA's count; xla_over_counted: the ratio. Both None where it is unknown (None or NaN).
    """
    counted, naive = (
        tokens * train_flops_per_token(account, rows_per_token),
        tokens * train_flops_per_token(account, 1.0),
    )
    xla = None if xla is None or math.isnan(xla) else xla
    return {
        "counted": counted,
        "saved": naive - counted,
        "saved_share": 1 - counted / naive,
        "xla": xla,
        "xla_over_counted": xla and xla / counted,
    }
