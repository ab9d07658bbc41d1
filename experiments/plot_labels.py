"""Where text goes in a figure: beside line ends, beside points, along reference lines, with as
little covered as can be.
"""

import numpy as np
from matplotlib.transforms import Bbox

SIZE = 8.5  # points


def edge_labels(ax, ends: list[tuple[str, str, float, float]]) -> None:
    """Writes (text, colour, y, x) beside the right edge, pushed apart until none overlap, each tied
    to its end by a thin line.
    """
    low, high = to_axes(ax, [(0, y) for y in ax.get_ylim()])[:, 1]
    box = ax.get_window_extent()
    heights = (
        to_axes(ax, [(x, y) for _, _, y, x in ends])[:, 1].clip(min(low, high), max(low, high))
        if ends
        else []
    )
    order = sorted(range(len(ends)), key=lambda i: (heights[i], i))
    gap = min(11.5, (box.height + 10) / max(len(ends), 1))
    placed = spread([heights[i] * box.height for i in order], gap, -2, box.height + 2)
    bottom, top = sorted(ax.get_ylim())
    for i, height in zip(order, placed, strict=True):
        text, colour, y, x = ends[i]
        ax.annotate(
            text,
            (x, min(max(y, bottom), top)),
            xytext=(1 + 14 / box.width, height / box.height),
            textcoords="axes fraction",
            color=colour,
            fontsize=min(SIZE, gap * 0.78),
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.5,
                "shrinkA": 0,
                "shrinkB": 2,
                "alpha": 0.7,
                "relpos": (0, 0.5),
            },
        )


def to_axes(ax, points: list) -> np.ndarray:
    """Data coordinates as shares of the axes, whatever their scales."""
    return (ax.transData + ax.transAxes.inverted()).transform(
        np.array(points, float).reshape(-1, 2)
    )


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the sorted ``wanted`` ones, at least ``gap`` apart: neighbours that collide
    share their mean.
    """
    blocks = []  # [centre, members]
    for y in wanted:
        blocks.append([y, 1])
        while True:
            half = (blocks[-1][1] - 1) * gap / 2
            blocks[-1][0] = min(max(blocks[-1][0], low + half), max(high - half, low + half))
            if (
                len(blocks) < 2
                or blocks[-1][0] - blocks[-2][0] >= (blocks[-1][1] + blocks[-2][1]) * gap / 2 - 1e-9
            ):
                break
            (a, n), (b, m) = blocks[-2], blocks[-1]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    return [centre + (i - (n - 1) / 2) * gap for centre, n in blocks for i in range(n)]


def place_labels(ax, points: list[tuple[float, float, str, str]], obstacles: list = ()) -> None:
    """Writes each (x, y, text, colour) where it covers least: tries places around the point, near
    ones first, and ties far ones by a line.

    obstacles: polylines in data coordinates, [(x, y), ...], that text had better not cross.
    """
    renderer = ax.figure.canvas.get_renderer()
    frame = ax.get_window_extent()
    centres = (
        ax.transData.transform([(x, y) for x, y, _, _ in points]) if points else np.zeros((0, 2))
    )
    marks = [Bbox.from_extents(cx - 5, cy - 5, cx + 5, cy + 5) for cx, cy in centres]
    crossed = crossings(ax, obstacles)
    taken = []
    for (x, y, text, colour), (cx, cy) in zip(points, centres, strict=True):
        artist = ax.annotate(
            text,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            color=colour,
            fontsize=SIZE,
            zorder=5,
            annotation_clip=False,
        )
        size = artist.get_window_extent(renderer)
        best = None
        for ring, distance in enumerate((8, 15, 24, 36)):
            for rank, (ux, uy) in enumerate(
                (
                    (1, 0),
                    (0, 1),
                    (0, -1),
                    (-1, 0),
                    (0.75, 0.75),
                    (0.75, -0.75),
                    (-0.75, 0.75),
                    (-0.75, -0.75),
                )
            ):
                dx = (
                    ux * distance + (ux - 1) / 2 * size.width
                    if abs(ux) in (0, 1)
                    else ux * distance + (-size.width if ux < 0 else 0)
                )
                dy = uy * distance - size.height * 0.38 + uy * size.height * 0.3
                box = Bbox.from_bounds(cx + dx - 1, cy + dy - 2.5, size.width + 2, size.height + 1)
                cost = 3 * ring + 0.1 * rank
                cost += sum(200 for other in taken if box.overlaps(other)) + sum(
                    40 for mark in marks if box.overlaps(mark)
                )
                cost += 1.5 * inside(box, crossed)
                outside = max(
                    frame.x0 - box.x0,
                    box.x1 - frame.x1 - 8,
                    frame.y0 - box.y0,
                    box.y1 - frame.y1 - 6,
                    0,
                )
                cost += 20 * outside
                if best is None or cost < best[0]:
                    best = cost, ring, dx, dy, box
        _, ring, dx, dy, box = best
        artist.set_position((dx, dy))
        taken.append(box)
        if ring >= 2:
            near = (np.clip(0, dx, dx + size.width), np.clip(0, dy, dy + size.height * 0.7))
            ax.annotate(
                "",
                (x, y),
                xytext=near,
                textcoords="offset points",
                annotation_clip=False,
                arrowprops={
                    "arrowstyle": "-",
                    "color": colour,
                    "linewidth": 0.5,
                    "shrinkA": 1,
                    "shrinkB": 4,
                },
            )


def line_labels(ax, lines: list[tuple[float, str]], colour: str, obstacles: list = ()) -> None:
    """Writes each (y, text) on its horizontal line, at the first free place from the right."""
    renderer = ax.figure.canvas.get_renderer()
    taken = [text.get_window_extent(renderer) for text in ax.texts if text.get_text()]
    crossed = crossings(ax, obstacles)
    for y, text in lines:
        best = None
        for share in (0.99, 0.86, 0.73, 0.6, 0.47, 0.34):
            for above in (True, False):
                artist = ax.annotate(
                    text,
                    (share, y),
                    xycoords=("axes fraction", "data"),
                    xytext=(0, 2 if above else -2),
                    textcoords="offset points",
                    ha="right",
                    va="bottom" if above else "top",
                    fontsize=7.5,
                    color=colour,
                    zorder=5,
                )
                box = artist.get_window_extent(renderer)
                cost = (
                    100 * sum(box.overlaps(other) for other in taken)
                    + inside(box, crossed)
                    + 0.1 * (0.99 - share)
                    + 0.01 * (not above)
                )
                if best is None or cost < best[0]:
                    if best:
                        best[1].remove()
                    best = cost, artist
                else:
                    artist.remove()
        taken.append(best[1].get_window_extent(renderer))


def crossings(ax, polylines: list) -> np.ndarray:
    """Points along all polylines, on the drawing, that text had better not cover."""
    parts = [line_points(ax.transData.transform(line)) for line in polylines if len(line) > 1]
    return np.concatenate(parts) if parts else np.zeros((0, 2))


def inside(box: Bbox, points: np.ndarray) -> int:
    return int(
        (
            (points[:, 0] > box.x0)
            & (points[:, 0] < box.x1)
            & (points[:, 1] > box.y0)
            & (points[:, 1] < box.y1)
        ).sum()
    )


def line_points(corners: np.ndarray, step: float = 4.0) -> np.ndarray:
    """Points every ``step`` along a polyline."""
    parts = [
        np.linspace(a, b, max(int(np.hypot(*(b - a)) / step), 2))
        for a, b in zip(corners[:-1], corners[1:], strict=True)
    ]
    return np.concatenate(parts)
