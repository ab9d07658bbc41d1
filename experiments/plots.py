"""The figures of the report: matplotlib drawings turned into inline SVG that follows the page's
light or dark colours.
"""

import html
import io
import math
import re
import textwrap
import warnings

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Affine2D

from experiments.plot_labels import SIZE, edge_labels, line_labels, place_labels

# family: (colour on light paper, colour on dark paper, marker); in the SVG a colour becomes the CSS
# variable --family
STYLES = {
    "dense": ("#3b4252", "#d8dee9", "s"),
    "layers": ("#0b7d67", "#45c9a9", "^"),
    "flex": ("#2866bd", "#7db2f7", "D"),
    "memoryllm": ("#bf5208", "#ffa260", "o"),
    "stem": ("#8547b8", "#c9a0f2", "P"),
    "parallel": ("#8a6026", "#d3ac78", "v"),
    "attn_only": ("#6b717b", "#9ea5b0", "X"),
    "other": ("#b03a63", "#f08cb0", "h"),
}
# for series that no family tells apart: clusters, policies, prunings
PALETTE = {
    f"c{i}": (*pair, "osD^vPX<h>p*"[i])
    for i, pair in enumerate(
        (
            ("#2563b8", "#7fb0f5"),
            ("#b5500a", "#f5a361"),
            ("#14774f", "#5cc99a"),
            ("#8a3ab0", "#cf9bf0"),
            ("#c0293b", "#f58a92"),
            ("#0c7489", "#5cc6dc"),
            ("#6f6a0f", "#cfc75a"),
            ("#b8287f", "#f291cf"),
            ("#7d5033", "#d2a986"),
            ("#56607a", "#aab4cc"),
            ("#4d42c9", "#a9a2ff"),
            ("#4a6b10", "#a6d15f"),
        )
    )
}
LOOKS = STYLES | PALETTE
PAGE = {
    "paper": ("#fdfdfb", "#16181c"),
    "ink": ("#22262b", "#e4e6ea"),
    "muted": ("#636972", "#a0a6b0"),
    "rule": ("#e2e1dc", "#33373e"),
    "good": ("#0a7059", "#4cccae"),
    "bad": ("#b32447", "#f58aa8"),
    "even": ("#855600", "#e0b45c"),
}
PAPER, INK, MUTED, RULE = (PAGE[name][0] for name in ("paper", "ink", "muted", "rule"))
WIDTH = 4.8  # inches
CLOUD = 300  # points from which on markers are dots
DASHES = ("-", "--", ":", "-.")  # lines of one look, one after the other
FEW = 24  # labels that still find a place beside their points or lines


def colours(dark: bool) -> dict[str, str]:
    """{CSS variable: colour} for one of the two papers."""
    return {name: values[dark] for name, values in (LOOKS | PAGE).items()}


def marker_svg(look: str, kind: str = "marker") -> str:
    """A marker as a small inline SVG for legends and tables, or a piece of line, a dot, a bar;
    decorative, so hidden from screen readers.

    kind: marker | solid | dashed | dot | bar.
    """
    if kind in ("solid", "dashed"):
        dashes = ' stroke-dasharray="5 3"' if kind == "dashed" else ""
        body = f'<path d="M-8 0H8" stroke="var(--{look})" stroke-width="2.5"{dashes}/>'
    else:
        style = MarkerStyle({"marker": LOOKS[look][2], "dot": "o", "bar": "s"}[kind])
        polygons = (
            style.get_path()
            .transformed(style.get_transform() + Affine2D().scale(10, -10))
            .to_polygons()
        )
        path = " ".join(
            "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in polygon) + "Z" for polygon in polygons
        )
        body = f'<path d="{path}" fill="var(--{look})"/>'
    return f'<svg class="mark" viewBox="-8 -8 16 16" aria-hidden="true">{body}</svg>'


