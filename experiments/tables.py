"""The report's tables as text: numbers of four digits, Markdown and LaTeX."""

import json
import re
import unicodedata

from experiments.verdicts import OURS, VERDICTS

DASH = "–"
# a verdict is told by word and mark, not by colour alone
MARKS = dict(zip(VERDICTS, "✓✗≈○", strict=True))
WAITING = "not started"
VERDICT_HEAD = ("claim", "source", "paper", "ours", "scale", "seeds", "verdict")


def cell(value, spread: float | None = None, exact: bool = True) -> str:
    """A value as text: 4 significant digits of a float (``exact``: 0.5 stays 0.5), thousands
    grouped, a dash for None.
    """
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if isinstance(value, float):
        text = four(value, exact and spread is None)
        return (text if spread is None else f"{text} ± {like(spread, text)}").replace("-", "−")
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def four(value: float, exact: bool = True) -> str:
    """2.345, 12,346, 1.234e-07. A 0.5 stays 0.5 where ``exact``, otherwise it is 0.5000."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e9:
        return f"{value:.3e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if exact and short(value) else f"{value:#.4g}".removesuffix(".")


def short(value: float) -> bool:
    """Do four digits hold all of it?"""
    return float(f"{value:.4g}") == value


def like(spread: float, text: str) -> str:
    """A spread to the last digit of its mean's text; in its own digits where that would be 0."""
    if "e" in text or not spread:
        return four(spread)
    digits = f"{spread:,.{len(text.partition('.')[2])}f}"
    return digits if digits.strip("0.") else f"{spread:.1g}"


def count(value: float | None, space: str = " ") -> str:
    """1234567 -> 1.23 M"""
    if value is None:
        return DASH
    for unit, word in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.{3 if abs(value) < 999.5 * unit else 4}g}{space}{word}"
    return f"{value:.3g}"


def size(value: float | None) -> str:
    """Bytes in binary units; a dash for none at all."""
    for unit, word in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if (value or 0) >= unit:
            return f"{value / unit:.{0 if value >= 100 * unit else 1}f} {word}"
    return f"{value:.0f} B" if value else DASH


def seconds(value: float | None) -> str:
    """3.2 s, 47 s, 5 min 22 s"""
    if value is None:
        return DASH
    minutes, rest = divmod(round(value), 60)
    return f"{minutes:,} min {rest} s" if minutes else f"{value:.{1 if value < 10 else 0}f} s"


def grid(rows: list[dict]) -> tuple[list[str], list[list[str]], list[bool]]:
    """(head, cells, which columns hold numbers) of flat dicts; columns in the order in which they
    first occur. ``key_std`` beside ``key`` becomes "mean ± spread"; ``family`` is no column.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "family"))
    keys = [key for key in keys if not (key.endswith("_std") and key.removesuffix("_std") in keys)]

    def exact(key):
        floats = [row for row in rows if isinstance(row.get(key), float)]
        return all(short(row[key]) and row.get(key + "_std") is None for row in floats)

    def numeric(key):
        values = [row.get(key) for row in rows]
        return any(isinstance(v, int | float) for v in values) and not any(
            isinstance(v, str) for v in values
        )

    columns = [[cell(r.get(k), r.get(k + "_std"), exact(k)) for r in rows] for k in keys]
    cells = [list(line) for line in zip(*columns, strict=True)]
    return [key.replace("_", " ") for key in keys], cells, [numeric(key) for key in keys]


def verdicts(results: dict) -> list[tuple[dict, dict]]:
    """(experiment, claim) of every claim."""
    return [(e, claim) for e in results["experiments"] for claim in e["claims"]]


def origin(experiment: dict) -> str:
    """E2, MemoryLLM Fig 9"""
    return ", ".join(filter(None, [*experiment["ids"], experiment["source"]])) or experiment["name"]


def tally(results: dict) -> str:
    """Claims of the papers: 12 reproduced, 1 contradicted, 3 within noise, 0 not run; questions of
    ours: ...
    """
    words = []
    for whose, ours in (("claims of the papers", False), ("questions of ours", True)):
        claims = [c for _, c in verdicts(results) if c["paper"].startswith(OURS) == ours]
        counts = [sum(claim["verdict"] == verdict for claim in claims) for verdict in VERDICTS]
        if claims:
            pairs = zip(counts, VERDICTS, strict=True)
            words.append(f"{whose}: " + ", ".join(f"{n} {verdict}" for n, verdict in pairs))
    return "; ".join(words) or "no claims"


def progress(run: dict) -> str:
    """Where a run without result stands: not started, its last step, or what is left after it."""
    step, steps = run["step"], run["steps"]
    if step is None:
        return "begun, no step yet" if run["begun"] else WAITING
    if step == steps:
        return f"trained to step {step:,}, measures not finished"
    return f"at step {step:,}" + (f" of {steps:,}" if steps else "")


def last_line(text: str) -> str:
    return next(filter(None, map(str.strip, reversed(text.splitlines()))), "no message")


def title(results: dict) -> str:
    return "flexmemory experiments" + (f", scale {results['scale']}" if results["scale"] else "")


def finished(results: dict) -> str:
    """3 of 4 runs finished. claims of the papers: 12 reproduced, ..."""
    return f"{results['finished']} of {results['expected']} runs finished. {tally(results)}."


def state(experiment: dict) -> str:
    """3 of 4 runs finished, 1 failed, seeds 0, 1."""
    words = [f"{len(experiment['finished'])} of {experiment['expected']} runs finished"]
    if experiment["failed"]:
        words.append(f"{len(experiment['failed'])} failed")
    if seeds := experiment["seeds"]:
        words.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
    return ", ".join(words) + "."


def verdict_rows(results: dict, marks: bool) -> list[list[str]]:
    """Cells of the verdict table in the order of VERDICT_HEAD."""
    rows = []
    for e, claim in verdicts(results):
        verdict = f"{MARKS[claim['verdict']]} " * marks + claim["verdict"]
        verdict += f" ({claim['detail']})" if claim["detail"] else ""
        texts = [claim["text"], origin(e), claim["paper"], claim["ours"]]
        rows.append([*texts, e["scale"] or DASH, str(claim["seeds"]), verdict])
    return rows


def markdown(results: dict) -> str:
    """The verdict table and every experiment's rows as one Markdown document."""
    rows = verdict_rows(results, marks=True)
    table = pipes(VERDICT_HEAD, rows, [False] * 5 + [True, False])
    parts = [f"# {title(results)}", finished(results), "## Verdicts"]
    parts.append(table if rows else "No claim has been judged yet.")
    for e in results["experiments"]:
        parts.append(f"## {escape_markdown(e['name'])}: {escape_markdown(origin(e))}")
        if e["question"]:
            parts.append(escape_markdown(e["question"]))
        errors = [f" {what} failed: {escape_markdown(text)}." for what, text in e["errors"].items()]
        parts.append(state(e) + "".join(errors))
        if e["rows"]:
            parts.append(pipes(*grid(e["rows"])))
    return "\n\n".join(parts) + "\n"


