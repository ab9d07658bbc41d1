"""Sweeps as lists of override dicts, put together with four functions.

An override dict sets dotted config fields ("model.beta": "3"), arguments of `flexmemory prepare`
("prepare.source": ...), and, under "budget", how one width is solved so that the model costs what
another does (see budgets.py). "name" names the run; the last part of a run's name is its seed.

    product(prefix("facts64", [{"prepare.source": ...}]), variants, seeds((0, 1, 2)))
"""

import dataclasses
import re
from collections.abc import Iterable

from ml_collections import ConfigDict

from flexmemory.config import Config, default_config, from_dict
from flexmemory.errors import UserError, nearest

Sweep = list[dict]
PREPARE = ("source", "tokenizer", "val_fraction")  # arguments of `flexmemory prepare`
BUDGET = ("mode", "knob", "like")


def merge(*overrides: dict) -> dict:
    """One override dict of several; their names are joined by "-". Raises UserError where two set
    one field differently.
    """
    made = {}
    for override in overrides:
        for key, value in override.items():
            if key == "name":
                made["name"] = f"{made['name']}-{value}" if made.get("name") else value
            elif made.setdefault(key, value) != value:
                raise UserError(
                    f"sweep: {key} is set twice, to {made[key]!r} and {value!r}; set it in one"
                    " place"
                )
    return made


def product(*sweeps: Sweep) -> Sweep:
    """Every combination, the last sweep running fastest."""
    made: Sweep = [{}]
    for sweep in sweeps:
        made = [merge(left, right) for left in made for right in sweep]
    return made


def zipped(*sweeps: Sweep) -> Sweep:
    """First with first, second with second. Raises UserError where the lengths differ."""
    if len(set(map(len, sweeps))) > 1:
        lengths = ", ".join(str(len(sweep)) for sweep in sweeps)
        raise UserError(f"sweep: zipped sweeps have lengths {lengths}; give equal ones")
    return [merge(*rows) for rows in zip(*sweeps, strict=True)]


def chain(*sweeps: Sweep) -> Sweep:
    """One after the other."""
    return [row for sweep in sweeps for row in sweep]


def prefix(name: str, sweep: Sweep) -> Sweep:
    """The sweep with ``name`` before every run's name."""
    return [merge({"name": name}, row) for row in sweep]


def values(key: str, items: Iterable, name: str = "{}") -> Sweep:
    """One override per value of ``key``, named by the format ``name``."""
    return [{"name": name.format(item), key: item} for item in items]


def seeds(items: Iterable[int]) -> Sweep:
    """The runs' seeds, of parameters and data order. Last in a product, so that a run's name ends
    with -s<seed>.
    """
    return values("train.seed", items, "s{}")


def variant_of(name: str) -> str:
    """A run's name without its seed, and without the paper's size after "@"."""
    stem, _, seed = name.rpartition("-s")
    return (stem if stem and seed.isdecimal() else name).partition("@")[0]


def check(sweep: Sweep) -> Sweep:
    """The sweep, if it is sound. Raises UserError on an unknown field, a value of another type, a
    run without a name, or two runs with one name.
    """
    fields = dotted(default_config()) | {f"prepare.{name}": None for name in PREPARE}
    seen: dict[str, dict] = {}
    for row in sweep:
        name = row.get("name")
        if not re.fullmatch(r"[A-Za-z0-9_.@-]+", name or ""):
            raise UserError(
                f"sweep: a run named {name!r}; give each a name of letters, digits, '-', '_', '.'"
                " and '@'"
            )
        if name in seen:
            key = differing(seen[name], row)
            why = f" ({key} differs)" if key else ""
            raise UserError(f"sweep: two runs are named {name!r}{why}; give each its own name")
        seen[name] = row
        for key, value in row.items():
            if key not in ("name", "budget"):
                check_field(f"run {name}", key, value, fields)
        budget = row.get("budget")
        if budget and set(budget) != set(BUDGET):
            raise UserError(
                f"run {name} sets budget: {', '.join(sorted(budget))}; give {', '.join(BUDGET)}"
            )
        for key, value in budget["like"].items() if budget else ():
            check_field(f"run {name}, budget.like,", key, value, fields)
    return sweep


def check_field(where: str, key: str, value, fields: dict) -> None:
    if key not in fields:
        raise UserError(f"{where} sets {key!r}: no such field; {nearest(key, fields)}")
    wanted, given = type(fields[key]), type(value)
    if fields[key] is not None and given is not wanted and (wanted, given) != (float, int):
        raise UserError(
            f"{where} sets {key}: {value!r} is a {given.__name__}, give a {wanted.__name__}"
        )


def differing(a: dict, b: dict) -> str | None:
    """The first key in which two override dicts differ."""
    return next((key for key in sorted({*a, *b}) if a.get(key) != b.get(key)), None)


def dotted(config: ConfigDict) -> dict:
    """{"section.field": value} of a whole config."""
    sections = config.to_dict().items()
    return {f"{section}.{name}": value for section, s in sections for name, value in s.items()}


def with_fields(cfg: Config, overrides: dict) -> Config:
    """``cfg`` with the dotted config fields of ``overrides`` set; "name", "budget" and "prepare.*"
    are for others. Raises UserError as ``from_dict``.
    """
    nested = dataclasses.asdict(cfg)
    for key, value in overrides.items():
        section, _, field = key.partition(".")
        if section in nested:
            nested[section][field] = value
    return from_dict(nested)
