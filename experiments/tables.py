"""The report's tables as text: numbers in words of four digits, Markdown, LaTeX, and plain columns
for a terminal.
"""

import json
import re
import unicodedata

from experiments.verdicts import OURS, VERDICTS

DASH = "–"
MARKS = {
    "reproduced": "✓",
    "contradicted": "✗",
    "within noise": "≈",
    "not run": "○",
}  # a verdict is told by word and mark, not by colour alone
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
        text = (
            four(value, exact)
            if spread is None
            else f"{four(value, exact=False)} ± {four_like(spread, value)}"
        )
        return text.replace("-", "−")
    if isinstance(value, list):
        return ", ".join(cell(item) for item in value)
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


def four_like(spread: float, value: float) -> str:
    """A spread to the last digit that ``value`` shows; in its own digits where that would be
    nothing.
    """
    text = four(value, exact=False)
    if "e" in text or not spread:
        return four(spread)
    like = f"{spread:,.{len(text.partition('.')[2])}f}"
    return like if like.strip("0.") else f"{spread:.1g}"


def grid(rows: list[dict]) -> tuple[list[str], list[list[str]], list[bool]]:
    """(head, cells, which columns hold numbers) of flat dicts, columns in the order they first
    occur.

    ``key_std`` beside ``key`` becomes "mean ± spread" in one column; ``family`` is for colours and
    no column.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "family"))
    keys = [key for key in keys if not (key.endswith("_std") and key.removesuffix("_std") in keys)]
    exact = {
        key: all(
            short(row[key]) and row.get(key + "_std") is None
            for row in rows
            if isinstance(row.get(key), float)
        )
        for key in keys
    }
    cells = [
        [cell(row.get(key), row.get(key + "_std"), exact[key]) for key in keys] for row in rows
    ]
    numeric = [
        any(isinstance(row.get(key), int | float) for row in rows)
        and not any(isinstance(row.get(key), str) for row in rows)
        for key in keys
    ]
    return [key.replace("_", " ") for key in keys], cells, numeric


def verdicts(results: dict) -> list[tuple[dict, dict]]:
    """(experiment, claim) for every claim, in the order of the plan."""
    return [
        (experiment, claim)
        for experiment in results["experiments"]
        for claim in experiment["claims"]
    ]


def origin(experiment: dict) -> str:
    """E2, MemoryLLM Fig 9"""
    return (
        ", ".join([*experiment["ids"], *([experiment["source"]] if experiment["source"] else [])])
        or experiment["name"]
    )


def tally(results: dict) -> str:
    """Claims of the papers: 12 reproduced, 1 contradicted, 3 within noise, 0 not run; questions of
    ours: ...
    """
    words = []
    for whose, ours in (("claims of the papers", False), ("questions of ours", True)):
        found = [
            claim["verdict"]
            for _, claim in verdicts(results)
            if claim["paper"].startswith(OURS) == ours
        ]
        words += (
            [f"{whose}: " + ", ".join(f"{found.count(verdict)} {verdict}" for verdict in VERDICTS)]
            if found
            else []
        )
    return "; ".join(words) or "no claims"


def progress(run: dict) -> str:
    """Where a run without result stands: not started, its last step, or what is left after the last
    one.
    """
    step, steps = run["step"], run["steps"]
    if step is None:
        return "begun, no step yet" if run["begun"] else WAITING
    if step == steps:
        return f"trained to step {step:,}, measures not finished"
    return f"at step {step:,}" + (f" of {steps:,}" if steps else "")


def last_line(text: str) -> str:
    return next(
        (line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message"
    )


def plain(results: dict, wide: int = 120) -> str:
    """The verdict table in columns of a terminal: texts that are too long are cut with …, nothing
    wraps.
    """
    most = {"id": 6, "paper": 18, "ours": 24, "seeds": 5, "verdict": 14}
    rows = [
        (
            claim["text"],
            (experiment["ids"] or [experiment["name"]])[0],
            claim["paper"],
            claim["ours"],
            str(claim["seeds"]),
            f"{MARKS[claim['verdict']]} {claim['verdict']}",
        )
        for experiment, claim in verdicts(results)
    ]
    widths = [
        min(limit, max(len(row[i]) for row in [("claim", *most), *rows]))
        for i, limit in enumerate(most.values(), 1)
    ]
    widths = [wide - sum(widths) - 2 * len(widths), *widths]
    lines = [
        "  ".join(cut(text, width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in [("claim", *most), *rows]
    ]
    lines.insert(1, "─" * wide)
    return "\n".join(lines)


def cut(text: str, wide: int) -> str:
    """Exactly ``wide`` characters in one line."""
    text = " ".join(text.split())
    return text.ljust(wide) if len(text) <= wide else text[: wide - 1] + "…"


def markdown(results: dict) -> str:
    """The verdict table and every experiment's rows as one Markdown document."""
    parts = [
        f"# {title(results)}",
        f"{results['finished']} of {results['expected']} runs finished. {tally(results)}.",
        "## Verdicts",
    ]
    rows = [
        [
            claim["text"],
            origin(experiment),
            claim["paper"],
            claim["ours"],
            experiment["scale"] or DASH,
            str(claim["seeds"]),
            f"{MARKS[claim['verdict']]} {claim['verdict']}"
            + (f" ({claim['detail']})" if claim["detail"] else ""),
        ]
        for experiment, claim in verdicts(results)
    ]
    parts.append(
        pipes(VERDICT_HEAD, rows, [False] * 5 + [True, False])
        if rows
        else "No claim has been judged yet."
    )
    for experiment in results["experiments"]:
        parts.append(
            f"## {escape_markdown(experiment['name'])}: {escape_markdown(origin(experiment))}"
        )
        if experiment["question"]:
            parts.append(escape_markdown(experiment["question"]))
        parts.append(
            state(experiment)
            + "".join(
                f" {what} failed: {escape_markdown(error)}."
                for what, error in experiment["errors"].items()
            )
        )
        if experiment["rows"]:
            parts.append(pipes(*grid(experiment["rows"])))
    return "\n\n".join(parts) + "\n"