def pipes(head, rows: list[list[str]], numeric: list[bool]) -> str:
    lines = [list(map(escape_markdown, row)) for row in [head, *rows]]
    lines.insert(1, ["---:" if number else "---" for number in numeric])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(str(text).split()))


def latex(results: dict) -> str:
    r"""The same tables for \input in a document that loads booktabs and longtable."""
    parts = [
        "% \\usepackage{booktabs,longtable} in the preamble, then \\input this file.",
        f"\\section*{{{escape_latex(title(results))}}}\n{finished(results)}",
    ]
    if rows := verdict_rows(results, marks=False):
        widths = r"p{.26\linewidth}p{.12\linewidth}p{.12\linewidth}p{.16\linewidth}rp{.2\linewidth}"
        head, *rows = [row[:4] + row[5:] for row in [list(VERDICT_HEAD), *rows]]  # one scale
        parts.append(longtable(head, rows, widths))
    for e in results["experiments"]:
        heading = f"{escape_latex(e['name'])}: {escape_latex(origin(e))}"
        text = f"{escape_latex(e['question'] or '')} {escape_latex(state(e))}"
        parts.append(f"\\subsection*{{{heading}}}\n{text}")
        if e["rows"]:
            head, cells, numeric = grid(e["rows"])
            parts.append(longtable(head, cells, "".join("lr"[number] for number in numeric)))
    return "\n\n".join(parts) + "\n"


def longtable(head, rows: list[list[str]], columns: str) -> str:
    """Small print over as many pages as it takes. Braces keep a cell that starts with [ from being
    read as an option of the line before.
    """
    head, *lines = [
        " & ".join(f"{{{escape_latex(text)}}}" for text in row) + r" \\" for row in [head, *rows]
    ]
    begin = rf"\begin{{longtable}}{{@{{}}{columns}@{{}}}}"
    top = [r"{\footnotesize\setlength{\tabcolsep}{4pt}", begin, r"\toprule", head]
    end = [r"\bottomrule", r"\end{longtable}}"]
    return "\n".join([*top, r"\midrule\endhead", *lines, *end])


GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau"
    " upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
)
SIGNS = r"""\ \textbackslash{} ~ \textasciitilde{} ^ \textasciicircum{} < \textless{}
> \textgreater{} | \textbar{} " '' ± $\pm$ − $-$ × $\times$ · $\cdot$ → $\to$ ≤ $\leq$ ≥ $\geq$
≈ $\approx$ ∞ $\infty$ √ $\surd$ ° $^\circ$ ² $^2$ ³ $^3$ ✓ $\surd$ ✗ $\times$ ○ $\circ$ § \S{}
– -- — --- … \ldots{} “ `` ” '' ’ ' µ $\mu$""".split()
LATEX = dict(zip(SIGNS[::2], SIGNS[1::2], strict=True)) | {char: "\\" + char for char in "&%$#_{}"}
LATEX |= zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ", (f"$\\{name}$" for name in GREEK.split()))
ACCENTS = set("\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327")


def escape_latex(text: str) -> str:
    """Text for pdflatex; a character that its first font encoding lacks is named by its number
    instead of stopping the compiler.
    """

    def known(char: str) -> bool:
        base, *accents = unicodedata.normalize("NFD", char)
        return " " <= base <= "~" and set(accents) <= ACCENTS or char in "ßæøœłÆØŒŁ"

    return "".join(
        LATEX.get(char) or (char if known(char) else f"[U+{ord(char):04X}]")
        for char in " ".join(str(text).split())
    )
