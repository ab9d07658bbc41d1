"""Intelligence computes, knowledge is read: does the C/M ratio move facts and in-context tasks in
opposite ways?

No paper tests this directly; MemoryLLM's Table 1 suggests it (scaling FFNs down by alpha costs
recall tasks more than reasoning tasks). Models are trained on nothing but invented biographies and
puzzles whose answer stands in the prompt, at two sizes and two numbers of people, with all compute,
flex beta 3, and all memory at equal total parameters. Recall counts in bits: a question has 16
possible answers, so an accuracy p is worth log2(16) - H(p) - (1-p) log2(15) bits of each of a
person's five facts; divided by parameters, total and active; the verdict counts embedding and head,
which hold facts too. Expected from the
slogan: memory holds more bits per active parameter; compute is better at the puzzles; and alpha
hurts recall first.

    python -m experiments.run knowledge --scale=cpu

Cost at cpu scale: twelve runs a seed.
"""

import math

from experiments import scales
from experiments.chart import compute_share, mean_lines, mean_of, means
from experiments.figure import Figure, Series
from experiments.verdicts import by_variant, difference, judge, number, within
from flexmemory.analysis.probes import alpha

IDS = ("KNOWLEDGE",)
SOURCE = "MemoryLLM Table 1; ours"
SCALES = ("smoke", "cpu", "gpu")
MEASURES = (alpha,)
# above chance, as a share of what is above it: below that a task says nothing when it falls
LEARNED = 0.5
ANSWERS, FACTS = 16, 5  # possible answers of a question, facts of a person
# source with the number of people left open, the two numbers, layers, widths (d_model, d_ff), other
# settings
TEXT = {
    "smoke": (
        "facts:people={},docs=6+tasks:n=60,eval=12,length=4,pairs=3",
        (3, 4),
        3,
        ((32, 88),),
        {},
    ),
    "cpu": (
        "facts:people={},docs=40+tasks:n=24000,words=32,length=24,pairs=3",
        (32, 128),
        4,
        ((32, 88), (48, 128)),
        {"data.document_mask": True},
    ),
    "gpu": (
        "facts:people={},docs=40+tasks:n=400000",
        (1000, 10000),
        12,
        ((384, 1024), (768, 2048)),
        {"prepare.tokenizer": "bpe:4096", "data.seq_len": 256, "data.document_mask": True},
    ),
}


def models(scale, n):
    return [scales.dense(n), scales.flex(n, 3), scales.memoryllm(n)]


def sweep(scale):
    source, counts, n, widths, others = TEXT[scale]
    places = [
        {
            "name": f"p{people}-d{d}",
            "prepare.source": source.format(people),
            "model.d_model": d,
            "model.d_ff": d_ff,
        }
        | others
        for people in counts
        for d, d_ff in widths
    ]
    return scales.sweep(
        scale, [scales.changed(place, model) for place in places for model in models(scale, n)]
    )


def bits(accuracy):
    """Bits that answers right with probability p carry of one of 16 equally likely values; 0 at
    chance and below.
    """
    if accuracy is None or accuracy <= 1 / ANSWERS:
        return None if accuracy is None else 0.0
    p = accuracy
    entropy = -p * math.log2(p) - ((1 - p) * math.log2((1 - p) / (ANSWERS - 1)) if p < 1 else 0)
    return math.log2(ANSWERS) - entropy


def people(run):
    return int(run["overrides"]["prepare.source"].partition("people=")[2].partition(",")[0])


def recalled(run):
    """Bits recalled of all facts of all people."""
    each = bits(number(run, "result.recall_acc"))
    return None if each is None else each * FACTS * people(run)


def per(run, count):
    found = recalled(run)
    return None if found is None else found / run["account"][count]


def place_of(run):
    return "-".join(run["variant"].split("-")[:2])


def model_of(run):
    return run["variant"].removeprefix(place_of(run) + "-")


def places(runs):
    return list(dict.fromkeys(place_of(run) for run in runs))


def scale_of(runs):
    """The scale of the runs; cpu without any."""
    return next(
        (scale for scale, (_, counts, *_) in TEXT.items() if runs and people(runs[0]) in counts),
        "cpu",
    )


def planned_places(scale):
    """All places of a scale, whether they have runs yet or not."""
    _, counts, _, widths, _ = TEXT[scale]
    return [f"p{people}-d{d}" for people in counts for d, _ in widths]


def easiest(scale):
    """The place with the fewest facts and the widest models, which have learned the most: E7's and
    E16's.
    """
    _, counts, _, widths, _ = TEXT[scale]
    return f"p{counts[0]}-d{widths[-1][0]}"


def of(runs, place):
    return [run | {"variant": model_of(run)} for run in runs if place_of(run) == place]


def percent(path):
    return lambda run: None if number(run, path) is None else 100 * number(run, path)


