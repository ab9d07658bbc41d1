"""The figures of the report: matplotlib drawings turned into inline SVG that follows the page's light or dark colours."""

import html
import io
import re
import statistics

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.transforms import Affine2D, Bbox

# family: (colour on light paper, colour on dark paper, marker); in the SVG a colour becomes the CSS variable --family
STYLES = {
    "dense": ("#3b4252", "#d8dee9", "s"),
    "layers": ("#0b8069", "#45c9a9", "^"),
    "flex": ("#2866bd", "#7db2f7", "D"),
    "memoryllm": ("#cf5a0c", "#ffa260", "o"),
    "stem": ("#8547b8", "#c9a0f2", "P"),
    "parallel": ("#94682f", "#d3ac78", "v"),
    "attn_only": ("#7c828c", "#9ea5b0", "X"),
    "other": ("#b03a63", "#f08cb0", "h"),
}
PAGE = {"paper": ("#fdfdfb", "#16181c"), "ink": ("#22262b", "#e4e6ea"), "muted": ("#666c75", "#a0a6b0"), "rule": ("#e2e1dc", "#33373e")}
PAPER, INK, MUTED, RULE = (PAGE[name][0] for name in ("paper", "ink", "muted", "rule"))
NOISE = 0.015  # nat between seeds, design.md section 8


def colours(dark: bool) -> dict[str, str]:
    """{CSS variable: colour} for one of the two papers."""
    return {name: values[dark] for name, values in {**STYLES, **PAGE}.items()}


def marker_svg(family: str) -> str:
    """The family's marker as a small inline SVG, for legends and tables; decorative, so hidden from screen readers."""
    style = MarkerStyle(STYLES[family][2])
    polygons = style.get_path().transformed(style.get_transform() + Affine2D().scale(10, -10)).to_polygons()
    path = " ".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in polygon) + "Z" for polygon in polygons)
    return f'<svg class="mark" viewBox="-8 -8 16 16" aria-hidden="true"><path d="{path}" fill="var(--{family})"/></svg>'


def draw(name: str, title: str, description: str, paint, height: float = 3.5) -> str:
    """An accessible inline SVG, 4.8 inches wide, of the axes that ``paint(ax)`` fills. Equal inputs give equal text."""
    settings = {"svg.hashsalt": name, "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": MUTED,
                "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK,
                "ytick.labelcolor": INK, "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
                "xtick.major.size": 3, "ytick.major.size": 3, "axes.spines.top": False, "axes.spines.right": False,
                "axes.axisbelow": True, "figure.dpi": 72, "axes.formatter.useoffset": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.8, height))
        FigureCanvasAgg(figure)  # measures text for label placement
        ax = figure.add_axes((0.128, 0.46 / height, 0.852, 1 - 0.58 / height))
        ax.grid(color=RULE, linewidth=0.6)
        paint(ax)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return inline(stream.getvalue(), name, title, description)


def inline(svg: str, name: str, title: str, description: str) -> str:
    """matplotlib's file as an element of a page: no headers, no links, own ids, named, colours as CSS variables."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    box = re.search(r'viewBox="([^"]+)"', svg)[1]
    body = svg[svg.index(">") + 1:].replace("xlink:href", "href")
    body = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    for key, colour in colours(dark=False).items():
        body = body.replace(colour, f"var(--{key})")
    body = re.sub(r"\s*\n\s*", "\n", body)
    return (f'<svg viewBox="{box}" role="img" aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{html.escape(title)}</title>'
            f'<desc id="{name}-desc">{html.escape(description)}</desc>{body}')


def loss_curves(ax, curves: list[dict]) -> None:
    """Training loss (running mean, faint) and validation loss (points joined) of every variant, named once at the right edge."""
    ends, tops, lows, last = [], [], [], 1
    for curve in curves:
        colour, _, marker = STYLES[curve["family"]]
        for steps, loss, style in ((*smooth(curve["train"]), {"linewidth": 0.7, "alpha": 0.35}),
                                   (*smooth(curve["val"], width=0), {"linewidth": 1.1, "marker": marker, "markersize": 3.4, "markeredgecolor": PAPER,
                                                                     "markeredgewidth": 0.4, "zorder": 3})):
            if len(steps):
                ax.plot(steps, loss, color=colour, **style)
                tops.append(np.interp(steps[0] + 0.22 * (steps[-1] - steps[0]), steps, loss))
                lows.append(loss.min())
                end = steps[-1], loss[-1]
                last = max(last, steps[-1])
        ends.append((curve["label"], colour, end[1], end[0]))
    span = max(tops) - min(lows) or 1
    ax.set_ylim(min(lows) - 0.06 * span, max(tops) + 0.04 * span)
    ax.set_xlim(0, last)
    ax.set_xlabel("training step")
    ax.set_ylabel("loss, nat per token")
    ax.set_position((0.128, ax.get_position().y0, 0.69, ax.get_position().height))
    edge_labels(ax, ends)


def smooth(series: list, width: float = 0.08, points: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Centred running mean over a share ``width`` of the series, thinned to ``points``: (steps, values)."""
    if not series:
        return np.zeros(0), np.zeros(0)
    steps, loss = np.array(series, float).T
    half = int(len(loss) * width / 2)
    total = np.concatenate([[0], np.cumsum(loss)])
    index = np.arange(len(loss))
    first, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(loss))
    mean = (total[end] - total[first]) / (end - first)
    keep = np.unique(np.linspace(0, len(loss) - 1, min(points, len(loss))).round().astype(int))
    return steps[keep], mean[keep]


