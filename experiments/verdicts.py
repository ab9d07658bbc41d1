"""From paired runs to verdicts: a claim is reproduced, contradicted, within noise or not run, never
a bare number.

Seeds are the unit of every test: a run of one seed is compared with another variant's run of the
*same* seed, which saw the same batches in the same order, and a difference counts as decided when
the 95% interval of its mean over the seeds (Student's t) leaves out zero.
"""

import dataclasses
import itertools
import math
import operator
import statistics
from collections.abc import Callable, Iterable

from scipy import stats

from flexmemory.errors import UserError

VERDICTS = ("reproduced", "contradicted", "within noise", "not run")
OURS = "not in the papers"  # begins Claim.paper of a question that is ours
CONFIDENCE, POWER = 0.95, 0.8
ONE_SEED = "one seed decides nothing; run at least three"
MOST_SEEDS = 1000  # beyond that many no number of seeds is worth naming
LOSS = "result.val_loss"
SIGNS = {">": 1, "<": -1}  # of a difference, as an order says it
# what must be equal for two runs to see the same batches
PAIRED = (
    "data_fingerprint",
    "config.data.seq_len",
    "config.data.batch_size",
    "config.data.document_mask",
    "config.train.steps",
    "config.train.seed",
)
Value = str | Callable[[dict], float | None]  # a number of a run: its dotted path, or a function


@dataclasses.dataclass(frozen=True)
class Claim:
    """One sentence of a paper, or of ours (see OURS), what the paper measured, what these runs did,
    and the verdict.
    """

    text: str
    paper: str
    ours: str
    verdict: str
    seeds: int
    detail: str = ""  # what is missing, or how much more would decide

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict {self.verdict!r} is none of {', '.join(VERDICTS)}")

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Differences of two numbers, {seed: difference}; {} where no seed has both."""

    by_seed: dict[int, float]

    @property
    def seeds(self) -> int:
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed.values())

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for one seed."""
        return statistics.stdev(self.by_seed.values()) if self.seeds > 1 else None

    def half_width(self, confidence: float = CONFIDENCE) -> float:
        """Half of the interval of the mean; infinite for one seed and where no spread has been
        seen, as counts that happen to agree have none.
        """
        if not self.std:
            return math.inf
        return float(quantile(confidence, self.seeds)) * self.std / self.seeds**0.5

    def sign(self, confidence: float = CONFIDENCE) -> int:
        """1 or -1 where the interval of the mean leaves out zero, else 0."""
        if abs(self.mean) <= self.half_width(confidence):
            return 0
        return int(math.copysign(1, self.mean))

    def seeds_to_decide(self) -> int | None:
        """With how many seeds a difference of this mean and spread would be decided four times out
        of five; None where no number up to 1,000 is enough, with one seed, or without a spread.
        """
        for n in range(2, MOST_SEEDS + 1) if self.std else ():
            needed = quantile(CONFIDENCE, n) + stats.t.ppf(POWER, n - 1)
            if needed * self.std / n**0.5 < abs(self.mean):
                return n
        return None


def quantile(confidence: float, seeds: int) -> float:
    """Standard errors that an interval of this confidence reaches to each side of its mean."""
    return stats.t.ppf((1 + confidence) / 2, seeds - 1)


def number(run: dict, value: Value):
    """The value at a dotted path of a run, e.g. "result.val_loss", or of a function of it; None
    where there is none.
    """
    if callable(value):
        return value(run)
    at = run
    for part in value.split("."):
        at = at.get(part) if isinstance(at, dict) else None
    return at


def entry(measured: str, key: str, **having) -> Callable[[dict], float | None]:
    """A function of a run: ``key`` of the first entry that has these values in a measure's list,
    e.g. entry("svd.points", "val_loss", cut=0.1).
    """

    def of(run):
        entries = number(run, f"measures.{measured}") or []
        return next((found[key] for found in entries if having.items() <= found.items()), None)

    return of


def at(curve: Callable[[dict], Iterable], x) -> Callable[[dict], float | None]:
    """A function of a run: y at x of its curve, whose points are (x, y)."""
    return lambda run: dict(curve(run)).get(x)


