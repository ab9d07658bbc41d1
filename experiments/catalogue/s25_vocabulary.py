"""What does the vocabulary do to a memory with a row per token, while the computing stays?

Reviewers of STEM asked for a vocabulary sweep; nothing is published. A ToL is smaller than the FFN
weights it replaces only while V < 8 d. Losses per token do not compare over tokenizers, so the
figure is bits per byte, and differences are paired inside one vocabulary. The sign asked: does a
larger vocabulary help the memory models more than the dense one?

    python -m experiments.run s25 --scale=cpu
"""

from experiments import scales
from experiments.chart import mean_lines, means
from experiments.sweeps import merge
from experiments.verdicts import Difference, difference, judge, minus, number

IDS = ("S25",)
SOURCE = "STEM; reviewers"
SCALES = ("smoke", "cpu", "gpu")
VOCABULARIES = {"smoke": (400, 500), "cpu": (512, 2048), "gpu": (4096, 16384)}
MODELS = ("dense", "memoryllm", "stem-third")
BITS = "result.val_bits_per_byte"


def sweep(scale):
    own = scales.BASE[scale]["prepare.tokenizer"]
    models = scales.models(" ".join(MODELS), scales.layers(scale))
    rows = []
    for size in VOCABULARIES[scale]:
        change = {"name": f"v{size}", "prepare.tokenizer": f"bpe:{size}"}
        if f"bpe:{size}" == own:
            change = {}
        rows += scales.sweep(scale, [merge(model, change) for model in models])
    return rows


def vocabulary(run):
    return run["config"]["model"]["vocab_size"]


def by_vocabulary(runs):
    """{size: its runs, named by their model alone}, the smallest first."""
    groups = {}
    for run in sorted(runs, key=vocabulary):
        model = next(model for model in MODELS if run["variant"].startswith(model))
        groups.setdefault(vocabulary(run), []).append(run | {"variant": model})
    return groups


def analyse(runs):
    groups = by_vocabulary(runs)
    columns = "result.val_loss account.table_over_ffn"
    rows = [
        {"vocabulary": size} | row
        for size, group in groups.items()
        for row in means(group, columns, bits_per_byte=BITS)
    ]

    def curve(run):
        return [(vocabulary(run), number(run, BITS))]

    every = [run for group in groups.values() for run in group]
    title, x, y = "Bits per byte against vocabulary", "vocabulary V", "validation bits per byte"
    figure = mean_lines("bits", title, every, curve, x, y, log_x=True)
    return {"rows": rows, "figures": [figure]}


def claims(runs):
    made, groups = [], list(by_vocabulary(runs).values())
    for model in MODELS[1:]:
        text = f"A larger vocabulary helps {model} more than dense"
        paper = "not in the papers (asked by reviewers)"
        gaps = [difference(group, model, "dense", BITS) for group in groups]
        found = minus(gaps[-1], gaps[0]) if len(gaps) > 1 else Difference({})
        needs = f"dense and {model} with two vocabularies"
        made.append(judge(text, paper, found, -1, "bits per byte", needs=needs))
    return made
