"""The page of the report: results to one self-contained HTML file, readable on a phone, offline, in light and dark."""

import html
import re

from experiments import plots

DASH = "–"


def count(value) -> str:
    """1234567 -> 1.23 M"""
    if value is None:
        return DASH
    for unit, word in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{word}" if value < 999.5 * unit else f"{value / unit:.0f}{word}"
    return f"{value:.3g}"


def size(value) -> str:
    """Bytes in binary units; a dash for none at all."""
    if not value:
        return DASH
    for unit, word in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.{0 if value >= 100 * unit else 1}f} {word}"
    return f"{value:.0f} B"


def rate(value) -> str:
    return DASH if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def loss(value) -> str:
    return DASH if value is None else f"{value:.3f}"


def signed(value) -> str:
    return DASH if value is None else "0" if value == 0 else f"{value:+.3f}".replace("-", "−")


def share(value) -> str:
    return DASH if value is None else f"{100 * value:.1f} %"


def ratio(value) -> str:
    """C and M shares of the FFN weights in percent: 0.375 -> 37.5/62.5"""
    return DASH if value is None else f"{100 * value:.3g}/{100 - 100 * value:.3g}"


def difference(value) -> str:
    return DASH if value is None else "0" if value == 0 else f"{value:.1e}"


def seconds(value) -> str:
    return DASH if value is None else f"{value:,.1f} s" if value < 100 else f"{value:,.0f} s"


SHORT = {"count": count, "bytes": size, "rate": rate, "loss": loss, "signed": signed, "share": share, "ratio": ratio}


def chance(summary: list[dict], task: str) -> str | None:
    """What guessing scores on the task's questions: one figure, or its range where variants were asked differently."""
    values = sorted({share(e[task + "_chance"]) for e in summary if e[task + "_chance"] is not None}, key=lambda text: float(text[:-2]))
    return None if not values else values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"


def progress(run: dict, steps: int | None) -> str:
    """Where a run without result stands: not started, or its last step."""
    return "not started" if run.get("step") is None else f"at step {run['step']:,}" + (f" of {steps:,}" if steps else "")


def esc(value) -> str:
    """Text for HTML; what no page may hold (control characters, halves of surrogate pairs) becomes the replacement character."""
    return html.escape(re.sub("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", str(value)))


def spread(mean: str, deviation: float | None) -> str:
    return mean if deviation is None else f'{mean}<span class="pm"> ± {deviation:.3f}</span>'


def joined(values) -> str:
    return ", ".join(str(v) for v in values)


def table(caption: str, head: list, rows: list[list[str]], text_columns: int = 1) -> str:
    """A table that scrolls inside its own box; the first ``text_columns`` columns are left-aligned, the first is a row header.

    head: texts, or (text, small second line). Cells are HTML already.
    """
    def column(i, item):
        top, sub = item if isinstance(item, tuple) else (item, None)
        return f'<th scope="col"{"" if i >= text_columns else " class=text"}>{esc(top)}{f"<small>{esc(sub)}</small>" if sub else ""}</th>'

    body = "\n".join(
        "<tr>" + "".join(f'<th scope="row">{cell}</th>' if i == 0 else f'<td{" class=text" if i < text_columns else ""}>{cell}</td>'
                         for i, cell in enumerate(row)) + "</tr>" for row in rows)
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(caption)}"><table><caption>{esc(caption)}</caption>'
            f'<thead><tr>{"".join(column(i, item) for i, item in enumerate(head))}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>')


def name_cell(entry: dict) -> str:
    sub = entry["pattern"] or ""
    if entry["beta"] is not None:
        sub += f", β = {entry['beta']}"
    return f'<span class="name">{plots.marker_svg(entry["family"])}{esc(entry["variant"])}</span><small>{esc(sub)}</small>'