def edge_labels(ax, ends: list[tuple[str, str, float, float]]) -> None:
    """Writes (text, colour, y, x) beside the right edge, pushed apart until none overlap, each tied to its end by a thin line."""
    ends = sorted(ends, key=lambda e: e[2])
    box = ax.get_window_extent()
    low, high = ax.get_ylim()
    wanted = [(min(max(y, low), high) - low) / (high - low) * box.height for _, _, y, _ in ends]
    gap = min(11.5, (box.height + 10) / max(len(ends), 1))
    placed = spread(wanted, gap, -2, box.height + 2)
    for (text, colour, y, x), height in zip(ends, placed, strict=True):
        ax.annotate(text, (x, min(max(y, low), high)), xytext=(1 + 14 / box.width, height / box.height), textcoords="axes fraction", color=colour,
                    fontsize=min(8.5, gap * 0.78), va="center", annotation_clip=False,
                    arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2, "alpha": 0.7, "relpos": (0, 0.5)})


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the sorted ``wanted`` ones, at least ``gap`` apart: neighbours that collide share their mean."""
    blocks = []  # [centre, members]
    for y in wanted:
        blocks.append([y, 1])
        while True:
            half = (blocks[-1][1] - 1) * gap / 2
            blocks[-1][0] = min(max(blocks[-1][0], low + half), max(high - half, low + half))
            if len(blocks) < 2 or blocks[-1][0] - blocks[-2][0] >= (blocks[-1][1] + blocks[-2][1]) * gap / 2 - 1e-9:
                break
            (a, n), (b, m) = blocks[-2], blocks[-1]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    return [centre + (i - (n - 1) / 2) * gap for centre, n in blocks for i in range(n)]


def scatter(ax, entries: list[dict], x: str, y: str, scale: tuple[float, float] = (1, 1), obstacles: list = ()) -> None:
    """One marker per variant with the spread over seeds as bars, labelled where there is room."""
    points = []
    for e in entries:
        colour, _, marker = STYLES[e["family"]]
        px, py = e[x] * scale[0], e[y] * scale[1]
        ax.errorbar(px, py, xerr=(e.get(x + "_std") or 0) * scale[0] or None, yerr=(e.get(y + "_std") or 0) * scale[1] or None, fmt=marker,
                    color=colour, markersize=6.5, markeredgecolor=PAPER, markeredgewidth=0.6, elinewidth=0.9, zorder=4, clip_on=False)
        points.append((px, py, e["label"], colour))
    place_labels(ax, points, obstacles)


def place_labels(ax, points: list[tuple[float, float, str, str]], obstacles: list = ()) -> None:
    """Writes each point's text where it covers least: tries places around the point, near ones first, and ties far ones by a line.

    obstacles: polylines in data coordinates, [(x, y), ...], that text had better not cross.
    """
    renderer = ax.figure.canvas.get_renderer()
    frame = ax.get_window_extent()
    centres = ax.transData.transform([(x, y) for x, y, _, _ in points]) if points else np.zeros((0, 2))
    marks = [Bbox.from_extents(cx - 5, cy - 5, cx + 5, cy + 5) for cx, cy in centres]
    crossed = [line_points(ax.transData.transform(line)) for line in obstacles if len(line) > 1]
    crossed = np.concatenate(crossed) if crossed else np.zeros((0, 2))
    taken = []
    for (x, y, text, colour), (cx, cy) in zip(points, centres, strict=True):
        artist = ax.annotate(text, (x, y), xytext=(0, 0), textcoords="offset points", color=colour, fontsize=8.5, zorder=5, annotation_clip=False)
        size = artist.get_window_extent(renderer)
        best = None
        for ring, distance in enumerate((8, 15, 24, 36)):
            for rank, (ux, uy) in enumerate(((1, 0), (0, 1), (0, -1), (-1, 0), (0.75, 0.75), (0.75, -0.75), (-0.75, 0.75), (-0.75, -0.75))):
                dx = ux * distance + (ux - 1) / 2 * size.width if abs(ux) in (0, 1) else ux * distance + (-size.width if ux < 0 else 0)
                dy = uy * distance - size.height * 0.38 + uy * size.height * 0.3
                box = Bbox.from_bounds(cx + dx - 1, cy + dy - 2.5, size.width + 2, size.height + 1)
                cost = 3 * ring + 0.1 * rank
                cost += sum(200 for other in taken if box.overlaps(other)) + sum(40 for mark in marks if box.overlaps(mark))
                cost += 1.5 * ((crossed[:, 0] > box.x0) & (crossed[:, 0] < box.x1) & (crossed[:, 1] > box.y0) & (crossed[:, 1] < box.y1)).sum()
                outside = max(frame.x0 - box.x0, box.x1 - frame.x1 - 8, frame.y0 - box.y0, box.y1 - frame.y1 - 6, 0)
                cost += 20 * outside
                if best is None or cost < best[0]:
                    best = cost, ring, dx, dy, box
        _, ring, dx, dy, box = best
        artist.set_position((dx, dy))
        taken.append(box)
        if ring >= 2:
            near = (np.clip(0, dx, dx + size.width), np.clip(0, dy, dy + size.height * 0.7))
            ax.annotate("", (x, y), xytext=near, textcoords="offset points", annotation_clip=False,
                        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 4})


def line_points(corners: np.ndarray, step: float = 4.0) -> np.ndarray:
    """Points every ``step`` along a polyline."""
    parts = [np.linspace(a, b, max(int(np.hypot(*(b - a)) / step), 2)) for a, b in zip(corners[:-1], corners[1:], strict=True)]
    return np.concatenate(parts)


def noise_bar(ax, points: list[tuple[float, float]]) -> None:
    """A bar as tall as the seed noise, in the lower corner away from the lowest of the points (x, loss)."""
    low, high = ax.get_ylim()
    tall = NOISE / (high - low)
    right = bool(points) and min(points, key=lambda p: p[1])[0] < sum(ax.get_xlim()) / 2
    bar, text = (0.978, 0.962) if right else (0.022, 0.038)
    ax.plot([bar, bar], [0.03, 0.03 + tall], transform=ax.transAxes, color=MUTED, linewidth=2.2, solid_capstyle="butt", clip_on=False)
    ax.text(text, 0.026, f"{NOISE} nat", transform=ax.transAxes, va="bottom", ha="right" if right else "left", fontsize=7.5, color=MUTED)


def loss_against_share(ax, entries: list[dict]) -> None:
    """Validation loss against the compute share: the beta way and the layer way as two lines between the same ends."""
    on_line = [e for e in entries if e["c_fraction"] is not None and e["family"] in ("dense", "memoryllm", "flex", "layers")]
    references = [e for e in fit_losses(ax, entries) if e["c_fraction"] is None]
    lines = []
    for way, dashes in (("flex", "-"), ("layers", "--")):
        line = sorted((100 * e["c_fraction"], e["val_loss"]) for e in on_line if e["family"] in (way, "dense", "memoryllm"))
        if any(e["family"] == way for e in on_line):
            ax.plot(*zip(*line, strict=True), color=STYLES[way][0], linewidth=1.1, linestyle=dashes, zorder=2)
            lines.append(line)
    ax.set_xlim(-4, 104)
    ax.set_xticks(range(0, 101, 25))
    ax.set_xlabel("compute share C of the FFN weights, %")
    ax.set_ylabel("validation loss, nat per token")
    named = []
    for e in references:
        colour = STYLES[e["family"]][0]
        ax.axhline(e["val_loss"], color=colour, linewidth=1, linestyle=(0, (1.5, 2)), zorder=1.5)
        lines.append([(-4, e["val_loss"]), (104, e["val_loss"])])
        named.append((e, colour))
    noise_bar(ax, [(100 * e["c_fraction"], e["val_loss"]) for e in on_line])
    scatter(ax, on_line, "c_fraction", "val_loss", scale=(100, 1), obstacles=lines)
    renderer = ax.figure.canvas.get_renderer()
    taken = [text.get_window_extent(renderer) for text in ax.texts]
    for e, colour in named:  # a reference's name sits on its line, at the first free place from the right
        best = None
        for share in (88, 75, 62, 50, 40, 28, 16, 6):
            for above in (True, False):
                artist = ax.annotate(e["label"], (share, e["val_loss"]), xytext=(0, 2.5 if above else -2.5), textcoords="offset points", ha="center",
                                     va="bottom" if above else "top", fontsize=8.5, color=colour)
                box = artist.get_window_extent(renderer)
                points = [ax.transData.transform(p) for line in lines for p in line] + list(
                    np.concatenate([line_points(ax.transData.transform(line)) for line in lines if len(line) > 1]))
                cost = 100 * sum(box.overlaps(other) for other in taken) + sum(box.contains(*p) for p in points)
                if best is None or cost < best[0]:
                    if best:
                        best[1].remove()
                    best = cost, artist
                else:
                    artist.remove()
        taken.append(best[1].get_window_extent(renderer))


def loss_against_active(ax, entries: list[dict]) -> None:
    """Validation loss against active parameters (without embedding and head), in millions or thousands."""
    unit, word = (1e9, "billions") if max(e["active"] for e in entries) >= 1e9 else (1e6, "millions")
    entries = fit_losses(ax, entries)
    wide = [e["active"] / unit for e in entries]
    pad = 0.08 * (max(wide) - min(wide)) or 0.1 * max(wide)
    ax.set_xlim(min(wide) - pad, max(wide) + pad)
    ax.set_xlabel(f"active parameters per token, {word} (no embedding, no head)")
    ax.set_ylabel("validation loss, nat per token")
    noise_bar(ax, [(e["active"] / unit, e["val_loss"]) for e in entries])
    scatter(ax, entries, "active", "val_loss", scale=(1 / unit, 1))


def fit_losses(ax, entries: list[dict]) -> list[dict]:
    """Fits the loss axis to the variants and returns those on it.

    Variants without a place on the C/M axis (attn_only, stem) that lie far above all others would flatten the figure:
    they are written at the top edge with their loss instead.
    """
    core = [e["val_loss"] for e in entries if e["c_fraction"] is not None] or [e["val_loss"] for e in entries]
    limit = max(core) + 2 * max(max(core) - min(core), 4 * NOISE)
    shown = [e for e in entries if e["val_loss"] <= limit or e["c_fraction"] is not None]
    values = [e["val_loss"] for e in shown]
    span = max(values) - min(values) or 4 * NOISE
    ax.set_ylim(min(values) - 0.14 * span, max(values) + 0.12 * span)
    for i, e in enumerate(e for e in entries if e not in shown):
        ax.text(0.99, 0.985 - 0.06 * i, f"{e['label']} {e['val_loss']:.3f} ↑", transform=ax.transAxes, ha="right", va="top", fontsize=8.5,
                color=STYLES[e["family"]][0])
    return shown


def recall_against_reasoning(ax, entries: list[dict]) -> None:
    """Recall of trained facts against reasoning in the context, both in percent, with the lines of chance."""
    lines = []
    for task, where in (("reasoning", "x"), ("recall", "y")):
        values = [100 * e[task + "_acc"] for e in entries]
        chances = [100 * e[task + "_chance"] for e in entries if e[task + "_chance"] is not None]
        low, high = min(values + chances), max(values + chances)
        pad = 0.13 * (high - low) or 5
        (ax.set_xlim if where == "x" else ax.set_ylim)(low - pad, high + pad)
        if chances:
            chance = statistics.fmean(chances)
            (ax.axvline if where == "x" else ax.axhline)(chance, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
            lines.append((where, chance))
            place = {"x": (chance, 1.0), "y": (1.0, chance)}[where]
            ax.annotate("chance", place, xycoords=("data", "axes fraction") if where == "x" else ("axes fraction", "data"),
                        xytext=(3, -1) if where == "x" else (0, 2), textcoords="offset points", fontsize=7.5, color=MUTED,
                        ha="left" if where == "x" else "right", va="top" if where == "x" else "bottom")
    ax.set_xlabel("reasoning in the context, % right")
    ax.set_ylabel("recall of trained facts, % right")
    obstacles = [[(at, y) for y in ax.get_ylim()] if where == "x" else [(x, at) for x in ax.get_xlim()] for where, at in lines]
    scatter(ax, entries, "reasoning_acc", "recall_acc", scale=(100, 100), obstacles=obstacles)
