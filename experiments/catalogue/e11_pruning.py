"""Fewer active weights by pruning a dense model, or by flex from the start?

MemoryLLM, Figure 11 (1B and 750M; sparsity pattern, calibration and numbers not given): base models
pruned by magnitude, SparseGPT and Wanda to the active parameters of MemoryLLM and flex are clearly
worse. Here magnitude and Wanda, unstructured, per matrix; SparseGPT is not done. A dense model
pruned to beta/8 of its FFN weights has the active weights of flex beta; MemoryLLM itself would be a
dense model without any FFN weight. Neither comparison fine-tunes after pruning. Expected: flex is
better at each of beta = 1, 2, 3.

    python -m experiments.run e11 --scale=cpu         # E2's runs
"""

from experiments import scales
from experiments.chart import measured
from experiments.figure import Figure, Series
from experiments.verdicts import LOSS, by_variant, entry, means_at, not_run, number, order_claim
from flexmemory.analysis.prune import pruned

IDS = ("E11",)
SOURCE = "MemoryLLM Fig 11"
MEASURES = (pruned,)
RULES = ("magnitude", "wanda")
PAPER = "clearly better (figure only)"


def sweep(scale):
    return scales.sweep(scale, "dense memoryllm flex-b3 flex-b2 flex-b1")


def loss(rule, beta):
    """A function of a run: a trained model's loss, and a dense one's pruned to flex's weights."""
    after = entry("pruned.points", "val_loss", rule=rule, kept=beta / 8)
    return lambda run: number(run, after if run["variant"] == "dense" else LOSS)


def analyse(runs):
    dense = by_variant(runs).get("dense", [])
    points = [point for run in dense for point in number(run, "measures.pruned.points") or []]
    series = []
    for rule in RULES:
        own = [(p["active"], p["val_loss"]) for p in points if p["rule"] in (rule, "none")]
        label, dashed = f"dense, {rule}", rule == "wanda"
        series.append(Series(label, means_at(own), "line", "dense", dashed=dashed))
    others = [run for run in runs if run["variant"] != "dense"]
    own = means_at((run["account"]["active"], number(run, LOSS)) for run in others)
    series.append(Series("memoryllm, flex", own, "line", "flex"))
    figure = Figure(
        "loss-active",
        "Pruned after training, or flex from the start",
        "Means over seeds.",
        "active parameters per token",
        "validation loss, nat per token",
        tuple(s for s in series if s.points),
    )
    columns = "rule kept active val_loss recall_acc reasoning_acc"
    return {"rows": measured(dense, "pruned", "points", columns), "figures": [figure]}


def claims(runs):
    text = "Flex β = {} beats a dense model pruned by {} to its active parameters"
    made = [
        order_claim(text.format(beta, rule), PAPER, runs, f"flex-b{beta} < dense", loss(rule, beta))
        for rule in RULES
        for beta in (3, 2, 1)
    ]
    return [*made, not_run("…and pruned by SparseGPT", PAPER, "SparseGPT is not implemented")]
