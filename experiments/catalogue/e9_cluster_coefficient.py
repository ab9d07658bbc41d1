"""How well do the keys' coefficients cluster, layer by layer?

MemoryLLM, Figure 6a (1B; the coefficient is not defined, about 0.9 by eye): high in all 24 layers,
with a slight dip in some middle ones. Ours is the mean silhouette, so heights need not compare.
Expected: well above 0 and above both controls; the middle third below the others.

    python -m experiments.run e9 --scale=cpu          # E1's runs
"""

from experiments import scales
from experiments.chart import layer_lines, layer_values, measured, thirds
from experiments.layers import layer_mean
from experiments.verdicts import judge, within
from flexmemory.analysis.keys import cluster_coefficient

IDS = ("E9",)
SOURCE = "MemoryLLM Fig 6a"
MEASURES = (cluster_coefficient,)
CLEAR = 0.5  # from where a silhouette is commonly called a reasonable structure


def sweep(scale):
    return scales.sweep(scale, "memoryllm")


def analyse(runs):
    keys = {"coefficient": "trained", "fresh": "before training", "permuted": "permuted"}
    title, y = "Mean silhouette of the coefficients by layer", "mean silhouette"
    figure = layer_lines("coefficient", title, runs, "cluster_coefficient", keys, y)
    rows = measured(runs, "cluster_coefficient", "layers", "layer coefficient fresh permuted")
    return {"rows": rows, "figures": [figure]}


def claims(runs):
    made, paper = [], "not in the papers (no control)"
    own = layer_mean("cluster_coefficient", "coefficient")
    for control, words in (("permuted", "permuted ones"), ("fresh", "those before training")):
        text = f"Coefficients cluster better than {words}, mean over the layers"
        found = within(runs, "memoryllm", own, layer_mean("cluster_coefficient", control))
        made.append(judge(text, paper, found, 1, "silhouette", needs="memoryllm"))
    text = (
        "Coefficients form clear clusters: their silhouette is above 0.5 (our limit), mean over"
        " the layers"
    )
    paper, unit = "about 0.9 (figure, not defined)", "silhouette above the limit"
    found = within(runs, "memoryllm", own, lambda run: CLEAR)
    made.append(judge(text, paper, found, 1, unit, needs="memoryllm"))
    text, paper = "The middle layers cluster less than the others", "a slight dip (figure only)"
    needs = "memoryllm with at least three layers"
    found = within(runs, "memoryllm", dip, lambda run: 0.0)
    return [*made, judge(text, paper, found, -1, "silhouette", needs=needs)]


def dip(run):
    """How far the middle third lies above the mean of the other two."""
    parts = thirds(layer_values(run, "cluster_coefficient", "coefficient"))
    return parts and parts[1] - (parts[0] + parts[2]) / 2
