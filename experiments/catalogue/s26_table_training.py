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
from experiments.verdicts import sign_claim

IDS = ("S26",)
SOURCE = "STEM section on training; reviewers"
CHANGES = (
    {"name": "decay", "optimizer.table_weight_decay": 0.1},
    {"name": "lr3", "optimizer.table_lr": 3.0},
    {"name": "lr10", "optimizer.table_lr": 10.0},
    {"name": "init", "model.table_init_std": 0.1},
)


def sweep(scale):
    stem = scales.stem(scales.layers(scale, "stem-350m"))
    if scale == "paper":  # whose recipe decays tables
        stem = stem | {"name": "stem-third-no-decay", "optimizer.table_weight_decay": 0.0}
    base = stem | {"name": "stem-third"}
    return scales.sweep(
        scale, [stem, *(scales.changed(base, change) for change in CHANGES)], "stem-350m"
    )


def analyse(runs):
    return {
        "rows": means(runs, "result.val_loss result.recall_acc"),
        "figures": [loss_bars("Loss by how the tables are trained", runs)],
    }


def claims(runs):
    base = (
        "stem-third-no-decay"
        if any(run["variant"] == "stem-third-no-decay" for run in runs)
        else "stem-third"
    )
    return [
        sign_claim(
            "Weight decay 0.1 on tables costs loss",
            "not in the papers (asked by reviewers)",
            runs,
            "stem-third-decay",
            base,
            1,
        ),
        sign_claim(
            "Ten times the learning rate on tables helps",
            "not in the papers (the authors' choice for converting trained models)",
            runs,
            "stem-third-lr10",
            base,
            -1,
        ),
    ]
