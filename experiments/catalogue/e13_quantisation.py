"""What do 16, 8 and 4 bits a number cost a table?

MemoryLLM, Table 7 (1B; method and granularity not given): WikiText-2 perplexity 24.348 in 16 bits,
24.347 in 8 (-0.00004 nat), 24.439 in 4 (+0.0037 nat); tasks move within a percent (its Winogrande
column jumps by 2 points in one row, probably a misprint). Here round to nearest, symmetric, one
scale per row or per 32 numbers. Expected: 8 bits cost less than 0.001 nat, 4 bits less than 0.01.

    python -m experiments.run e13 --scale=cpu         # E2's runs
"""

from experiments import scales
from experiments.chart import mean_of, measured, rises
from experiments.figure import Figure, Series
from experiments.verdicts import at, by_variant, limit_claim
from flexmemory.analysis.compress import quantised

IDS = ("E13",)
SOURCE = "MemoryLLM Table 7"
MEASURES = (quantised,)
# type, numbers that share a scale (0: a row)
KINDS = (("bfloat16", 0), ("int8", 0), ("int8", 32), ("int4", 0), ("int4", 32))
LIMITS = {
    "int8": (0.001, "−0.00004 nat (WikiText-2, 1B)"),
    "int4": (0.01, "+0.0037 nat (WikiText-2, 1B)"),
}


def sweep(scale):
    return scales.sweep(scale, "memoryllm flex-b3")


def costs(run):
    """[((type, numbers that share a scale), rise of the loss over the float32 table in nat)]"""
    return rises(run, "quantised", lambda point: (point["dtype"], point["scale_group"]))


def analyse(runs):
    series = []
    for i, kind in enumerate(KINDS):
        for j, (variant, members) in enumerate(by_variant(runs).items()):
            mean, spread = mean_of(members, at(costs, kind))
            if mean is not None:
                bar = (i + 0.25 * (j - 0.5), 1000 * mean, 1000 * (spread or 0.0))
                series.append(Series(variant, (bar,), "bars", variant.partition("-")[0]))
    figure = Figure(
        "cost",
        "What smaller numbers cost",
        "/32: one scale for 32 numbers, else one a row. Means over seeds.",
        "",
        "rise of the loss, thousandths of a nat",
        tuple(series),
        ticks=tuple(enumerate(f"{dtype}/{group}" if group else dtype for dtype, group in KINDS)),
    )
    columns = "dtype scale_group table_bytes saved relative_error val_loss recall_acc reasoning_acc"
    rows = measured(runs, "quantised", "points", columns)
    return {"rows": rows, "figures": [figure] if series else []}


def claims(runs):
    text = "A table in {} bits costs less than {} nat (our limit)"
    made = []
    for dtype, (limit, paper) in LIMITS.items():
        own, cost = text.format(dtype[3:], limit), at(costs, (dtype, 0))
        made.append(limit_claim(own, paper, runs, "memoryllm", cost, limit))
    return made
