"""What does the vocabulary do? A token memory has a row per token, so its capacity grows with V
while the computing stays.

Reviewers of STEM asked for a vocabulary sweep; nothing is published. A ToL is smaller than the FFN
weights it replaces only while V < 8 d. Losses per token do not compare over tokenizers, so the
figure is bits per byte, and differences are paired inside one vocabulary. The sign asked: does a
larger vocabulary help the memory models more than the dense one?

    python -m experiments.run s25 --scale=cpu
"""

from experiments import scales
from experiments.chart import means
from experiments.figure import Figure, Series
from experiments.verdicts import difference, judge, mean_spread, minus, number

IDS = ("S25",)
SOURCE = "STEM; reviewers"
SCALES = ("smoke", "cpu", "gpu")
VOCABULARIES = {"smoke": (400, 500), "cpu": (512, 2048), "gpu": (4096, 16384)}
MODELS = ("dense", "memoryllm", "stem-third")


def sweep(scale):
    n, own = scales.layers(scale), scales.BASE[scale]["prepare.tokenizer"]
    models = [scales.dense(n), scales.memoryllm(n), scales.stem(n)]
    changes = [
        {} if f"bpe:{size}" == own else {"name": f"v{size}", "prepare.tokenizer": f"bpe:{size}"}
        for size in VOCABULARIES[scale]
    ]
    return scales.sweep(
        scale, [scales.changed(model, change) for change in changes for model in models]
    )


def sizes(runs):
    return sorted({run["config"]["model"]["vocab_size"] for run in runs})


def of(runs, size):
    """The runs of one vocabulary, named by their model alone."""
    return [
        run | {"variant": next(model for model in MODELS if run["variant"].startswith(model))}
        for run in runs
        if run["config"]["model"]["vocab_size"] == size
    ]


def analyse(runs):
    rows = [
        {"vocabulary": size} | row
        for size in sizes(runs)
        for row in means(
            of(runs, size),
            bits_per_byte="result.val_bits_per_byte",
            val_loss="result.val_loss",
            table_over_ffn="account.table_over_ffn",
        )
    ]
    lines = []
    for model in MODELS:
        points = [
            (
                size,
                *mean_spread(
                    [
                        number(run, "result.val_bits_per_byte")
                        for run in of(runs, size)
                        if run["variant"] == model
                    ]
                ),
            )
            for size in sizes(runs)
        ]
        lines.append(
            Series(
                model,
                tuple((x, y, spread or 0.0) for x, y, spread in points if y is not None),
                "line",
                model.partition("-")[0],
            )
        )
    figure = Figure(
        "bits",
        "Bits per byte against vocabulary",
        "Means over seeds.",
        "vocabulary V",
        "validation bits per byte",
        tuple(s for s in lines if s.points),
        log_x=True,
    )
    return {"rows": rows, "figures": [figure]}


def claims(runs):
    made, known = [], sizes(runs)
    for model in MODELS[1:]:
        text = f"A larger vocabulary helps {model} more than dense"
        paper = "not in the papers (asked by reviewers)"
        found = (
            minus(
                *(
                    difference(of(runs, size), model, "dense", "result.val_bits_per_byte")
                    for size in (known[-1], known[0])
                )
            )
            if len(known) > 1
            else None
        )
        made.append(
            judge(
                text,
                paper,
                found,
                -1,
                "bits per byte",
                needs=f"dense and {model} with two vocabularies",
            )
        )
    return made
