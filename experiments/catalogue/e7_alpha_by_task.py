"""Scaled-down FFNs: do recall tasks suffer and reasoning tasks not?

MemoryLLM, Table 1 (1B, alpha 1.0 to 0.5): LAMBADA .361 to .109, SciQ (printed "SiQA") .783 to .538,
ARC-E .516 to .317, HellaSwag .372 to .330; Winogrande, BoolQ, PIQA fall by 4, 1 and 3%; the paper
counts HellaSwag with these. Several of them are near chance or majority: above chance (a quarter or
a half) the falls are 70, 46, 75% against 34, 95, 11 and 6%, a much weaker contrast than the raw 70,
31, 39 against 11, 4, 3 and 1%. Here recall questions about trained facts against copying from the
prompt (the in-context task that small models learn), both above chance, on the models of the
knowledge experiment that are trained on nothing else. Expected: recall falls first.

    python -m experiments.run e7 --scale=cpu          # three of knowledge's runs a seed
"""

from experiments.catalogue import knowledge
from experiments.chart import measured
from flexmemory.analysis.probes import alpha

IDS = ("E7",)
SOURCE = "MemoryLLM Table 1"
SCALES = knowledge.SCALES
MEASURES = (alpha,)
PAPER = (
    "above chance LAMBADA −70, SciQ −46, ARC-E −75 %; HellaSwag −34, Winogrande −95, PIQA −11,"
    " BoolQ −6 %"
)


def sweep(scale):
    easiest = knowledge.easiest(scale)
    return [row for row in knowledge.sweep(scale) if row["name"].startswith(f"{easiest}-")]


def analyse(runs):
    columns = (
        "alpha val_loss recall_acc reasoning_acc kinds.cloze kinds.copy kinds.lookup1 kinds.lookup2"
    )
    rows = measured(runs, "alpha", "points", columns)
    return {"rows": rows, "figures": knowledge.alpha_figures(runs)}


def claims(runs):
    runs = knowledge.named_by_model(runs)
    text = "{}: α = 0.5 costs recall more than copying in the context"
    return [
        knowledge.alpha_claim(text.format(model), PAPER, runs, model)
        for model in ("memoryllm", "flex-b3")
    ]
