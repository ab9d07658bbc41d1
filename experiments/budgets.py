"""Equal budgets: one width of a model solved so that it costs what a reference model does.

    "budget": {"mode": "total", "knob": "model.d_ff", "like": {"model.pattern": "dense*4"}}

``like`` is laid over the run's own config and makes the reference; both have the run's vocabulary.
Costs rise with either knob, so bisection finds the nearest width there is. What a width cannot
reach is stated as the residual.
"""

import bisect
import dataclasses
from collections.abc import Callable

from experiments.sweeps import variant_of, with_fields
from flexmemory.config import Config, get
from flexmemory.errors import UserError, nearest
from flexmemory.models.accounting import account

MODES = {  # mode -> which number of accounting.account
    "total": "total",  # parameters, no embedding or head
    "active": "active",  # parameters that a token computes with, no embedding or head
    "flops": "flops_per_token",  # forward, rows handed in
    "bytes": "read_bytes_per_token",  # weights and rows that decoding one token alone reads
}
KNOBS = ("model.d_ff", "model.d_model")
WIDEST = 16  # times the width that the config gives
# in which the models of one comparison agree
ALIKE = ("model.d_model", "prepare.source", "prepare.tokenizer", "train.steps")
WORST = 0.1  # a model further from its target is not of equal budget


def solve(cfg: Config, budget: dict) -> tuple[Config, dict]:
    """(config with the solved width, {"mode", "knob", "chosen": {field: value}, "target", "got",
    "residual": got / target - 1}).

    knob model.d_ff: any whole width. knob model.d_model: multiples of 2 n_heads with d_ff in
    proportion, then d_ff for what is left. Raises UserError for an unknown mode or knob and for a
    target that the knob does not reach.
    """
    mode, knob = budget["mode"], budget["knob"]
    if mode not in MODES:
        raise UserError(f"budget.mode {mode!r}: {nearest(mode, MODES)}")
    if knob not in KNOBS:
        raise UserError(f"budget.knob {knob!r}: {nearest(knob, KNOBS)}")
    target = cost(with_fields(cfg, budget["like"]), mode)
    best = cfg
    if knob == "model.d_model":
        unit, ratio = 2 * cfg.model.n_heads, cfg.model.d_ff / cfg.model.d_model

        def in_proportion(n):
            return widened(cfg, d_model=n * unit, d_ff=max(1, round(ratio * n * unit)))

        best = closest(in_proportion, cfg.model.d_model // unit, mode, target)
    finer = closest(lambda n: widened(best, d_ff=n), best.model.d_ff, mode, target)
    best = min(best, finer, key=lambda made: abs(cost(made, mode) - target))
    got = cost(best, mode)
    if abs(got / target - 1) > WORST:
        raise UserError(
            f"budget.mode {mode}: {cfg.model.pattern} comes no nearer to {target:,} by {knob} than"
            f" {got:,}; choose another knob or reference"
        )
    chosen = {name: get(best, name) for name in KNOBS}
    facts = {"mode": mode, "knob": knob, "chosen": chosen, "target": target, "got": got}
    return best, facts | {"residual": got / target - 1}


def widened(cfg: Config, **fields: int) -> Config:
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **fields))


def closest(make: Callable[[int], Config], start: int, mode: str, target: float) -> Config:
    """``make(n)`` of the whole number n >= 1, up to ``WIDEST`` times ``start``, whose cost is
    nearest to ``target``; costs rise with n.
    """
    widths = range(1, WIDEST * max(1, start) + 1)
    above = bisect.bisect(widths, target, key=lambda n: cost(make(n), mode))
    around = map(make, widths[max(0, above - 1) : above + 1])
    return min(around, key=lambda made: abs(cost(made, mode) - target))


def cost(cfg: Config, mode: str) -> int:
    return account(cfg.model, cfg.data.seq_len)[MODES[mode]]


def equalise(rows: list[dict], mode: str) -> list[dict]:
    """The sweep with every other variant's d_model solved so that it costs what the first variant
    of its size and text does; runs with a budget of their own stay as they are.

    Raises UserError for an unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"--budget {mode!r}: {nearest(mode, MODES)}")
    first, made = {}, []
    for row in rows:
        reference = first.setdefault(tuple(row.get(key) for key in ALIKE), row)
        if variant_of(row["name"]) != variant_of(reference["name"]):
            like = {key: value for key, value in reference.items() if key.startswith("model.")}
            row = {"budget": {"mode": mode, "knob": "model.d_model", "like": like}} | row
        made.append(row)
    return made
