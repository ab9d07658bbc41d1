"""Which layers' FFNs matter: what happens when one of them is left out?

MemoryLLM, Figure 4 (1B; values not given): for the base model perplexity rises most for the first
and the last layers (a U over depth), for MemoryLLM only for the first few. Expected: both shapes.
Judged by thirds of the stack: the mean rise of the loss when a layer of that third is left out.

    python -m experiments.run e5 --scale=cpu          # E1's runs
"""

from experiments import scales
from experiments.chart import by_layer, layer_values, measured
from experiments.layers import thirds_claim
from flexmemory.analysis.probes import drop_layer

IDS = ("E5",)
SOURCE = "MemoryLLM Fig 4"
MEASURES = (drop_layer,)
U, EARLY = "a U over depth (figure only)", "early layers only (figure only)"
CLAIMS = (
    ("Base", U, "dense", "first > middle"),
    ("Base", U, "dense", "last > middle"),
    ("MemoryLLM", EARLY, "memoryllm", "first > last"),
    ("MemoryLLM", EARLY, "memoryllm", "first > middle"),
)


def sweep(scale):
    return scales.sweep(scale, "dense memoryllm")


def analyse(runs):
    rises = [value for run in runs for value in layer_values(run, "drop_layer", "perplexity_rise")]
    title, y = "One layer's FFN or row left out", "rise of perplexity, %"
    wide = bool(rises) and None not in rises and min(rises) > 0
    figure = by_layer("rise", title, runs, "drop_layer", "perplexity_rise", y, log_y=wide)
    columns = "layer kind val_loss perplexity_rise recall_acc reasoning_acc"
    return {"rows": measured(runs, "drop_layer", "layers", columns), "figures": [figure]}


def claims(runs):
    made = []
    for model, paper, variant, order in CLAIMS:
        more, less = order.split(" > ")
        text = f"{model}: the {more} layers' FFNs matter more than the {less} ones'"
        made.append(thirds_claim(text, paper, runs, variant, order, "drop_layer.val_loss"))
    return made