def headline_table(results: dict) -> str:
    summary = results["summary"]
    task = {name: (name, f"chance {chance(summary, name)}" if chance(summary, name) else None) for name in ("recall", "reasoning")}
    head = ["variant", ("C / M", "% of FFN"), "seeds", ("total", "weights"), ("active", "weights"), ("val loss", "nat/token"),
            ("Δ dense", "paired"), ("bits/byte", "validation"), task["recall"], task["reasoning"], ("train", "tokens/s"), ("table", "float32"),
            ("decode, tokens/s", "RAM / disk")]
    rows = [[name_cell(e), ratio(e["c_fraction"]), str(e["n"]), count(e["total"]), count(e["active"]),
             spread(f"<b>{loss(e['val_loss'])}</b>", e["val_loss_std"]), spread(signed(e["delta_dense"]), e["delta_dense_std"] or None),
             loss(e["val_bits_per_byte"]), share(e["recall_acc"]), share(e["reasoning_acc"]), rate(e["train_tokens_per_s"]),
             size(e["table_bytes"]), f"{rate(e['decode_tps_resident'])} / {rate(e['decode_tps_offloaded'])}"] for e in summary]
    return table("The variants, from dense to memory", head, rows)


def equality_table(results: dict) -> str:
    """Run by run: the model with its rows on disk against the one with its memory resident, as `flexmemory verify` found them."""
    mark = {True: '<span class="yes">✓ equal</span>', False: '<span class="no">✗ differs</span>'}
    rows = [[f'<code>{esc(run["name"])}/</code>', mark[run["ok"]], difference(run.get("rows_max_abs_diff")), difference(run.get("logits_max_abs_diff")),
             difference(run.get("logits_max_rel_diff")), "yes" if run["greedy_equal"] else '<span class="no">no</span>', seconds(run.get("export_s")),
             share(run.get("cache_hit_rate"))]
            for run in results["variants"] if run.get("ok") is not None]
    head = ["run folder", "disk = resident", ("rows", "max |Δ|"), ("logits", "max |Δ|"), ("logits", "max |Δ|, relative"), ("greedy text", "equal"),
            ("export", "fold + write"), ("cache hits", "while decoding")]
    return table("Largest differences over every row of the table and over the logits of test prompts", head, rows)


def cost_table(results: dict) -> str:
    parts = sorted({part for run in results["variants"] for part in run.get("seconds") or {}}, key=lambda p: (p not in ("train", "eval"), p))
    head = ["run folder", ("total", "with embeddings"), ("active", "with embeddings"), "FLOPs/token", ("rows/token", "trained on"), ("FLOPs saved", "rows made once"),
            ("rows read", "per token"), ("table", "over FFN")] + [(part, "seconds") for part in parts]

    rows = [[f'<code>{esc(run["name"])}/</code>', count(run.get("total_all")), count(run.get("active_all")), count(run.get("flops_per_token")),
             loss(run.get("rows_per_token")), share(run.get("flops_saved_share") or None), size(run.get("row_bytes_per_token")),
             DASH if run.get("table_over_ffn") is None else f"{run['table_over_ffn']:.2f} ×"]
            + [seconds((run.get("seconds") or {}).get(part)).removesuffix(" s") for part in parts] for run in results["variants"]]
    return table("What each run costs", head, rows)


def kinds_table(results: dict) -> str:
    kinds = sorted({kind for e in results["summary"] for kind in e["kinds"]})
    rows = [[name_cell(e), *(share(e["kinds"].get(kind)) for kind in kinds)] for e in results["summary"] if e["kinds"]]
    return table("Right answers by kind of question", ["variant", *kinds], rows) if rows else ""


