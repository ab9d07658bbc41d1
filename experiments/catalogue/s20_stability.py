"""Does the training loss spike?

STEM (figure, 350M): STEM's loss has no spikes, a hash-routed mixture of experts spikes at about
75B, 85B and 112B tokens. Here a spike is a logged training loss above the median of the 21 around
it by more than 6 times their median deviation, after the warm-up. flexmemory has no hash-routed
experts, so the contrast is not run. The report counts a run that diverges as failed.

    python -m experiments.run s20 --scale=cpu         # S3's runs
"""

import statistics

from experiments import scales
from experiments.chart import mean_lines, means
from experiments.measures import training_curve
from experiments.verdicts import exact_claim, not_run, number

IDS = ("S20",)
SOURCE = "STEM figure on stability"
MEASURES = (training_curve,)
AROUND, LIMIT = 10, 6.0


def sweep(scale):
    return scales.sweep(scale, "dense stem-third stem-full", "stem-350m")


def curve(run):
    return number(run, "measures.training_curve.points") or []


def spikes(run):
    """Number of spikes of the training loss; None without a curve."""
    if not curve(run):
        return None
    warmup = run["config"]["optimizer"]["warmup_steps"]
    losses = [loss for step, loss in curve(run) if step > warmup]
    count = 0
    for i, loss in enumerate(losses):
        near = losses[max(0, i - AROUND) : i + AROUND + 1]
        middle = statistics.median(near)
        count += loss - middle > LIMIT * max(statistics.median(abs(x - middle) for x in near), 1e-9)
    return count


def analyse(runs):
    columns = {"spikes": spikes, "logged_steps": lambda run: len(curve(run))}
    rows = means(runs, "result.val_loss", **columns)
    title, x, y = "Training loss as logged", "training step", "loss, nat per token"
    return {"rows": rows, "figures": [mean_lines("curve", title, runs, curve, x, y)]}


def claims(runs):
    text, paper = "STEM's training loss has no spikes", "no spikes (figure)"
    found = [spikes(run) for run in runs if run["variant"] == "stem-third" and curve(run)]
    claim = not_run(text, paper, "needs stem-third")
    if found:
        ours = f"{sum(found)} in {len(found)} runs"
        claim = exact_claim(text, paper, ours, not any(found), len(found))
    text = "A hash-routed mixture of experts spikes"
    paper = "at about 75B, 85B, 112B tokens (figure)"
    return [claim, not_run(text, paper, "flexmemory has no such block")]
