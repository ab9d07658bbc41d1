"""The page of the report: results to one self-contained HTML file, readable on a phone, offline, in
light and dark.
"""

from pathlib import Path
from urllib.parse import quote

from experiments import plots, tables
from experiments.page_parts import cards, count, esc, rate, seconds, size, slug, table
from experiments.tables import DASH

TONES = {"reproduced": "good", "contradicted": "bad", "within noise": "even", "not run": "muted"}
NAV_FROM = 4  # experiments from which on the page has a list of its sections


def verdict_html(verdict: str) -> str:
    return (
        f'<span class="verdict {TONES[verdict]}"><span'
        f' aria-hidden="true">{tables.MARKS[verdict]}</span> {esc(verdict)}</span>'
    )


def verdict_table(results: dict) -> str:
    """All claims with their verdicts, the first thing on the page."""
    rows = [
        [
            esc(claim["text"])
            + (f"<small>{esc(claim['detail'])}</small>" if claim["detail"] else ""),
            f'<a href="#{slug(experiment["name"])}">{esc(tables.origin(experiment))}</a>',
            esc(claim["paper"]) or DASH,
            esc(claim["ours"]) or DASH,
            esc(experiment["scale"] or DASH),
            str(claim["seeds"]),
            verdict_html(claim["verdict"]),
        ]
        for experiment, claim in tables.verdicts(results)
    ]
    if not rows:
        return '<p class="none">No claim has been judged yet.</p>'
    counts = "".join(
        f"<li>{verdict_html(verdict)} <b>{n}</b></li>" for verdict, n in results["verdicts"].items()
    )
    return (
        '<ul class="counts"'
        f' aria-label="Verdicts">{counts}</ul><p>{esc(tables.tally(results))}.</p>'
        + cards("The claims of the papers and what these runs say", list(tables.VERDICT_HEAD), rows)
    )


def claim_list(experiment: dict) -> str:
    items = []
    for claim in experiment["claims"]:
        facts = [
            f"{word}: {esc(claim[key])}"
            for key, word in (("paper", "paper"), ("ours", "ours"))
            if claim[key]
        ]
        facts += (
            [f"{claim['seeds']} seed{'s' if claim['seeds'] != 1 else ''}"] if claim["seeds"] else []
        )
        facts += [esc(claim["detail"])] if claim["detail"] else []
        items.append(
            f"<li>{verdict_html(claim['verdict'])}"
            f" {esc(claim['text'])}<small>{' · '.join(facts)}</small></li>"
        )
    return f'<ul class="claims">{"".join(items)}</ul>' if items else ""


def rows_table(experiment: dict) -> str:
    """What ``analyse`` measured; a row's family shows as its marker."""
    rows = experiment["rows"]
    if not rows:
        return ""
    head, cells, numeric = tables.grid(rows)
    kinds = [
        "num" if numeric[i] else "long" if max(len(row[i]) for row in cells) > 34 else "text"
        for i in range(len(head))
    ]
    made = [
        [marked(text, row.get("family")) if i == 0 else esc(text) for i, text in enumerate(line)]
        for row, line in zip(rows, cells, strict=True)
    ]
    return table(f"Measured: {heading(experiment)}", head, made, kinds)


def marked(text: str, family: str | None) -> str:
    return (
        f'<span class="name">{plots.marker_svg(family)}{esc(text)}</span>'
        if family in plots.STYLES
        else esc(text)
    )


def heading(experiment: dict) -> str:
    """E2 loss order, of ids E2 and name e2_loss_order."""
    first, _, rest = experiment["name"].partition("_")
    words = rest.replace("_", " ")
    return (
        f"{first.upper()} {words}"
        if first.upper() in (i.upper() for i in experiment["ids"]) and words
        else experiment["name"].replace("_", " ")
    )


