"""What do 16, 8 and 4 bits a number cost a table?

MemoryLLM, Table 7 (1B; method and granularity not given): WikiText-2 perplexity 24.348 in 16 bits,
24.347 in 8 (-0.00004 nat), 24.439 in 4 (+0.0037 nat); tasks move within a percent (its Winogrande
column jumps by 2 points in one row, probably a misprint). Here round to nearest, symmetric, one
scale per row or per 32 numbers.
Expected: 8 bits cost less than 0.001 nat, 4 bits less than 0.01.

    python -m experiments.run e13 --scale=cpu         # E2's runs
"""

from experiments import scales
from experiments.chart import measured
from experiments.figure import Figure, Series
from experiments.verdicts import by_variant, limit_claim, mean_spread, number
from flexmemory.analysis.compress import quantised

IDS = ("E13",)
SOURCE = "MemoryLLM Table 7"
MEASURES = (quantised,)
LIMITS = {
    "int8": (0.001, "−0.00004 nat (WikiText-2, 1B)"),
    "int4": (0.01, "+0.0037 nat (WikiText-2, 1B)"),
}


def sweep(scale):
    n = scales.layers(scale)
    return scales.sweep(scale, [scales.memoryllm(n), scales.flex(n, 3)])


def cost(run, dtype, group=0):
    """Rise of the loss over the float32 table, nat."""
    points = (number(run, "measures.quantised") or {}).get("points", [])
    exact = next((point["val_loss"] for point in points if point["dtype"] == "float32"), None)
    found = next(
        (
            point["val_loss"]
            for point in points
            if point["dtype"] == dtype and point["scale_group"] == group
        ),
        None,
    )
    return None if None in (exact, found) else found - exact


def analyse(runs):
    series, kinds = [], [("bfloat16", 0), ("int8", 0), ("int8", 32), ("int4", 0), ("int4", 32)]
    for i, (dtype, group) in enumerate(kinds):
        for j, (variant, members) in enumerate(by_variant(runs).items()):
            mean, spread = mean_spread([cost(run, dtype, group) for run in members])
            if mean is not None:
                series.append(
                    Series(
                        variant,
                        ((i + 0.25 * (j - 0.5), 1000 * mean, 1000 * (spread or 0.0)),),
                        "bars",
                        variant.partition("-")[0],
                    )
                )
    ticks = tuple(
        (i, dtype + (f"/{group}" if group else "")) for i, (dtype, group) in enumerate(kinds)
    )
    figure = Figure(
        "cost",
        "What smaller numbers cost",
        "/32: one scale for 32 numbers, else one a row. Means over seeds.",
        "",
        "rise of the loss, thousandths of a nat",
        tuple(series),
        ticks=ticks,
    )
    return {
        "rows": measured(
            runs,
            "quantised",
            "points",
            "dtype scale_group table_bytes saved relative_error val_loss recall_acc reasoning_acc",
        ),
        "figures": [figure] if series else [],
    }


def claims(runs):
    return [
        limit_claim(
            f"A table in {dtype[3:]} bits costs less than {limit} nat (our limit)",
            paper,
            runs,
            "memoryllm",
            lambda run, dtype=dtype: cost(run, dtype),
            limit,
        )
        for dtype, (limit, paper) in LIMITS.items()
    ]
