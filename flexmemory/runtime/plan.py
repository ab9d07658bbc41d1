"""What a RAM budget buys: expected hits, reads and waits of decoding, from how often each token
occurs in the corpus.

The model: tokens are drawn independently with the corpus frequencies, and a step of B sequences
looks up its unique tokens in the hot tier, then what is missing there in the RAM tier, then reads
the rest at once. Ids that never occur share, in equal parts, the probability that Good and Turing
give to the unseen: (ids seen once, or 1) / (tokens + 1).

static, lfu  A tier of K slots holds the K likeliest tokens (what lfu settles on); the RAM tier
holds the hot rows as well.
lru          Che's approximation: a token is present if it was used in the last T tokens, where T
             makes the expected number of such tokens K. The RAM tier sees the misses of the hot
             tier, taken as independent at the rate they have.
window       As lru with T at most ``window`` steps of B tokens.

Real text repeats itself more than independent draws do, so lru and lfu do better on it than the
plan says. A step that needs more rows than a tier has slots is outside the approximation.
"""

import time
from collections.abc import Callable

import numpy as np

from flexmemory.errors import UserError, nearest
from flexmemory.runtime.cache import POLICIES

FRACTIONS = (0.01, 0.02, 0.05, 0.10, 0.25, 0.50, 1.0)
WAIT_SHARE = 0.05  # of the step, what a good plan waits at most


def probabilities(counts_V: np.ndarray) -> np.ndarray:
    """p_V float64 above 0, sum 1: the corpus frequencies with the smoothing above."""
    counts_V = np.asarray(counts_V, np.float64)
    total, unseen = counts_V.sum(), np.count_nonzero(counts_V == 0)
    if not unseen:
        return counts_V / total
    share = max(1, np.count_nonzero(counts_V == 1)) / (total + 1)
    return np.where(counts_V == 0, share / unseen, counts_V * ((1 - share) / max(total, 1)))


def hit_rates(
    counts_V: np.ndarray,
    hot_slots: int,
    ram_slots: int,
    policy: str,
    *,
    batch: int = 1,
    window: int = 0,
) -> tuple[float, float]:
    """(hot, ram): the shares of looked-up ids that each tier answers; the rest is read. What
    SlotCache counts, expected.
    """
    tiers = _Tiers(counts_V, hot_slots, policy, batch, window)
    return tiers.hot, tiers.ram(ram_slots)


class _Tiers:
    """The expected hits for any RAM slots, given the rest. Equal counts are computed once: values u
    with N_U tokens each.
    """

    def __init__(self, counts_V: np.ndarray, hot_slots: int, policy: str, batch: int, window: int):
        p_U, self.n_U = np.unique(probabilities(counts_V), return_counts=True)
        self.p_U, self.n_U = p_U[::-1], self.n_U[::-1]
        self.static, self.vocab, self.hot_slots = (
            policy in ("static", "lfu"),
            len(counts_V),
            hot_slots,
        )
        with np.errstate(divide="ignore"):
            rate_U = np.minimum(
                -np.log1p(-np.minimum(self.p_U, 1)), 700
            )  # (1 - p)^T = exp(-rate T), T in tokens
        self.limit = window * batch if policy == "window" else np.inf
        self.looked_U = -np.expm1(-rate_U * batch)  # P(a step looks it up)
        self.unique = float(self.n_U @ self.looked_U)
        if self.static:
            self.hot = self._likeliest(hot_slots)
            return
        self.rate_U = rate_U
        self.hot_age = self._age(rate_U, hot_slots)
        self.hot_U = -np.expm1(-rate_U * self.hot_age)
        self.hot = self._share(self.hot_U)

    def ram(self, slots: int) -> float:
        if self.static:
            return max(0.0, self._likeliest(slots) - self.hot)
        missed_U = self.rate_U * (1 - self.hot_U)
        age = self._age(missed_U, slots)
        if age == np.inf:
            return 1 - self.hot
        return self._share((1 - self.hot_U) * -np.expm1(-missed_U * max(0.0, age - self.hot_age)))

    def _share(self, hit_U: np.ndarray) -> float:
        return float(self.n_U @ (self.looked_U * hit_U)) / self.unique

    def _likeliest(self, slots: int) -> float:
        held_U = np.clip(slots - (np.cumsum(self.n_U) - self.n_U), 0, self.n_U)
        return self._share(held_U / self.n_U)

    def _age(self, rate_U: np.ndarray, slots: int) -> float:
        """T at which ``slots`` tokens are expected to have been used in the last T, by halving; inf
        where all fit.
        """
        if slots >= self.vocab:
            return self.limit
        low, high = 0.0, 1.0
        while high < self.limit and self.n_U @ -np.expm1(-rate_U * high) < slots and high < 1e300:
            high *= 2
        for _ in range(36):  # far closer than the approximation is
            middle = (low + high) / 2
            low, high = (
                (middle, high) if self.n_U @ -np.expm1(-rate_U * middle) < slots else (low, middle)
            )
        return min(low, self.limit)


