"""The catalogue: one file here is one experiment. Its docstring says what is claimed and expected;
docs/experiments.md has the contract.

IDS       other names, the papers' tables and figures counted through
SOURCE    the paper's table, figure or section
MEASURES  functions of a trained model, run once after each training (optional)
sweep(scale) -> [override dict, ...]        analyse(runs) -> {"rows", "figures"}        claims(runs)
-> [Claim, ...]
"""

import importlib
import pkgutil
from types import ModuleType

from experiments.scales import SCALES
from experiments.sweeps import check
from flexmemory.errors import UserError, nearest


def names() -> list[str]:
    """Every experiment, in the order of their numbers."""
    found = [module.name for module in pkgutil.iter_modules(__path__)]
    return sorted(
        found,
        key=lambda name: (
            name[0],
            int(digits) if (digits := name.partition("_")[0][1:]).isdecimal() else 0,
            name,
        ),
    )


def load(name: str) -> ModuleType:
    """The module of an experiment by its name or one of its ids. Raises UserError with the nearest
    names.
    """
    known = names()
    if name in known:
        return importlib.import_module(f"{__name__}.{name}")
    by_id = {
        identity.lower(): known_name for known_name in known for identity in load(known_name).IDS
    }
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
    if scale not in scales_of(module):
        raise UserError(
            f"--scale {scale!r} of {name_of(module)}: {nearest(scale, scales_of(module))}"
        )
    try:
        return check(module.sweep(scale))
    except UserError as error:
        raise UserError(f"{name_of(module)}: {error}") from None
