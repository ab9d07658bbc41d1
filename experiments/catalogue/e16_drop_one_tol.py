"""Which layers' tables matter for which task?

MemoryLLM, Figure 12 (1B, eight tasks; values not given): leaving out one layer's ToL hurts only for
the first few layers; the middle ones are nearly redundant. Expected: on the loss and on each task
the first third of the layers matters most. Tasks at chance cannot fall and say nothing, so these
are models of the knowledge experiment, which have learned theirs.

    python -m experiments.run e16 --scale=cpu         # E7's runs
"""

from experiments.catalogue import e7_alpha_by_task, knowledge
from experiments.chart import by_layer, measured, third
from experiments.verdicts import judge, number, within
from flexmemory.analysis.probes import drop_layer

IDS = ("E16",)
SOURCE = "MemoryLLM Fig 12"
SCALES = knowledge.SCALES
MEASURES = (drop_layer,)
LEARNED = 0.05  # above chance: a task that is not learned cannot be unlearned
TASKS = {
    "val_loss": ("loss", 1, "nat"),
    "recall_acc": ("recall", -1, ""),
    "reasoning_acc": ("reasoning", -1, ""),
}


def sweep(scale):
    return [row for row in e7_alpha_by_task.sweep(scale) if "-dense-" not in row["name"]]


def analyse(runs):
    figures = [
        by_layer(
            key.replace("_", "-"),
            f"One layer's table left out: {word}",
            runs,
            "drop_layer",
            key,
            "validation loss, nat" if key == "val_loss" else f"{word}, share right",
        )
        for key, (word, _, _) in TASKS.items()
    ]
    return {
        "rows": measured(
            runs, "drop_layer", "layers", "layer kind val_loss recall_acc reasoning_acc"
        ),
        "figures": [f for f in figures if f.series],
    }


def claims(runs):
    runs, made = [run | {"variant": knowledge.model_of(run)} for run in runs], []
    for key, (word, sign, unit) in TASKS.items():
        text = f"The first layers' tables matter more for {word} than the middle ones'"
        paper = "only the first few matter (figure only)"
        learned = [run for run in runs if is_learned(run, key)]
        first, middle = (third("drop_layer", key, i) for i in (0, 1))
        found = within(learned, "memoryllm", first, middle)
        needs = f"memoryllm with at least three layers, and {word} well above chance"
        made.append(judge(text, paper, found, sign, unit, needs=needs))
    return made


def is_learned(run, key):
    """Whether the whole model is well above chance; the loss has no chance."""
    chance = number(run, f"result.{key.removesuffix('_acc')}_chance")
    whole = number(run, f"measures.drop_layer.whole.{key}")
    return chance is None or whole is None or whole >= chance + LEARNED
