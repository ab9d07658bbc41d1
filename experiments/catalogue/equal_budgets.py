"""Does memory still pay when something other than total parameters is held equal?

The papers compare at equal total parameters, or show two active counts. Here MemoryLLM is widened
until it costs what the dense model does by each of three more measures: active parameters, forward
FLOPs (head included), bytes read per decoded token. Widths come in steps, so the costs are equal
within some percent. Expected from Table 2's second pair: at equal active parameters MemoryLLM is
better (-0.049 nat at 245M against 265M); the other two are not in the papers.

    python -m experiments.run equal_budgets --scale=cpu

Any other sweep takes the same modes: --budget=total|active|flops|bytes makes all its variants cost
what its first one does.
"""

from experiments import scales
from experiments.chart import loss_against, means
from experiments.verdicts import order_claim

IDS = ("BUDGETS",)
SOURCE = "MemoryLLM Table 2; ours"
SCALES = ("smoke", "cpu", "gpu")
MODES = {
    "active": ("active parameters", "−0.049 nat (245M against 265M active)"),
    "flops": ("forward FLOPs per token", "not in the papers"),
    "bytes": ("bytes read per decoded token", "not in the papers"),
}


def sweep(scale):
    n = scales.layers(scale)
    wider = [
        scales.variant(f"memoryllm-{mode}", f"memoryllm*{n}")
        | scales.equal(mode, "model.d_model", f"dense*{n}")
        for mode in MODES
    ]
    return scales.sweep(scale, [*scales.models("dense memoryllm", n), *wider])


def analyse(runs):
    rows = means(
        runs,
        "config.model.d_model account.total account.active account.flops_per_token"
        " account.read_bytes_per_token budget.residual result.val_loss result.recall_acc",
    )
    costs = ("total", "active", "flops_per_token", "read_bytes_per_token")
    return {"rows": rows, "figures": [loss_against(runs, cost) for cost in costs]}


def claims(runs):
    budgets = {run["variant"]: run["budget"] for run in runs}
    made = []
    for mode, (what, paper) in MODES.items():
        variant = f"memoryllm-{mode}"
        text = f"MemoryLLM is better than dense at equal {what}"
        if variant in budgets:
            text += f" (costs {budgets[variant]['residual']:+.1%})".replace("-", "−")
        made.append(order_claim(text, paper, runs, f"{variant} < dense"))
    return made