def figures(results: dict, curves: list[dict]) -> str:
    """The four figures, each left out with a word on why when nothing can be drawn yet."""
    with_loss = [e for e in results["summary"] if e["val_loss"] is not None]
    with_tasks = [e for e in results["summary"] if e["recall_acc"] is not None and e["reasoning_acc"] is not None]
    losses = "; ".join(f"{e['variant']} {loss(e['val_loss'])}" for e in with_loss)
    drawn = [c for c in curves if c["train"] or c["val"]]
    items = [
        ("loss-curves", "Loss curves", "Training loss, a running mean (faint), and validation loss (markers); means over seeds.",
         f"Loss against training step. Final validation losses: {losses}.", drawn, plots.loss_curves, 4),
        ("loss-share", "Validation loss against the C/M ratio", "Two ways from all memory to all compute: moving β from FFN-M to FFN-C in every layer (solid), "
         "or making the first layers dense (dashed). Dotted: variants beside this axis (↑: above the frame). Bar: what two seeds of one model may differ by.",
         "Compute share and validation loss: " + "; ".join(f"{e['variant']} {ratio(e['c_fraction'])}: {loss(e['val_loss'])}" for e in with_loss) + ".",
         with_loss, plots.loss_against_share, 4),
        ("loss-active", "Validation loss against active parameters", "What a token costs on the accelerator once rows come from a table. Lower left is better.",
         "Active parameters and validation loss: " + "; ".join(f"{e['variant']} {count(e['active'])}: {loss(e['val_loss'])}" for e in with_loss) + ".",
         [e for e in with_loss if e["active"] is not None], plots.loss_against_active, 3.5),
        ("recall-reasoning", "Recall against reasoning", "Facts seen in training against tasks solved in the context. Dashed: chance.",
         "Recall and reasoning: " + "; ".join(f"{e['variant']} {share(e['recall_acc'])}, {share(e['reasoning_acc'])}" for e in with_tasks) + ".",
         with_tasks, plots.recall_against_reasoning, 3.5)]
    parts = []
    for name, title, caption, description, data, paint, height in items:
        picture = plots.draw(name, title, description, lambda ax, data=data, paint=paint: paint(ax, data), height) if data else '<p class="none">Nothing to draw yet.</p>'
        parts.append(f"<figure>{picture}<figcaption><b>{esc(title)}.</b> {esc(caption)}</figcaption></figure>")
    present = {e["family"] for e in results["summary"]} | {c["family"] for c in curves}
    words = {"layers": "first layers dense (nC+nM)", "flex": "flex (β on all layers)"}
    keys = "".join(f'<li>{plots.marker_svg(f)}{words.get(f, f)}</li>' for f in plots.STYLES if f in present)
    return f'<ul class="key" aria-label="Markers of the figures">{keys}</ul><div class="figures">{"".join(parts)}</div>'


def samples(results: dict) -> str:
    """One text per variant, of its first seed: prompt in grey, continuation in ink."""
    first = {run: e for e in results["summary"] for run in e["runs"][:1]}
    by_name = {run["name"]: run for run in results["variants"]}
    parts = []
    for name, entry in first.items():
        prompt, text = by_name[name].get("prompt") or "", by_name[name].get("sample")
        if text is not None:
            parts.append(f'<article><h3>{plots.marker_svg(entry["family"])}{esc(entry["variant"])}</h3>'
                         f'<pre><span class="prompt">{esc(prompt)}</span>{esc(text.removeprefix(prompt))}</pre></article>')
    return f'<div class="samples">{"".join(parts)}</div>' if parts else '<p class="none">No run has generated text yet.</p>'


def unfinished(results: dict) -> str:
    """What is not in the tables: failed, missing and unlisted runs."""
    parts = []
    if results["failed"]:
        parts.append("<h3>Failed</h3>" + "".join(
            f'<p><code>{esc(run["name"])}/</code> during <b>{esc(run["stage"])}</b></p><pre class="error">{esc(run["error"].strip())}</pre>'
            for run in results["failed"]))
    if results["missing"]:
        parts.append("<h3>Not finished</h3><ul>" + "".join(
            f'<li><code>{esc(run["name"])}/</code> <span class="soft">{progress(run, results["steps"])}</span></li>' for run in results["missing"]) + "</ul>")
    if results["unlisted"]:
        parts.append(f'<p>Finished runs that this sweep does not list, left out: {", ".join(f"<code>{esc(n)}/</code>" for n in results["unlisted"])}.</p>')
    return f'<section id="unfinished" class="notice"><h2>Not in the tables</h2>{"".join(parts)}</section>' if parts else ""


