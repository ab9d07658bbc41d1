"""How should a learned table be trained: its learning rate, its weight decay, its initial size?

STEM trains tables as everything else (one learning rate, decay 0.1, Xavier-normal over [V, W], so
rows start about 250 times smaller than what they replace); for converting trained models its
authors later used 10 to 100 times the rate and nearly no decay for tables, and reviewers asked for
this ablation. Decay touches every row in every step, its gradient only the rows met. No number is
published; the sign asked: does decay 0.1 cost loss, does a higher rate help?

    python -m experiments.run s26 --scale=cpu

flexmemory's default is the same rate and no decay for tables.
"""

from experiments import scales
from experiments.chart import loss_bars, means
from experiments.verdicts import order_claims

IDS = ("S26",)
SOURCE = "STEM section on training; reviewers"
CHANGES = {
    "decay": {"optimizer.table_weight_decay": 0.1},
    "lr3": {"optimizer.table_lr": 3.0},
    "lr10": {"optimizer.table_lr": 10.0},
    "init": {"model.table_init_std": 0.1},
}
NO_DECAY = "stem-third-no-decay"  # the base at paper scale, whose recipe decays tables


def sweep(scale):
    stem = scales.model("stem-third", scales.layers(scale, "stem-350m"))
    if scale == "paper":
        stem |= {"name": NO_DECAY, "optimizer.table_weight_decay": 0.0}
    changed = [stem | change | {"name": f"stem-third-{name}"} for name, change in CHANGES.items()]
    return scales.sweep(scale, [stem, *changed], "stem-350m")


def analyse(runs):
    rows = means(runs, "result.val_loss result.recall_acc")
    return {"rows": rows, "figures": [loss_bars("Loss by how the tables are trained", runs)]}


def claims(runs):
    base = NO_DECAY if any(run["variant"] == NO_DECAY for run in runs) else "stem-third"
    asked = {
        f"stem-third-decay > {base}": (
            "Weight decay 0.1 on tables costs loss",
            "not in the papers (asked by reviewers)",
        ),
        f"stem-third-lr10 < {base}": (
            "Ten times the learning rate on tables helps",
            "not in the papers (the authors' choice for converting trained models)",
        ),
    }
    return order_claims(runs, asked)
