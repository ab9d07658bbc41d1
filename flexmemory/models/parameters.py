"""Every kind of parameter in one table: how it is called, trained and cut.

A parameter is known by its dotted path, e.g. ``blocks.s0.u0.attn.q``. One that no row of
:data:`PARAMETERS` matches raises, so that a new kind cannot be trained or placed by accident.
"""

import dataclasses
import re

import jax
from flax import traverse_util

from flexmemory.exchange import lookup


@dataclasses.dataclass(frozen=True)
class ParameterKind:
    pattern: str  # of the dotted path
    label: str  # group of the optimiser: norms are clipped, logged and decayed by it
    field: str  # of parallel.Plan: how the tensor is cut
    addressed: bool = False  # a token's id picks a row: a step computes with R of its rows


PARAMETERS = (  # the first that matches counts
    ParameterKind(r"^memory\..*\.table$", "table", "table_VW", addressed=True),
    ParameterKind(r"(^|\.)\w*norm\.(scale|bias)$|\.(alpha|beta)$", "norm", "norm_D"),  # gains
    ParameterKind(r"^embed$", "embed", "embed_VD", addressed=True),
    ParameterKind(r"^head$", "head", "head_DV"),
    ParameterKind(r"\.attn\.(q|k|v)$", "attention", "q_DNH"),
    ParameterKind(r"\.attn\.o$", "attention", "o_NHD"),
    ParameterKind(r"^memory\..*\.(gate|up)$", "memory", "up_DF"),
    ParameterKind(r"^memory\..*\.down$", "memory", "down_FD"),
    ParameterKind(r"^blocks\..*\.(gate|up)$", "ffn", "up_DF"),
    ParameterKind(r"^blocks\..*\.down$", "ffn", "down_FD"),
)
ADDRESSED = tuple(kind.label for kind in PARAMETERS if kind.addressed)


def parameter_kind(path: str) -> ParameterKind:
    """The row of PARAMETERS for a dotted path. Raises ValueError where none matches."""
    for kind in PARAMETERS:
        if re.search(kind.pattern, path):
            return kind
    raise ValueError(
        f"parameter {path} is of no known kind: add a row to flexmemory.models.parameters.PARAMETERS"
    )


def label_params(params: dict) -> dict:
    """A tree of labels shaped like ``params``. Raises ValueError naming an unknown parameter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: parameter_kind(path_name(path)).label, params
    )


def is_table(path, leaf) -> bool:
    """Is a leaf of a train state or of parameters a table [L, V, W], or a moment or a number of
    each of its rows?
    """
    return leaf.ndim > 0 and bool(re.search(r"\bmemory\..*\.table$", path_name(path)))


def path_name(path) -> str:
    """Dotted name of a key path, e.g. blocks.s0.u0.attn.q"""
    return ".".join(keys(path))


def keys(path) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def partition(params: dict, labels: tuple[str, ...]) -> tuple[dict, dict]:
    """(parameters with one of ``labels``, the rest): nested dicts with the paths of ``params``, so
    that labels stay what they are.
    """
    flat = traverse_util.flatten_dict(params)
    label_of = traverse_util.flatten_dict(label_params(params))
    chosen = {path: leaf for path, leaf in flat.items() if label_of[path] in labels}
    rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return traverse_util.unflatten_dict(chosen), traverse_util.unflatten_dict(rest)


def combine(one: dict, other: dict) -> dict:
    """The inverse of :func:`partition`, for parameters or anything in their place (rows, gradients)."""
    return traverse_util.unflatten_dict(
        traverse_util.flatten_dict(one) | traverse_util.flatten_dict(other)
    )


def addressed_rows(addressed: dict, ids_R: jax.Array, places_R: jax.Array | None = None) -> dict:
    """:func:`exchange.lookup` of parameters with ADDRESSED labels. places_R: where the ids' rows
    are in tables that do not hold all of them.
    """
    if places_R is None:
        return lookup(addressed, ids_R)
    tables, others = partition(addressed, ("table",))
    return combine(lookup(tables, places_R), lookup(others, ids_R))
