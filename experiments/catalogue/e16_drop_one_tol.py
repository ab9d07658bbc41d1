"""Which layers' tables matter for which task?

MemoryLLM, Figure 12 (1B, eight tasks; values not given): leaving out one layer's ToL hurts only for
the first few layers; the middle ones are nearly redundant. Expected: on the loss and on each task
the first third of the layers matters most. Tasks at chance cannot fall and say nothing, so these
are models of the knowledge experiment, which have learned theirs.

    python -m experiments.run e16 --scale=cpu         # E7's runs
"""

from experiments.catalogue import e7_alpha_by_task, knowledge
from experiments.chart import by_layer, measured
from experiments.layers import thirds_claim
from experiments.verdicts import number
from flexmemory.analysis.probes import drop_layer

IDS = ("E16",)
SOURCE = "MemoryLLM Fig 12"
SCALES = knowledge.SCALES
MEASURES = (drop_layer,)
LEARNED = 0.05  # above chance: a task that is not learned cannot be unlearned
TASKS = {  # score: its name, what "matters more" means for it, its axis and unit
    "val_loss": ("loss", "first > middle", "validation loss, nat", "nat"),
    "recall_acc": ("recall", "first < middle", "recall, share right", ""),
    "reasoning_acc": ("reasoning", "first < middle", "reasoning, share right", ""),
}


def sweep(scale):
    return [row for row in e7_alpha_by_task.sweep(scale) if "-dense-" not in row["name"]]


def analyse(runs):
    figures = []
    for key, (word, _, axis, _) in TASKS.items():
        name, title = key.replace("_", "-"), f"One layer's table left out: {word}"
        figures.append(by_layer(name, title, runs, "drop_layer", key, axis))
    columns = "layer kind val_loss recall_acc reasoning_acc"
    rows = measured(runs, "drop_layer", "layers", columns)
    return {"rows": rows, "figures": [figure for figure in figures if figure.series]}


def claims(runs):
    runs, made = knowledge.named_by_model(runs), []
    for key, (word, order, _, unit) in TASKS.items():
        learned = [run for run in runs if is_learned(run, key)]
        text = f"The first layers' tables matter more for {word} than the middle ones'"
        paper = "only the first few matter (figure only)"
        needs = f"at least three layers, and {word} well above chance"
        path = f"drop_layer.{key}"
        made.append(thirds_claim(text, paper, learned, "memoryllm", order, path, unit, needs))
    return made


def is_learned(run, key):
    """Whether the whole model is well above chance; the loss has no chance."""
    chance = number(run, f"result.{key.removesuffix('_acc')}_chance")
    whole = number(run, f"measures.drop_layer.whole.{key}")
    return chance is None or whole is None or whole >= chance + LEARNED
