"""How well do the keys' coefficients cluster, layer by layer?

MemoryLLM, Figure 6a (1B; the coefficient is not defined, about 0.9 by eye): high in all 24 layers, with a slight dip in some middle ones. Ours is the
mean silhouette (flexmemory/analysis/keys.py), so heights do not compare, shapes do. Expected: above the permuted control in every layer; the middle
third below the others.

    python -m experiments.run e9 --scale=cpu          # E1's runs
"""

from experiments import scales
from experiments.chart import layer_values, measured, thirds
from experiments.figure import Figure, Series
from experiments.verdicts import exact_claim, judge, mean_spread, not_run, number, within
from flexmemory.analysis.keys import cluster_coefficient

IDS = ("E9",)
SOURCE = "MemoryLLM Fig 6a"
MEASURES = (cluster_coefficient,)


def sweep(scale):
    return scales.sweep(scale, [scales.memoryllm(scales.layers(scale))])


def analyse(runs):
    series = []
    for key, family in (("coefficient", "memoryllm"), ("fresh", "other"), ("permuted", "attn_only")):
        columns = zip(*(layer_values(run, "cluster_coefficient", key) for run in runs), strict=True)
        series.append(
            Series(
                {"coefficient": "trained", "fresh": "before training"}.get(key, key),
                tuple((i, *(value or 0.0 for value in mean_spread(list(column)))) for i, column in enumerate(columns)),
                "line",
                family,
            )
        )
    figure = Figure(
        "coefficient",
        "Mean silhouette of the coefficients by layer",
        "Means over seeds.",
        "layer, from input",
        "mean silhouette",
        tuple(s for s in series if s.points),
    )
    return {"rows": measured(runs, "cluster_coefficient", "layers", ("layer", "coefficient", "fresh", "permuted")), "figures": [figure]}


def claims(runs):
    layers = [entry for run in runs for entry in number(run, "measures.cluster_coefficient.layers") or ()]
    above = sum(entry["coefficient"] > entry["permuted"] for entry in layers)
    text, paper = "The middle layers cluster less than the others", "a slight dip (figure only)"

    def dip(run):
        parts = thirds(layer_values(run, "cluster_coefficient", "coefficient"))
        return parts and parts[1] - (parts[0] + parts[2]) / 2

    found = within(runs, "memoryllm", dip)
    return [
        exact_claim(
            "Coefficients cluster better than permuted ones in every layer",
            "high everywhere (figure only)",
            f"{above} of {len(layers)} layers over all seeds",
            above == len(layers) if layers else None,
            len(runs),
            "needs memoryllm",
        ),
        judge(text, paper, found, -1, "silhouette") if found else not_run(text, paper, "needs memoryllm with at least three layers"),
    ]
