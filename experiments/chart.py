"""Rows and figures that many experiments share: means over seeds as table rows, bars, lines and
points.
"""

from collections.abc import Callable, Iterable

from experiments.figure import Figure, Series
from experiments.verdicts import by_variant, mean_spread, number


def family_of(pattern: str) -> str:
    """The colour and marker of a model in figures."""
    kinds = {word.partition("*")[0] for word in pattern.replace("(", " ").replace(")", " ").split()}
    for kind in ("flex", "stem", "stem-gate", "stem-dagger", "parallel"):
        if kind in kinds:
            return kind.partition("-")[0]
    if "memoryllm" in kinds:
        return "layers" if "dense" in kinds else "memoryllm"
    return "attn_only" if "attn_only" in kinds else "dense"


def family(run: dict) -> str:
    return family_of(run["config"]["model"]["pattern"])


def mean_of(
    runs: list[dict], path: str | Callable[[dict], float | None]
) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation) over runs of the number at a dotted path, or of a function
    of the run.
    """
    return mean_spread([path(run) if callable(path) else number(run, path) for run in runs])


def means(runs: list[dict], paths: str = "", **columns) -> list[dict]:
    """One row per variant: its name, its seeds, and of each column mean and ``_std`` where it
    varies. ``paths``: dotted paths, whose last part names the column; ``columns``: by name, a
    dotted path or a function of the run.
    """
    rows = []
    columns = {path.rpartition(".")[2]: path for path in paths.split()} | columns
    for variant, group in by_variant(runs).items():
        row = {"variant": variant, "family": family(group[0]), "seeds": len(group)}
        for column, path in columns.items():
            mean, std = mean_of(group, path)
            row[column] = mean
            if std:
                row[column + "_std"] = std
        rows.append(row)
    return rows


def bars(name: str, title: str, runs: list[dict], path, y: str, caption: str = "") -> Figure:
    """One bar per variant, with the spread over seeds."""
    series, ticks = [], []
    for i, (variant, group) in enumerate(by_variant(runs).items()):
        mean, std = mean_of(group, path)
        if mean is not None:
            series.append(Series(variant, ((i, mean, std or 0.0),), "bars", family(group[0])))
            ticks.append((i, variant))
    return Figure(
        name,
        title,
        caption or "Means over seeds; whiskers: standard deviation.",
        "",
        y,
        tuple(series),
        ticks=tuple(ticks),
    )


def loss_bars(title: str, runs: list[dict]) -> Figure:
    """:func:`bars` of the validation loss."""
    return bars("loss", title, runs, "result.val_loss", "validation loss, nat per token")


def scatter(
    name: str,
    title: str,
    runs: list[dict],
    x_path,
    y_path,
    x: str,
    y: str,
    caption: str = "",
    **options,
) -> Figure:
    """One labelled point per variant."""
    series = []
    for variant, group in by_variant(runs).items():
        (x_mean, _), (y_mean, y_std) = mean_of(group, x_path), mean_of(group, y_path)
        if x_mean is not None and y_mean is not None:
            series.append(
                Series(variant, ((x_mean, y_mean, y_std or 0.0),), "points", family(group[0]))
            )
    return Figure(
        name,
        title,
        caption or "Means over seeds; bars: standard deviation.",
        x,
        y,
        tuple(series),
        **options,
    )


def mean_lines(
    name: str,
    title: str,
    runs: list[dict],
    curve: Callable[[dict], Iterable[tuple[float, float]] | None],
    x: str,
    y: str,
    caption: str = "",
    **options,
) -> Figure:
    """One line per variant: ``curve(run)`` gives (x, y) points or None; means over the seeds at
    each x.
    """
    series = []
    for variant, group in by_variant(runs).items():
        at: dict[float, list[float]] = {}
        for run in group:
            for px, py in curve(run) or ():
                if py is not None:
                    at.setdefault(px, []).append(py)
        points = tuple(
            (px, *(value or 0.0 for value in mean_spread(values)))
            for px, values in sorted(at.items())
        )
        if points:
            series.append(Series(variant, points, "line", family(group[0])))
    return Figure(name, title, caption or "Means over seeds.", x, y, tuple(series), **options)


def compute_share(run: dict) -> float | None:
    """C of the C/M ratio: the share of the FFN weights that compute on the context; None beside
    that axis (stem, attn_only).
    """
    widths, residual = run["account"]["ffn_widths"], run["account"]["residual"]
    if residual is None:
        return None
    return sum(c for c, _ in widths) / sum(c + m for c, m in widths)


def noise_of(runs: list[dict], path: str = "result.val_loss") -> float | None:
    """Standard deviation of the loss between seeds, mean over the variants; None with one seed."""
    spread = mean_spread([mean_of(group, path)[1] for group in by_variant(runs).values()])[0]
    return spread and float(f"{spread:.2g}")


def loss_against(runs: list[dict], cost: str) -> Figure:
    """Validation loss against one of the costs of accounting: active, read_bytes_per_token,
    flops_per_token, total.
    """
    axis = {
        "active": "active parameters per token (no embedding, no head)",
        "read_bytes_per_token": "bytes read per decoded token",
        "flops_per_token": "forward FLOPs per token",
        "total": "total parameters (no embedding, no head)",
    }[cost]
    return scatter(
        f"loss-{cost.replace('_', '-')}",
        f"Validation loss against {axis.partition(' (')[0]}",
        runs,
        f"account.{cost}",
        "result.val_loss",
        axis,
        "validation loss, nat per token",
        "Means over seeds; lower left is better. Bar: standard deviation between seeds.",
        noise=noise_of(runs),
    )


def thirds(values: list[float]) -> tuple[float, float, float] | None:
    """Means over the first, middle and last third of the layers (the middle takes what does not
    divide); None with fewer than three layers.
    """
    if len(values) < 3 or None in values:
        return None
    n = len(values) // 3
    return tuple(
        sum(part) / len(part)
        for part in (values[:n], values[n : len(values) - n], values[len(values) - n :])
    )


def layer_values(run: dict, measure: str, key: str) -> list:
    """The numbers of a measure that has one entry per layer, from input to output; [] where it does
    not apply.
    """
    return [entry[key] for entry in (number(run, f"measures.{measure}") or {}).get("layers", [])]


def third(measure: str, key: str, i: int) -> Callable[[dict], float | None]:
    """The mean of a measure's number over third i of a run's layers: 0 first, 1 middle, 2 last."""

    def of(run):
        parts = thirds(layer_values(run, measure, key))
        return parts and parts[i]

    return of


def rises(run: dict, measure: str, x: str | Callable[[dict], float]) -> list[tuple[float, float]]:
    """[(x of a measure's point, rise of its loss over the first point in nat)], where both losses
    are known.
    """
    points = (number(run, f"measures.{measure}") or {}).get("points", [])
    at = x if callable(x) else lambda point: point[x]
    losses = [(at(point), point["val_loss"], points[0]["val_loss"]) for point in points]
    return [(value, loss - first) for value, loss, first in losses if None not in (loss, first)]


def by_layer(
    name: str,
    title: str,
    runs: list[dict],
    measure: str,
    key: str,
    y: str,
    caption: str = "",
    **options,
) -> Figure:
    """One line per variant over the layers."""
    return mean_lines(
        name,
        title,
        runs,
        lambda run: [
            (entry["layer"], entry[key])
            for entry in (number(run, f"measures.{measure}") or {}).get("layers", [])
        ],
        "layer, from input",
        y,
        caption,
        **options,
    )


def layer_lines(
    name: str,
    title: str,
    runs: list[dict],
    measure: str,
    keys: dict[str, str],
    y: str,
    caption: str = "",
) -> Figure:
    """Several numbers of a measure over the layers, one line each: ``keys`` {number: label}. Means
    over all runs.
    """
    series = []
    for key, label in keys.items():
        columns = zip(*(layer_values(run, measure, key) for run in runs), strict=True)
        points = tuple(
            (layer, *(value or 0.0 for value in mean_spread(list(column))))
            for layer, column in enumerate(columns)
        )
        series.append(Series(label, points))
    return Figure(
        name,
        title,
        caption or "Means over seeds.",
        "memory layer, from input",
        y,
        tuple(line for line in series if line.points),
    )


def measured(runs: list[dict], measure: str, part: str, columns: str) -> list[dict]:
    """One row per variant and entry of a measure's list ``part`` (points or layers): ``columns`` as
    means over the seeds, texts as they are.
    """
    rows = []
    for variant, group in by_variant(runs).items():
        lists = [
            found[part]
            for run in group
            if (found := number(run, f"measures.{measure}")) and found.get("applies", True)
        ]
        for entries in zip(*lists, strict=False):
            row = {"variant": variant, "family": family(group[0]), "seeds": len(entries)}
            for column in columns.split():
                values = [number(entry, column) for entry in entries]
                row[column.replace(".", "_")] = (
                    values[0]
                    if isinstance(values[0], str) or len(set(values)) == 1
                    else mean_spread(values)[0]
                )
            rows.append(row)
    return rows
