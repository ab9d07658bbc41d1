"""Which layers' FFNs matter: what happens when one of them is left out?

MemoryLLM, Figure 4 (1B; values not given): for the base model perplexity rises most for the first
and the last layers (a U over depth), for MemoryLLM only for the first few. Expected: both shapes.
Judged by thirds of the stack: the mean rise of the loss when a layer of that third is left out.

    python -m experiments.run e5 --scale=cpu          # E1's runs
"""

import functools

from experiments import scales
from experiments.chart import by_layer, layer_values, measured, thirds
from experiments.verdicts import judge, number, within
from flexmemory.analysis.probes import drop_layer

IDS = ("E5",)
SOURCE = "MemoryLLM Fig 4"
MEASURES = (drop_layer,)


def sweep(scale):
    n = scales.layers(scale)
    return scales.sweep(scale, [scales.dense(n), scales.memoryllm(n)])


def analyse(runs):
    rises = [value for run in runs for value in layer_values(run, "drop_layer", "perplexity_rise")]
    wide = bool(rises) and None not in rises and min(rises) > 0
    return {
        "rows": measured(
            runs,
            "drop_layer",
            "layers",
            "layer kind val_loss perplexity_rise recall_acc reasoning_acc",
        ),
        "figures": [
            by_layer(
                "rise",
                "One layer's FFN or row left out",
                runs,
                "drop_layer",
                "perplexity_rise",
                "rise of perplexity, %",
                log_y=wide,
            )
        ],
    }


def rise(run, third):
    """Mean rise of the loss, in nat, when a layer of that third is left out."""
    losses = layer_values(run, "drop_layer", "val_loss")
    parts = (
        thirds([loss - number(run, "measures.drop_layer.whole.val_loss") for loss in losses])
        if losses and None not in losses
        else None
    )
    return parts and parts[third]


def claims(runs):
    u, early = "a U over depth (figure only)", "early layers only (figure only)"
    rows = (
        ("Base", u, "dense", 0, 1),
        ("Base", u, "dense", 2, 1),
        ("MemoryLLM", early, "memoryllm", 0, 2),
        ("MemoryLLM", early, "memoryllm", 0, 1),
    )
    words, made = ("first", "middle", "last"), []
    for model, paper, variant, a, b in rows:
        text = f"{model}: the {words[a]} layers' FFNs matter more than the {words[b]} ones'"
        more, less = (functools.partial(rise, third=i) for i in (a, b))
        needs = f"{variant} with at least three layers"
        made.append(judge(text, paper, within(runs, variant, more, less), 1, needs=needs))
    return made
