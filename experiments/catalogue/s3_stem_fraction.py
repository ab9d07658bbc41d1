"""How many layers should be STEM layers: none, a third, half, all but the first?

STEM, 350M (figure, loss at equal training FLOPs, read to ±0.01): half 2.36 < full 2.375 < third
2.39 < dense 2.435; 1B after 1T tokens, perplexity: dense 13.19, third 12.64 (-0.043 nat). The
published accuracies of 350M mix two evaluation pipelines and are no target. The tables add
parameters: total parameters are not equal, active ones fall with every STEM layer. Here tokens are
equal, so that models with more STEM layers have used fewer FLOPs. Expected: that order of losses.

    python -m experiments.run s3 --scale=cpu

Cost at cpu scale: four runs a seed, one of them E1's; paper scale has dense and third at 1B too.
"""

from experiments import scales
from experiments.chart import loss_against, loss_bars, means
from experiments.verdicts import order_claims

IDS = ("S1", "S2", "S3", "S4", "S5")
SOURCE = "STEM 350M ablation, 1B table"


def sweep(scale):
    rows = scales.sweep(scale, "dense stem-third stem-half stem-full", "stem-350m")
    if scale == "paper":
        models = scales.models("dense stem-third", scales.layers(scale, "stem-1b"))
        larger = [row | {"name": f"{row['name']}-1b"} for row in models]
        rows += scales.sweep(scale, larger, "stem-1b")
    return rows


def analyse(runs):
    rows = means(
        runs,
        "account.total account.active account.flops_per_token result.val_loss result.recall_acc"
        " result.reasoning_acc",
        table_bytes="account.table_bytes.float32",
    )
    bars = loss_bars("Loss by share of STEM layers", runs)
    return {"rows": rows, "figures": [bars, loss_against(runs, "flops_per_token")]}


def claims(runs):
    large = "-1b" if any(run["variant"].endswith("-1b") for run in runs) else ""
    asked = {
        "stem-half < stem-full < stem-third < dense": (
            "Loss rises from half over full and third to dense",
            "2.36, 2.375, 2.39, 2.435 (350M, equal FLOPs; here equal tokens)",
        ),
        f"stem-third{large} < dense{large}": (
            "A third of the layers as STEM layers beats dense",
            "−0.043 nat (1B, 1T tokens)",
        ),
    }
    return order_claims(runs, asked)