def what_was_run(results: dict) -> str:
    runs, env = results["variants"], results["environment"]
    seeds = sorted({run["seed"] for run in runs if run.get("seed") is not None})
    tokens = sorted({run["tokens"] for run in runs if run.get("tokens")})
    devices = sorted({str(run["device"]) for run in runs if run.get("device")}) or [env["device"] if isinstance(env.get("device"), str) else ""]
    words = f"{len(runs)} of {results['expected']} runs of the <b>{esc(results['experiment'])}</b> sweep"
    words += f" at <b>{esc(results['scale'])}</b> scale" if results["scale"] else ""
    words += f", trained from scratch on {esc(results['source'])}" if results["source"] else ""
    words += f" ({esc(results['tokenizer'])} tokens)" if results["tokenizer"] else ""
    if results["steps"]:
        words += f" for {results['steps']:,} steps each"
    if tokens:
        words += f", {count(tokens[0])}{f' to {count(tokens[-1])}' if len(tokens) > 1 else ''} tokens"
    words += f", on {esc(joined(devices))}" if any(devices) else ""
    if seeds:
        words += f", with {'one seed' if len(seeds) == 1 else f'{len(seeds)} seeds'} per variant ({esc(joined(seeds))})"
    totals = [run["total"] for run in runs if run.get("total") and "attn_only" not in str(run.get("pattern"))]
    equal = " at equal total parameters (attn_only, which has no FFN, holds fewer)" if totals and max(totals) <= 1.01 * min(totals) else ""
    return words + (f". All see the same data in the same order{equal}; what changes is the share of the FFN that computes on the context (C) "
                    "and the share that is looked up by token (M).")


def at_a_glance(results: dict) -> str:
    """Two or three sentences made of the numbers alone."""
    best = {family: min((e for e in results["summary"] if e["family"] == family and e["val_loss"] is not None), key=lambda e: e["val_loss"], default=None)
            for family in ("dense", "memoryllm", "flex", "layers")}
    lines = []
    dense, memory = best["dense"], best["memoryllm"]
    if dense and memory:
        gap = memory["val_loss"] - dense["val_loss"]
        text = (f"Dense reaches {loss(dense['val_loss'])} nat, all-memory {loss(memory['val_loss'])} ({signed(gap)}) with "
                f"{share(memory['active'] / dense['active']) if dense['active'] and memory['active'] else DASH} of its active weights.")
        between = [e for e in (best["flex"], best["layers"]) if e]
        if between:
            text += " The best mixtures: " + " and ".join(
                f"{esc(e['variant'])} at {loss(e['val_loss'])} ({signed(e['val_loss'] - dense['val_loss'])})" for e in between) + "."
        lines.append(text)
    checks = [run["ok"] for run in results["variants"] if run.get("ok") is not None]
    if checks:
        lines.append(f"{sum(checks)} of {len(checks)} stores, served from disk, give the resident model's logits and text.")
    if results["summary"] and max(e["n"] for e in results["summary"]) == 1:
        lines.append(f"With one seed, differences below about {plots.NOISE} nat decide nothing.")
    return "".join(f"<li>{line}</li>" for line in lines)