def by_variant(runs: list[dict]) -> dict[str, list[dict]]:
    """{variant: its runs by seed}, in the order of the sweep."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(run["variant"], []).append(run)
    return {
        variant: sorted(group, key=lambda run: run["seed"]) for variant, group in groups.items()
    }


def combined(
    runs: list[dict], sides: Iterable[tuple[str, Value]], f: Callable[..., float]
) -> Difference:
    """f(numbers) of every seed for which each side, (variant, number of its run), has one.

    Raises UserError when two runs to be paired did not see the same batches in the same order.
    """
    variants, values = zip(*sides, strict=True)
    groups = [{run["seed"]: run for run in runs if run["variant"] == name} for name in variants]
    found = {}
    for seed in sorted(set.intersection(*map(set, groups))):
        members = [group[seed] for group in groups]
        numbers = list(map(number, members, values))
        if None not in numbers:
            for run in members[1:]:
                check_paired(members[0], run)
            found[seed] = f(*numbers)
    return Difference(found)


def difference(runs: list[dict], a: str, b: str, value: Value = LOSS) -> Difference:
    """Variant a minus variant b in one number."""
    return combined(runs, [(a, value), (b, value)], operator.sub)


def within(runs: list[dict], variant: str, a: Value, b: Value) -> Difference:
    """a - b of each run of a variant: two numbers of the same model."""
    return combined(runs, [(variant, a), (variant, b)], operator.sub)


def minus(a: Difference, b: Difference) -> Difference:
    """a - b over the seeds that both have: whether one difference is larger than another, also
    where the two come from other data or steps.
    """
    both = [seed for seed in a.by_seed if seed in b.by_seed]
    return Difference({seed: a.by_seed[seed] - b.by_seed[seed] for seed in both})


def check_paired(run: dict, other: dict) -> None:
    """Raises UserError unless both runs saw the same batches in the same order."""
    for path in PAIRED:
        own, theirs = number(run, path), number(other, path)
        if own != theirs:
            name = path.removeprefix("config.").replace("_fingerprint", " fingerprint")
            raise UserError(
                f"{run['name']} and {other['name']} cannot be compared: {name} is {own!r} and"
                f" {theirs!r}, so they saw other batches; give both the same, or compare means over"
                " different data by name"
            )


def places(difference: Difference) -> int:
    """Decimals that show two digits of the spread, or of the mean where there is none."""
    size = difference.std or abs(difference.mean)
    return min(9, max(0, 1 - math.floor(math.log10(size)))) if size else 0


def signed(difference: Difference) -> str:
    return f"{difference.mean:+.{places(difference)}f}".replace("-", "−")


def shown(difference: Difference, unit: str) -> str:
    """+0.031 ± 0.014 nat (mean and sample standard deviation over the seeds)."""
    spread = "" if difference.std is None else f" ± {difference.std:.{places(difference)}f}"
    return f"{signed(difference)}{spread} {unit}".rstrip()


def not_run(text: str, paper: str, missing: str) -> Claim:
    """A claim whose inputs are missing; ``missing`` names them."""
    return Claim(text, paper, "", "not run", 0, missing)


def judge(
    text: str, paper: str, found: Difference, expected: int, unit: str = "nat", *, needs: str
) -> Claim:
    """The claim that the mean of a difference is positive (expected 1) or negative (-1); ``needs``
    says what is missing where there is none.
    """
    if not found.seeds:
        return not_run(text, paper, f"needs {needs}")
    if sign := found.sign():
        verdict = "reproduced" if sign == expected else "contradicted"
        detail = f"95% interval ± {found.half_width():.2g}"
    else:
        verdict, detail = "within noise", undecided(found)
    return Claim(text, paper, shown(found, unit), verdict, found.seeds, detail)


def undecided(found: Difference) -> str:
    """How much more compute would decide."""
    if found.seeds == 1:
        return ONE_SEED
    if not found.mean and not found.std:
        return "equal on every seed"
    if not found.std:
        return "the same on every seed: no spread to judge by"
    needed = found.seeds_to_decide()
    if needed is None:
        return f"not decided by {MOST_SEEDS:,} seeds at this spread"
    return f"about {needed} seeds would decide it"


def order_claim(
    text: str, paper: str, runs: list[dict], order: str, value: Value = LOSS, unit: str = "nat"
) -> Claim:
    """The claim that an order of variants holds in one number: "memoryllm > dense", or "a < b < c"
    with every step upwards.
    """
    variants, signs = order.split()[::2], order.split()[1::2]
    if len(variants) == 2:
        found, needs = difference(runs, *variants, value), " and ".join(variants)
        return judge(text, paper, found, SIGNS[signs[0]], unit, needs=f"{needs} of one seed")
    if set(signs) != {"<"}:
        raise ValueError(f"order {order!r}: write three or more variants upwards, a < b < c")
    pairs = itertools.pairwise(variants)
    steps = {f"{a}→{b}": difference(runs, b, a, value) for a, b in pairs}
    return steps_claim(text, paper, steps, unit)


def order_claims(
    runs: list[dict], asked: dict[str, tuple[str, str]], value: Value = LOSS, unit: str = "nat"
) -> list[Claim]:
    """A claim for each {order: (text, paper)}, as :func:`order_claim` reads it."""
    return [
        order_claim(text, paper, runs, order, value, unit) for order, (text, paper) in asked.items()
    ]


def steps_claim(text: str, paper: str, steps: dict[str, Difference], unit: str = "nat") -> Claim:
    """The claim that every one of some differences, by name, is positive.

    Reproduced when each is decided at 95%, so that all hold with at least that confidence;
    contradicted when one is negative, decided at 95% over all of them (Bonferroni); else within
    noise.
    """
    missing = [name for name, found in steps.items() if not found.seeds]
    if missing or not steps:
        sides = ", ".join(missing) or "every step"
        return not_run(text, paper, f"needs both sides of {sides} of one seed")
    n = min(found.seeds for found in steps.values())
    ours = ", ".join(f"{name} {signed(found)}" for name, found in steps.items())
    strict = 1 - (1 - CONFIDENCE) / len(steps)
    down = [name for name, found in steps.items() if found.sign(strict) == -1]
    still = {name: found for name, found in steps.items() if found.sign() != 1}
    if down:
        verdict, detail = "contradicted", f"decided the other way: {', '.join(down)}"
    elif not still:
        verdict, detail = "reproduced", f"every step decided at {CONFIDENCE:.0%}"
    elif n == 1:
        verdict, detail = "within noise", ONE_SEED
    else:
        verdict = "within noise"
        detail = "; ".join(f"{name}: {undecided(found)}" for name, found in still.items())
    return Claim(text, paper, f"{ours} {unit}".rstrip(), verdict, n, detail)


def limit_claim(
    text: str,
    paper: str,
    runs: list[dict],
    variant: str,
    value: Value,
    limit: float,
    unit: str = "nat",
) -> Claim:
    """The claim that a number of a variant's models lies below a limit: decided when the interval
    of its mean over the seeds leaves the limit out.
    """
    found = combined(runs, [(variant, value)], float)
    over = Difference({seed: each - limit for seed, each in found.by_seed.items()})
    judged = judge(text, paper, over, -1, unit, needs=variant)
    if not found.seeds:
        return judged
    return dataclasses.replace(judged, ours=shown(found, unit).removeprefix("+"))


def exact_claim(
    text: str, paper: str, ours: str, holds: bool, seeds: int, detail: str = ""
) -> Claim:
    """A claim that needs no statistics: an equality bit by bit, arithmetic, a count in the data."""
    return Claim(text, paper, ours, "reproduced" if holds else "contradicted", seeds, detail)


def mean_spread(values: Iterable) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation) of the values that are there; None for too few."""
    values = [value for value in values if value is not None]
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def means_at(pairs: Iterable[tuple[float, float | None]]) -> tuple[tuple[float, float, float], ...]:
    """(x, mean, sample standard deviation or 0) of the numbers at each x, for a figure's series."""
    at: dict[float, list[float]] = {}
    for x, y in pairs:
        if y is not None:
            at.setdefault(x, []).append(y)
    means = {x: mean_spread(values) for x, values in sorted(at.items())}
    return tuple((x, mean, spread or 0.0) for x, (mean, spread) in means.items())
