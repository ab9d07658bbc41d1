"""The report's figures: matplotlib with ordinary legends, as SVG on a transparent ground.

There is one style, with dark text. Where a reader's system is dark, the page turns a figure's
lightness round by a CSS filter (report.css), which keeps the hues.
"""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable
from urllib.parse import quote

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullFormatter

from experiments.tables import count

# family: (colour, marker), in the order of tables and legends
STYLES = {
    "dense": ("#3b4252", "s"),
    "layers": ("#0b7d67", "^"),
    "flex": ("#2866bd", "D"),
    "memoryllm": ("#bf5208", "o"),
    "stem": ("#8547b8", "P"),
    "parallel": ("#8a6026", "v"),
    "attn_only": ("#6b717b", "X"),
    "other": ("#b03a63", "h"),
}
# for series that no family tells apart: clusters, policies, prunings
PALETTE = "#2563b8 #b5500a #14774f #8a3ab0 #c0293b #0c7489 #6f6a0f #b8287f #7d5033 #56607a".split()
MARKERS = "os^DvPX<>hp*"
DASHES = ("-", "--", ":", "-.")
GREY = "#6b717b"
WIDTH, HEIGHT = 4.8, 3.0  # inches, the legend's lines not counted
CLOUD = 300  # from so many points on they are dots, drawn as pixels
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flexmemory",  # equal inputs, equal bytes
    "font.sans-serif": ["DejaVu Sans"],  # measured with; a reader without it has its own
    "font.size": 9.5,
    "text.parse_math": False,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "grid.color": "#8886",
    "grid.linewidth": 0.5,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "#22262b",
    "ytick.labelcolor": "#22262b",
}


def figure_svg(figure: dict) -> str:
    """A figure (``Figure.to_dict``) as SVG; "" where no point of it can be drawn: finite, and
    positive on a log axis.
    """
    figure = printable(figure)
    series = [s | {"points": drawable(s["points"], figure)} for s in figure["series"]]
    series = [s for s in series if s["points"]]
    return render(lambda ax: paint(ax, figure, series)) if series else ""


def curves_svg(curves: list[dict]) -> str:
    """Training loss (faint) and validation loss of variants: [{"family", "label", "train": [(step,
    loss)], "val": [(step, loss)]}].
    """
    kinds = {"train": "faint", "val": "line"}
    series = [
        {"label": c["label"], "family": c["family"], "style": style, "points": c[kind]}
        for c in curves
        for kind, style in kinds.items()
        if c[kind]
    ]
    axes = {"x": "training step", "y": "loss, nat per token", "log_x": False, "log_y": False}

    def draw(ax):
        paint(ax, axes | {"ticks": (), "lines": (), "noise": None}, series)
        # the first fifth of training, where the loss falls from the log of the vocabulary, is cut
        late = [y for s in series for x, y in s["points"] if x >= 0.22 * s["points"][-1][0]]
        margin = 0.05 * (max(late) - min(late) or 1)
        ax.set_ylim(min(late) - margin, max(late) + margin)

    return render(draw)


def render(draw: Callable) -> str:
    """The SVG of axes that ``draw(ax)`` fills, above the legend of what it labelled."""
    stream = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # tokens of any script: the reader's fonts draw them
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        ax = figure.add_subplot()
        draw(ax)
        handles, labels = ax.get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True))  # a label that comes twice is named once
        if named:
            labels = [textwrap.shorten(label, 60, placeholder=" …") for label in named]
            columns = max(1, min(4, 70 // (max(map(len, labels)) + 6)))
            figure.set_figheight(HEIGHT + 0.19 * math.ceil(len(labels) / columns))
            figure.legend(named.values(), labels, loc="outside lower center", ncols=columns)
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata, dpi=96)
    svg = stream.getvalue()
    svg = re.sub(r"\s*\n\s*", " ", svg[svg.index("<svg") :])
    svg = re.sub("font-family: [^;]*; ", "", svg)  # once for all, in its style sheet
    svg = svg.replace("*{", "*{font-family: DejaVu Sans, sans-serif;", 1)
    svg = re.sub('<g id="[^"]*"', "<g", svg)
    # a hundredth of a point is enough; numbers of texts, outside tags, keep their digits
    return re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)


