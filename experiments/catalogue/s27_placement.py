"""Where should the STEM layers be: early, in the middle, late, or spread evenly?

STEM spreads a third of the layers evenly and never replaces layer 0; reviewers asked for the
comparison, nothing is published. The sign asked: is spread evenly at least as good as each cluster
of the same number of layers?

    python -m experiments.run s27 --scale=cpu
"""

from experiments import scales
from experiments.chart import loss_bars, means
from experiments.verdicts import sign_claim

IDS = ("S27",)
SOURCE = "STEM; reviewers"
PLACES = ("early", "middle", "late")


def sweep(scale):
    n = scales.layers(scale, "stem-350m")
    even = scales.stem(n)
    count = even["model.pattern"].split().count("stem")
    starts = {"early": 1, "middle": (n - count + 1) // 2, "late": n - count}
    rows = [
        scales.variant(
            f"stem-{place}",
            " ".join(
                "stem" if starts[place] <= i < starts[place] + count else "dense" for i in range(n)
            ),
        )
        for place in PLACES
    ]
    return scales.sweep(scale, [even, *rows], "stem-350m")


def analyse(runs):
    return {
        "rows": means(runs, "result.val_loss result.recall_acc result.reasoning_acc"),
        "figures": [loss_bars("Loss by place of the STEM layers", runs)],
    }


def claims(runs):
    return [
        sign_claim(
            f"STEM layers {place} in the stack are worse than spread evenly",
            "not in the papers (asked by reviewers)",
            runs,
            f"stem-{place}",
            "stem-third",
            1,
        )
        for place in PLACES
    ]
