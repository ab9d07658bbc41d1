"""Layer patterns: from ``"dense*8 memoryllm*16"`` to one LayerSpec per layer, and to the units that
are scanned."""

import dataclasses
import re
from collections.abc import Collection
from typing import NoReturn

from flexmemory.errors import UserError, nearest

MAX_LAYERS, MAX_DEPTH = 4096, 100


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """Resolved widths of one layer. Layers with equal specs have equal parameter shapes and can be
    stacked."""

    kind: str  # a word of blocks.KINDS
    d_ffn: int = 0  # inner width of the FFN that stays in the block (dense, FFN-C, stem), or 0
    d_memory: int = 0  # inner width of the FFN that computes the row (ToL), 0 for a learned table
    row_width: int = 0  # W, width of the row handed to the block, 0 for a layer without memory
    square: int = 0  # flex with ffn_c_kind=square: number of D x D matrices in FFN-C
    replaces: int = 0  # FFN weights that the row stands for
    nominal: bool = False  # FFN-C and FFN-M together are the papers' FFN of 8 D^2 weights
    learned: bool = False  # the row is a row of a learned table, and nothing else computes it

    @property
    def group(self) -> str:
        """Name of the layer's row group, see memory.row_groups; "" for a layer without memory."""
        return f"w{self.row_width}" if self.row_width else ""


# MemoryLLM Table 5 (rows h^2 and 3h^2 of the 1B model swapped back): FFN-M widths as printed follow
# no single rounding rule, so they are listed; {(D, F): {beta: FFN-M width}}.
TABLE5_FFN_M: dict[tuple[int, int], dict[float, int]] = {
    (960, 2560): {1: 2240, 2: 1920, 3: 1600},
    (1600, 4272): {1: 3738, 2: 3200, 3: 2668},
    (2048, 5464): {1: 4778, 2: 4096, 3: 3418},
}


def flex_widths(d_model: int, d_ff: int, beta: float) -> tuple[int, int]:
    """(FFN-C width, FFN-M width) of a flex layer; their sum is d_ff, so totals are equal across
    beta.

    FFN-M is the paper's printed width where Table 5 has one, else (8 - beta)/8 of d_ff rounded to
    the nearest integer (d_ff itself stands for 8h/3)."""
    rounded = int(d_ff * (8 - beta) / 8 + 0.5)
    d_memory = TABLE5_FFN_M.get((d_model, d_ff), {}).get(beta, rounded)
    return d_ff - d_memory, d_memory


def parse_pattern(text: str, kinds: Collection[str]) -> tuple[str, ...]:
    """Expands a pattern into kind names. Grammar: item = (word | "(" items ")") ["*" count]; items
    are separated by spaces.

    Raises UserError that shows the position of the bad word."""
    tokens = [(m.group(), m.start()) for m in re.finditer(r"[()]|\*|[^\s()*]+", text)]
    position = 0

    def fail(at: int, what: str) -> NoReturn:
        raise UserError(
            f"config model.pattern: {what}, at {at + 1} in {text!r}: {text[:at]}>>>{text[at:]}"
        )

    def items(depth: int) -> list[str]:
        nonlocal position
        layers: list[str] = []
        if depth > MAX_DEPTH:
            fail(tokens[position - 1][1], f"more than {MAX_DEPTH} groups inside each other")
        while position < len(tokens):
            word, at = tokens[position]
            position += 1
            if word == ")":
                if not depth:
                    fail(at, "')' without '('")
                if not layers:
                    fail(at, "empty group")
                return layers
            if word == "(":
                part = items(depth + 1)
            elif word == "*":
                fail(at, "'*' without a layer before it")
            elif word in kinds:
                part = [word]
            else:
                fail(at, f"unknown layer {word!r}, {nearest(word, kinds)}")
            if position < len(tokens) and tokens[position][0] == "*":
                star = tokens[position][1]
                position += 1
                count, at = tokens[position] if position < len(tokens) else ("", len(text))
                if not count.isdecimal() or not count.strip("0"):
                    what = f"a whole number above 0 must follow '*', not {count!r}"
                    fail(at if count else star, what)
                position += 1
                if len(count) > 9 or len(part) * int(count) > MAX_LAYERS:
                    fail(at, f"more than {MAX_LAYERS} layers")
                part = part * int(count)
            layers += part
            if len(layers) > MAX_LAYERS:
                fail(at, f"more than {MAX_LAYERS} layers")
        if depth:
            fail(len(text), "missing ')'")
        return layers

    layers = items(0)
    if not layers:
        raise UserError("config model.pattern: empty; give at least one layer, e.g. 'dense*4'")
    return tuple(layers)


def parse_betas(text: str, count: int) -> tuple[float, ...]:
    """One beta per flex layer from "3" or "3 2.5 1" (spaces or commas). Raises UserError outside
    0..8."""
    betas = []
    for word in text.replace(",", " ").split():
        try:
            beta = float(word)
        except ValueError:
            raise UserError(f"config model.beta: {word!r} is not a number") from None
        if not 0 <= beta <= 8:
            raise UserError(
                f"config model.beta: {word} is outside 0..8 (FFN-C gets beta*h^2 of 8h^2)"
            )
        betas.append(beta)
    if len(betas) == 1:
        betas *= count
    if len(betas) != count:
        raise UserError(
            f"config model.beta: {len(betas)} values for {count} flex layers; give one, or one per"
            " flex layer"
        )
    return tuple(betas)


def segments(specs: tuple[LayerSpec, ...]) -> tuple[tuple[tuple[LayerSpec, ...], int], ...]:
    """Cuts the stack into (repeating unit, repeats), greedily from the input: the unit that covers
    most, the shortest first."""
    cuts: list[tuple[tuple[LayerSpec, ...], int]] = []
    start = 0
    while start < len(specs):
        best, covered = 1, 1
        for period in range(1, (len(specs) - start) // 2 + 1):
            unit, end = specs[start : start + period], start + period
            while specs[end : end + period] == unit:
                end += period
            if end - start > max(covered, period):
                best, covered = period, end - start
        cuts.append((specs[start : start + best], covered // best))
        start += covered
    return tuple(cuts)
