"""Rows and figures that many experiments share: means over seeds as table rows, bars, lines and
points.
"""

from collections.abc import Callable, Iterable

from experiments.figure import Figure, Series
from experiments.verdicts import by_variant, mean_spread, number

Number = str | Callable[[dict], float | None]  # of a run: at a dotted path, or by a function
COSTS = {  # of accounting.account: how an axis names them
    "active": "active parameters per token (no embedding, no head)",
    "read_bytes_per_token": "bytes read per decoded token",
    "flops_per_token": "forward FLOPs per token",
    "total": "total parameters (no embedding, no head)",
}


def family_of(pattern: str) -> str:
    """The colour and marker of a model in figures, by what its layers have."""
    from flexmemory.models.blocks import KINDS, layer_specs  # late: imports jax
    from flexmemory.models.config import ModelConfig

    layers = layer_specs(ModelConfig(pattern=pattern, beta="1"))
    ffn = any(layer.d_ffn for layer in layers)
    if any(layer.d_ffn and layer.d_memory for layer in layers):
        return "flex"
    if any(layer.learned for layer in layers):
        return "stem"
    if any(getattr(KINDS[layer.kind], "parallel", False) for layer in layers):
        return "parallel"
    if any(layer.d_memory for layer in layers):
        return "layers" if ffn else "memoryllm"
    return "dense" if ffn else "attn_only"


def family(run: dict) -> str:
    return family_of(run["config"]["model"]["pattern"])


