"""What a run of experiments ends with on the terminal: 80 columns, also written to summary.txt."""

import textwrap
from pathlib import Path

from experiments.tables import (
    DASH,
    MARKS,
    WAITING,
    count,
    last_line,
    progress,
    size,
    tally,
    verdicts,
)
from experiments.tables import seconds as duration

WIDE = 80
MOST = 24  # variants that a table still shows at one sight
# two lines of heading; every column is as wide as its longest cell
HEAD = """
||||val|bits/||train||decode|tok/s|
variant|C/M|total|active|loss|byte|recall|tok/s|table|device|disk|equal
""".strip("\n").split("\n")
PARTS = {
    "text": "text",
    "train": "training",
    "fold": "folding and verifying",
    "decode": "generation from disk",
    "tokens": "rows of tokens",
    "report": "report",
}


def text(results: dict) -> str:
    """The variants where they are few, generated text, every claim, and what is missing."""
    parts = []
    if 0 < len(results["variants"]) <= MOST:
        parts.append(table(results["variants"]))
    for e in results["experiments"]:
        parts += [continuations(e["continuations"]), tokens(e["tokens"])]
    parts += [claims(results), "\n".join(state(results))]
    return "\n\n".join(filter(None, parts))


def ending(out: Path, results: dict) -> str:
    """The text, where the report lies, and how long each part took."""
    where = [f"page   {out / 'report.html'}"]
    where += ["beside it: results.json, report.md, report.tex, summary.txt"]
    return "\n".join([text(results), "", *where, *times(results["seconds"])])


def table(variants: list[dict]) -> str:
    """One line per variant: size, quality, speed, and whether the disk gives the live model's
    bits.
    """
    rows = [line.split("|") for line in HEAD] + [cells(v) for v in variants]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<", *">" * (len(widths) - 1)]
    lines = [
        " ".join(f"{text:{side}{wide}}" for text, side, wide in zip(row, sides, widths)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines[:2], "─" * max(map(len, lines)), *lines[2:]])


def cells(v: dict) -> list[str]:
    def told(value, form):
        return DASH if value is None else form.format(value)

    share = v["compute_share"]
    return [
        v["name"],
        DASH if share is None else f"{100 * share:.0f}/{100 - round(100 * share)}",
        count(v["total"], ""),
        count(v["active"], ""),
        told(v["val_loss"], "{:.3f}"),
        told(v["bits_per_byte"], "{:.3f}"),
        told(v["recall"], "{:.1%}"),
        count(v["train_tokens_per_s"], ""),
        size(v["table_bytes"]).replace(" ", ""),
        count(v["decode_resident_tokens_per_s"], ""),
        count(v["decode_disk_tokens_per_s"], ""),
        {True: "yes", False: "NO", None: DASH}[v["equal"]],
    ]


def continuations(entries: list[dict]) -> str:
    """The same prompts continued from disk and by the live model."""
    lines = []
    for model in dict.fromkeys(entry["model"] for entry in entries):
        lines.append(f"{model}: text generated from disk, beside the live model's")
        for entry in (entry for entry in entries if entry["model"] == model):
            equal = "equal" if entry["disk"] == entry["live"] else "NOT EQUAL"
            lines += ["", f"  {one_line(entry['prompt'], 60)}  ({equal})"]
            lines += [f"    {k}  {one_line(entry[k], WIDE - 10)}" for k in ("disk", "live")]
    return "\n".join(lines)


def tokens(entries: list[dict]) -> str:
    """Tokens and those whose rows are nearest to theirs."""
    lines = []
    for entry in entries:
        near = (f"{visible(n['token'])} {n['cosine']:.2f}" for n in entry["nearest"])
        lines.append(f"  {visible(entry['token']):<12} {', '.join(near)}"[:WIDE])
    if entries:
        lines.insert(0, f"{entries[0]['model']}: tokens whose rows are nearest, by cosine\n")
    return "\n".join(lines)


def visible(token: str) -> str:
    token = token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "\ufffd" for c in token)


def one_line(text: str, wide: int) -> str:
    text = text.replace("\n", "⏎").replace("\t", " ")
    return text if len(text) <= wide else text[: wide - 1] + "…"


def claims(results: dict) -> str:
    """Every claim with its verdict, source and numbers."""
    lines = []
    for experiment, claim in verdicts(results):
        name, verdict = (experiment["ids"] or [experiment["name"]])[0], claim["verdict"]
        ours = f": {claim['ours']}" if claim["ours"] else ""
        head = f"{MARKS[verdict]} {verdict:<12}  "
        lines.append(wrapped(head, f"{name}  {claim['text']}{ours}"))
    return "\n".join(lines)


def wrapped(head: str, text: str) -> str:
    return textwrap.fill(text, WIDE, initial_indent=head, subsequent_indent=" " * len(head))


def state(results: dict) -> list[str]:
    """The counts, and what is missing."""
    lines = tally(results).split("; ")
    lines.append(f"{results['finished']} of {results['expected']} runs finished")
    for e in results["experiments"]:
        lines += [f"ERROR    {e['name']} ({what}): {text}" for what, text in e["errors"].items()]
    for run in results["failed"]:
        lines.append(f"FAILED   {run['name']} (exit {run['exit']}): {last_line(run['error'])}")
    progresses = {run["name"]: progress(run) for run in results["missing"]}
    lines += [f"missing  {n}: {at}" for n, at in progresses.items() if at != WAITING]
    if waiting := [name for name, at in progresses.items() if at == WAITING]:
        lines.append(f"missing  {len(waiting)} {WAITING}: {', '.join(waiting)}")
    return [wrapped("", line) for line in lines]


def times(parts: dict[str, float]) -> list[str]:
    """How long each part took. The seconds of a run's parts are sums over runs, of which several
    go at a time: they are scaled to what the launcher waited for the runs, where that is known.
    """
    own = {key: value for key, value in parts.items() if key not in ("text", "runs", "report")}
    scale = parts["runs"] / sum(own.values()) if parts.get("runs") and sum(own.values()) else 1
    own = {key: scale * value for key, value in own.items()}
    took = {key: parts[key] for key in ("text", "report") if key in parts} | own
    names = [*(key for key in PARTS if key in took), *(key for key in took if key not in PARTS)]
    words = ", ".join(f"{PARTS.get(key, key)} {duration(took[key])}" for key in names)
    total = f"{duration(sum(took.values()))}: " if "runs" in parts else "of all runs: "
    return [wrapped("time     ", total + words)] if words else []