def how_to_read(results: dict) -> str:
    counts = sorted({e["n"] for e in results["summary"]})
    if counts in ([], [1]):
        seeds = (f"Each variant was trained once (n = 1), so no spread is shown. Two seeds of one model differ by about {plots.NOISE} nat: "
                 "a smaller difference in loss decides nothing.")
    else:
        seeds = (f"Mean ± sample standard deviation over n = {joined(counts)} seeds; Δ dense subtracts the dense run of the same seed before averaging, "
                 f"so the seeds are paired. A single seed cannot decide differences below about {plots.NOISE} nat.")
    items = [
        ("C and M", "A C (compute) layer runs its FFN on the residual stream. An M (memory) layer looks its FFN's output up by token id. C / M is how the FFN weights "
                    "divide: dense 100/0, memoryllm 0/100, flex β/8, and n of L dense layers n/L. attn_only has no FFN weights and stem replaces one projection only, "
                    "so they have no place on this axis."),
        ("FFN-C, FFN-M", "The two parts of a flex layer's FFN: β·h² weights compute, (8−β)·h² weights depend on the token alone and fold into the table. β = 0 is memoryllm."),
        ("nC+nM", "n dense layers near the input, then memory layers."),
        ("total, active", "Weights without embedding and head. Active leaves out what a table replaces: it is what a token needs on the accelerator. The cost table has both with embeddings."),
        ("TKV", "Token-key-value store: the folded rows of all memory layers on disk, one contiguous record a token. It needs no FFN-M weights any more."),
        ("table over FFN", "Bytes of the table over the bytes of the FFN weights it replaces. Above 1 the store is larger; the gain is accelerator memory and compute."),
        ("rows/token", "Distinct token ids of a batch over its tokens: what training pays for memory rows, instead of 1."),
        ("disk = resident", "✓ when greedy text is identical and logits agree within 1e-5 of their size; rows are compared with a live fold."),
        ("recall, reasoning", "Share of questions whose every answer token is the model's first choice: facts stated in training, and tasks that the prompt itself contains. "
                              "At chance a difference means nothing."),
        ("decode tok/s", "One sequence, KV cache: memory rows resident in RAM, and read from disk through a cache with a byte budget."),
        ("seeds", seeds),
    ]
    return "<dl>" + "".join(f"<dt>{esc(term)}</dt><dd>{esc(text)}</dd>" for term, text in items) + "</dl>"


