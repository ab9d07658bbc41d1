"""Numbers over the layers of a model: their mean, and claims on one third against another."""

from collections.abc import Callable

from experiments.chart import third
from experiments.verdicts import SIGNS, Claim, judge, mean_spread, number, within

THIRDS = ("first", "middle", "last")


def layer_mean(measure: str, path: str) -> Callable[[dict], float | None]:
    """A function of a run: the mean over its layers of a measure's number at a dotted path."""

    def of(run):
        layers = number(run, f"measures.{measure}.layers") or []
        return mean_spread(number(layer, path) for layer in layers)[0]

    return of


def thirds_claim(
    text: str,
    paper: str,
    runs: list[dict],
    variant: str,
    order: str,
    measured: str,
    unit: str = "nat",
    needs: str = "at least three layers",
) -> Claim:
    """The claim that a measure's number, e.g. "spectra.effective_rank", has an order such as
    "first > middle" between its means over thirds of a variant's layers.
    """
    a, sign, b = order.split()
    measure, key = measured.split(".")
    found = within(runs, variant, *(third(measure, key, THIRDS.index(word)) for word in (a, b)))
    return judge(text, paper, found, SIGNS[sign], unit, needs=f"{variant} with {needs}")
