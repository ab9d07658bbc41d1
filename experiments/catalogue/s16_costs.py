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
    "350m third": ("350m", "third", 50.90, 1.08),
    "350m half": ("350m", "half", 54.20, 1.20),
    "350m full": ("350m", "full", 53.43, 1.33),
    "1b third": ("1b", "third", 56.63, 1.08),
}
DENSE_ACCURACY = {"350m": 49.72, "1b": 55.82}
TABLE5 = {  # as printed, in millions, the swapped rows of beta 1 and 3 put right
    "1b": (1208, {0: 402, 1: 503, 2: 604, 3: 704}),
    "750m": (737, {0: 245, 1: 307, 2: 368, 3: 430}),
    "250m": (265, {0: 88, 1: 110, 2: 132, 3: 154}),
}


def sweep(scale):
    return []


def stem_model(size, share):
    """Config of a STEM model: the paper's shape with none, a third, half or all but the first layer
    as STEM layers.
    """
    model = from_dict(stem_recipe(STEM_SIZES[size], "stem")).model
    n = account(model)["layers"]
    if share == "third":
        return model
    pattern = {
        "none": f"dense*{n}",
        "half": "(dense stem)*" + str(n // 2),
        "full": f"dense stem*{n - 1}",
    }[share]
    return dataclasses.replace(model, pattern=pattern)


def counts():
    """Rows of quoted against computed numbers: {"what", "paper", "ours", "unit"}."""
    rows = []
    for size, quoted in (
        (
            "1b",
            {
                "none": ("dense total", 1.50, "total_all"),
                "third": ("STEM total", 6.75, "paper_total"),
            },
        ),
    ):
        for share, (what, paper, key) in quoted.items():
            rows.append(
                {
                    "what": f"STEM {size}: {what}",
                    "paper": paper,
                    "ours": account(stem_model(size, share))[key] / 1e9,
                    "unit": "B parameters",
                }
            )
        rows.append(
            {
                "what": f"STEM {size}: STEM active",
                "paper": 1.41,
                "ours": account(stem_model(size, "third"))["active_all"] / 1e9,
                "unit": "B parameters",
            }
        )
    for name, (d, d_ff, paper) in QWEN.items():
        rows.append(
            {
                "what": f"FLOPs saved in a layer, Qwen2.5 {name}",
                "paper": paper,
                "ours": 100 * d_ff / (4 * d + 2 * 4096 + 3 * d_ff),
                "unit": "%",
            }
        )
    for name, (size, share, accuracy, paper) in ROI.items():
        dense, stem = (account(stem_model(size, s))["active_all"] for s in ("none", share))
        rows.append(
            {
                "what": f"training ROI, {name}",
                "paper": paper,
                "ours": accuracy / DENSE_ACCURACY[size] * dense / stem,
                "unit": "dense = 1",
            }
        )
    for size, (total, active) in TABLE5.items():
        for beta, paper in active.items():
            pattern = "flex*24" if beta else "memoryllm*24"
            config = memoryllm_recipe(MEMORYLLM_SIZES[size], pattern)
            config.model.beta = str(beta or 3)
            numbers = account(from_dict(config).model)
            rows.append(
                {
                    "what": f"MemoryLLM {size}, β = {beta}: active",
                    "paper": paper,
                    "ours": numbers["active"] / 1e6,
                    "unit": "M parameters",
                }
            )
            if not beta:
                rows.append(
                    {
                        "what": f"MemoryLLM {size}: total",
                        "paper": total,
                        "ours": numbers["total"] / 1e6,
                        "unit": "M parameters",
                    }
                )
    return [row | {"residual": row["ours"] / row["paper"] - 1} for row in rows]


def analyse(runs):
    rows = counts()
    points = tuple((i, 100 * row["residual"]) for i, row in enumerate(rows))
    return {
        "rows": rows,
        "figures": [
            Figure(
                "residuals",
                "Computed against printed, in the order of the table",
                "",
                "row of the table",
                "difference, %",
                (Series("", points, "points"),),
            )
        ],
    }


def claims(runs):
    rows = counts()

    def judged(text, paper, begins, tolerance):
        mine = [row for row in rows if row["what"].startswith(begins)]
        worst = max(mine, key=lambda row: abs(row["residual"]))
        return exact_claim(
            text,
            paper,
            f"{sum(abs(row['residual']) <= tolerance for row in mine)} of {len(mine)} within"
            f" {tolerance:.1%}; worst {worst['what']}: {worst['residual']:+.1%}",
            abs(worst["residual"]) <= tolerance,
            0,
        )

    return [
        judged(
            "STEM-1B's parameter counts follow from its shape",
            "1.50, 1.41, 6.75 B",
            "STEM 1b",
            0.005,
        ),
        judged(
            "The quoted savings of a layer's FLOPs follow from the formula",
            "21.7 to 24.8 %",
            "FLOPs saved",
            0.005,
        ),
        judged(
            "The quoted training ROI follows from accuracy and active parameters",
            "1.08, 1.20, 1.33, 1.08, from FLOPs printed to two digits",
            "training ROI",
            0.02,
        ),
        judged(
            "MemoryLLM's Table 5 follows from its shapes, with its swapped rows put right",
            "88 to 1208 M, cut to whole millions",
            "MemoryLLM",
            0.01,
        ),
    ]