def draw(name: str, title: str, description: str, paint, height: float = 3.5) -> str:
    """An accessible inline SVG, 4.8 inches wide, of the axes that ``paint(ax)`` fills. Equal inputs
    give equal text.
    """
    settings = {
        "svg.hashsalt": name,
        "svg.fonttype": "path",
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.linewidth": 0.7,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "figure.dpi": 72,
        "axes.formatter.useoffset": False,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasAgg(figure)  # measures text for label placement
        ax = figure.add_axes((0.13, 0.46 / height, 0.85, 1 - 0.58 / height))
        ax.grid(color=RULE, linewidth=0.6)
        stream = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Glyph .* missing"
            )  # tokens of any script are drawn as boxes; the description has their text
            paint(ax)
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return inline(stream.getvalue(), name, title, description)


def inline(svg: str, name: str, title: str, description: str) -> str:
    """matplotlib's file as an element of a page: no headers, no links, own ids, named, rounded,
    colours as CSS variables.

    Shapes of letters keep ids of their own, equal in every figure; see :func:`letters_once`.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    box = re.search(r'viewBox="([^"]+)"', svg)[1]
    body = svg[svg.index(">") + 1 :].replace("xlink:href", "href")
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(id="|href="#|url\(#)(?!DejaVuSans-)', rf"\g<1>{name}-", body)
    for key, colour in colours(dark=False).items():
        body = body.replace(colour, f"var(--{key})")
    body = re.sub(
        r' (?:d|x|y|width|height)="[^"]*"|translate\([^)]*\)', lambda match: rounded(match[0]), body
    )
    body = re.sub(r"\s*\n\s*", "\n", body)
    return (
        f'<svg viewBox="{box}" role="img" aria-labelledby="{name}-title {name}-desc"><title'
        f' id="{name}-title">{html.escape(title)}</title><desc'
        f' id="{name}-desc">{html.escape(description)}</desc>{body}'
    )


def rounded(text: str) -> str:
    """Coordinates to a tenth of a point, with no more characters than they need; a line of no
    length, which is a dot, in three.
    """
    text = re.sub(
        r"-?\d+\.\d+",
        lambda match: f"{float(match[0]):.1f}".removesuffix(".0").replace("-0.", "-.") or "0",
        text,
    )
    text = re.sub(r"\s*([MLHVCQzZ])\s*", r"\1", text).replace(' "', '"')
    return re.sub(r"M([-\d.]+ [-\d.]+)L\1(?![\d.])", r"M\1h0", text)


def letters_once(page: str) -> str:
    """The page with the shape of every letter in the first figure that writes it, and no second
    time.
    """
    seen: set[str] = set()

    def first(match: re.Match) -> str:
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return match[0].replace("DejaVuSans-", "g")

    return re.sub(
        r'href="#DejaVuSans-',
        'href="#g',
        re.sub(r'<path id="(DejaVuSans-[^"]+)"[^>]*>\n?', first, page),
    )


def drawn(name: str, figure: dict) -> tuple[str, list[tuple[str, str, str]]]:
    """(inline SVG, legend) of a Figure as dict. ``name`` is unique in the page. Legend: (look, kind
    of :func:`marker_svg`, label) of what no text in the drawing names. Points that are not finite,
    or not positive on a log axis, are left out; without any left the SVG is empty.
    """
    figure = printable(figure)
    figure = figure | {
        "series": [s | {"points": finite(s["points"], figure)} for s in figure["series"]],
        "lines": [
            line
            for line in figure["lines"]
            if line[0] is not None and (line[0] > 0 or not figure["log_y"])
        ],
    }
    figure["series"] = [s for s in figure["series"] if s["points"]]
    if not figure["series"]:
        return "", []
    lines = [s for s in figure["series"] if s["style"] == "line"]
    height = max(
        3.5,
        1.2 + 0.165 * len(lines),
        3.9 if any(len(text) > 8 for _, text in figure["ticks"]) else 0,
    )
    legend = []
    svg = draw(
        name, figure["title"], describe(figure), lambda ax: legend.extend(paint(ax, figure)), height
    )
    return svg, legend


def printable(value):
    """Without control characters, which no font draws."""
    if isinstance(value, dict):
        return {key: printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable(item) for item in value]
    return (
        "".join(c if c.isprintable() else "\ufffd" for c in value)
        if isinstance(value, str)
        else value
    )


def finite(points: list, figure: dict) -> list[list[float]]:
    usable = [p for p in points if all(v is not None and math.isfinite(v) for v in p[:2])]
    return [
        p for p in usable if (p[0] > 0 or not figure["log_x"]) and (p[1] > 0 or not figure["log_y"])
    ]


def describe(figure: dict, most: int = 8) -> str:
    """The numbers of a figure in words, for those who do not see it; of a long series its ends and
    its range.
    """
    names = {x: text for x, text in figure["ticks"]}
    parts = []
    for s in figure["series"][:16]:
        told = s["points"] if len(s["points"]) <= most else [s["points"][0], s["points"][-1]]
        text = ", ".join(f"{names.get(p[0], f'{p[0]:.4g}')}: {p[1]:.4g}" for p in told)
        if len(s["points"]) > most:
            ys = [p[1] for p in s["points"]]
            text = (
                f"{len(ys)} points, from {text.replace(', ', ' to ')}, between {min(ys):.4g} and"
                f" {max(ys):.4g}"
            )
        parts.append(f"{s['label'] or s['family']}: {text}")
    parts += [f"line at {y:.4g}: {text}" for y, text in figure["lines"]]
    if len(figure["series"]) > 16:
        parts.append(f"and {len(figure['series']) - 16} more")
    return f"{figure['y']} against {figure['x']}. " + "; ".join(parts) + "."


def paint(ax, figure: dict) -> list[tuple[str, str, str]]:
    """Fills the axes with a Figure; returns its legend. Marks come first, then limits and room,
    then text.
    """
    series = figure["series"]
    lines = [i for i, s in enumerate(series) if s["style"] == "line" and s["label"]]
    singles = [
        i
        for i, s in enumerate(series)
        if s["style"] == "points" and len(s["points"]) == 1 and s["label"]
    ]
    widest = max(text_widths(ax, [series[i]["label"] for i in lines]), default=0)
    if widest > 0.42 * WIDTH * 72 or len(lines) > 2 * FEW:
        lines = []
    if len(singles) > FEW:
        singles = []
    ticks = {x: text for x, text in figure["ticks"]}
    named = [
        i
        for i, s in enumerate(series)
        if s["style"] == "bars" and all(ticks.get(p[0]) == s["label"] for p in s["points"])
    ]  # by their tick
    keyed = [i for i, s in enumerate(series) if s["label"] and i not in [*lines, *singles, *named]]
    looks = choose_looks(series, keyed)
    ax.set_xscale("log" if figure["log_x"] else "linear")
    ax.set_yscale("log" if figure["log_y"] else "linear")
    for y, _ in figure["lines"]:
        ax.axhline(y, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
    dotted = sum(len(s["points"]) for s in series if s["style"] == "points")
    for i, (s, look) in enumerate(zip(series, looks, strict=True)):
        if s["style"] == "line":
            same = [
                other
                for other, its in zip(series[:i], looks[:i], strict=True)
                if its == look and other["style"] == "line"
            ]
            paint_line(
                ax,
                s,
                look,
                "--" if s["dashed"] else DASHES[len(same) % len(DASHES) if i in lines else 0],
            )
        elif s["style"] == "points" and dotted > CLOUD:
            paint_dots(ax, s, look)
        elif s["style"] == "points":
            paint_points(ax, s, look, 6.5 if dotted <= 40 else 4)
    paint_bars(
        ax, [(s, look) for s, look in zip(series, looks, strict=True) if s["style"] == "bars"]
    )
    ax.set_xlabel(textwrap.fill(figure["x"], 66))
    ax.set_ylabel(textwrap.fill(figure["y"], 42))
    make_room(ax, figure, widest + 20 if lines else 0)
    obstacles = [[p[:2] for p in s["points"]] for s in series if s["style"] == "line"]
    obstacles += [
        [(p[0], p[1] - p[2]), (p[0], p[1] + p[2])]
        for i in singles
        for p in series[i]["points"]
        if len(p) > 2 and 0 < (p[2] or 0) < p[1]
    ]
    if figure["noise"]:
        noise_bar(ax, figure["noise"], [p for s in series for p in s["points"]])
    across = [[(x, y) for x in ax.get_xlim()] for y, _ in figure["lines"]]
    place_labels(
        ax,
        [(*series[i]["points"][0][:2], series[i]["label"], LOOKS[looks[i]][0]) for i in singles],
        obstacles + across,
    )
    line_labels(ax, figure["lines"], MUTED, obstacles)
    edge_labels(
        ax,
        [
            (
                series[i]["label"],
                LOOKS[looks[i]][0],
                series[i]["points"][-1][1],
                series[i]["points"][-1][0],
            )
            for i in lines
        ],
    )
    kinds = {"line": "solid", "points": "dot" if dotted > CLOUD else "marker", "bars": "bar"}
    return [
        (
            looks[i],
            "dashed" if series[i]["dashed"] else kinds[series[i]["style"]],
            series[i]["label"],
        )
        for i in keyed
    ]


def choose_looks(series: list[dict], keyed: list[int]) -> list[str]:
    """A key of LOOKS per series: its family; the palette in turn for several "other", and for all
    where a legend could not tell families apart.
    """
    shown = [
        (series[i]["family"], series[i]["dashed"], series[i]["style"])
        for i in keyed
        if series[i]["family"] != "other"
    ]
    if len(set(shown)) < len(shown):
        return [f"c{i % len(PALETTE)}" for i in range(len(series))]
    others = [i for i, s in enumerate(series) if s["family"] == "other"]
    return [
        f"c{others.index(i) % len(PALETTE)}" if i in others and len(others) > 1 else s["family"]
        for i, s in enumerate(series)
    ]


def text_widths(ax, texts: list[str]) -> list[float]:
    """Widths in points at the size of labels."""
    renderer, artist = ax.figure.canvas.get_renderer(), ax.text(0, 0, "", fontsize=SIZE)
    widths = []
    for text in texts:
        artist.set_text(text)
        widths.append(artist.get_window_extent(renderer).width)
    artist.remove()
    return widths


def columns(points: list) -> tuple[list, list, list | None]:
    """(x, y, spreads or None) of the points."""
    spreads = [
        p[2] if len(p) > 2 and p[2] is not None and math.isfinite(p[2]) else 0 for p in points
    ]
    return [p[0] for p in points], [p[1] for p in points], spreads if any(spreads) else None


def paint_line(ax, s: dict, look: str, dashes: str) -> None:
    x, y, spreads = columns(s["points"])
    colour, _, marker = LOOKS[look]
    marked = (
        {"marker": marker, "markersize": 4, "markeredgecolor": PAPER, "markeredgewidth": 0.4}
        if len(x) <= 40
        else {}
    )
    ax.errorbar(
        x,
        y,
        yerr=spreads,
        color=colour,
        linewidth=1.2,
        elinewidth=0.8,
        linestyle=dashes,
        zorder=3,
        **marked,
    )


def paint_points(ax, s: dict, look: str, size: float) -> None:
    x, y, spreads = columns(s["points"])
    colour, _, marker = LOOKS[look]
    ax.errorbar(
        x,
        y,
        yerr=spreads,
        fmt=marker,
        color=colour,
        markersize=size,
        markeredgecolor=PAPER,
        markeredgewidth=0.6,
        elinewidth=0.9,
        zorder=4,
        clip_on=False,
    )


def paint_dots(ax, s: dict, look: str) -> None:
    """Thousands of points as one path of round dots: a dozen characters each."""
    corners = np.repeat(np.array([p[:2] for p in s["points"]]), 2, axis=0)
    path = Path(corners, [Path.MOVETO, Path.LINETO] * len(s["points"]))
    path.should_simplify = False
    ax.add_patch(
        PathPatch(
            path, fill=False, edgecolor=LOOKS[look][0], linewidth=2.6, capstyle="round", zorder=3
        )
    )
    ax.autoscale_view()


def paint_bars(ax, bars: list[tuple[dict, str]]) -> None:
    """Series side by side at each x, from zero, with the spread as whiskers. Values that lie closer
    together than they lie to zero, where bars would all look alike, are markers at the same places:
    those need no zero.
    """
    places = sorted({p[0] for s, _ in bars for p in s["points"]})
    at = {
        x: [i for i, (s, _) in enumerate(bars) if any(p[0] == x for p in s["points"])]
        for x in places
    }
    step = min((b - a for a, b in zip(at, list(at)[1:], strict=False)), default=1)
    wide = 0.78 * step / max((len(those) for those in at.values()), default=1)
    values = [p[1] for s, _ in bars for p in s["points"]]
    near = (
        bool(values)
        and min(values) * max(values) > 0
        and max(map(abs, values)) < 2 * min(map(abs, values))
    )
    for i, (s, look) in enumerate(bars):
        x, y, spreads = columns(s["points"])
        x = [px + (at[px].index(i) - (len(at[px]) - 1) / 2) * wide for px in x]
        if near:
            paint_points(
                ax, s | {"points": list(zip(x, y, spreads or [0] * len(x), strict=True))}, look, 6.5
            )
        else:
            ax.bar(
                x,
                y,
                width=0.9 * wide,
                yerr=spreads,
                color=LOOKS[look][0],
                zorder=2,
                error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2},
            )
    if at:
        ax.set_xlim(min(at) - 0.6 * step, max(at) + 0.6 * step)
        if not near and ax.get_yscale() == "linear":
            ax.axhline(0, color=MUTED, linewidth=0.7, zorder=2.5)


def make_room(ax, figure: dict | None, right: float) -> None:
    """Ticks, then the axes as large as the labels around them allow; ``right`` points stay free
    beside them.
    """
    figure_wide, figure_high = ax.figure.get_size_inches() * 72
    for _ in range(2):  # fewer or turned ticks change the room, room changes the ticks
        if figure:
            axis_ticks(ax, figure, figure_wide * ax.get_position().width)
        renderer = ax.figure.canvas.get_renderer()
        frame, beside = ax.get_window_extent(), ax.yaxis.get_tightbbox(renderer)
        below = ax.xaxis.get_tightbbox(renderer)
        left = frame.x0 - min(beside.x0, below.x0, frame.x0) + 2
        over = max(below.x1 - frame.x1, 2) + 1
        bottom = frame.y0 - below.y0 + 2
        right_edge = figure_wide - max(right, over)
        ax.set_position(
            (
                left / figure_wide,
                bottom / figure_high,
                (right_edge - left) / figure_wide,
                (figure_high - bottom - 9) / figure_high,
            )
        )


def axis_ticks(ax, figure: dict, wide: float) -> None:
    """Names on a categorical axis, turned where they would touch and thinned where even that is too
    dense; plain numbers elsewhere.
    """
    for axis, log in ((ax.xaxis, figure["log_x"]), (ax.yaxis, figure["log_y"])):
        low, high = sorted(axis.get_view_interval())
        if log and high > 4 * low:
            axis.set_major_locator(
                LogLocator(base=10, subs=(1, 2, 5) if high < 200 * low else (1,))
            )
        else:
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    if figure["ticks"]:
        texts = [text if len(text) <= 26 else text[:25] + "…" for _, text in figure["ticks"]]
        widths = text_widths(ax, texts)
        low, high = ax.get_xlim()
        places = np.array([x for x, _ in figure["ticks"]], float)
        pixels = (
            np.log(places / low) / math.log(high / low)
            if figure["log_x"]
            else (places - low) / (high - low)
        ) * wide
        gap = min(np.diff(np.sort(pixels)), default=wide)
        turned = max(widths) + 5 > gap
        every = math.ceil(13.5 / gap) if turned else 1
        ax.set_xticks(
            places[::every],
            texts[::every],
            rotation=40 if turned else 0,
            ha="right" if turned else "center",
            rotation_mode="anchor",
            fontsize=SIZE,
        )
        ax.minorticks_off()


def plain(value: float) -> str:
    """A tick's number: 0.25, 1,000, 20k, 3M, 10⁻⁵"""
    size = abs(value)
    if size and (size < 1e-4 or size >= 1e12):
        exponent = math.floor(math.log10(size) + 1e-9)
        digits = f"{value / 10**exponent:.3g}"
        return (
            ("" if digits == "1" else digits + "·")
            + "10"
            + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        )
    for unit, word in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= max(unit, 1e4):
            return f"{value / unit:.6g}{word}".replace("-", "−")
    return f"{round(value, 10):,.6g}".replace("-", "−")


