"""Does the gap to a dense model close as FFN parameters move back to compute (flex, beta 0..3)?

MemoryLLM, Figure 9 (1B, up to 150B tokens; values not given; paper scale here plans 50B): at equal
total parameters perplexity falls from MemoryLLM (beta 0) through beta 1, 2, 3 to the dense model,
and beta 3 is close to dense. The paper gives no equation for the flex block: docs/variants.md.
Expected: the order over beta, dense below them all, beta 3 nearer to dense than MemoryLLM.

    python -m experiments.run e2 --scale=cpu

Cost at cpu scale: five runs a seed, about five minutes on two cores; two of them are E1's.
"""

from experiments import scales
from experiments.chart import loss_against, loss_bars, means
from experiments.verdicts import LOSS, combined, judge, order_claims

IDS = ("E2",)
SOURCE = "MemoryLLM Fig 9"
ORDER = "dense flex-b3 flex-b2 flex-b1 memoryllm".split()
CLAIMS = {
    "flex-b3 < flex-b2 < flex-b1 < memoryllm": (
        "Loss rises as β falls from 3 to 0 (MemoryLLM)",
        "that order (1B, 150B tokens)",
    ),
    "flex-b3 > dense": ("β = 3 is still worse than dense", "a small gap (figure only)"),
}


def sweep(scale):
    names = "dense memoryllm flex-b3 flex-b2 flex-b1"
    return scales.sweep(scale, names, numbers=scales.MORE_SEEDS)


def analyse(runs):
    runs = sorted(runs, key=lambda run: ORDER.index(run["variant"]))
    rows = means(
        runs, "account.total account.active result.val_loss result.recall_acc result.reasoning_acc"
    )
    figures = [
        loss_bars("Loss from all compute to all memory, at equal total parameters", runs),
        loss_against(runs, "active"),
        loss_against(runs, "read_bytes_per_token"),
    ]
    return {"rows": rows, "figures": figures}


def claims(runs):
    sides = [(variant, LOSS) for variant in ("memoryllm", "flex-b3", "dense")]
    found = combined(runs, sides, lambda m, f, d: abs(m - d) - abs(f - d))
    text, paper = "β = 3 is nearer to dense than MemoryLLM is", "the gap shrinks (figure only)"
    nearer = judge(text, paper, found, 1, needs="dense, flex-b3 and memoryllm of one seed")
    return [*order_claims(runs, CLAIMS), nearer]
