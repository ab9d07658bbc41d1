"""Does every memory layer need its own norm on the token embedding?

MemoryLLM, section 2.2.2: one independent norm per layer on X_0 is called significantly helpful for
convergence, without number or curve. Expected: one norm shared by all layers has a higher loss.

    python -m experiments.run e4 --scale=cpu
"""

from experiments import scales
from experiments.chart import loss_bars, means
from experiments.verdicts import order_claims

IDS = ("E4",)
SOURCE = "MemoryLLM section 2.2.2"
CLAIMS = {
    "memoryllm-shared-norm > memoryllm": (
        "One norm shared by all layers is worse than a norm each",
        "significantly (no number)",
    )
}


def sweep(scale):
    n = scales.layers(scale)
    shared = scales.variant("memoryllm-shared-norm", f"memoryllm*{n}", x0_norm_shared=True)
    return scales.sweep(scale, [scales.model("memoryllm", n), shared])


def analyse(runs):
    rows = means(runs, "result.val_loss", bits_per_byte="result.val_bits_per_byte")
    return {"rows": rows, "figures": [loss_bars("A norm for each layer, or one for all", runs)]}


def claims(runs):
    return order_claims(runs, CLAIMS)
