"""Intelligence computes, knowledge is read: does C/M move facts and puzzles in opposite ways?

No paper tests this directly; MemoryLLM's Table 1 suggests it (scaling FFNs down by alpha costs
recall tasks more than reasoning tasks). Models are trained on nothing but invented biographies and
puzzles whose answer stands in the prompt, at two sizes and two numbers of people, with all compute,
flex beta 3, and all memory at equal total parameters. Recall counts in bits: a question has 16
possible answers, so an accuracy p is worth log2(16) - H(p) - (1-p) log2(15) bits of each of a
person's five facts; divided by parameters, total and active; the verdict counts embedding and head,
which hold facts too. Expected from the slogan: memory holds more bits per active parameter; compute
is better at the puzzles; alpha hurts recall first.

    python -m experiments.run knowledge --scale=cpu     # twelve runs a seed
"""

import math
import re

from experiments import scales
from experiments.chart import compute_share, mean_lines, means
from experiments.figure import Figure, Series
from experiments.sweeps import product
from experiments.verdicts import at, judge, means_at, number, order_claim, within
from flexmemory.analysis.probes import alpha

IDS = ("KNOWLEDGE",)
SOURCE = "MemoryLLM Table 1; ours"
SCALES = ("smoke", "cpu", "gpu")
MEASURES = (alpha,)
# above chance, as a share of what is above it: below that a task says nothing when it falls
LEARNED = 0.5
ANSWERS, FACTS = 16, 5  # possible answers of a question, facts of a person
SOURCES = {
    "smoke": "facts:people={},docs=6+tasks:n=60,eval=12,length=4,pairs=3",
    "cpu": "facts:people={},docs=40+tasks:n=24000,words=32,length=24,pairs=3",
    "gpu": "facts:people={},docs=40+tasks:n=400000",
}
PEOPLE = {"smoke": (3, 4), "cpu": (32, 128), "gpu": (1000, 10000)}
LAYERS = {"smoke": 3, "cpu": 4, "gpu": 12}
# d_model: d_ff
WIDTHS = {"smoke": {32: 88}, "cpu": {32: 88, 48: 128}, "gpu": {384: 1024, 768: 2048}}
OTHERS = {
    "smoke": {},
    "cpu": {"data.document_mask": True},
    "gpu": {"prepare.tokenizer": "bpe:4096", "data.seq_len": 256, "data.document_mask": True},
}


def places(scale):
    """{name: overrides} of each number of people at each width."""
    return {
        f"p{people}-d{d}": OTHERS[scale]
        | {
            "prepare.source": SOURCES[scale].format(people),
            "model.d_model": d,
            "model.d_ff": d_ff,
        }
        for people in PEOPLE[scale]
        for d, d_ff in WIDTHS[scale].items()
    }


def easiest(scale):
    """The place with the fewest facts and the widest models, which have learned the most: E7's and
    E16's.
    """
    return f"p{PEOPLE[scale][0]}-d{max(WIDTHS[scale])}"


def sweep(scale):
    at_places = [{"name": name} | overrides for name, overrides in places(scale).items()]
    models = scales.models("dense flex-b3 memoryllm", LAYERS[scale])
    return scales.sweep(scale, product(at_places, models))


def place_of(run):
    return "-".join(run["variant"].split("-")[:2])


def named_by_model(runs):
    """The runs with their model alone as variant, the place left out."""
    return [run | {"variant": run["variant"].split("-", 2)[2]} for run in runs]


def by_place(runs):
    """{place: its runs, named by model}"""
    names = dict.fromkeys(map(place_of, runs))
    return {name: named_by_model([run for run in runs if place_of(run) == name]) for name in names}


def setting(run, name, default=None):
    """A number in the source of the run's text, e.g. of people."""
    found = re.search(rf"\b{name}=(\d+)", run["overrides"]["prepare.source"])
    return int(found[1]) if found else default


def bits(accuracy):
    """Bits that answers right with probability p carry of one of 16 equally likely values; 0 at
    chance and below.
    """
    if accuracy <= 1 / ANSWERS:
        return 0.0
    p = accuracy
    entropy = -p * math.log2(p) - ((1 - p) * math.log2((1 - p) / (ANSWERS - 1)) if p < 1 else 0)
    return math.log2(ANSWERS) - entropy


def recalled(run):
    """Bits recalled of all facts of all people."""
    accuracy = number(run, "result.recall_acc")
    return None if accuracy is None else bits(accuracy) * FACTS * setting(run, "people")


