"""Are a table's rows nearly at right angles, and is that learned?

STEM, 1B: the 95th percentile of |cos| between rows of one table is 0.026, 0.030, 0.033 (layers 1,
7, 13). Random Gaussian rows of that width have 0.0217, so an *untrained* table is as spread: the
control that the paper lacks. Expected: trained rows at one to two times their random control.

    python -m experiments.run s17 --scale=cpu         # S3's run with a third of STEM layers
"""

import itertools

from experiments import scales
from experiments.chart import measured
from experiments.figure import Figure, Series
from experiments.layers import layer_mean
from experiments.verdicts import judge, limit_claim, number, within
from flexmemory.analysis.geometry import angular

IDS = ("S17",)
SOURCE = "STEM figure on angular spread"
MEASURES = (angular,)
ROWS = {  # whose cosines: label, colour
    "rows": ("trained", "stem"),
    "weighted": ("trained, as often as tokens occur", "flex"),
    "fresh": ("before training", "attn_only"),
}


def sweep(scale):
    return scales.sweep(scale, "stem-third", "stem-1b")


def ratio(run):
    trained, gaussian = (layer_mean("angular", key)(run) for key in ("rows.p95", "random_p95"))
    return trained and trained / gaussian


def analyse(runs):
    columns = "layer width random_p95 rows.p95 rows.mean weighted.p95 fresh.p95"
    rows = measured(runs, "angular", "layers", columns)
    layers = number(runs[0], "measures.angular.layers") if runs else None
    if not layers:
        return {"rows": rows, "figures": []}
    layer = layers[0]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(layer["edges"])]
    figure = Figure(
        "cosines",
        f"Cosines between rows of layer {layer['layer']}",
        f"Random pairs, {runs[0]['name']}.",
        "cosine",
        "density",
        tuple(
            Series(label, tuple(zip(middles, layer[key]["density"], strict=True)), family=family)
            for key, (label, family) in ROWS.items()
        ),
    )
    return {"rows": rows, "figures": [figure]}


def claims(runs):
    text = "Trained rows are at larger cosines than untrained ones"
    paper = "0.026 to 0.033; Gaussian rows 0.0217"
    trained, fresh = (layer_mean("angular", f"{which}.p95") for which in ("rows", "fresh"))
    found = within(runs, "stem-third", trained, fresh)
    near = (
        "Rows stay nearly at right angles: P95 |cos| below twice that of Gaussian rows (our limit)"
    )
    return [
        judge(text, paper, found, 1, "P95 |cos|", needs="stem-third"),
        limit_claim(near, "1.2 to 1.5 times", runs, "stem-third", ratio, 2.0, "times"),
    ]
