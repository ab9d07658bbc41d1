"""Are a table's rows nearly at right angles, and is that learned?

STEM, 1B: the 95th percentile of |cos| between rows of one table is 0.026, 0.030, 0.033 (layers 1,
7, 13). Random Gaussian rows of that width have 0.0217, so an *untrained* table is as spread: the
control that the paper lacks. Expected: trained rows at or above their random control, and within
twice of it.

    python -m experiments.run s17 --scale=cpu         # S3's run with a third of STEM layers
"""

from experiments import scales
from experiments.chart import measured
from experiments.figure import Figure, Series
from experiments.verdicts import judge, limit_claim, mean_spread, number, within
from flexmemory.analysis.geometry import angular

IDS = ("S17",)
SOURCE = "STEM figure on angular spread"
MEASURES = (angular,)


def sweep(scale):
    return scales.sweep(scale, [scales.stem(scales.layers(scale, "stem-1b"))], "stem-1b")


def mean_p95(run, which):
    layers = number(run, "measures.angular.layers") or []
    return mean_spread(
        [
            layer[which]["p95"] if isinstance(layer[which], dict) else layer[which]
            for layer in layers
        ]
    )[0]


def analyse(runs):
    figures = []
    if runs and number(runs[0], "measures.angular.layers"):
        layer = runs[0]["measures"]["angular"]["layers"][0]
        middles = [(a + b) / 2 for a, b in zip(layer["edges"], layer["edges"][1:], strict=False)]
        series = tuple(
            Series(label, tuple(zip(middles, layer[key]["density"], strict=True)), "line", family)
            for key, label, family in (
                ("rows", "trained", "stem"),
                ("weighted", "trained, as often as tokens occur", "flex"),
                ("fresh", "before training", "attn_only"),
            )
        )
        figures.append(
            Figure(
                "cosines",
                f"Cosines between rows of layer {layer['layer']}",
                f"Random pairs, {runs[0]['name']}.",
                "cosine",
                "density",
                series,
            )
        )
    return {
        "rows": measured(
            runs,
            "angular",
            "layers",
            "layer width random_p95 rows.p95 rows.mean weighted.p95 fresh.p95",
        ),
        "figures": figures,
    }


def claims(runs):
    text = "Trained rows are at larger cosines than untrained ones"
    paper = "0.026 to 0.033; Gaussian rows 0.0217"
    found = within(
        runs, "stem-third", lambda run: mean_p95(run, "rows"), lambda run: mean_p95(run, "fresh")
    )
    near, words = (
        "Rows stay nearly at right angles: P95 |cos| below twice that of Gaussian rows (our limit)",
        "1.2 to 1.5 times",
    )
    return [
        judge(text, paper, found, 1, "P95 |cos|", needs="stem-third"),
        limit_claim(near, words, runs, "stem-third", ratio, 2.0, "times"),
    ]


def ratio(run):
    return (
        mean_p95(run, "rows") / mean_p95(run, "random_p95")
        if mean_p95(run, "rows") is not None
        else None
    )