def title(results: dict) -> str:
    return "flexmemory experiments" + (f", scale {results['scale']}" if results["scale"] else "")


def state(experiment: dict) -> str:
    """3 of 4 runs finished, 1 failed, seeds 0, 1."""
    words = [f"{len(experiment['finished'])} of {experiment['expected']} runs finished"]
    words += [f"{len(experiment['failed'])} failed"] if experiment["failed"] else []
    words += (
        [
            f"seed{'s' if len(experiment['seeds']) > 1 else ''}"
            f" {', '.join(map(str, experiment['seeds']))}"
        ]
        if experiment["seeds"]
        else []
    )
    return ", ".join(words) + "."


def pipes(head, rows: list[list[str]], numeric: list[bool]) -> str:
    lines = [[escape_markdown(text) for text in row] for row in [head, *rows]]
    lines.insert(1, ["---:" if number else "---" for number in numeric])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(str(text).split()))


def latex(results: dict) -> str:
    r"""The same tables for \input in a document that loads booktabs and longtable."""
    parts = [
        "% \\usepackage{booktabs,longtable} in the preamble, then \\input this file.",
        (
            f"\\section*{{{escape_latex(title(results))}}}\n{results['finished']} of"
            f" {results['expected']} runs finished. {tally(results)}."
        ),
    ]
    rows = [
        [
            claim["text"],
            origin(experiment),
            claim["paper"],
            claim["ours"],
            str(claim["seeds"]),
            claim["verdict"] + (f" ({claim['detail']})" if claim["detail"] else ""),
        ]
        for experiment, claim in verdicts(results)
    ]
    if rows:
        head = [word for word in VERDICT_HEAD if word != "scale"]  # in the heading
        parts.append(
            longtable(
                head,
                rows,
                r"p{.26\linewidth}p{.12\linewidth}p{.12\linewidth}p{.16\linewidth}rp{.2\linewidth}",
            )
        )
    for experiment in results["experiments"]:
        parts.append(
            f"\\subsection*{{{escape_latex(experiment['name'])}:"
            f" {escape_latex(origin(experiment))}}}\n{escape_latex(experiment['question'] or '')}"
            f" {escape_latex(state(experiment))}"
        )
        if experiment["rows"]:
            head, cells, numeric = grid(experiment["rows"])
            parts.append(
                longtable(head, cells, "".join("r" if number else "l" for number in numeric))
            )
    return "\n\n".join(parts) + "\n"


def longtable(head, rows: list[list[str]], columns: str) -> str:
    """Small print over as many pages as it takes; a first cell that starts with [ must not be read
    as an option of the line before.
    """
    lines = [
        " & ".join(f"{{{escape_latex(text)}}}" for text in row) + r" \\" for row in [head, *rows]
    ]
    return "\n".join(
        [
            r"{\footnotesize\setlength{\tabcolsep}{4pt}",
            rf"\begin{{longtable}}{{@{{}}{columns}@{{}}}}",
            r"\toprule",
            lines[0],
            r"\midrule\endhead",
            *lines[1:],
            r"\bottomrule",
            r"\end{longtable}}",
        ]
    )


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "→": r"$\to$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "∞": r"$\infty$",
    "√": r"$\surd$",
    "°": r"$^\circ$",
    "²": "$^2$",
    "³": "$^3$",
    "✓": r"$\surd$",
    "✗": r"$\times$",
    "○": r"$\circ$",
    "§": r"\S{}",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "“": "``",
    "”": "''",
    "’": "'",
    "\u00a0": "~",
    "µ": r"$\mu$",
    **{char: "\\" + char for char in "&%$#_{}"},
    **{
        char: f"$\\{name}$"
        for char, name in zip(
            "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ",
            (
                "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho"
                " sigma tau upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi"
                " Omega"
            ).split(),
            strict=True,
        )
    },
}
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
