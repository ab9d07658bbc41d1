"""Which part of a SwiGLU should the table replace: up-projection, gate, or none (added to it)?

STEM, 350M, average accuracy: stem 50.90, stem-dagger (row added to the up-projection) 50.60 to
50.74, stem-gate (row in place of the gate) 49.10 beside dense 49.72; losses are not given. The
paper's gate variant leaves its activation open (SiLU assumed). Expected: stem better than
stem-gate; stem-dagger slightly worse than stem although it computes more.

    python -m experiments.run s6 --scale=cpu
"""

from experiments import scales
from experiments.chart import loss_bars, means
from experiments.verdicts import order_claims

IDS = ("S6", "S7")
SOURCE = "STEM ablation of the replaced part"
CLAIMS = {
    "stem-gate > stem-third": (
        "A row in place of the gate is worse than in place of the up-projection",
        "49.10 against 50.90 % average accuracy",
    ),
    "stem-gate > dense": (
        "A row in place of the gate is worse than dense",
        "49.10 against 49.72 % average accuracy",
    ),
    "stem-dagger > stem-third": (
        "A row added to the up-projection is worse than one in its place",
        "50.60 to 50.74 against 50.90 %",
    ),
}


def sweep(scale):
    return scales.sweep(scale, "dense stem-third stem-gate stem-dagger", "stem-350m")


def analyse(runs):
    rows = means(runs, "account.active result.val_loss result.recall_acc result.reasoning_acc")
    return {"rows": rows, "figures": [loss_bars("Loss by what the table row does", runs)]}


def claims(runs):
    return order_claims(runs, CLAIMS)