def mean_of(runs: list[dict], of: Number) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation) over runs."""
    return mean_spread([of(run) if callable(of) else number(run, of) for run in runs])


def means(runs: list[dict], paths: str = "", **columns: Number) -> list[dict]:
    """One row per variant: its name, its seeds, and of each column mean and ``_std`` where it
    varies. ``paths``: dotted paths, whose last part names the column; ``columns``: by name.
    """
    rows = []
    columns = {path.rpartition(".")[2]: path for path in paths.split()} | columns
    for variant, group in by_variant(runs).items():
        row = {"variant": variant, "family": family(group[0]), "seeds": len(group)}
        for column, of in columns.items():
            row[column], std = mean_of(group, of)
            row |= {f"{column}_std": std} if std else {}
        rows.append(row)
    return rows


def point(x: float, mean: float | None, std: float | None) -> list[tuple[float, float, float]]:
    """[(x, mean, spread)]; [] without a mean."""
    return [] if mean is None else [(x, mean, std or 0.0)]


def per_variant(
    runs: list[dict], style: str, points: Callable[[int, list[dict]], Iterable]
) -> tuple[Series, ...]:
    """One series per variant that has points: ``points(its place, its runs)``."""
    made = [
        Series(variant, tuple(points(i, group)), style, family(group[0]))
        for i, (variant, group) in enumerate(by_variant(runs).items())
    ]
    return tuple(series for series in made if series.points)


def bars(
    name: str,
    title: str,
    runs: list[dict],
    of: Number,
    y: str,
    caption: str = "Means over seeds; whiskers: standard deviation.",
) -> Figure:
    """One bar per variant, with the spread over seeds."""
    series = per_variant(runs, "bars", lambda i, group: point(i, *mean_of(group, of)))
    ticks = tuple((bar.points[0][0], bar.label) for bar in series)
    return Figure(name, title, caption, "", y, series, ticks=ticks)


def loss_bars(title: str, runs: list[dict]) -> Figure:
    """:func:`bars` of the validation loss."""
    return bars("loss", title, runs, "result.val_loss", "validation loss, nat per token")


def scatter(
    name: str,
    title: str,
    runs: list[dict],
    x_of: Number,
    y_of: Number,
    x: str,
    y: str,
    caption: str = "Means over seeds; bars: standard deviation.",
    **options,
) -> Figure:
    """One labelled point per variant."""

    def points(_, group):
        at, _ = mean_of(group, x_of)
        return [] if at is None else point(at, *mean_of(group, y_of))

    return Figure(name, title, caption, x, y, per_variant(runs, "points", points), **options)


def mean_lines(
    name: str,
    title: str,
    runs: list[dict],
    curve: Callable[[dict], Iterable[tuple[float, float]] | None],
    x: str,
    y: str,
    caption: str = "Means over seeds.",
    **options,
) -> Figure:
    """One line per variant: ``curve(run)`` gives (x, y) points or None; means over the seeds at
    each x.
    """

    def points(_, group):
        at: dict[float, list[float]] = {}
        for run in group:
            for px, py in curve(run) or ():
                at.setdefault(px, []).append(py)
        return [p for px, values in sorted(at.items()) for p in point(px, *mean_spread(values))]

    return Figure(name, title, caption, x, y, per_variant(runs, "line", points), **options)


def compute_share(run: dict) -> float | None:
    """C of the C/M ratio: the share of the FFN weights that compute on the context; None beside
    that axis (stem, attn_only).
    """
    widths, residual = run["account"]["ffn_widths"], run["account"]["residual"]
    if residual is None:
        return None
    return sum(c for c, _ in widths) / sum(c + m for c, m in widths)


def noise_of(runs: list[dict]) -> float | None:
    """Standard deviation of the loss between seeds, mean over the variants; None with one seed."""
    stds = [mean_of(group, "result.val_loss")[1] for group in by_variant(runs).values()]
    spread, _ = mean_spread(stds)
    return spread and float(f"{spread:.2g}")


def loss_against(runs: list[dict], cost: str) -> Figure:
    """Validation loss against one of COSTS."""
    return scatter(
        f"loss-{cost.replace('_', '-')}",
        f"Validation loss against {COSTS[cost].partition(' (')[0]}",
        runs,
        f"account.{cost}",
        "result.val_loss",
        COSTS[cost],
        "validation loss, nat per token",
        "Means over seeds; lower left is better. Bar: standard deviation between seeds.",
        noise=noise_of(runs),
    )


def entries(run: dict, measure: str, part: str = "layers") -> list[dict]:
    """A measure's list, such as one entry per layer from input to output; [] where the measure does
    not apply.
    """
    return number(run, f"measures.{measure}.{part}") or []


def layer_values(run: dict, measure: str, key: str) -> list:
    """One number per layer, see :func:`entries`."""
    return [entry[key] for entry in entries(run, measure)]


def thirds(values: list[float]) -> tuple[float, float, float] | None:
    """Means over the first, middle and last third of the layers (the middle takes what does not
    divide); None with fewer than three layers.
    """
    if len(values) < 3 or None in values:
        return None
    n = len(values) // 3
    parts = values[:n], values[n : len(values) - n], values[len(values) - n :]
    return tuple(sum(part) / len(part) for part in parts)


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
    points = entries(run, measure, "points")
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
    caption: str = "Means over seeds.",
    **options,
) -> Figure:
    """One line per variant over the layers."""

    def curve(run):
        return [(entry["layer"], entry[key]) for entry in entries(run, measure)]

    return mean_lines(name, title, runs, curve, "layer, from input", y, caption, **options)


def layer_lines(
    name: str,
    title: str,
    runs: list[dict],
    measure: str,
    keys: dict[str, str],
    y: str,
    caption: str = "Means over seeds.",
) -> Figure:
    """Several numbers of a measure over the layers, one line each: ``keys`` {number: label}. Means
    over all runs.
    """
    lines = []
    for key, label in keys.items():
        layers = zip(*(layer_values(run, measure, key) for run in runs), strict=True)
        points = [p for i, layer in enumerate(layers) for p in point(i, *mean_spread(layer))]
        lines += [Series(label, tuple(points))] if points else []
    return Figure(name, title, caption, "memory layer, from input", y, tuple(lines))


def measured(runs: list[dict], measure: str, part: str, columns: str) -> list[dict]:
    """One row per variant and entry of a measure's list ``part`` (points or layers): ``columns`` as
    means over the seeds, texts as they are.
    """
    rows = []
    for variant, group in by_variant(runs).items():
        lists = [found for run in group if (found := entries(run, measure, part))]
        for same in zip(*lists, strict=False):
            row = {"variant": variant, "family": family(group[0]), "seeds": len(same)}
            for column in columns.split():
                values = [number(entry, column) for entry in same]
                alike = isinstance(values[0], str) or len(set(values)) == 1
                row[column.replace(".", "_")] = values[0] if alike else mean_spread(values)[0]
            rows.append(row)
    return rows
