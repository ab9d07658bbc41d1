"""Scaled-down FFNs: do recall tasks suffer and reasoning tasks not?

MemoryLLM, Table 1 (1B, alpha 1.0 to 0.5): LAMBADA .361 to .109, SciQ (printed "SiQA") .783 to .538,
ARC-E .516 to .317, HellaSwag .372 to .330; Winogrande, BoolQ, PIQA fall by 4, 1 and 3%; the paper
counts HellaSwag with these. Several of them are near chance or majority: above chance (a quarter or
a half) the falls are 70, 46, 75% against 34, 95, 11 and 6%, a much weaker contrast than the raw 70,
31, 39 against 11, 4, 3 and 1%. Here recall questions about trained facts against copying from the
prompt (the in-context task that small models learn), both above chance, on the models of the
knowledge experiment that are trained on nothing else. Expected: recall falls first.

    python -m experiments.run e7 --scale=cpu          # three of the knowledge experiment's runs a
    seed
"""

from experiments.catalogue import knowledge
from experiments.chart import mean_lines, measured
from experiments.verdicts import judge, within
from flexmemory.analysis.probes import alpha

IDS = ("E7",)
SOURCE = "MemoryLLM Table 1"
SCALES = knowledge.SCALES
MEASURES = (alpha,)


def sweep(scale):
    return [
        row
        for row in knowledge.sweep(scale)
        if row["name"].startswith(knowledge.easiest(scale) + "-")
    ]


def analyse(runs):
    return {
        "rows": measured(
            runs,
            "alpha",
            "points",
            "alpha val_loss recall_acc reasoning_acc kinds.cloze kinds.copy kinds.lookup1"
            " kinds.lookup2",
        ),
        "figures": [
            mean_lines(
                "recall",
                "Recall under the α-probe",
                runs,
                knowledge.remaining("recall"),
                "α, scale of what FFNs and rows add",
                "recall above chance that is left, %",
            ),
            mean_lines(
                "reasoning",
                "Copying in the context under the α-probe",
                runs,
                knowledge.remaining("copy"),
                "α, scale of what FFNs and rows add",
                "accuracy above chance that is left, %",
            ),
        ],
    }


def claims(runs):
    runs = [run | {"variant": knowledge.model_of(run)} for run in runs]
    made = []
    for model in ("memoryllm", "flex-b3"):
        text = f"{model}: α = 0.5 costs recall more than copying in the context"
        paper = (
            "above chance LAMBADA −70, SciQ −46, ARC-E −75 %; HellaSwag −34, Winogrande −95,"
            " PIQA −11, BoolQ −6 %"
        )
        found = within(
            runs,
            model,
            lambda run: dict(knowledge.remaining("recall")(run)).get(0.5),
            lambda run: dict(knowledge.remaining("copy")(run)).get(0.5),
        )
        made.append(
            judge(
                text,
                paper,
                found,
                -1,
                "% of what was above chance",
                needs=f"{model} with both tasks well above chance",
            )
        )
    return made
