"""Where should the STEM layers be: early, in the middle, late, or spread evenly?

STEM spreads a third of the layers evenly and never replaces layer 0; reviewers asked for the
comparison, nothing is published. The sign asked: is spread evenly at least as good as each cluster
of the same number of layers?

    python -m experiments.run s27 --scale=cpu
"""

from experiments import scales
from experiments.chart import loss_bars, means
from experiments.verdicts import order_claim

IDS = ("S27",)
SOURCE = "STEM; reviewers"
PLACES = ("early", "middle", "late")


def sweep(scale):
    n = scales.layers(scale, "stem-350m")
    even = scales.model("stem-third", n)
    count = even["model.pattern"].split().count("stem")
    rows = [even]
    for place, start in zip(PLACES, (1, (n - count + 1) // 2, n - count), strict=True):
        kinds = ["stem" if start <= i < start + count else "dense" for i in range(n)]
        rows.append(scales.variant(f"stem-{place}", " ".join(kinds)))
    return scales.sweep(scale, rows, "stem-350m")


def analyse(runs):
    rows = means(runs, "result.val_loss result.recall_acc result.reasoning_acc")
    return {"rows": rows, "figures": [loss_bars("Loss by place of the STEM layers", runs)]}


def claims(runs):
    text = "STEM layers {} in the stack are worse than spread evenly"
    paper = "not in the papers (asked by reviewers)"
    return [
        order_claim(text.format(place), paper, runs, f"stem-{place} > stem-third")
        for place in PLACES
    ]
