"""Can the last layers' tables be left out for good?

MemoryLLM, section 2.3.2, proposes to leave the later layers' ToLs out of memory because they matter
less; nothing is measured. Expected: leaving out the last layer's table costs less than leaving out
the first one's; the figure has loss against the bytes that are saved.

    python -m experiments.run e18 --scale=cpu         # E2's runs
"""

from experiments import scales
from experiments.chart import mean_lines, measured, rises
from experiments.verdicts import entry, judge, number, within
from flexmemory.analysis.probes import drop_last, drop_layer

IDS = ("E18",)
SOURCE = "MemoryLLM section 2.3.2"
MEASURES = (drop_last, drop_layer)


def sweep(scale):
    return scales.sweep(scale, "memoryllm flex-b3")


def saved(run):
    """[(share of the table's bytes that goes away in %, rise of the loss in nat)]"""
    whole = number(run, "measures.drop_last.table_bytes")
    return rises(run, "drop_last", lambda point: 100 * point["table_bytes_gone"] / whole)


def analyse(runs):
    x, y = "table bytes saved, %", "rise of the loss, nat per token"
    figure = mean_lines("rise", "The last layers' tables left out", runs, saved, x, y)
    columns = "dropped table_bytes_gone val_loss perplexity_rise recall_acc reasoning_acc"
    return {"rows": measured(runs, "drop_last", "points", columns), "figures": [figure]}


def claims(runs):
    last = entry("drop_last.points", "val_loss", dropped=1)
    first = entry("drop_layer.layers", "val_loss")
    text = "leaving out the last layer's table costs less than leaving out the first one's"
    paper = "not in the papers (proposed, not measured)"
    return [
        judge(f"{model}: {text}", paper, within(runs, model, last, first), -1, needs=model)
        for model in ("memoryllm", "flex-b3")
    ]
