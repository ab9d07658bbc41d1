"""Do late layers use a few keys far more than the rest?

MemoryLLM, Figure 6b (1B; the threshold is not given): the mean number of outlier coefficients per
token is higher in the last layers. Here an outlier is above 6 (and 3) standard deviations of its
token's coefficients. Expected: more in the last third of the layers than in the first.

    python -m experiments.run e10 --scale=cpu         # E1's runs
"""

from experiments import scales
from experiments.chart import layer_lines, measured
from experiments.layers import thirds_claim
from flexmemory.analysis.keys import outliers

IDS = ("E10",)
SOURCE = "MemoryLLM Fig 6b"
MEASURES = (outliers,)


def sweep(scale):
    return scales.sweep(scale, "memoryllm")


def analyse(runs):
    keys = {"above_3": "above 3 σ", "above_6": "above 6 σ", "fresh_above_3": "before training, 3 σ"}
    title, y = "Outlier coefficients per token", "outliers per token"
    caption = "Means over all tokens of the vocabulary and over seeds."
    figure = layer_lines("outliers", title, runs, "outliers", keys, y, caption)
    columns = "layer keys above_3 above_6 fresh_above_3 fresh_above_6"
    return {"rows": measured(runs, "outliers", "layers", columns), "figures": [figure]}


def claims(runs):
    made, paper = [], "more in the last layers (figure only)"
    for sigma in (6, 3):
        text = f"More coefficients above {sigma} σ in the last layers than in the first"
        key, unit = f"outliers.above_{sigma}", "per token"
        made.append(thirds_claim(text, paper, runs, "memoryllm", "last > first", key, unit))
    return made