def provenance(results: dict) -> str:
    env = results["environment"]
    items = [(key, joined(value) if isinstance(value, list) else joined(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value)
             for key, value in env.items()]
    folders = ", ".join(f'<code>{esc(run["name"])}/</code>' for run in results["variants"])
    return ("<dl>" + "".join(f"<dt>{esc(key.replace('_', ' '))}</dt><dd>{esc(text)}</dd>" for key, text in items if text is not None)
            + f"<dt>run folders</dt><dd>{folders or DASH}, beside this file</dd><dt>numbers</dt><dd><code>results.json</code>, beside this file</dd></dl>")


def page(results: dict, curves: list[dict]) -> str:
    """The whole document. curves: [{"family", "label", "train": [(step, loss)], "val": [(step, loss)]}]."""
    title = f"{results['experiment']}: {results['scale']}" if results["scale"] else str(results["experiment"])
    without = [e["variant"] for e in results["summary"] if e["equal"] is None]
    glance = at_a_glance(results)
    have = bool(results["summary"])
    stores = any(e["equal"] is not None for e in results["summary"])
    kinds = kinds_table(results)
    none = '<p class="none">No run has finished yet.</p>'
    variables = {dark: "".join(f"--{name}:{colour};" for name, colour in plots.colours(dark).items()) for dark in (False, True)}
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
{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="over">flexmemory sweep report</p>
<h1>{esc(title)}</h1>
<p class="lede">{what_was_run(results)}</p>
{f'<ul class="glance">{glance}</ul>' if glance else ""}
</header>
{unfinished(results)}
<section id="results"><h2>Results</h2>
{headline_table(results) if have else none}
</section>
<section id="figures"><h2>Figures</h2>
{figures(results, curves) if have or curves else none}
</section>
<section id="equality"><h2>Served from disk = resident</h2>
{equality_table(results) if stores else '<p class="none">No store has been verified yet.</p>'}
{f'<p class="soft">Without memory rows, so without a store: {esc(joined(without))}.</p>' if without and stores else ""}
</section>
<section id="samples"><h2>Generated text</h2>
<p class="soft">Written with the rows read from disk. The prompt is grey.</p>
{samples(results)}
</section>
<section id="detail"><h2>Detail</h2>
{kinds}
{cost_table(results) if have else none}
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


STYLE = """*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1232px;margin:0 auto;padding:2.5rem 1.5rem 4rem}
h1,h2{font-family:Charter,"Bitstream Charter","Iowan Old Style",Georgia,"DejaVu Serif",serif;font-weight:600;line-height:1.2;letter-spacing:-.01em}
h1{font-size:clamp(1.6rem,5vw,2.2rem);margin:.2rem 0 .9rem;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:3rem 0 .9rem;padding-top:1rem;border-top:1px solid var(--rule)}
h3{font-size:.95rem;margin:1rem 0 .35rem}
p{margin:.5rem 0}
small{display:block;font-weight:400;font-size:.72rem;line-height:1.3;color:var(--muted)}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.82em}
code,p{overflow-wrap:anywhere}
.over{color:var(--muted);font-size:.8rem;letter-spacing:.06em;margin:0}
.lede{max-width:46rem;margin:0}
.glance{max-width:46rem;margin:1rem 0 0;padding:0 0 0 1.1rem}
.glance li{margin:.25rem 0}
.soft,.none,figcaption{color:var(--muted);font-size:.86rem}
.notice{margin-top:2rem;border-left:3px solid var(--memoryllm);padding:.1rem 0 .1rem 1.1rem}
.notice h2{margin:0 0 .3rem;padding:0;border:0;font-size:1.1rem}
.notice ul{margin:.3rem 0;padding-left:1.1rem}
.scroll{overflow-x:auto;margin:0 0 1.5rem;scrollbar-width:thin;background:linear-gradient(to left,var(--paper) 40%,transparent) right/2.5rem 100% local no-repeat,linear-gradient(to left,var(--rule),transparent) right/.8rem 100% scroll no-repeat}
.scroll:focus-visible{outline:2px solid var(--flex);outline-offset:3px}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.84rem;line-height:1.35;font-variant-numeric:tabular-nums lining-nums}
caption{text-align:left;color:var(--muted);font-size:.86rem;padding-bottom:.4rem}
th,td{padding:.42rem .5rem;text-align:right;white-space:nowrap;vertical-align:top}
thead th{font-weight:600;vertical-align:bottom;border-bottom:1.5px solid var(--muted)}
tbody tr+tr>*{border-top:1px solid var(--rule)}
tbody th,th.text,td.text{text-align:left}
tbody th{font-weight:500}
tr>:first-child{position:sticky;left:0;background:var(--paper);padding-left:0;z-index:1}
tr>:last-child{padding-right:0}
tbody th small{max-width:11rem;white-space:normal}
.name{display:inline-flex;align-items:center;gap:.4rem}
.name+small{padding-left:1.25rem}
.mark{width:.85rem;height:.85rem;flex:none}
.pm{color:var(--muted)}
.yes{color:var(--layers);font-weight:600}
.no{color:var(--other);font-weight:600}
.key{display:flex;flex-wrap:wrap;gap:.3rem 1.3rem;list-style:none;margin:0 0 1rem;padding:0;font-size:.86rem}
.key li,.samples h3{display:flex;align-items:center;gap:.4rem}
.figures{display:grid;grid-template-columns:minmax(0,1fr);gap:2rem 2.5rem}
.samples{display:grid;grid-template-columns:minmax(0,1fr);gap:.4rem 2.5rem}
figure{margin:0;min-width:0}
figure svg{display:block;width:100%;height:auto;overflow:visible}
figcaption{margin-top:.5rem;line-height:1.45}
figcaption b{color:var(--ink);font-weight:600}
.samples article{min-width:0}
.samples h3{margin:.6rem 0 0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0 .8rem;padding:.1rem 0 .1rem .8rem;border-left:2px solid var(--rule);line-height:1.5}
.prompt{color:var(--muted)}
dl{display:grid;grid-template-columns:minmax(0,1fr);gap:.1rem 1.5rem;margin:0;font-size:.9rem;max-width:60rem}
dt{font-weight:600;margin-top:.5rem}
dd{margin:0;overflow-wrap:anywhere}
@media (min-width:640px){dl{grid-template-columns:9.5rem minmax(0,1fr);gap:.45rem 1.5rem}dt{margin:0}}
@media (min-width:900px){.figures,.samples{grid-template-columns:repeat(2,minmax(0,1fr))}}
@media (max-width:500px){main{padding:1.5rem 1rem 3rem}tbody th small{max-width:7.5rem}}
@media print{.scroll{overflow:visible}main{max-width:none;padding:0}}
"""