def data_uri(svg: str) -> str:
    """The SVG for the src of an <img>, shorter than in base64."""
    return svg and "data:image/svg+xml," + quote(svg, safe=" /:;,=?@+$!*()")


def printable(value):
    """Without control characters, which no font draws."""
    if isinstance(value, dict):
        return {key: printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable(item) for item in value]
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "\ufffd" for c in value)
    return value


def drawable(points: list, figure: dict) -> list:
    def fits(value, log):
        return value is not None and math.isfinite(value) and (value > 0 or not log)

    return [p for p in points if fits(p[0], figure["log_x"]) and fits(p[1], figure["log_y"])]


def looks(series: list[dict]) -> list[dict]:
    """Colour, marker and dashes of each series: its family's colour, then other markers and dashes
    for further ones of it; the palette where families do not tell them apart. Series of one family
    and label look alike.
    """
    keys = [(s["family"], s["label"] or i) for i, s in enumerate(series)]
    distinct, known = list(dict.fromkeys(keys)), {}
    for i, key in enumerate(distinct):
        family = key[0]
        alike = [other for other in distinct if other[0] == family]
        if len(alike) > 4 or (family == "other" and len(alike) > 1):
            look = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)], DASHES[0]
        else:
            n, (colour, marker) = alike.index(key), STYLES[family]
            look = colour, MARKERS[(MARKERS.index(marker) + n) % len(MARKERS)], DASHES[n]
        known[key] = dict(zip(("color", "marker", "linestyle"), look, strict=True))
    dashed = [{"linestyle": "--"} if s.get("dashed") else {} for s in series]
    return [known[key] | more for key, more in zip(keys, dashed, strict=True)]