def figures(experiment: dict, curves: list[dict] | str, place: int) -> str:
    """The experiment's figures and its loss curves; ``place`` in the page makes their ids, which
    are short because there are many.
    """
    parts = [figure_html(f"f{place}-{i}", figure) for i, figure in enumerate(experiment["figures"])]
    if isinstance(curves, str):
        parts.append(
            f'<p class="soft">Its runs are those of <a href="#{slug(curves)}">{esc(curves)}</a>;'
            " the loss curves are there.</p>"
        )
    elif curves:
        svg = plots.drawn_curves(f"f{place}-c", curves)
        parts.append(
            f"<figure>{svg}<figcaption><b>Loss curves.</b> Training loss, a running mean (faint),"
            " and validation loss (markers); means over seeds.</figcaption></figure>"
        )
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def figure_html(name: str, figure: dict) -> str:
    try:
        svg, legend = plots.drawn(name, figure)
    except Exception as error:  # a figure that cannot be drawn is named in its place
        return (
            f'<p class="none">{esc(figure.get("title"))}: not drawn'
            f" ({esc(f'{type(error).__name__}: {tables.last_line(str(error))}')}).</p>"
        )
    keys = "".join(
        f"<li>{plots.marker_svg(look, line)}{esc(label)}</li>" for look, line, label in legend
    )
    key = f'<ul class="key" aria-label="Series of the figure">{keys}</ul>' if keys else ""
    caption = f"<figcaption><b>{esc(figure['title'])}.</b> {esc(figure['caption'])}</figcaption>"
    return f"<figure>{svg or '<p class=none>Nothing to draw yet.</p>'}{key}{caption}</figure>"


def run_list(experiment: dict, results: dict) -> str:
    """Every run of the experiment with its files, folded away."""
    states = dict.fromkeys(experiment["finished"], "finished") | dict.fromkeys(
        experiment["failed"], "failed"
    )
    states |= {
        run["name"]: tables.progress(run)
        for run in results["missing"]
        if run["name"] in experiment["missing"]
    }
    items = []
    for name in [*experiment["finished"], *experiment["failed"], *experiment["missing"]]:
        links = " ".join(
            f'<a href="{esc(quote(f"{name}/{file}"))}">{esc(file)}</a>'
            for file in results["runs"].get(name, ())
        )
        items.append(
            f'<li><code>{esc(name)}/</code> <span class="soft">{esc(states[name])}</span>'
            f" {links}</li>"
        )
    return (
        f"<details><summary>{'1 run and its' if len(items) == 1 else f'{len(items)} runs and their'}"
        f' files</summary><ul class="runs">{"".join(items)}</ul></details>'
        if items
        else ""
    )


def experiment_html(experiment: dict, results: dict, curves: list[dict] | str, place: int) -> str:
    errors = "".join(
        f'<p class="error"><b>{esc(what)}</b> failed: {esc(error)}</p>'
        for what, error in experiment["errors"].items()
    )
    facts = " · ".join(
        esc(text) for text in (tables.origin(experiment), tables.state(experiment)) if text
    )
    return f"""<section id="{slug(experiment["name"])}"><h2>{esc(heading(experiment))}</h2>
<p class="question">{esc(experiment["question"])}</p>
<p class="soft">{facts}</p>
{errors}{claim_list(experiment)}
{rows_table(experiment)}
{figures(experiment, curves, place)}
{run_list(experiment, results)}
</section>"""


