"""Which layers' tables are nearly low-rank?

MemoryLLM, Figure 13 (1B, MemoryLLM and flex; values not given): the normalised singular values are
heavy-tailed, and the last layers' tables are easier to compress than the middle ones'. Expected: a
smaller effective rank in the last third of the layers than in the middle one.

    python -m experiments.run e15 --scale=cpu         # E2's runs
"""

from experiments import scales
from experiments.chart import by_layer, measured
from experiments.figure import Figure, Series
from experiments.layers import thirds_claim
from experiments.verdicts import by_variant, mean_spread, number
from flexmemory.analysis.geometry import spectra

IDS = ("E15",)
SOURCE = "MemoryLLM Fig 13"
MEASURES = (spectra,)


def sweep(scale):
    return scales.sweep(scale, "memoryllm flex-b3")


def analyse(runs):
    title, y = "Effective rank by layer", "exp of the entropy of the spectrum"
    figures = [by_layer("effective-rank", title, runs, "spectra", "effective_rank", y)]
    for variant, group in by_variant(runs).items():
        found = filter(None, (number(run, "measures.spectra.layers") for run in group))
        series = tuple(spectrum(layer, variant) for layer in zip(*found, strict=False))
        if series:
            figures.append(
                Figure(
                    f"spectrum-{variant}",
                    f"Singular values of the tables of {variant}",
                    "Over the largest of each layer; means over seeds.",
                    "rank",
                    "singular value over the largest",
                    series,
                    log_y=True,
                )
            )
    rows = measured(runs, "spectra", "layers", "layer width effective_rank")
    return {"rows": rows, "figures": figures}


def spectrum(seeds, variant):
    """Mean singular values of one layer, of which ``seeds`` are the measures."""
    layer, ranks = seeds[0]["layer"], seeds[0]["ranks"]
    values = zip(*(seed["singular_values"] for seed in seeds), strict=True)
    points = tuple(zip(ranks, (mean_spread(column)[0] for column in values), strict=True))
    family = variant.partition("-")[0]
    return Series(f"layer {layer}", points, "line", family, dashed=layer % 2 == 1)


def claims(runs):
    text = "{}: the last layers' tables are easier to compress than the middle ones'"
    paper, order, key = "yes (figure only)", "last < middle", "spectra.effective_rank"
    return [
        thirds_claim(text.format(variant), paper, runs, variant, order, key, "ranks")
        for variant in ("memoryllm", "flex-b3")
    ]
