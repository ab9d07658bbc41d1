"""Does MemoryLLM's gap to a dense model shrink with more training tokens, and how does it move with
size?

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
from experiments.verdicts import difference, judge, minus

IDS = ("E3",)
SOURCE = "MemoryLLM Fig 10"
DENSE, NEAR = ("dense", "dense-middle", "dense-small"), 0.1


def sweep(scale):
    base = scales.settings(scale)
    half = {"name": "half", "train.steps": base["train.steps"] // 2}
    if scale == "paper":
        models, rows = [scales.dense(24), scales.memoryllm(24), scales.flex(24, 3)], []
        for size, other in (
            ("memoryllm-1b", {}),
            ("memoryllm-750m", {"name": "middle"}),
            ("memoryllm-250m", {"name": "small"}),
        ):
            rows += scales.sweep(
                scale,
                [scales.changed(model, other, *more) for more in ((), (half,)) for model in models],
                size,
            )
        return rows
    n, unit = scales.layers(scale), 2 * base["model.n_heads"]
    width = round(base["model.d_model"] * 2 / 3 / unit) * unit
    small = {
        "name": "small",
        "model.d_model": width,
        "model.d_ff": round(base["model.d_ff"] * width / base["model.d_model"]),
    }
    models = [scales.dense(n), scales.memoryllm(n), scales.flex(n, 3)]
    return scales.sweep(
        scale,
        [
            scales.changed(model, *more)
            for more in ((), (half,), (small,), (small, half))
            for model in models
        ],
    )


def analyse(runs):
    rows = means(runs, "account.total account.active result.tokens result.val_loss")
    return {
        "rows": rows,
        "figures": [
            scatter(
                "grid",
                "Two sizes after half and after all of the tokens",
                runs,
                "account.active",
                "result.val_loss",
                "active parameters per token",
                "validation loss, nat per token",
            )
        ],
    }


def claims(runs):
    made = []
    for size, what in (("", "the larger width"), ("-small", "the smaller width")):
        text = f"The gap of MemoryLLM to dense shrinks with tokens, {what}"
        paper = "shrinks from 25B to 150B tokens (figure only)"
        found = minus(
            difference(runs, f"memoryllm{size}", f"dense{size}"),
            difference(runs, f"memoryllm{size}-half", f"dense{size}-half"),
        )
        made.append(
            judge(
                text,
                paper,
                found,
                -1,
                needs=f"dense{size}, memoryllm{size} and both after half the tokens",
            )
        )
    text = "Flex β = 3 beats a smaller dense model of about its active parameters"
    paper = "704M active against 737M (figure only)"
    active = {run["variant"]: run["account"]["active"] for run in runs}
    like = [
        name
        for name in active
        if name in DENSE
        and "flex-b3" in active
        and abs(active[name] / active["flex-b3"] - 1) < NEAR
    ]
    found = difference(runs, "flex-b3", like[0]) if like else None
    return [
        *made,
        judge(
            text,
            paper,
            found,
            -1,
            needs=f"flex-b3 and a dense model within {NEAR:.0%} of its active parameters",
        ),
    ]