def cost_table(results: dict) -> str:
    """What each variant holds and costs."""
    head = [
        "variant",
        "runs",
        ("total", "weights"),
        ("active", "weights"),
        ("total", "with embeddings"),
        "FLOPs/token",
        ("rows read", "per token"),
        ("table", "as stored"),
        ("table", "over FFN"),
        ("budget", "held equal"),
        ("residual", "of the target"),
        "tokens",
        ("train", "tokens/s"),
        ("time", "a run"),
    ]
    rows = []
    for e in results["accounting"]:
        budget = e["budget"] or {}
        chosen = ", ".join(
            f"{key.removeprefix('model.')}={value}"
            for key, value in (budget.get("chosen") or {}).items()
        )
        table_size = (
            f"{size(e['table_bytes'])}<small>{esc(e['row_dtype'])}</small>"
            if e["table_bytes"]
            else DASH
        )
        rows.append(
            [
                (
                    "<span"
                    f' class="name">{plots.marker_svg(e["family"])}{esc(e["variant"])}</span><small>{esc(e["pattern"] or "")}</small>'
                ),
                str(e["n"]),
                *(count(e[key]) for key in ("total", "active", "total_all", "flops_per_token")),
                size(e["row_bytes_per_token"]),
                table_size,
                DASH if e["table_over_ffn"] is None else f"{e['table_over_ffn']:.2f} ×",
                (
                    f"{esc(budget.get('mode'))}<small>{esc(chosen)}</small>"
                    if budget.get("mode")
                    else DASH
                ),
                (
                    DASH
                    if budget.get("residual") is None
                    else f"{100 * budget['residual']:+.2f} %".replace("-", "−")
                ),
                count(e["tokens"]),
                rate(e["train_tokens_per_s"]),
                seconds(e["seconds"]),
            ]
        )
    return (
        table(
            "What each variant holds and costs; rates and times are means over its runs",
            head,
            rows,
            ["text", *["num"] * 8, "text", *["num"] * 4],
        )
        if rows
        else '<p class="none">No run has finished yet.</p>'
    )


def unfinished(results: dict) -> str:
    """What is not in the tables: failed and missing runs, experiments that could not be judged."""
    parts = []
    if broken := [e for e in results["experiments"] if e["errors"]]:
        parts.append(
            "<h3>Not judged</h3><ul>"
            + "".join(
                f'<li><a href="#{slug(e["name"])}">{esc(e["name"])}</a> <span'
                f' class="soft">{esc("; ".join(dict.fromkeys(e["errors"].values())))}</span></li>'
                for e in broken
            )
            + "</ul>"
        )
    if results["failed"]:
        parts.append(
            "<h3>Failed</h3>"
            + "".join(
                f'<p><code>{esc(run["name"])}/</code> <span class="soft">exit'
                f" {esc('unknown' if run['exit'] is None else run['exit'])}</span></p><pre"
                f' class="error">{esc(run["error"].strip())}</pre>'
                for run in results["failed"]
            )
        )
    if results["missing"]:
        begun = [run for run in results["missing"] if tables.progress(run) != tables.WAITING]
        waiting = [run["name"] for run in results["missing"] if run not in begun]
        items = "".join(
            f"<li><code>{esc(run['name'])}/</code> <span"
            f' class="soft">{esc(tables.progress(run))}</span></li>'
            for run in begun
        )
        parts.append(
            "<h3>Not finished</h3>"
            + (f"<ul>{items}</ul>" if items else "")
            + (
                f"<details><summary>{len(waiting)}"
                f" {tables.WAITING}</summary><p><code>{esc(', '.join(waiting))}</code></p></details>"
                if waiting
                else ""
            )
        )
    return (
        '<section id="unfinished" class="notice"><h2>Not in the'
        f" tables</h2>{''.join(parts)}</section>"
        if parts
        else ""
    )


def what_was_run(results: dict) -> str:
    """One paragraph: experiments, runs, scale, device, steps."""
    names, env = results["experiments"], results["environment"]
    ids = [i for experiment in names for i in experiment["ids"][:1] or [experiment["name"]]]
    words = f"{len(names)} experiment{'s' if len(names) != 1 else ''} ({esc(', '.join(ids))})"
    words += f" at <b>{esc(results['scale'])}</b> scale" if results["scale"] else ""
    words += f": {results['finished']} of {results['expected']} runs finished"
    if steps := results["steps"]:
        words += (
            f", {f'{steps[0]:,}' if len(steps) == 1 else f'{steps[0]:,} to {steps[-1]:,}'} training"
            " steps each"
        )
    devices = (
        env.get("device")
        if isinstance(env.get("device"), list)
        else [env["device"]]
        if env.get("device")
        else []
    )
    words += f", on {esc(', '.join(map(str, devices)))}" if devices else ""
    seeds = sorted({seed for experiment in names for seed in experiment["seeds"]})
    words += (
        f", seed{'s' if len(seeds) > 1 else ''} {esc(', '.join(map(str, seeds)))}" if seeds else ""
    )
    return (
        words
        + ". Every number here was measured on these models, trained from scratch; a verdict says"
        " whether the paper's claim shows at this scale."
    )


