"""How far can a table's rank be cut, the same in every layer?

MemoryLLM, Table 8 (1B, C4 perplexity): rank cut by 10, 20, 30, 40, 50%: +0.0002, +0.0021, +0.0051,
+0.0109, +0.0347 nat, saving 8.6 to 49% of the bytes. Only savings beyond the useful rank |V| d /
(|V| + d) count. Expected: 10% costs less than 0.005 nat, 50% less than 0.1, each further cut more.

    python -m experiments.run e14 --scale=cpu         # E2's runs

At a small vocabulary the basis [r, W] is no longer small beside the numbers [V, r]: "saved" says
what is left of the saving.
"""

import itertools

from experiments import scales
from experiments.chart import mean_lines, measured, rises
from experiments.verdicts import at, limit_claim, steps_claim, within
from flexmemory.analysis.compress import svd

IDS = ("E14",)
SOURCE = "MemoryLLM Table 8"
MEASURES = (svd,)
LIMITS = {0.1: (0.005, "+0.0002 nat (C4, 1B)"), 0.5: (0.1, "+0.0347 nat (C4, 1B)")}


def sweep(scale):
    return scales.sweep(scale, "memoryllm flex-b3")


def costs(run):
    """[(cut, rise of the loss over the uncut table in nat)]"""
    return rises(run, "svd", "cut")


def analyse(runs):
    x, y = "share of the rank that is cut", "rise of the loss, nat per token"
    figure = mean_lines("cost", "What a cut of the rank costs", runs, costs, x, y)
    columns = "cut table_bytes saved relative_error val_loss recall_acc reasoning_acc"
    return {"rows": measured(runs, "svd", "points", columns), "figures": [figure]}


def claims(runs):
    text = "Cutting {:.0%} of the rank costs less than {} nat (our limit)"
    made = [
        limit_claim(text.format(cut, limit), paper, runs, "memoryllm", at(costs, cut), limit)
        for cut, (limit, paper) in LIMITS.items()
    ]
    cuts = [cut for cut, _ in costs(runs[0])] if runs else []
    steps = {
        f"{a:.0%}→{b:.0%}": within(runs, "memoryllm", at(costs, b), at(costs, a))
        for a, b in itertools.pairwise(cuts)
    }
    paper = "18.919 < 18.923 < 18.958 < 19.015 < 19.126 < 19.586 perplexity"
    return [*made, steps_claim("Every further cut costs more", paper, steps)]
