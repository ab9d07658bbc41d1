"""From paired runs to verdicts: a claim is reproduced, contradicted, within noise or not run, never
a bare number.

Seeds are the unit of every test: a run of one seed is compared with another variant's run of the
*same* seed, which saw the same batches in the same order, and a difference counts as decided when
the 95% interval of its mean over the seeds (Student's t) leaves out zero.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable

from scipy import stats

from flexmemory.errors import UserError

VERDICTS = ("reproduced", "contradicted", "within noise", "not run")
OURS = "not in the papers"  # begins Claim.paper of a question that is ours
CONFIDENCE, POWER = 0.95, 0.8
ONE_SEED = "one seed decides nothing; run at least three"
MOST_SEEDS = 1000  # beyond that many no number of seeds is worth naming


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
    """Differences a - b of one number, seed by seed."""

    a: str
    b: str
    values: tuple[float, ...]  # one per seed that both have
    seeds: tuple[int, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def half_width(self, confidence: float = CONFIDENCE) -> float:
        """Half of the interval of the mean; infinite for one seed and where no spread has been
        seen, as counts that happen to agree have none.
        """
        n = len(self.values)
        return (
            float(stats.t.ppf((1 + confidence) / 2, n - 1)) * self.std / n**0.5
            if self.std
            else math.inf
        )

    def sign(self, confidence: float = CONFIDENCE) -> int:
        """1 or -1 where the interval of the mean leaves out zero, else 0."""
        return (
            0 if abs(self.mean) <= self.half_width(confidence) else int(math.copysign(1, self.mean))
        )

    def seeds_to_decide(self, confidence: float = CONFIDENCE) -> int | None:
        """With how many seeds a difference of this mean and spread would be decided four times out
        of five; None where no number up to 1,000 is enough, with one seed, or without a spread.
        """
        if not self.std:
            return None
        for n in range(2, MOST_SEEDS + 1):
            if (
                stats.t.ppf((1 + confidence) / 2, n - 1) + stats.t.ppf(POWER, n - 1)
            ) * self.std / n**0.5 < abs(self.mean):
                return n
        return None


def number(run: dict, path: str):
    """The value at a dotted path of a run, e.g. "result.val_loss"; None where there is none."""
    at = run
    for part in path.split("."):
        at = at.get(part) if isinstance(at, dict) else None
    return at


def by_variant(runs: list[dict]) -> dict[str, list[dict]]:
    """{variant: its runs by seed}, in the order of the sweep."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(run["variant"], []).append(run)
    return {
        variant: sorted(group, key=lambda run: run["seed"]) for variant, group in groups.items()
    }


def combined(
    runs: list[dict],
    variants: tuple[str, ...],
    f: Callable[..., float],
    path: str = "result.val_loss",
) -> Difference | None:
    """f(numbers of the variants) of every seed that all of them have, e.g. a difference of
    differences; None where there is none.
    """
    groups = {
        variant: {run["seed"]: run for run in by_variant(runs).get(variant, [])}
        for variant in variants
    }
    values, seeds = [], []
    for seed in sorted(set.intersection(*(set(group) for group in groups.values()))):
        members = [groups[variant][seed] for variant in variants]
        numbers = [number(run, path) for run in members]
        if None not in numbers:
            for run in members[1:]:
                check_paired(members[0], run)
            values.append(f(*numbers))
            seeds.append(seed)
    return Difference(variants[0], variants[-1], tuple(values), tuple(seeds)) if values else None


def minus(a: Difference | None, b: Difference | None) -> Difference | None:
    """a - b over the seeds that both have: whether one difference is larger than another, also
    where the two come from other data or steps.
    """
    if a is None or b is None:
        return None
    there = dict(zip(b.seeds, b.values, strict=True))
    both = [
        (value - there[seed], seed)
        for value, seed in zip(a.values, a.seeds, strict=True)
        if seed in there
    ]
    return (
        Difference(
            f"({a.a} − {a.b})",
            f"({b.a} − {b.b})",
            tuple(v for v, _ in both),
            tuple(s for _, s in both),
        )
        if both
        else None
    )


def within(
    runs: list[dict],
    variant: str,
    a: Callable[[dict], float | None],
    b: Callable[[dict], float | None] = lambda run: 0.0,
) -> Difference | None:
    """a(run) - b(run) of each run of a variant: two numbers of the same model, seed by seed. None
    where no run has both.
    """
    pairs = [(a(run), b(run), run["seed"]) for run in by_variant(runs).get(variant, [])]
    pairs = [(x - y, seed) for x, y, seed in pairs if x is not None and y is not None]
    return (
        Difference(variant, variant, tuple(v for v, _ in pairs), tuple(s for _, s in pairs))
        if pairs
        else None
    )


PAIRED = (
    "data.seq_len",
    "data.batch_size",
    "data.document_mask",
    "train.steps",
)  # what must be equal for two runs to see the same batches


def difference(
    runs: list[dict], a: str, b: str, path: str = "result.val_loss"
) -> Difference | None:
    """a minus b over the seeds that both variants have; None where there is none.

    Raises UserError when two runs to be paired did not see the same batches in the same order.
    """
    return combined(runs, (a, b), lambda x, y: x - y, path)