def read_us(latency_us: dict[int, float], reads: np.ndarray) -> np.ndarray:
    """Microseconds of one read of that many bundles: straight lines between the points, flat before
    them, the last line beyond.
    """
    points = np.asarray(sorted(latency_us))
    times = np.asarray([latency_us[n] for n in points], np.float64)
    slope = (
        max(0.0, (times[-1] - times[-2]) / (points[-1] - points[-2]))
        if len(points) > 1
        else times[-1] / points[-1]
    )
    reads = np.asarray(reads, np.float64)
    return np.where(
        reads > 0, np.interp(reads, points, times) + slope * np.maximum(0, reads - points[-1]), 0.0
    )


def available_memory() -> tuple[int, int]:
    """(bytes of RAM that can be had now, bytes of the first device's own memory that are free, 0
    where it tells of none).
    """
    import jax

    try:
        with open("/proc/meminfo") as file:
            ram = next(
                int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")
            )
    except (OSError, StopIteration):
        raise UserError(
            "ram_available: this system does not say how much memory is free; give a budget"
        ) from None
    memory = jax.local_devices()[0].memory_stats() or {}
    return ram, max(0, memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0))


def plan(
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
    window: int = 0,
    hit_target: float | None = None,
) -> dict:
    """The table over RAM budgets and the smallest budget that is good enough, as JSON-able values.

    bundle_bytes: of one token's rows; latency_us: microseconds of one read of 1, 8, 64, … bundles;
    step_ms: of a step with all rows resident; overlap_ms: its part that runs while rows are read;
    ram_available, hot_available: bytes, by default what is free now. Good enough: waits at most
    WAIT_SHARE of step_ms, or with hit_target that share of ids found in a tier. ``proposal`` is the
    best that fits where nothing good enough does (``meets`` is False there). Raises UserError for
    values that cannot be.
    """
    if ram_available is None or hot_available is None:
        ram, hot = available_memory()
        ram_available, hot_available = (
            ram if ram_available is None else ram_available,
            hot if hot_available is None else hot_available,
        )
    vocab = len(counts_V)
    if policy not in POLICIES:
        raise UserError(f"policy: {policy!r}, {nearest(policy, POLICIES)}")
    if (window < 1) if policy == "window" else window:
        raise UserError(
            f"window: {window} with policy {policy!r}; give 1 or more steps with 'window' and none"
            " otherwise"
        )
    for name, value, least in (
        ("batch", batch, 1),
        ("bundle_bytes", bundle_bytes, 1),
        ("counts", vocab, 1),
        ("ram_available", ram_available, 0),
        ("hot_available", hot_available, 0),
        ("overlap_ms", overlap_ms, 0),
    ):
        if not value >= least:
            raise UserError(f"{name}: {value} must be at least {least}")
    if not step_ms > 0:
        raise UserError(f"step_ms: {step_ms} must be above 0")
    if (
        not latency_us
        or min(latency_us) < 1
        or not all(0 <= us < np.inf for us in latency_us.values())
    ):
        raise UserError(f"latency_us: {latency_us} needs microseconds for 1 or more bundles a read")
    if hit_target is not None and not 0 <= hit_target <= 1:
        raise UserError(f"hit_target: {hit_target} must be in 0..1")

    hot_slots = min(vocab, hot_available // bundle_bytes)
    tiers = _Tiers(counts_V, hot_slots, policy, batch, window)

    def row(slots: int) -> dict:
        ram = tiers.ram(slots)
        rate = min(1.0, tiers.hot + ram)
        misses = tiers.unique * (1 - rate)
        read_ms, wait_ms = _read_and_wait(misses, latency_us, overlap_ms)
        return {
            "ram_bytes": slots * bundle_bytes,
            "slots": slots,
            "fraction": slots / vocab,
            "fits": slots * bundle_bytes <= ram_available,
            "hot_hit_rate": tiers.hot,
            "ram_hit_rate": ram,
            "hit_rate": rate,
            "misses_per_step": misses,
            "bytes_per_token": misses * bundle_bytes / batch,
            "read_ms": read_ms,
            "wait_ms": wait_ms,
            "wait_share": wait_ms / step_ms,
            "meets": (
                rate >= hit_target if hit_target is not None else wait_ms <= WAIT_SHARE * step_ms
            ),
        }

    low, high = (
        -1,
        min(vocab, ram_available // bundle_bytes),
    )  # the smallest that meets, if the largest does
    if row(high)["meets"]:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if row(middle)["meets"] else (middle, high)
    return {
        "policy": policy,
        "window": window,
        "batch": batch,
        "vocab": vocab,
        "bundle_bytes": bundle_bytes,
        "step_ms": step_ms,
        "overlap_ms": overlap_ms,
        "latency_us": {str(n): float(us) for n, us in sorted(latency_us.items())},
        "unique_per_step": tiers.unique,
        "hot_slots": hot_slots,
        "hot_bytes": hot_slots * bundle_bytes,
        "ram_available": ram_available,
        "hit_target": hit_target,
        "budgets": [row(max(1, round(part * vocab))) for part in FRACTIONS],
        "proposal": row(high),
    }


def _read_and_wait(
    misses: float, latency_us: dict[int, float], overlap_ms: float
) -> tuple[float, float]:
    """Expected milliseconds of a step's read and of the part that the overlap does not hide.

    The number of misses is taken as a Poisson number of that mean: a step without any waits for
    nothing.
    """
    if misses <= 0:
        return 0.0, 0.0
    spread = 10 * np.sqrt(misses) + 10
    n = np.arange(max(0, int(misses - spread)), int(misses + spread) + 1)
    with np.errstate(divide="ignore"):
        logs = np.cumsum(np.log(misses / np.maximum(n, 1)))
    weight = np.exp(logs - logs.max())
    weight /= weight.sum()
    ms = read_us(latency_us, n) / 1000
    return float(weight @ ms), float(weight @ np.maximum(0, ms - overlap_ms))


def table(plan: dict) -> str:
    """The plan for a terminal, without a newline at the end."""
    goal = (
        f"{plan['hit_target']:.1%} of ids found"
        if plan["hit_target"] is not None
        else f"waits of at most {WAIT_SHARE:.0%} of the step"
    )
    heads = (
        ("of table", 9),
        ("hot hits", 9),
        ("RAM hits", 9),
        ("read/step", 10),
        ("read/token", 11),
        ("read ms", 8),
        ("wait ms", 8),
        ("wait", 7),
    )
    lines = [
        (
            f"policy {plan['policy']}, batch {plan['batch']}: {plan['unique_per_step']:.1f}"
            f" different tokens a step of {plan['step_ms']:g} ms, {plan['overlap_ms']:g} ms of it"
            f" beside the read; hot rows {_size(plan['hot_bytes'])}, RAM"
            f" {_size(plan['ram_available'])} free"
        ),
        f"{'RAM':>10} " + " ".join(f"{head:>{width}}" for head, width in heads),
    ]
    for row in [*plan["budgets"], plan["proposal"]]:
        if row is plan["proposal"]:
            lines.append(
                f"proposed, the smallest with {goal}:"
                if row["meets"]
                else f"no budget that fits has {goal}; the best that fits:"
            )
        lines.append(
            f"{_size(row['ram_bytes']):>10} {row['fraction']:>9.2%} {row['hot_hit_rate']:>9.2%}"
            f" {row['ram_hit_rate']:>9.2%} {row['misses_per_step']:>10.2f}"
            f" {_size(row['bytes_per_token']):>11} {row['read_ms']:>8.3f} {row['wait_ms']:>8.3f}"
            f" {row['wait_share']:>7.1%}" + ("" if row["fits"] else "  more than is free")
        )
    return "\n".join(lines)


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
    after one untimed read.

    Each read has new ids. Whether they come from the disk or from the page cache is the caller's
    matter. Sizes above the vocabulary are left out.
    """
    sizes = [size for size in sizes if size <= vocab] or [vocab]
    read(np.sort(rng.choice(vocab, sizes[0], replace=False)))
    found = {}
    for size in sizes:
        spent = []
        for _ in range(repeats):
            ids_U = np.sort(rng.choice(vocab, size, replace=False))
            began = time.perf_counter()
            read(ids_U)
            spent.append(time.perf_counter() - began)
        found[size] = float(np.median(spent)) * 1e6
    return found
