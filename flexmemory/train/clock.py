"""Where the time of a run goes, and how far from the device's peak it ran."""

import contextlib
import time
from collections import defaultdict

import jax

# dense bfloat16 peak of one device in FLOP/s, by a part of jax's device_kind, the first that fits; vendor data sheets
PEAK_FLOPS = (
    ("B200", 2.25e15), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("A100", 312e12),
    ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12), ("TPU v6", 918e12), ("TPU v5p", 459e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12),
    ("TPU v5", 459e12), ("TPU v4", 275e12), ("TPU v3", 61.5e12),
)


def peak_flops() -> float | None:
    """Peak of one local device, None when the device is not in the table."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAK_FLOPS if name in kind), None)


class Clock:
    """Adds up seconds by name: setup, compile, data_wait, eval, checkpoint. What is left of the whole is training."""

    def __init__(self):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.began = time.perf_counter()

    @contextlib.contextmanager
    def span(self, name: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def working(self) -> float:
        """Seconds of the training loop proper: everything but compilation, evaluation and checkpoints."""
        return self.elapsed() - sum(self.seconds[name] for name in ("setup", "compile", "eval", "checkpoint"))
