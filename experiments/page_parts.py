"""Small parts of the report's page: numbers in words, escaped text, tables that scroll in their own
box.
"""

import html
import re

from experiments.tables import DASH

SHOWN = 40  # rows of a table before the rest folds away


def count(value) -> str:
    """1234567 -> 1.23 M"""
    if value is None:
        return DASH
    for unit, word in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return (
                f"{value / unit:.3g}{word}" if value < 999.5 * unit else f"{value / unit:.0f}{word}"
            )
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


def seconds(value) -> str:
    return DASH if value is None else f"{value:,.1f} s" if value < 100 else f"{value:,.0f} s"


def esc(value) -> str:
    """Text for HTML; what no page may hold (control characters, halves of surrogate pairs) becomes
    the replacement character.
    """
    return html.escape(re.sub("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", str(value)))


def slug(name: str) -> str:
    """A name as an id of the page."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)


def table(caption: str, head: list, rows: list[list[str]], kinds: list[str]) -> str:
    """A table that scrolls inside its own box; rows beyond the first 40 fold away.

    head: texts, or (text, small second line). Cells are HTML already. kinds: per column "num"
    (right), "text" or "long" (text that wraps). The first column heads its row.
    """
    parts = [grid(caption, head, rows[:SHOWN], kinds)]
    if more := rows[SHOWN:]:
        rest = grid(f"{caption}: the other rows", head, more, kinds)
        parts.append(
            f'<details class="more"><summary>{len(more)} more rows</summary>{rest}</details>'
        )
    return "".join(parts)


def grid(caption: str, head: list, rows: list[list[str]], kinds: list[str]) -> str:
    def column(item, kind):
        top, sub = item if isinstance(item, tuple) else (item, None)
        return (
            '<th scope="col"'
            f' class="{kind}">{esc(top)}{f"<small>{esc(sub)}</small>" if sub else ""}</th>'
        )

    heads = "".join(column(item, kind) for item, kind in zip(head, kinds, strict=True))
    body = "\n".join(
        "<tr>"
        + "".join(
            (
                f'<th scope="row" class="{kind}">{cell}</th>'
                if i == 0
                else f'<td class="{kind}">{cell}</td>'
            )
            for i, (cell, kind) in enumerate(zip(row, kinds, strict=True))
        )
        + "</tr>"
        for row in rows
    )
    return (
        '<div class="scroll" tabindex="0" role="region"'
        f' aria-label="{esc(caption)}"><table><caption>{esc(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def cards(caption: str, head: list[str], rows: list[list[str]]) -> str:
    """A table that becomes one card per row on a narrow screen; roles are spelled out, for browsers
    drop them with display: block.
    """
    body = "\n".join(
        '<tr role="row">'
        + "".join(
            f'<td role="cell" data-label="{esc(name)}" class="{slug(name)}">{cell}</td>'
            for name, cell in zip(head, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<table class="cards" role="table"><caption>{esc(caption)}</caption><thead'
        ' role="rowgroup"><tr role="row">'
        + "".join(f'<th scope="col" role="columnheader">{esc(name)}</th>' for name in head)
        + f'</tr></thead>\n<tbody role="rowgroup">\n{body}\n</tbody></table>'
    )
