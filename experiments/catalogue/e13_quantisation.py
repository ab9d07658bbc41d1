"""What do 16, 8 and 4 bits a number cost a table?

MemoryLLM, Table 7 (1B; method and granularity not given): WikiText-2 perplexity 24.348 in 16 bits,
24.347 in 8 (-0.00004 nat), 24.439 in 4 (+0.0037 nat); tasks move within a percent (its Winogrande
column jumps by 2 points in one row, probably a misprint). Here round to nearest, symmetric, one
scale per row or per 32 numbers.
Expected: 8 bits cost less than 0.001 nat, 4 bits less than 0.01.

    python -m experiments.run e13 --scale=cpu         # E2's runs
"""

from experiments import scales
from experiments.chart import mean_of, measured
from experiments.figure import Figure, Series
from experiments.verdicts import by_variant, entry, limit_claim
from flexmemory.analysis.compress import quantised

IDS = ("E13",)
SOURCE = "MemoryLLM Table 7"
MEASURES = (quantised,)
KINDS = {  # label of a bar: type, numbers that share a scale (0: a row)
    "bfloat16": ("bfloat16", 0),
    "int8": ("int8", 0),
    "int8/32": ("int8", 32),
    "int4": ("int4", 0),
    "int4/32": ("int4", 32),
}
LIMITS = {
    "int8": (0.001, "−0.00004 nat (WikiText-2, 1B)"),
    "int4": (0.01, "+0.0037 nat (WikiText-2, 1B)"),
}


def sweep(scale):
    return scales.sweep(scale, "memoryllm flex-b3")


def cost(dtype, group=0):
    """A function of a run: the rise of its loss over the float32 table, nat."""
    exact = entry("quantised.points", "val_loss", dtype="float32")
    rounded = entry("quantised.points", "val_loss", dtype=dtype, scale_group=group)

    def rise(run):
        losses = rounded(run), exact(run)
        return None if None in losses else losses[0] - losses[1]

    return rise


def analyse(runs):
    series = []
    for i, kind in enumerate(KINDS.values()):
        for j, (variant, members) in enumerate(by_variant(runs).items()):
            mean, spread = mean_of(members, cost(*kind))
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
        ticks=tuple(enumerate(KINDS)),
    )
    columns = "dtype scale_group table_bytes saved relative_error val_loss recall_acc reasoning_acc"
    rows = measured(runs, "quantised", "points", columns)
    return {"rows": rows, "figures": [figure] if series else []}


def claims(runs):
    text = "A table in {} bits costs less than {} nat (our limit)"
    return [
        limit_claim(text.format(dtype[3:], limit), paper, runs, "memoryllm", cost(dtype), limit)
        for dtype, (limit, paper) in LIMITS.items()
    ]
