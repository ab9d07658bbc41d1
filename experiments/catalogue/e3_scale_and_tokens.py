"""Does MemoryLLM's gap to a dense model shrink with training tokens, and how does size move it?

MemoryLLM, Figure 10 (250M, 750M, 1B; 25B to 150B tokens; values not given): the gap to the dense
model of equal total parameters shrinks with tokens, and flex beta 3 at 1B (704M active) beats dense
at 737M. Every point is a run of its own with its own schedule. Expected: the gap after all tokens
is smaller than after half of them.

    python -m experiments.run e3 --scale=cpu

Two widths (the scale's and two thirds of it; at paper scale 1B, 750M, 250M) and two numbers of
steps (all and half, at paper scale 50B and 25B tokens). Cost at cpu scale: twelve runs a seed,
three of them E1's and E2's.
"""

from experiments import scales
from experiments.chart import means, scatter
from experiments.sweeps import merge
from experiments.verdicts import Difference, difference, judge, minus

IDS = ("E3",)
SOURCE = "MemoryLLM Fig 10"
DENSE, NEAR = ("dense", "dense-middle", "dense-small"), 0.1
PAPER_SIZES = {
    "memoryllm-1b": {},
    "memoryllm-750m": {"name": "middle"},
    "memoryllm-250m": {"name": "small"},
}


def sweep(scale):
    base, n = scales.settings(scale), scales.layers(scale)
    half = {"name": "half", "train.steps": base["train.steps"] // 2}
    unit = 2 * base["model.n_heads"]
    width = round(base["model.d_model"] * 2 / 3 / unit) * unit
    d_ff = round(base["model.d_ff"] * width / base["model.d_model"])
    small = {"name": "small", "model.d_model": width, "model.d_ff": d_ff}
    sizes = PAPER_SIZES.items() if scale == "paper" else [("", {}), ("", small)]
    return [
        row
        for paper, size in sizes
        for steps in ({}, half)
        for model in scales.models("dense memoryllm flex-b3", n)
        for row in scales.sweep(scale, [merge(model, size, steps)], paper)
    ]


def analyse(runs):
    title = "Two sizes after half and after all of the tokens"
    x, y = "active parameters per token", "validation loss, nat per token"
    figure = scatter("grid", title, runs, "account.active", "result.val_loss", x, y)
    rows = means(runs, "account.total account.active result.tokens result.val_loss")
    return {"rows": rows, "figures": [figure]}


def claims(runs):
    made, paper = [], "shrinks from 25B to 150B tokens (figure only)"
    for size, what in (("", "the larger width"), ("-small", "the smaller width")):
        text = f"The gap of MemoryLLM to dense shrinks with tokens, {what}"
        gaps = [
            difference(runs, f"memoryllm{size}{steps}", f"dense{size}{steps}")
            for steps in ("", "-half")
        ]
        needs = f"dense{size}, memoryllm{size} and both after half the tokens"
        made.append(judge(text, paper, minus(*gaps), -1, needs=needs))
    text = "Flex β = 3 beats a smaller dense model of about its active parameters"
    paper = "704M active against 737M (figure only)"
    active = {run["variant"]: run["account"]["active"] for run in runs}
    own = active.get("flex-b3")
    like = [name for name in DENSE if own and abs(active.get(name, 0) / own - 1) < NEAR]
    found = difference(runs, "flex-b3", like[0]) if like else Difference({})
    needs = f"flex-b3 and a dense model within {NEAR:.0%} of its active parameters"
    return [*made, judge(text, paper, found, -1, needs=needs)]
