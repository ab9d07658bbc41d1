"""Fewer active weights by pruning a dense model, or by flex from the start?

MemoryLLM, Figure 11 (1B and 750M; sparsity pattern, calibration and numbers not given): base models
pruned by magnitude, SparseGPT and Wanda to the active parameters of MemoryLLM and flex are clearly
worse. Here magnitude and Wanda, unstructured, per matrix; SparseGPT is not done. A dense model
pruned to beta/8 of its FFN weights has the active weights of flex beta; MemoryLLM itself would be a
dense model without any FFN weight.
Expected: flex is better at each of beta = 1, 2, 3. Fine-tuning after pruning is not part of the
paper's comparison and not of this one.

    python -m experiments.run e11 --scale=cpu         # E2's runs
"""

from experiments import scales
from experiments.chart import measured
from experiments.figure import Figure, Series
from experiments.verdicts import by_variant, difference, judge, mean_spread, not_run, number
from flexmemory.analysis.prune import pruned

IDS = ("E11",)
SOURCE = "MemoryLLM Fig 11"
MEASURES = (pruned,)
BETAS = (3, 2, 1)


def sweep(scale):
    n = scales.layers(scale)
    return scales.sweep(
        scale, [scales.dense(n), scales.memoryllm(n), *(scales.flex(n, beta) for beta in BETAS)]
    )


def loss_of(run, rule, kept):
    points = (number(run, "measures.pruned") or {}).get("points", [])
    return next(
        (
            point["val_loss"]
            for point in points
            if point["rule"] == rule and abs(point["kept"] - kept) < 1e-9
        ),
        None,
    )


def analyse(runs):
    groups, series = by_variant(runs), []
    for rule in ("magnitude", "wanda"):
        at: dict[float, list] = {}
        for run in groups.get("dense", []):
            for point in (number(run, "measures.pruned") or {}).get("points", []):
                if point["rule"] in (rule, "none"):
                    at.setdefault(point["active"], []).append(point["val_loss"])
        points = tuple(
            (active, mean, spread or 0.0)
            for active, (mean, spread) in ((a, mean_spread(v)) for a, v in sorted(at.items()))
            if mean is not None
        )
        series.append(Series(f"dense, {rule}", points, "line", "dense", dashed=rule == "wanda"))
    trained = [
        (
            number(group[0], "account.active"),
            *mean_spread([number(run, "result.val_loss") for run in group]),
        )
        for name, group in groups.items()
        if name != "dense"
    ]
    series.append(
        Series(
            "memoryllm, flex",
            tuple(sorted((x, y, s or 0.0) for x, y, s in trained)),
            "line",
            "flex",
        )
    )
    figure = Figure(
        "loss-active",
        "Pruned after training, or flex from the start",
        "Means over seeds.",
        "active parameters per token",
        "validation loss, nat per token",
        tuple(s for s in series if s.points),
    )
    return {
        "rows": measured(
            groups.get("dense", []),
            "pruned",
            "points",
            "rule kept active val_loss recall_acc reasoning_acc",
        ),
        "figures": [figure],
    }


def claims(runs):
    made = []
    for rule in ("magnitude", "wanda"):
        for beta in BETAS:
            text = f"Flex β = {beta} beats a dense model pruned by {rule} to its active parameters"
            paper = "clearly better (figure only)"
            judged = [
                run
                | {
                    "loss": (
                        loss_of(run, rule, beta / 8)
                        if run["variant"] == "dense"
                        else number(run, "result.val_loss")
                    )
                }
                for run in runs
            ]
            found = difference(judged, f"flex-b{beta}", "dense", "loss")
            made.append(judge(text, paper, found, -1, needs=f"dense and flex-b{beta} of one seed"))
    text, paper = "…and pruned by SparseGPT", "clearly better (figure only)"
    return [*made, not_run(text, paper, "SparseGPT is not implemented")]
