"""From paired runs to verdicts: a claim is reproduced, contradicted, within noise or not run, never a bare number.

Seeds are the unit of every test: a run of one seed is compared with another variant's run of the *same* seed, which saw the same
batches in the same order, and a difference counts as decided when the 95% interval of its mean over the seeds (Student's t) leaves out zero.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable

from scipy import stats

from flexmemory.errors import UserError

VERDICTS = ("reproduced", "contradicted", "within noise", "not run")
CONFIDENCE = 0.95
MOST_SEEDS = 1000  # beyond that many no number of seeds is worth naming


@dataclasses.dataclass(frozen=True)
class Claim:
    """One sentence of a paper, what the paper measured, what these runs did, and the verdict."""

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
        """Half of the interval of the mean; infinite for one seed."""
        n = len(self.values)
        return math.inf if n < 2 else float(stats.t.ppf((1 + confidence) / 2, n - 1)) * self.std / n**0.5

    def sign(self, confidence: float = CONFIDENCE) -> int:
        """1 or -1 where the interval of the mean leaves out zero, else 0."""
        return 0 if abs(self.mean) <= self.half_width(confidence) else int(math.copysign(1, self.mean))

    def seeds_to_decide(self, confidence: float = CONFIDENCE) -> int | None:
        """How many seeds would decide a difference of this mean and spread; None where no number up to 1,000 would, or with one seed."""
        if self.std is None:
            return None
        for n in range(2, MOST_SEEDS + 1):
            if stats.t.ppf((1 + confidence) / 2, n - 1) * self.std / n**0.5 < abs(self.mean):
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
    made: dict[str, list[dict]] = {}
    for run in runs:
        made.setdefault(run["variant"], []).append(run)
    return {variant: sorted(group, key=lambda run: run["seed"]) for variant, group in made.items()}


def minus(a: Difference | None, b: Difference | None) -> Difference | None:
    """a - b over the seeds that both have: whether one difference is larger than another."""
    if a is None or b is None:
        return None
    there = dict(zip(b.seeds, b.values, strict=True))
    both = [(value - there[seed], seed) for value, seed in zip(a.values, a.seeds, strict=True) if seed in there]
    return Difference(f"({a.a} − {a.b})", f"({b.a} − {b.b})", tuple(v for v, _ in both), tuple(s for _, s in both)) if both else None


def within(
    runs: list[dict],
    variant: str,
    a: Callable[[dict], float | None],
    b: Callable[[dict], float | None] = lambda run: 0.0,
    names: tuple[str, str] = ("", ""),
) -> Difference | None:
    """a(run) - b(run) of each run of a variant: two numbers of the same model, seed by seed. None where no run has both."""
    pairs = [(a(run), b(run), run["seed"]) for run in by_variant(runs).get(variant, [])]
    pairs = [(x - y, seed) for x, y, seed in pairs if x is not None and y is not None]
    return Difference(*names, tuple(v for v, _ in pairs), tuple(s for _, s in pairs)) if pairs else None


PAIRED = ("data.seq_len", "data.batch_size", "data.document_mask", "train.steps")  # what must be equal for two runs to see the same batches


def difference(runs: list[dict], a: str, b: str, path: str = "result.val_loss") -> Difference | None:
    """a minus b over the seeds that both variants have; None where there is none.

    Raises UserError when two runs to be paired did not see the same batches in the same order.
    """
    groups = by_variant(runs)
    others = {run["seed"]: run for run in groups.get(b, [])}
    values, seeds = [], []
    for run in groups.get(a, []):
        other = others.get(run["seed"])
        if other is None or number(run, path) is None or number(other, path) is None:
            continue
        check_paired(run, other)
        values.append(number(run, path) - number(other, path))
        seeds.append(run["seed"])
    return Difference(a, b, tuple(values), tuple(seeds)) if values else None


def check_paired(run: dict, other: dict) -> None:
    """Raises UserError unless both runs saw the same batches in the same order."""
    facts = [("data fingerprint", *(r["data_fingerprint"] for r in (run, other)))]
    facts += [(path, *(number(r["config"], path) for r in (run, other))) for path in (*PAIRED, "train.seed")]
    for name, mine, theirs in facts:
        if mine != theirs:
            raise UserError(
                f"{run['name']} and {other['name']} cannot be compared: {name} is {mine!r} and {theirs!r}, so they saw other batches; "
                "give both the same, or compare means over different data by name"
            )


def signed(value: float, unit: str) -> str:
    return f"{value:+.4f}".replace("-", "−") + (f" {unit}" if unit else "")


def shown(difference: Difference, unit: str) -> str:
    """+0.031 ± 0.004 nat (mean and sample standard deviation over the seeds)."""
    spread = "" if difference.std is None else f" ± {difference.std:.4f}"
    return f"{difference.mean:+.4f}".replace("-", "−") + spread + (f" {unit}" if unit else "")


def not_run(text: str, paper: str, missing: str) -> Claim:
    """A claim whose inputs are missing; ``missing`` names them."""
    return Claim(text, paper, "", "not run", 0, missing)


def sign_claim(text: str, paper: str, runs: list[dict], a: str, b: str, expected: int, path: str = "result.val_loss", unit: str = "nat") -> Claim:
    """The claim that variant a lies above (expected 1) or below (-1) variant b in the number at ``path``."""
    found = difference(runs, a, b, path)
    if found is None:
        return not_run(text, paper, f"needs {a} and {b} of one seed")
    return judge(text, paper, found, expected, unit)


def judge(text: str, paper: str, found: Difference, expected: int, unit: str = "nat") -> Claim:
    sign, n = found.sign(), len(found.values)
    if sign:
        interval = f"95% interval ± {found.half_width():.4f}"
        return Claim(text, paper, shown(found, unit), "reproduced" if sign == expected else "contradicted", n, interval)
    return Claim(text, paper, shown(found, unit), "within noise", n, undecided(found, n))


def undecided(found: Difference, n: int) -> str:
    """How much more compute would decide."""
    if n == 1:
        return "one seed decides nothing; run at least three"
    needed = found.seeds_to_decide()
    return (
        f"not decided by {MOST_SEEDS:,} seeds at this spread"
        if needed is None
        else f"about {needed} seeds would decide, {needed / n:.1f} times the compute"
    )


def order_claim(text: str, paper: str, runs: list[dict], variants: list[str], path: str = "result.val_loss", unit: str = "nat") -> Claim:
    """The claim that the number rises from variant to variant: every neighbouring pair, Bonferroni-corrected.

    Reproduced when all steps up are decided, contradicted when one step down is, else within noise.
    """
    steps = [(a, b, difference(runs, b, a, path)) for a, b in zip(variants, variants[1:], strict=False)]
    if missing := [f"{a} and {b}" for a, b, found in steps if found is None]:
        return not_run(text, paper, "needs " + ", ".join(missing) + " of one seed")
    confidence = 1 - (1 - CONFIDENCE) / len(steps)
    signs = [found.sign(confidence) for _, _, found in steps]
    n = min(len(found.values) for _, _, found in steps)
    ours = ", ".join(f"{a}→{b} {signed(found.mean, '')}" for a, b, found in steps) + (f" {unit}" if unit else "")
    if all(sign == 1 for sign in signs):
        return Claim(text, paper, ours, "reproduced", n, f"every step decided at {confidence:.1%}")
    if -1 in signs:
        down = ", ".join(f"{a}→{b}" for (a, b, _), sign in zip(steps, signs, strict=True) if sign == -1)
        return Claim(text, paper, ours, "contradicted", n, f"decided the other way: {down}")
    open_steps = [(a, b, found) for (a, b, found), sign in zip(steps, signs, strict=True) if sign == 0]
    if n == 1:
        return Claim(text, paper, ours, "within noise", n, "one seed decides nothing; run at least three")
    wants = [(f"{a}→{b}", found.seeds_to_decide(confidence)) for a, b, found in open_steps]
    detail = "; ".join(f"{name}: " + (f"about {seeds} seeds would decide" if seeds else f"not by {MOST_SEEDS:,} seeds") for name, seeds in wants)
    return Claim(text, paper, ours, "within noise", n, detail)


def exact_claim(text: str, paper: str, ours: str, holds: bool | None, seeds: int, missing: str = "") -> Claim:
    """A claim that needs no statistics: equalities, counts and arithmetic. ``holds`` None: its inputs are missing."""
    if holds is None:
        return not_run(text, paper, missing)
    return Claim(text, paper, ours, "reproduced" if holds else "contradicted", seeds)


def mean_spread(values: list) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation) of the values that are there; None where there are too few."""
    values = [value for value in values if value is not None]
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
