"""Which layers' tables are nearly low-rank?

MemoryLLM, Figure 13 (1B, MemoryLLM and flex; values not given): the normalised singular values are
heavy-tailed, and the last layers' tables are easier to compress than the middle ones'. Expected: a
smaller effective rank in the last third of the layers than in the middle one.

    python -m experiments.run e15 --scale=cpu         # E2's runs
"""

from experiments import scales
from experiments.chart import by_layer, measured, third
from experiments.figure import Figure, Series
from experiments.verdicts import by_variant, judge, mean_spread, number, within
from flexmemory.analysis.geometry import spectra

IDS = ("E15",)
SOURCE = "MemoryLLM Fig 13"
MEASURES = (spectra,)


def sweep(scale):
    n = scales.layers(scale)
    return scales.sweep(scale, [scales.memoryllm(n), scales.flex(n, 3)])


def analyse(runs):
    figures = [
        by_layer(
            "effective-rank",
            "Effective rank by layer",
            runs,
            "spectra",
            "effective_rank",
            "exp of the entropy of the spectrum",
        )
    ]
    for variant, group in by_variant(runs).items():
        found = [number(run, "measures.spectra.layers") for run in group]
        series = []
        for entries in zip(*(layers for layers in found if layers), strict=False):
            values = [
                mean_spread(column)[0]
                for column in zip(*(entry["singular_values"] for entry in entries), strict=True)
            ]
            series.append(
                Series(
                    f"layer {entries[0]['layer']}",
                    tuple(zip(entries[0]["ranks"], values, strict=True)),
                    "line",
                    variant.partition("-")[0],
                    dashed=entries[0]["layer"] % 2 == 1,
                )
            )
        if series:
            figures.append(
                Figure(
                    f"spectrum-{variant}",
                    f"Singular values of the tables of {variant}",
                    "Over the largest of each layer; means over seeds.",
                    "rank",
                    "singular value over the largest",
                    tuple(series),
                    log_y=True,
                )
            )
    return {
        "rows": measured(runs, "spectra", "layers", "layer width effective_rank"),
        "figures": figures,
    }


def claims(runs):
    made, paper = [], "yes (figure only)"
    middle, last = (third("spectra", "effective_rank", i) for i in (1, 2))
    for variant in ("memoryllm", "flex-b3"):
        text = f"{variant}: the last layers' tables are easier to compress than the middle ones'"
        found = within(runs, variant, last, middle)
        needs = f"{variant} with at least three layers"
        made.append(judge(text, paper, found, -1, "ranks", needs=needs))
    return made
