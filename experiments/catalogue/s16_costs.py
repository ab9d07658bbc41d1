"""Do the published parameter counts, savings and returns on compute follow from the shapes?

STEM: 1B dense 1.50B, a third STEM 1.41B active and 6.75B total; the saved share of a layer's
training FLOPs is d_ff / (4d + 2L + 3 d_ff), quoted as 21.7, 22.8, 23.9, 19.7, 24.8% for Qwen2.5
1.5B to 32B at L = 4,096; training ROI = accuracy over FLOPs per token, dense = 1: 1.08, 1.20, 1.33
for 350M third, half, full and 1.08 for 1B. The published totals of 350M (1.14, 1.85, 3.25B) do not
follow from its shapes. MemoryLLM Table 5: totals and active counts, three of whose rows are
swapped. Arithmetic alone: nothing is trained, so every scale gives the same. Expected: all but the
known misprints.

    python -m experiments.run s16 --scale=smoke
"""

import dataclasses

from experiments import scales
from experiments.figure import Figure, Series
from experiments.verdicts import exact_claim
from flexmemory.config import from_dict
from flexmemory.models.accounting import account
from flexmemory.recipes import MEMORYLLM_SIZES, STEM_SIZES, memoryllm_recipe, stem_recipe

IDS = ("S16",)
SOURCE = "STEM Tables 1-3; MemoryLLM Table 5"

QWEN = {
    "1.5B": (1536, 8960, 21.7),
    "3B": (2048, 11008, 22.8),
    "7B": (3584, 18944, 23.9),
    "14B": (5120, 13824, 19.7),
    "32B": (5120, 27648, 24.8),
}  # d, d_ff, percent quoted
ROI = {  # name: (size, STEM layers, average accuracy, ROI printed)
    "350m third": ("350m", "stem-third", 50.90, 1.08),
    "350m half": ("350m", "stem-half", 54.20, 1.20),
    "350m full": ("350m", "stem-full", 53.43, 1.33),
    "1b third": ("1b", "stem-third", 56.63, 1.08),
}
DENSE_ACCURACY = {"350m": 49.72, "1b": 55.82}
# as printed, in millions: total, active by beta; the swapped rows of beta 1 and 3 put right
TABLE5 = {
    "1b": (1208, {0: 402, 1: 503, 2: 604, 3: 704}),
    "750m": (737, {0: 245, 1: 307, 2: 368, 3: 430}),
    "250m": (265, {0: 88, 1: 110, 2: 132, 3: 154}),
}
CLAIMS = {  # how its rows begin: text, paper, tolerance
    "STEM 1b": ("STEM-1B's parameter counts follow from its shape", "1.50, 1.41, 6.75 B", 0.005),
    "FLOPs saved": (
        "The quoted savings of a layer's FLOPs follow from the formula",
        "21.7 to 24.8 %",
        0.005,
    ),
    "training ROI": (
        "The quoted training ROI follows from accuracy and active parameters",
        "1.08, 1.20, 1.33, 1.08, from FLOPs printed to two digits",
        0.02,
    ),
    "MemoryLLM": (
        "MemoryLLM's Table 5 follows from its shapes, with its swapped rows put right",
        "88 to 1208 M, cut to whole millions",
        0.01,
    ),
}


def sweep(scale):
    return []


def stem(size, layers):
    """Account of the paper's shape with these layers, named as in scales.models."""
    model = from_dict(stem_recipe(STEM_SIZES[size], "stem")).model
    pattern = scales.model(layers, account(model)["layers"])["model.pattern"]
    return account(dataclasses.replace(model, pattern=pattern))


def memoryllm(size, beta):
    config = memoryllm_recipe(MEMORYLLM_SIZES[size], "flex*24" if beta else "memoryllm*24")
    config.model.beta = str(beta or 3)
    return account(from_dict(config).model)


def counts():
    """Rows of quoted against computed numbers: {"what", "paper", "ours", "unit", "residual"}."""
    rows = []

    def add(what, paper, ours, unit):
        residual = ours / paper - 1
        rows.append(
            {"what": what, "paper": paper, "ours": ours, "unit": unit, "residual": residual}
        )

    third = stem("1b", "stem-third")
    add("STEM 1b: dense total", 1.50, stem("1b", "dense")["total_all"] / 1e9, "B parameters")
    add("STEM 1b: STEM total", 6.75, third["paper_total"] / 1e9, "B parameters")
    add("STEM 1b: STEM active", 1.41, third["active_all"] / 1e9, "B parameters")
    for name, (d, d_ff, paper) in QWEN.items():
        saved = 100 * d_ff / (4 * d + 2 * 4096 + 3 * d_ff)
        add(f"FLOPs saved in a layer, Qwen2.5 {name}", paper, saved, "%")
    for name, (size, layers, accuracy, paper) in ROI.items():
        dense, active = (stem(size, kind)["active_all"] for kind in ("dense", layers))
        roi = accuracy / DENSE_ACCURACY[size] * dense / active
        add(f"training ROI, {name}", paper, roi, "dense = 1")
    for size, (total, active) in TABLE5.items():
        for beta, paper in active.items():
            what, ours = f"MemoryLLM {size}, β = {beta}: active", memoryllm(size, beta)
            add(what, paper, ours["active"] / 1e6, "M parameters")
            if beta == 0:
                add(f"MemoryLLM {size}: total", total, ours["total"] / 1e6, "M parameters")
    return rows


def analyse(runs):
    rows = counts()
    figure = Figure(
        "residuals",
        "Computed against printed, in the order of the table",
        "",
        "row of the table",
        "difference, %",
        (Series("", tuple((i, 100 * row["residual"]) for i, row in enumerate(rows)), "points"),),
    )
    return {"rows": rows, "figures": [figure]}


def claims(runs):
    rows, made = counts(), []
    for begins, (text, paper, tolerance) in CLAIMS.items():
        residuals = {r["what"]: r["residual"] for r in rows if r["what"].startswith(begins)}
        near = [abs(residual) <= tolerance for residual in residuals.values()]
        worst = max(residuals, key=lambda what: abs(residuals[what]))
        ours = (
            f"{sum(near)} of {len(near)} within {tolerance:.1%}; worst {worst}:"
            f" {residuals[worst]:+.1%}"
        )
        made.append(exact_claim(text, paper, ours, all(near), 0))
    return made