def per(count):
    """A function of a run: bits recalled per parameter of an account's ``count``."""

    def of(run):
        found = recalled(run)
        return None if found is None else found / run["account"][count]

    return of


def remaining(task):
    """A function of a run: [(alpha, what is left of the accuracy above chance in %)] of a task,
    "recall" or "copy"; [] where the whole model is hardly above chance.
    """

    def curve(run):
        path, answers = "recall_acc", ANSWERS
        if task == "copy":
            path, answers = "kinds.copy", setting(run, "length", 8)
        points = number(run, "measures.alpha.points") or []
        found = [(p["alpha"], number(p, path)) for p in points if number(p, path) is not None]
        chance = 1 / answers
        above = [(alpha, (accuracy - chance) / (1 - chance)) for alpha, accuracy in found]
        if not above or above[0][1] < LEARNED:
            return []
        return [(alpha, 100 * value / above[0][1]) for alpha, value in above]

    return curve


def alpha_figures(runs, prefix=""):
    def figure(task, name, title, what):
        x, y = "α, scale of what FFNs and rows add", f"{what} above chance that is left, %"
        title = f"{title} under the α-probe"
        return mean_lines(prefix + name, title, runs, remaining(task), x, y)

    return [
        figure("recall", "recall", "Recall", "recall"),
        figure("copy", "reasoning", "Copying in the context", "accuracy"),
    ]


def alpha_claim(text, paper, runs, model):
    """The claim that alpha = 0.5 costs a model more of its recall than of its copying."""
    recall, copy = (at(remaining(task), 0.5) for task in ("recall", "copy"))
    needs = f"{model} with both tasks well above chance"
    found = within(runs, model, recall, copy)
    return judge(text, paper, found, -1, "% of what was above chance", needs=needs)


def percent(path):
    return lambda run: None if number(run, path) is None else 100 * number(run, path)


def ratio_figure(name, title, runs, value, y):
    series = []
    for place, group in by_place(runs).items():
        points = means_at((100 * compute_share(run), number(run, value)) for run in group)
        if points:
            series.append(Series(place, points))
    caption = "p: people in the training text; d: width of the model. Means over seeds."
    return Figure(name, title, caption, "compute share C of the FFN weights, %", y, tuple(series))


def analyse(runs):
    rows = means(
        runs,
        "account.total account.active result.val_loss result.recall_acc result.reasoning_acc"
        " result.kinds.copy result.kinds.lookup1 result.kinds.lookup2",
        bits_recalled=recalled,
        bits_per_parameter=per("total"),
        bits_per_active_parameter=per("active"),
        bits_per_active_parameter_with_embedding_and_head=per("active_all"),
    )
    title, y = "Recall against the C/M ratio", "recall of trained facts, % right"
    recall = ratio_figure("recall", title, runs, percent("result.recall_acc"), y)
    title, y = "Copying in the context against the C/M ratio", "copying, % right"
    copying = ratio_figure("reasoning", title, runs, percent("result.kinds.copy"), y)
    title, y = "Bits recalled per active parameter", "bits per active parameter"
    per_active = ratio_figure("bits-active", title, runs, per("active_all"), y)
    largest = list(by_place(runs).values())[-1] if runs else []
    figures = [recall, copying, per_active, *alpha_figures(largest, "alpha-")]
    return {"rows": rows, "figures": figures}


MORE_BITS = "memory recalls more bits per active parameter, embedding and head counted"
JUDGED = (  # of each place: text, sign of memory against compute, number, unit
    ("memory recalls more facts at equal total parameters", ">", recalled, "bits"),
    (MORE_BITS, ">", per("active_all"), "bits"),
    ("compute copies better in the context", "<", "result.kinds.copy", "accuracy"),
    ("compute is better at all in-context tasks", "<", "result.reasoning_acc", "accuracy"),
)


def claims(runs):
    made, groups = [], by_place(runs)
    own = setting(runs[0], "people") if runs else None
    scale = next((scale for scale, counts in PEOPLE.items() if own in counts), "cpu")
    for place in places(scale):
        here = groups.get(place, [])
        for what, sign, value, unit in JUDGED:
            text, order = f"{place}: {what}", f"memoryllm {sign} dense"
            made.append(order_claim(text, "not in the papers", here, order, value, unit))
        if place != easiest(scale):  # that one is E7's
            text = f"{place}: α = 0.5 costs MemoryLLM more of its recall than of its copying"
            paper = "recall tasks fall, reasoning tasks hardly (Table 1)"
            made.append(alpha_claim(text, paper, here, "memoryllm"))
    return made