def nav(results: dict) -> str:
    if len(results["experiments"]) < NAV_FROM:
        return ""
    items = "".join(
        f'<li><a href="#{slug(e["name"])}">{esc(heading(e))}</a></li>'
        for e in results["experiments"]
    )
    return (
        f'<nav aria-label="Sections"><ul><li><a href="#verdicts">Verdicts</a></li>{items}<li><a'
        ' href="#cost">Sizes and cost</a></li></ul></nav>'
    )


def how_to_read(results: dict) -> str:
    items = [
        (
            "reproduced, contradicted",
            (
                "The 95 % interval of the mean of the paired differences leaves out zero, on the"
                " paper's side or on the other. Runs of one seed saw the same batches in the same"
                " order. Claims of equality or count are exact and need no interval."
            ),
        ),
        ("within noise", "These seeds do not decide it; the small line says how many would."),
        ("not run", "Its runs are not all there."),
        ("±", "Sample standard deviation over the seeds."),
        (
            "total, active",
            (
                "Weights without embedding and head. Active leaves out what a table replaces: what"
                " a token needs on the accelerator."
            ),
        ),
        (
            "table over FFN",
            (
                "Values of the folded table over the FFN weights it replaces. Above 1 the table is"
                " larger; the gain is accelerator memory and compute."
            ),
        ),
    ]
    return (
        "<dl>"
        + "".join(f"<dt>{esc(term)}</dt><dd>{esc(text)}</dd>" for term, text in items)
        + "</dl>"
    )


def provenance(results: dict) -> str:
    def told(value):
        return (
            ", ".join(f"{k} {v}" for k, v in value.items())
            if isinstance(value, dict)
            else str(value)
        )

    items = [
        (key, "; ".join(told(v) for v in value) if isinstance(value, list) else told(value))
        for key, value in results["environment"].items()
        if value is not None
    ]
    return (
        "<dl>"
        + "".join(
            f"<dt>{esc(key.replace('_', ' '))}</dt><dd>{esc(text)}</dd>" for key, text in items
        )
        + '<dt>numbers</dt><dd><a href="results.json">results.json</a>, tables as <a'
        ' href="report.md">Markdown</a> and <a href="report.tex">LaTeX</a>, beside this'
        " file</dd></dl>"
    )


def page(results: dict, curves: dict[str, list[dict] | str]) -> str:
    """The whole document. curves: per experiment as `experiments.report.curves` gives them."""
    title = tables.title(results)
    variables = {
        dark: "".join(f"--{name}:{colour};" for name, colour in plots.colours(dark).items())
        for dark in (False, True)
    }
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    sections = "\n".join(
        experiment_html(e, results, curves.get(e["name"], []), place)
        for place, e in enumerate(results["experiments"])
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{esc(title)}</title>
<style>
:root{{{variables[False]}color-scheme:light dark}}
@media (prefers-color-scheme:dark){{:root{{{variables[True]}}}}}
{style}</style>
</head>
<body>
<main>
<header>
<p class="over">flexmemory report</p>
<h1>{esc(title)}</h1>
<p class="lede">{what_was_run(results)}</p>
</header>
{nav(results)}
<section id="verdicts"><h2>Verdicts</h2>
{verdict_table(results)}
</section>
{unfinished(results)}
{plots.letters_once(sections)}
<section id="cost"><h2>Sizes and cost</h2>
{cost_table(results)}
</section>
<section id="reading"><h2>How to read</h2>
{how_to_read(results)}
</section>
<section id="provenance"><h2>Where it comes from</h2>
{provenance(results)}
</section>
</main>
</body>
</html>
"""
