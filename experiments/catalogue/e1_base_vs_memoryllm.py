"""Is MemoryLLM worse than a dense model at equal total parameters, and better at equal active ones?

MemoryLLM, Table 2 (C4 perplexity after 50B tokens): at 737M total, dense 19.730 and MemoryLLM
22.079, so +0.112 nat for MemoryLLM; at about equal active parameters, dense 265M 23.190 and
MemoryLLM (245M of 737M) 22.079, so -0.049 nat. Parameters leave embedding and head out. The paper
ran one seed. Expected: both signs.

    python -m experiments.run e1 --scale=cpu

At smaller scales two dense models have MemoryLLM's active parameters: as many layers of a d_model
that is solved (budgets.py), as in the paper, which also narrows embedding and head (they are not
counted, and weigh much in small models); and a third of the layers at equal width, whose embedding
and head are the same. Cost at cpu scale: four runs a seed, about five minutes on one core; at paper
scale three of the paper's four models (not MemoryLLM 1B).
"""

from experiments import scales
from experiments.chart import loss_bars, means
from experiments.verdicts import order_claims

IDS = ("E1",)
SOURCE = "MemoryLLM Table 2"
CLAIMS = {
    "memoryllm > dense": (
        "MemoryLLM is worse than a dense model of equal total parameters",
        "+0.112 nat (C4, 737M, 50B tokens)",
    ),
    "memoryllm < dense-active": (
        "MemoryLLM is better than a dense model of equal active parameters, narrower",
        "−0.049 nat (C4, 245M against 265M)",
    ),
    "memoryllm < dense-third": (
        "MemoryLLM is better than a dense model of equal active parameters, a third as deep",
        "−0.049 nat (C4, 245M against 265M)",
    ),
}


def sweep(scale):
    if scale == "paper":
        active = scales.variant("dense-active", "dense*24")
        return [
            *scales.sweep(scale, "dense memoryllm", "memoryllm-750m"),
            *scales.sweep(scale, [active], "memoryllm-250m"),
        ]
    n = scales.layers(scale)
    smaller = scales.variant("dense-active", f"dense*{n}")
    smaller |= scales.equal("active", "model.d_model", f"memoryllm*{n}")
    shallow = scales.variant("dense-third", f"dense*{n // 3}")
    variants = [*scales.models("dense memoryllm", n), smaller, shallow]
    return scales.sweep(scale, variants, numbers=scales.MORE_SEEDS)


def analyse(runs):
    rows = means(
        runs,
        "account.total account.active account.active_all result.val_loss",
        bits_per_byte="result.val_bits_per_byte",
    )
    figure = loss_bars("Loss at equal total and equal active parameters", runs)
    return {"rows": rows, "figures": [figure]}


def claims(runs):
    return order_claims(runs, CLAIMS)
