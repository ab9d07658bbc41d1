"""Does the training loss spike?

STEM (figure, 350M): STEM's loss has no spikes, a hash-routed mixture of experts spikes at about
75B, 85B and 112B tokens. Here a spike is a logged training loss above the median of the 21 around
it by more than 6 times their median deviation, after the warm-up. flexmemory has no hash-routed
experts, so the contrast is not run. A run that diverges has no result: the report counts it as
failed.

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
    n = scales.layers(scale, "stem-350m")
    return scales.sweep(
        scale, [scales.dense(n), scales.stem(n), scales.stem(n, "full")], "stem-350m"
    )


def spikes(run):
    """Number of spikes of the training loss; None without a curve."""
    curve = number(run, "measures.training_curve.points")
    if not curve:
        return None
    losses = [loss for step, loss in curve if step > run["config"]["optimizer"]["warmup_steps"]]
    count = 0
    for i, loss in enumerate(losses):
        near = losses[max(0, i - AROUND) : i + AROUND + 1]
        middle = statistics.median(near)
        count += loss - middle > LIMIT * max(statistics.median(abs(x - middle) for x in near), 1e-9)
    return count


def analyse(runs):
    return {
        "rows": means(
            runs,
            spikes=spikes,
            val_loss="result.val_loss",
            logged_steps=lambda run: len(number(run, "measures.training_curve.points") or ()),
        ),
        "figures": [
            mean_lines(
                "curve",
                "Training loss as logged",
                runs,
                lambda run: number(run, "measures.training_curve.points"),
                "training step",
                "loss, nat per token",
            )
        ],
    }


def claims(runs):
    counts = [
        count
        for run in runs
        if run["variant"] == "stem-third" and (count := spikes(run)) is not None
    ]
    return [
        exact_claim(
            "STEM's training loss has no spikes",
            "no spikes (figure)",
            f"{sum(counts)} in {len(counts)} runs",
            sum(counts) == 0 if counts else None,
            len(counts),
            "needs stem-third",
        ),
        not_run(
            "A hash-routed mixture of experts spikes",
            "at about 75B, 85B, 112B tokens (figure)",
            "flexmemory has no such block",
        ),
    ]
