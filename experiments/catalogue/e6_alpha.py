"""Scaled-down FFNs: does the base model suffer more than MemoryLLM?

MemoryLLM, section 3.2 and Figure 7 (values not given): with x' = x + Attn + alpha FFN at inference,
alpha from 1.0 to 0.5, the base model degrades more.
Expected: the base model's loss rises more at every alpha; judged at 0.5.

    python -m experiments.run e6 --scale=cpu          # E1's runs
"""

from experiments import scales
from experiments.chart import mean_lines, measured, rises
from experiments.verdicts import at, order_claim
from flexmemory.analysis.probes import alpha

IDS = ("E6",)
SOURCE = "MemoryLLM Fig 7"
MEASURES = (alpha,)


def sweep(scale):
    return scales.sweep(scale, "dense memoryllm")


def costs(run):
    """[(alpha, rise of the loss in nat)]"""
    return rises(run, "alpha", "alpha")


def analyse(runs):
    x, y = "α, scale of what FFNs and rows add", "rise of the loss, nat per token"
    figure = mean_lines("rise", "The α-probe", runs, costs, x, y)
    columns = "alpha val_loss perplexity recall_acc reasoning_acc"
    return {"rows": measured(runs, "alpha", "points", columns), "figures": [figure]}


def claims(runs):
    text = "Scaling FFNs by 0.5 costs the base model more than MemoryLLM"
    paper = "base degrades more (figure only)"
    return [order_claim(text, paper, runs, "dense > memoryllm", at(costs, 0.5))]