def paint(ax, figure: dict, series: list[dict]) -> None:
    """Fills the axes with the series of a figure."""
    ax.set_xscale("log" if figure["log_x"] else "linear")
    ax.set_yscale("log" if figure["log_y"] else "linear")
    dots = sum(len(s["points"]) for s in series if s["style"] == "points")
    for s, look in zip(series, looks(series), strict=True):
        look["label"] = s["label"] or "_"  # matplotlib leaves labels that begin with _ out
        if s["style"] == "faint":
            look |= {"linewidth": 0.8, "alpha": 0.3, "marker": "", "linestyle": "-"}
        elif s["style"] == "line" and len(s["points"]) > 40:
            look |= {"marker": ""}
        elif s["style"] == "points":
            look |= {"linestyle": ""}
            if dots > CLOUD:
                look |= {"marker": ".", "markersize": 4, "mew": 0, "rasterized": True}
        if s["style"] != "bars":
            paint_points(ax, s["points"], look)
    paint_bars(ax, [s for s in series if s["style"] == "bars"], dict(figure["ticks"]))
    at_side = {"transform": ax.get_yaxis_transform(), "color": GREY}
    for y, text in figure["lines"]:
        if y is not None and (y > 0 or not figure["log_y"]):
            ax.axhline(y, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
            ax.text(0.99, y, text, fontsize=8, ha="right", va="bottom", **at_side)
    if noise := figure["noise"]:
        low, high = ax.get_ylim()
        label = f"noise between seeds, {noise:g}"
        ax.plot([0.02, 0.02], [low, low + noise], lw=2, marker="_", label=label, **at_side)
        ax.set_ylim(low, high)
    ax.set_xlabel(textwrap.fill(figure["x"], 60))
    ax.set_ylabel(textwrap.fill(figure["y"], 36))
    ticks_of(ax, dict(figure["ticks"]))


def paint_points(ax, points: list, look: dict) -> None:
    """Points, joined or not; their spreads as bars up and down."""
    x, y = zip(*(p[:2] for p in points), strict=True)
    spreads = spreads_of(points)
    if any(spreads):
        ax.errorbar(x, y, yerr=spreads, elinewidth=0.9, **look)
    else:
        ax.plot(x, y, **look)


def spreads_of(points: list) -> list[float]:
    return [p[2] if len(p) > 2 and p[2] and math.isfinite(p[2]) else 0 for p in points]


def paint_bars(ax, series: list[dict], ticks: dict) -> None:
    """Series side by side at each x, from zero. Values that lie closer together than they lie to
    zero, where bars would look alike, are markers: those need no zero. What its tick names has no
    legend.
    """
    if not series:
        return
    places = sorted({p[0] for s in series for p in s["points"]})
    at = {x: [i for i, s in enumerate(series) if x in (p[0] for p in s["points"])] for x in places}
    step = min((b - a for a, b in zip(places, places[1:], strict=False)), default=1)
    width = 0.78 * step / max(map(len, at.values()))
    values = [p[1] for s in series for p in s["points"]]
    alike = min(values) * max(values) > 0 and max(map(abs, values)) < 2 * min(map(abs, values))
    for i, (s, look) in enumerate(zip(series, looks(series), strict=True)):
        named = all(ticks.get(p[0]) == s["label"] for p in s["points"])
        label = "_" if named else s["label"] or "_"
        x = [p[0] + (at[p[0]].index(i) - (len(at[p[0]]) - 1) / 2) * width for p in s["points"]]
        if alike:
            points = [(px, *p[1:]) for px, p in zip(x, s["points"], strict=True)]
            paint_points(ax, points, look | {"linestyle": "", "label": label})
        else:
            y, spreads = [p[1] for p in s["points"]], spreads_of(s["points"])
            whiskers = {"yerr": spreads, "error_kw": {"elinewidth": 0.9}} if any(spreads) else {}
            ax.bar(x, y, 0.9 * width, color=look["color"], label=label, **whiskers)
    ax.set_xlim(places[0] - 0.6 * step, places[-1] + 0.6 * step)


def ticks_of(ax, ticks: dict) -> None:
    """Names on a categorical axis, turned where they would touch; plain numbers elsewhere."""
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        if axis.get_scale() == "log" and high > 4 * low:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        else:
            axis.set_major_locator(AutoLocator())
        axis.set_major_formatter(FuncFormatter(plain))
        axis.set_minor_formatter(NullFormatter())
    if ticks:
        names = [textwrap.shorten(text, 26, placeholder="…") for text in ticks.values()]
        turned = sum(map(len, names)) + 2 * len(names) > 64
        turn = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if turned else {}
        every = math.ceil(len(names) / 26)
        ax.set_xticks(list(ticks)[::every], names[::every], **turn)
        ax.minorticks_off()
        ax.grid(False, axis="x")


def plain(value: float, _=None) -> str:
    """A tick's number: 0.25, 1,000, 20k, 3M."""
    big = 1e4 <= abs(value) < 1e12
    return (count(value, "") if big else f"{round(value, 10):,.6g}").replace("-", "−")


def describe(figure: dict, most: int = 8) -> str:
    """The numbers of a figure in words, for those who do not see it; of a long series its ends."""
    names, parts = dict(figure["ticks"]), [f"{figure['y']} against {figure['x']}"]
    for s in figure["series"][:16]:
        points = [p for p in s["points"] if None not in p[:2]]
        shown = points if len(points) <= most else [points[0], points[-1]]
        text = ", ".join(f"{names.get(p[0], f'{p[0]:.4g}')}: {p[1]:.4g}" for p in shown)
        more = f" ({len(points)} points)" if len(points) > most else ""
        parts.append(f"{s['label'] or s['family']}{more}: {text}")
    parts += [f"line at {y:.4g}: {text}" for y, text in figure["lines"] if y is not None]
    return "; ".join(parts) + "."