def ratio_figure(name, title, runs, value, y):
    series = []
    for place in places(runs):
        points = [
            (100 * compute_share(group[0]), *mean_of(group, value))
            for group in by_variant(of(runs, place)).values()
        ]
        series.append(
            Series(place, tuple(sorted((x, m, s or 0.0) for x, m, s in points if m is not None)))
        )
    return Figure(
        name,
        title,
        "p: people in the training text; d: width of the model. Means over seeds.",
        "compute share C of the FFN weights, %",
        y,
        tuple(s for s in series if s.points),
    )


def above_chance(task, accuracy, run):
    """How far an accuracy of "recall" or "copy" is above guessing, as a share of what is above it;
    None where it is not given.
    """
    chance = (
        1 / ANSWERS
        if task == "recall"
        else 1
        / int(run["overrides"]["prepare.source"].partition("length=")[2].partition(",")[0] or 8)
    )
    return None if accuracy is None else (accuracy - chance) / (1 - chance)


def remaining(task):
    """Of a task, "recall" or "copy", what is left of its accuracy above chance at each alpha, in
    percent; nothing where it was hardly above.
    """

    def at(point, run):
        return above_chance(
            task, point["recall_acc"] if task == "recall" else point["kinds"].get("copy"), run
        )

    def curve(run):
        points = (number(run, "measures.alpha") or {}).get("points", [])
        whole = at(points[0], run) if points else None
        if whole is None or whole < LEARNED:
            return []
        return [(point["alpha"], 100 * at(point, run) / whole) for point in points]

    return curve


def analyse(runs):
    rows = means(
        runs,
        "account.total account.active result.recall_acc",
        bits_recalled=recalled,
        bits_per_parameter=lambda run: per(run, "total"),
        bits_per_active_parameter=lambda run: per(run, "active"),
        bits_per_active_parameter_with_embedding_and_head=lambda run: per(run, "active_all"),
        reasoning_acc="result.reasoning_acc",
        copy="result.kinds.copy",
        lookup1="result.kinds.lookup1",
        lookup2="result.kinds.lookup2",
        val_loss="result.val_loss",
    )
    largest = of(runs, places(runs)[-1]) if runs else []
    return {
        "rows": rows,
        "figures": [
            ratio_figure(
                "recall",
                "Recall against the C/M ratio",
                runs,
                percent("result.recall_acc"),
                "recall of trained facts, % right",
            ),
            ratio_figure(
                "reasoning",
                "Copying in the context against the C/M ratio",
                runs,
                percent("result.kinds.copy"),
                "copying, % right",
            ),
            ratio_figure(
                "bits-active",
                "Bits recalled per active parameter",
                runs,
                lambda run: per(run, "active_all"),
                "bits per active parameter",
            ),
            mean_lines(
                "alpha-recall",
                "Recall under the α-probe",
                largest,
                remaining("recall"),
                "α, scale of what FFNs and rows add",
                "recall above chance that is left, %",
            ),
            mean_lines(
                "alpha-reasoning",
                "Copying in the context under the α-probe",
                largest,
                remaining("copy"),
                "α, scale of what FFNs and rows add",
                "accuracy above chance that is left, %",
            ),
        ],
    }


def claims(runs):
    made = []
    judged = (
        ("memory recalls more facts at equal total parameters", recalled, 1, "bits"),
        (
            "memory recalls more bits per active parameter, embedding and head counted",
            lambda run: per(run, "active_all"),
            1,
            "bits",
        ),
        (
            "compute copies better in the context",
            lambda run: number(run, "result.kinds.copy"),
            -1,
            "accuracy",
        ),
        (
            "compute is better at all in-context tasks",
            lambda run: number(run, "result.reasoning_acc"),
            -1,
            "accuracy",
        ),
    )
    scale = scale_of(runs)
    for place in planned_places(scale):
        here = of(runs, place)
        for what, value, sign, unit in judged:
            found = difference(
                [run | {"value": value(run)} for run in here], "memoryllm", "dense", "value"
            )
            text = f"{place}: {what}"
            made.append(
                judge(
                    text,
                    "not in the papers",
                    found,
                    sign,
                    unit,
                    needs="dense and memoryllm of one seed",
                )
            )
        if place != easiest(scale):  # that one is E7's
            found = within(
                here,
                "memoryllm",
                lambda run: dict(remaining("recall")(run)).get(0.5),
                lambda run: dict(remaining("copy")(run)).get(0.5),
            )
            text = f"{place}: α = 0.5 costs MemoryLLM more of its recall than of its copying"
            paper = "recall tasks fall, reasoning tasks hardly (Table 1)"
            made.append(
                judge(
                    text,
                    paper,
                    found,
                    -1,
                    "% of what was above chance",
                    needs="memoryllm with both tasks well above chance",
                )
            )
    return made