def check_paired(run: dict, other: dict) -> None:
    """Raises UserError unless both runs saw the same batches in the same order."""
    facts = [("data fingerprint", *(r["data_fingerprint"] for r in (run, other)))]
    facts += [
        (path, *(number(r["config"], path) for r in (run, other)))
        for path in (*PAIRED, "train.seed")
    ]
    for name, own, theirs in facts:
        if own != theirs:
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
    return signed(difference) + spread + (f" {unit}" if unit else "")


def not_run(text: str, paper: str, missing: str) -> Claim:
    """A claim whose inputs are missing; ``missing`` names them."""
    return Claim(text, paper, "", "not run", 0, missing)


def sign_claim(
    text: str,
    paper: str,
    runs: list[dict],
    a: str,
    b: str,
    expected: int,
    path: str = "result.val_loss",
    unit: str = "nat",
) -> Claim:
    """The claim that variant a lies above (expected 1) or below (-1) variant b in the number at
    ``path``.
    """
    return judge(
        text, paper, difference(runs, a, b, path), expected, unit, needs=f"{a} and {b} of one seed"
    )


def judge(
    text: str, paper: str, found: Difference | None, expected: int, unit: str = "nat", *, needs: str
) -> Claim:
    """The claim that the mean of a difference is positive (expected 1) or negative (-1); ``needs``
    says what is missing where there is none.
    """
    if found is None:
        return not_run(text, paper, f"needs {needs}")
    sign, n = found.sign(), len(found.values)
    if sign:
        interval = f"95% interval ± {found.half_width():.2g}"
        return Claim(
            text,
            paper,
            shown(found, unit),
            "reproduced" if sign == expected else "contradicted",
            n,
            interval,
        )
    return Claim(text, paper, shown(found, unit), "within noise", n, undecided(found, n))


def undecided(found: Difference, n: int) -> str:
    """How much more compute would decide."""
    if n == 1:
        return ONE_SEED
    if not found.std:
        return (
            "equal on every seed"
            if not found.mean
            else "the same on every seed: no spread to judge by"
        )
    needed = found.seeds_to_decide()
    return (
        f"not decided by {MOST_SEEDS:,} seeds at this spread"
        if needed is None
        else f"about {needed} seeds would decide it, {needed / n:.1f} times the compute"
    )


def order_claim(
    text: str,
    paper: str,
    runs: list[dict],
    variants: list[str],
    path: str = "result.val_loss",
    unit: str = "nat",
) -> Claim:
    """The claim that the number rises from variant to variant."""
    return steps_claim(
        text,
        paper,
        [
            (f"{a}→{b}", difference(runs, b, a, path))
            for a, b in zip(variants, variants[1:], strict=False)
        ],
        unit,
    )


def steps_claim(
    text: str, paper: str, steps: list[tuple[str, Difference | None]], unit: str = "nat"
) -> Claim:
    """The claim that every one of some differences is positive.

    Reproduced when each is decided at 95%, so that all hold with at least that confidence;
    contradicted when one is negative, decided at 95% over all of them (Bonferroni); else within
    noise.
    """
    if not steps or any(found is None for _, found in steps):
        missing = [name for name, found in steps if found is None]
        return not_run(
            text,
            paper,
            "needs both sides of " + (", ".join(missing) or "every step") + " of one seed",
        )
    n = min(len(found.values) for _, found in steps)
    ours = ", ".join(f"{name} {signed(found)}" for name, found in steps) + (
        f" {unit}" if unit else ""
    )
    strict = 1 - (1 - CONFIDENCE) / len(steps)
    if down := [name for name, found in steps if found.sign(strict) == -1]:
        return Claim(
            text, paper, ours, "contradicted", n, f"decided the other way: {', '.join(down)}"
        )
    still = [(name, found) for name, found in steps if found.sign() != 1]
    if not still:
        return Claim(text, paper, ours, "reproduced", n, f"every step decided at {CONFIDENCE:.0%}")
    if n == 1:
        return Claim(text, paper, ours, "within noise", n, ONE_SEED)
    wants = [(name, found.seeds_to_decide()) for name, found in still]
    detail = "; ".join(
        f"{name}: "
        + (
            f"about {seeds} seeds would decide it"
            if seeds
            else f"not decided by {MOST_SEEDS:,} seeds"
        )
        for name, seeds in wants
    )
    return Claim(text, paper, ours, "within noise", n, detail)


def limit_claim(
    text: str,
    paper: str,
    runs: list[dict],
    variant: str,
    value: Callable[[dict], float | None],
    limit: float,
    unit: str = "nat",
) -> Claim:
    """The claim that a number of a variant's models lies below a limit: decided when the interval
    of its mean over the seeds leaves the limit out.
    """
    judged = judge(
        text, paper, within(runs, variant, value, lambda run: limit), -1, unit, needs=variant
    )
    found = within(runs, variant, value)
    return (
        dataclasses.replace(judged, ours=shown(found, unit).removeprefix("+")) if found else judged
    )


def exact_claim(
    text: str,
    paper: str,
    ours: str,
    holds: bool | None,
    seeds: int,
    missing: str = "",
    detail: str = "",
) -> Claim:
    """A claim that needs no statistics: an equality bit by bit, arithmetic, a count in the data.
    ``holds`` None: its inputs are missing.
    """
    if holds is None:
        return not_run(text, paper, missing)
    return Claim(text, paper, ours, "reproduced" if holds else "contradicted", seeds, detail)


def mean_spread(values: list) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation) of the values that are there; None for too few."""
    values = [value for value in values if value is not None]
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
