"""Sweeps as lists of override dicts, put together with four functions.

An override dict sets dotted config fields ("model.beta": "3"), arguments of `flexmemory prepare`
("prepare.source": ...), and, under "budget", how one width is solved so that the model costs what
another does (see budgets.py). "name" names the run; the last part of a run's name is its seed.

    product(prefix("facts64", [{"prepare.source": ...}]), variants, seeds((0, 1, 2)))
"""

import dataclasses
from collections.abc import Iterable

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
            elif key in made and made[key] != value:
                raise UserError(
                    f"sweep: {key} is set twice, to {made[key]!r} and {value!r}; set it in one"
                    " place"
                )
            else:
                made[key] = value
    return made


def product(*sweeps: Sweep) -> Sweep:
    """Every combination, the last sweep running fastest."""
    made: Sweep = [{}]
    for sweep in sweeps:
        made = [merge(left, right) for left in made for right in sweep]
    return made


def zipped(*sweeps: Sweep) -> Sweep:
    """First with first, second with second. Raises UserError where the lengths differ."""
    if len({len(sweep) for sweep in sweeps}) > 1:
        raise UserError(
            f"sweep: zipped sweeps have lengths {', '.join(str(len(sweep)) for sweep in sweeps)};"
            " give equal ones"
        )
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
    known = default_config().to_dict()
    fields = {
        f"{section}.{name}": value
        for section, names in known.items()
        for name, value in names.items()
    } | {f"prepare.{name}": None for name in PREPARE}
    seen: dict[str, dict] = {}
    for row in sweep:
        name = row.get("name")
        if not name or not set(name) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.@"
        ):
            raise UserError(
                f"sweep: a run named {name!r}; give each a name of letters, digits, '-', '_', '.'"
                " and '@'"
            )
        if name in seen:
            raise UserError(
                f"sweep: two runs are named {name!r}"
                + ("" if seen[name] == row else f" ({differing(seen[name], row)} differs)")
                + "; give each its own name"
            )
        seen[name] = row
        for key, value in row.items():
            if key == "budget":
                check_budget(name, value, fields)
            elif key != "name":
                check_field(f"run {name}", key, value, fields)
    return sweep


def check_field(where: str, key: str, value, fields: dict) -> None:
    if key not in fields:
        raise UserError(f"{where} sets {key!r}: no such field; {nearest(key, fields)}")
    wanted = type(fields[key]) if fields[key] is not None else None
    if wanted and type(value) is not wanted and not (wanted is float and type(value) is int):
        raise UserError(
            f"{where} sets {key}: {value!r} is a {type(value).__name__}, give a {wanted.__name__}"
        )


def check_budget(name: str, budget: dict, fields: dict) -> None:
    if set(budget) != set(BUDGET):
        raise UserError(
            f"run {name} sets budget: {', '.join(sorted(budget))}; give {', '.join(BUDGET)}"
        )
    for key, value in budget["like"].items():
        check_field(f"run {name}, budget.like,", key, value, fields)


def differing(a: dict, b: dict) -> str:
    """The first key in which two override dicts differ."""
    return next(key for key in sorted({*a, *b}) if a.get(key) != b.get(key))


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
