"""The catalogue: one file here is one experiment. Its docstring says what is claimed and expected;
docs/experiments.md has the contract and a whole example.
"""

import importlib
import pkgutil
from types import ModuleType

from experiments.scales import SCALES
from experiments.sweeps import check
from flexmemory.errors import UserError, nearest


def names() -> list[str]:
    """Every experiment, in the order of their numbers."""

    def place(name):
        digits = name.partition("_")[0][1:]
        return name[0], int(digits) if digits.isdecimal() else 0, name

    return sorted((module.name for module in pkgutil.iter_modules(__path__)), key=place)


def load(name: str) -> ModuleType:
    """The module of an experiment by its name or one of its ids. Raises UserError with the nearest
    names.
    """
    known = names()
    if name in known:
        return importlib.import_module(f"{__name__}.{name}")
    by_id = {identity.lower(): own for own in known for identity in load(own).IDS}
    if name.lower() in by_id:
        return load(by_id[name.lower()])
    raise UserError(f"experiment {name!r}: {nearest(name.lower(), [*known, *by_id])}")


def name_of(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def scales_of(module: ModuleType) -> tuple[str, ...]:
    return getattr(module, "SCALES", SCALES)


def measures_of(module: ModuleType) -> tuple:
    return getattr(module, "MEASURES", ())


def sweep_of(module: ModuleType, scale: str) -> list[dict]:
    """The checked sweep. Raises UserError for an unknown scale, an unknown override, or two runs of
    one name.
    """
    name, known = name_of(module), scales_of(module)
    if scale not in known:
        raise UserError(f"--scale {scale!r} of {name}: {nearest(scale, known)}")
    try:
        return check(module.sweep(scale))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
