"""The report's page: results as one HTML file that needs nothing else, by report.html.j2."""

import re
from functools import partial
from pathlib import Path
from urllib.parse import quote

import jinja2

from experiments import plots, summary, tables

TONES = {"reproduced": "good", "contradicted": "bad", "within noise": "even", "not run": "muted"}


def render(results: dict) -> str:
    """The whole document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=tables.count, size=tables.size, duration=tables.seconds, cell=tables.cell
    )
    environment.filters.update(slug=partial(re.sub, r"[^A-Za-z0-9_-]", "-"), quote=quote)
    environment.globals.update(tables=tables, summary=summary, styles=plots.STYLES, tones=TONES)
    environment.globals.update(
        heading=heading, figure=figure, curves=curves, states=states, told=told
    )
    return environment.get_template("report.html.j2").render(r=results)


def heading(experiment: dict) -> str:
    """E2 loss order, of ids E2 and name e2_loss_order."""
    first, _, rest = experiment["name"].partition("_")
    words = rest.replace("_", " ")
    if words and first.upper() in (i.upper() for i in experiment["ids"]):
        return f"{first.upper()} {words}"
    return experiment["name"].replace("_", " ")


def figure(figure: dict) -> dict:
    """{"src", "alt"} of a figure, src "" without a point to draw; {"error"} where it fails."""
    try:
        return {"src": plots.data_uri(plots.figure_svg(figure)), "alt": plots.describe(figure)}
    except Exception as error:  # a figure that cannot be drawn is named in its place
        return {"error": f"{type(error).__name__}: {tables.last_line(str(error))}"}


def curves(curves: list[dict]) -> dict:
    ends = [(c["label"], *(c["val"] or c["train"])[-1]) for c in curves]
    last = "; ".join(f"{label} {loss:.3f} at step {step:,}" for label, step, loss in ends)
    return {
        "src": plots.data_uri(plots.curves_svg(curves)),
        "alt": f"Loss against training step. Last values: {last}.",
    }


def states(experiment: dict, results: dict) -> dict[str, str]:
    """{run of the experiment: finished, failed, or how far it is}"""
    going = {run["name"]: tables.progress(run) for run in results["missing"]}
    done = dict.fromkeys(experiment["finished"], "finished")
    done |= dict.fromkeys(experiment["failed"], "failed")
    return done | {name: going[name] for name in experiment["missing"]}


def told(value) -> str:
    """A value of the environment in words."""
    if isinstance(value, list):
        return "; ".join(map(told, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)
