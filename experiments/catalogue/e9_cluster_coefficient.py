"""How well do the keys' coefficients cluster, layer by layer?

MemoryLLM, Figure 6a (1B; the coefficient is not defined, about 0.9 by eye): high in all 24 layers,
with a slight dip in some middle ones. Ours is the mean silhouette (flexmemory/analysis/keys.py), so
heights need not compare. Expected: well above 0 and above both controls; the middle third below the
others.

    python -m experiments.run e9 --scale=cpu          # E1's runs
"""

from experiments import scales
from experiments.chart import layer_lines, layer_values, measured, thirds
from experiments.verdicts import judge, mean_spread, within
from flexmemory.analysis.keys import cluster_coefficient

IDS = ("E9",)
SOURCE = "MemoryLLM Fig 6a"
MEASURES = (cluster_coefficient,)
CLEAR = 0.5  # from where a silhouette is commonly called a reasonable structure


def sweep(scale):
    return scales.sweep(scale, [scales.memoryllm(scales.layers(scale))])


def analyse(runs):
    keys = {"coefficient": "trained", "fresh": "before training", "permuted": "permuted"}
    figure = layer_lines(
        "coefficient",
        "Mean silhouette of the coefficients by layer",
        runs,
        "cluster_coefficient",
        keys,
        "mean silhouette",
    )
    return {
        "rows": measured(runs, "cluster_coefficient", "layers", "layer coefficient fresh permuted"),
        "figures": [figure],
    }


def claims(runs):
    made = []
    for control, words in (("permuted", "permuted ones"), ("fresh", "those before training")):
        text = f"Coefficients cluster better than {words}, mean over the layers"
        paper = "not in the papers (no control)"
        found = within(
            runs,
            "memoryllm",
            lambda run: layer_mean(run, "coefficient"),
            lambda run, control=control: layer_mean(run, control),
        )
        made.append(judge(text, paper, found, 1, "silhouette", needs="memoryllm"))
    text = (
        "Coefficients form clear clusters: their silhouette is above 0.5 (our limit), mean over"
        " the layers"
    )
    paper = "about 0.9 (figure, not defined)"
    found = within(runs, "memoryllm", lambda run: layer_mean(run, "coefficient"), lambda run: CLEAR)
    made.append(judge(text, paper, found, 1, "silhouette above the limit", needs="memoryllm"))
    text, paper = "The middle layers cluster less than the others", "a slight dip (figure only)"

    def dip(run):
        parts = thirds(layer_values(run, "cluster_coefficient", "coefficient"))
        return parts and parts[1] - (parts[0] + parts[2]) / 2

    found = within(runs, "memoryllm", dip)
    return [
        *made,
        judge(text, paper, found, -1, "silhouette", needs="memoryllm with at least three layers"),
    ]


def layer_mean(run, key):
    return mean_spread(layer_values(run, "cluster_coefficient", key))[0]