def noise_bar(ax, noise: float, points: list) -> None:
    """A bar as tall as the seed noise, in the lower corner away from the lowest of the points."""
    low, high = ax.get_ylim()
    bottom = low + 0.03 * (high - low)
    right = bool(points) and min(points, key=lambda p: p[1])[0] < sum(ax.get_xlim()) / 2
    bar, text = (0.978, 0.962) if right else (0.022, 0.038)
    ax.plot(
        [bar, bar],
        [bottom, bottom + noise],
        transform=ax.get_yaxis_transform(),
        color=MUTED,
        linewidth=2.2,
        solid_capstyle="butt",
        clip_on=False,
    )
    ax.set_ylim(low, high)
    ax.text(
        text,
        0.026,
        f"{noise:g}",
        transform=ax.transAxes,
        va="bottom",
        ha="right" if right else "left",
        fontsize=7.5,
        color=MUTED,
    )


def drawn_curves(name: str, curves: list[dict]) -> str:
    """Loss curves as an inline SVG; see :func:`loss_curves`."""
    ends = [(c["label"], (c["val"] or c["train"])[-1]) for c in curves]
    text = (
        "Loss against training step. Last values: "
        + "; ".join(f"{label} {loss:.3f} at step {step:,}" for label, (step, loss) in ends)
        + "."
    )
    return draw(
        name,
        "Loss curves",
        text,
        lambda ax: loss_curves(ax, curves),
        max(4, 1.2 + 0.165 * len(curves)),
    )


