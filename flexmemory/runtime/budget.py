"""What a RAM budget buys when decoding: hits, reads and waits.

The caches that serve (runtime/cache.py) run on tokens drawn independently with the corpus
frequencies. Every budget sees the same draws. A step looks up its unique tokens in the hot tier,
then what is missing there in the RAM tier, and reads the rest at once. The caches start as after an
endless text of such draws.

Real text repeats itself more than independent draws do, so lru and lfu do better on it."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable

import numpy as np

from flexmemory.errors import UserError
from flexmemory.runtime.cache import SlotCache, tier_caches

FRACTIONS = (0.01, 0.02, 0.05, 0.10, 0.25, 0.50, 1.0)
WAIT_SHARE = 0.05  # of a step, the longest wait of a good budget
TOKENS = 8192  # drawn, in at most STEPS steps: a hit rate's standard error is below a percent
STEPS = 4096


def probabilities(counts_V: np.ndarray) -> np.ndarray:
    """p_V float64 above 0, sum 1: the corpus frequencies. Ids that never occur share the
    probability that Good and Turing give to the unseen: (ids seen once, or 1) / (tokens + 1)."""
    counts_V = np.asarray(counts_V, np.float64)
    total, unseen = counts_V.sum(), np.count_nonzero(counts_V == 0)
    if not unseen:
        return counts_V / total
    share = max(1, np.count_nonzero(counts_V == 1)) / (total + 1)
    return np.where(counts_V == 0, share / unseen, counts_V * ((1 - share) / max(total, 1)))


@dataclasses.dataclass(frozen=True)
class Text:
    """Ids that a cache is asked for: ``steps``, each sorted and unique, and before them ``past``,
    the last use of each id, latest first, ``ago`` steps before the first step."""

    steps: list[np.ndarray]
    past: np.ndarray
    ago: np.ndarray

    @classmethod
    def draw(cls, counts_V: np.ndarray, batch: int) -> "Text":
        """Steps of ``batch`` tokens. The time since an id's last use is exponential."""
        rng, p_V = np.random.default_rng(0), probabilities(counts_V)
        steps = rng.choice(len(p_V), (min(STEPS, max(256, TOKENS // batch)), batch), p=p_V)
        ago_V = rng.exponential(1 / p_V)
        past = np.argsort(ago_V)
        return cls([np.unique(ids) for ids in steps], past, ago_V[past] // batch)

    def __len__(self) -> int:
        """Ids looked up."""
        return sum(map(len, self.steps))

    def missed(self, cache: SlotCache) -> "Text":
        """The ids that ``cache``, empty before, does not have when asked; it is offered them."""
        past, ago = self.past, self.ago
        if cache.policy == "window":
            starts = np.searchsorted(ago, np.arange(cache.window + 1))
            for start, stop in list(itertools.pairwise(starts))[::-1]:
                cache.lookup(past[start:stop])
                cache.admit(past[start:stop])
        else:
            cache.admit(past)
        if cache.policy == "static":  # what others keep they missed once, and passed it on
            absent = cache.peek(past) < 0
            past, ago = past[absent], ago[absent]
        steps = []
        for ids in self.steps:
            steps.append(ids[cache.lookup(ids) < 0])
            if cache.absent:
                cache.admit(steps[-1])
        return Text(steps, past, ago)


def hit_rate(text: Text, counts_V: np.ndarray, slots: int, policy: str) -> float:
    """The share of a text's ids that a single cache has when asked."""
    _, cache = tier_caches(len(counts_V), (0, slots), (policy, policy), counts_V)
    return 1 - len(text.missed(cache)) / len(text)


def read_us(latency_us: dict[int, float], reads: np.ndarray) -> np.ndarray:
    """Microseconds of one read of that many bundles: straight lines between the points, flat before
    them, the last line beyond."""
    points = np.asarray(sorted(latency_us))
    times = np.asarray([us for _, us in sorted(latency_us.items())], np.float64)
    slope = times[-1] / points[-1]
    if len(points) > 1:
        slope = max(0.0, (times[-1] - times[-2]) / (points[-1] - points[-2]))
    inside = np.interp(reads, points, times)
    return np.where(reads > 0, inside + slope * np.maximum(0, reads - points[-1]), 0.0)


def available_memory() -> tuple[int, int]:
    """(bytes of RAM that can be had now, bytes of the first device's own memory that are free, 0
    where it tells of none)."""
    import jax

    try:
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        raise UserError(
            "ram_available: this system does not say how much memory is free; give a budget"
        ) from None
    memory = jax.local_devices()[0].memory_stats() or {}
    free = memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0)
    return int(line.split()[1]) * 1024, max(0, free)


def try_budgets(
    counts_V: np.ndarray,
    bundle_bytes: int,
    *,
    batch: int,
    latency_us: dict[int, float],
    step_ms: float,
    overlap_ms: float,
    ram_available: int | None = None,
    hot_available: int | None = None,
    policy: str = "lfu",
    hot_policy: str = "static",
    window: int = 0,
) -> dict:
    """What RAM budgets of FRACTIONS of the table do, and the smallest that is good enough (to 1%),
    as JSON-able values.

    bundle_bytes: of one token's rows; latency_us: microseconds of one read of 1, 8, 64, … bundles;
    step_ms: of a step with all rows resident; overlap_ms: its part that runs while rows are read;
    ram_available, hot_available: bytes, by default what is free now. Good enough: waits at most
    WAIT_SHARE of step_ms. Where nothing is, ``proposal`` is the best that fits and its ``meets`` is
    False. Raises UserError for values that cannot be."""
    if ram_available is None or hot_available is None:
        ram, hot = available_memory()
        ram_available = ram if ram_available is None else ram_available
        hot_available = hot if hot_available is None else hot_available
    vocab = len(counts_V)
    counts = dict(batch=batch, bundle_bytes=bundle_bytes, counts_V=vocab)
    sizes = dict(ram_available=ram_available, hot_available=hot_available)
    for least, values in ((1, counts), (0, sizes | {"overlap_ms": overlap_ms})):
        for name, value in values.items():
            if not value >= least:
                raise UserError(f"{name}: {value} must be at least {least}")
    if not step_ms > 0:
        raise UserError(f"step_ms: {step_ms} must be above 0")
    times = latency_us.values()
    if not latency_us or min(latency_us) < 1 or not all(0 <= us < np.inf for us in times):
        raise UserError(f"latency_us: {latency_us} needs microseconds for 1 or more bundles a read")

    text = Text.draw(counts_V, batch)
    if window > len(text.steps):  # only its oldest steps leave it; the rest count as one
        ago = np.maximum(text.ago - (window - len(text.steps)), 0)
        text, window = dataclasses.replace(text, ago=ago), len(text.steps)
    hot_slots = min(vocab, hot_available // bundle_bytes)

    def caches(slots: int) -> tuple[SlotCache, SlotCache]:
        sizes, policies = (hot_slots, slots), (hot_policy, policy)
        return tier_caches(vocab, sizes, policies, counts_V, window)

    not_hot = text.missed(caches(0)[0])

    @functools.cache
    def row(slots: int) -> dict:
        cold = not_hot.missed(caches(slots)[1])
        reads_N = np.asarray([len(ids) for ids in cold.steps])
        read_ms_N = read_us(latency_us, reads_N) / 1000
        wait_ms = float(np.maximum(0, read_ms_N - overlap_ms).mean())
        misses = float(reads_N.mean())
        return {
            "ram_bytes": slots * bundle_bytes,
            "slots": slots,
            "fraction": slots / vocab,
            "fits": slots * bundle_bytes <= ram_available,
            "hot_hit_rate": 1 - len(not_hot) / len(text),
            "ram_hit_rate": (len(not_hot) - len(cold)) / len(text),
            "hit_rate": 1 - len(cold) / len(text),
            "misses_per_step": misses,
            "bytes_per_token": misses * bundle_bytes / batch,
            "read_ms": float(read_ms_N.mean()),
            "wait_ms": wait_ms,
            "wait_share": wait_ms / step_ms,
            "meets": wait_ms <= WAIT_SHARE * step_ms,
        }

    table = [row(max(1, round(part * vocab))) for part in FRACTIONS]
    low, high = -1, min(vocab, ram_available // bundle_bytes)
    if row(high)["meets"]:
        for slots in (0, *(tried["slots"] for tried in table)):
            if slots < high:
                low, high = (low, slots) if row(slots)["meets"] else (slots, high)
        while high - low > max(1, high // 100):
            middle = (low + high) // 2
            low, high = (low, middle) if row(middle)["meets"] else (middle, high)
    asked = dict(policy=policy, hot_policy=hot_policy, window=window, batch=batch, vocab=vocab)
    step = dict(bundle_bytes=bundle_bytes, step_ms=step_ms, overlap_ms=overlap_ms)
    return {
        **asked,
        **step,
        "latency_us": {str(n): float(us) for n, us in sorted(latency_us.items())},
        "unique_per_step": len(text) / len(text.steps),
        "hot_slots": hot_slots,
        "hot_bytes": hot_slots * bundle_bytes,
        "ram_available": ram_available,
        "budgets": table,
        "proposal": row(high),
    }


HEADINGS = (
    f"{'RAM':>10} {'of table':>9} {'hot hits':>9} {'RAM hits':>9} {'read/step':>10}"
    f" {'read/token':>11} {'read ms':>8} {'wait ms':>8} {'wait':>7}"
)


def table(result: dict) -> str:
    """:func:`try_budgets` for a terminal, without a newline at the end."""
    goal = f"waits of at most {WAIT_SHARE:.0%} of the step"
    lines = [
        f"policy {result['policy']}, batch {result['batch']}: {result['unique_per_step']:.1f}"
        f" different tokens a step of {result['step_ms']:g} ms, {result['overlap_ms']:g} ms of it"
        f" beside the read; hot rows {_size(result['hot_bytes'])}, RAM"
        f" {_size(result['ram_available'])} free",
        HEADINGS,
    ]
    lines += map(_line, result["budgets"])
    lines.append(
        f"proposed, the smallest with {goal}:"
        if result["proposal"]["meets"]
        else f"no budget that fits has {goal}; the best that fits:"
    )
    return "\n".join([*lines, _line(result["proposal"])])


def _line(row: dict) -> str:
    return (
        f"{_size(row['ram_bytes']):>10} {row['fraction']:>9.2%} {row['hot_hit_rate']:>9.2%}"
        f" {row['ram_hit_rate']:>9.2%} {row['misses_per_step']:>10.2f}"
        f" {_size(row['bytes_per_token']):>11} {row['read_ms']:>8.3f} {row['wait_ms']:>8.3f}"
        f" {row['wait_share']:>7.1%}" + ("" if row["fits"] else "  more than is free")
    )


def _size(count: float) -> str:
    power = 0
    while count >= 1024 and power < 4:
        count, power = count / 1024, power + 1
    return f"{count:.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def measure_latency(
    read: Callable[[np.ndarray], object],
    vocab: int,
    rng: np.random.Generator,
    *,
    sizes: tuple[int, ...] = (1, 8, 64),
    repeats: int = 9,
) -> dict[int, float]:
    """Median microseconds of read(ids_U) for that many uniformly drawn ids, sorted and unique,
    after one untimed read. Each read has new ids. Sizes above the vocabulary are left out."""

    def seconds(size: int) -> float:
        ids_U = np.sort(rng.choice(vocab, size, replace=False))
        began = time.perf_counter()
        read(ids_U)
        return time.perf_counter() - began

    fitting = [size for size in sizes if size <= vocab] or [vocab]
    seconds(fitting[0])
    return {n: float(np.median([seconds(n) for _ in range(repeats)])) * 1e6 for n in fitting}
