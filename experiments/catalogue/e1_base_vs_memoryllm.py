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
from experiments.verdicts import sign_claim

IDS = ("E1",)
SOURCE = "MemoryLLM Table 2"


def sweep(scale):
    if scale == "paper":
        return scales.sweep(
            scale, [scales.dense(24), scales.memoryllm(24)], "memoryllm-750m"
        ) + scales.sweep(scale, [scales.dense(24) | {"name": "dense-active"}], "memoryllm-250m")
    n = scales.layers(scale)
    shallow = scales.dense(n // 3) | {"name": "dense-third"}
    smaller = scales.dense(n) | {
        "name": "dense-active",
        "budget": {
            "mode": "active",
            "knob": "model.d_model",
            "like": {"model.pattern": f"memoryllm*{n}"},
        },
    }
    return scales.sweep(
        scale, [scales.dense(n), scales.memoryllm(n), smaller, shallow], numbers=scales.MORE_SEEDS
    )


def analyse(runs):
    rows = means(
        runs,
        "account.total account.active account.active_all result.val_loss",
        bits_per_byte="result.val_bits_per_byte",
    )
    return {
        "rows": rows,
        "figures": [loss_bars("Loss at equal total and equal active parameters", runs)],
    }


def claims(runs):
    worse, better = "+0.112 nat (C4, 737M, 50B tokens)", "−0.049 nat (C4, 245M against 265M)"
    return [
        sign_claim(
            "MemoryLLM is worse than a dense model of equal total parameters",
            worse,
            runs,
            "memoryllm",
            "dense",
            1,
        ),
        sign_claim(
            "MemoryLLM is better than a dense model of equal active parameters, narrower",
            better,
            runs,
            "memoryllm",
            "dense-active",
            -1,
        ),
        sign_claim(
            "MemoryLLM is better than a dense model of equal active parameters, a third as deep",
            better,
            runs,
            "memoryllm",
            "dense-third",
            -1,
        ),
    ]