def loss_curves(ax, curves: list[dict]) -> None:
    """Training loss (running mean, faint) and validation loss (points joined) of every variant,
    named once at the right edge.

    curves: [{"family", "label", "train": [(step, loss)], "val": [(step, loss)]}], each with a point
    in one of both.
    """
    ends, tops, lows, last = [], [], [], 1
    for i, curve in enumerate(curves):
        colour, _, marker = STYLES[curve["family"]]
        dashes = DASHES[
            sum(other["family"] == curve["family"] for other in curves[:i]) % len(DASHES)
        ]
        for steps, loss, style in (
            (*smooth(curve["train"]), {"linewidth": 0.7, "alpha": 0.35}),
            (
                *smooth(curve["val"], width=0),
                {
                    "linewidth": 1.1,
                    "linestyle": dashes,
                    "marker": marker,
                    "markersize": 3.4,
                    "markeredgecolor": PAPER,
                    "markeredgewidth": 0.4,
                    "zorder": 3,
                },
            ),
        ):
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
    make_room(ax, None, max(text_widths(ax, [label for label, *_ in ends])) + 20)
    edge_labels(ax, ends)


def smooth(series: list, width: float = 0.08, points: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Centred running mean over a share ``width`` of the series, thinned to ``points``: (steps,
    values).
    """
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
