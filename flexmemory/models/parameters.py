"""Every kind of parameter in one table: how it is called, trained and cut; and the three parts of
a train state.

A parameter is known by its dotted path, e.g. ``blocks.s0.u0.attn.q``, whatever stands in front of
it in a train state. One that no row of :data:`PARAMETERS` matches raises, so that a new kind cannot
be trained or placed by accident."""

import dataclasses
import re
from typing import Any

import jax
from flax import traverse_util

from flexmemory.exchange import lookup


@dataclasses.dataclass(frozen=True)
class ParameterKind:
    pattern: str  # of the dotted path
    label: str  # group of the optimiser: norms are clipped, logged and decayed by it
    field: str  # of parallel.Plan: how the tensor is cut


TABLE = ParameterKind(r"\bmemory\..*\.table$", "table", "table_VW")
PARAMETERS = (  # the first that matches counts
    TABLE,
    ParameterKind(r"norm\.(scale|bias)$|\.(alpha|beta)$", "norm", "norm_D"),  # gains
    ParameterKind(r"\bembed$", "embed", "embed_VD"),
    ParameterKind(r"\bhead$", "head", "head_DV"),
    ParameterKind(r"\.attn\.(q|k|v)$", "attention", "q_DNH"),
    ParameterKind(r"\.attn\.o$", "attention", "o_NHD"),
    ParameterKind(r"\bmemory\..*\.(gate|up)$", "memory", "up_DF"),
    ParameterKind(r"\bmemory\..*\.down$", "memory", "down_FD"),
    ParameterKind(r"\bblocks\..*\.(gate|up)$", "ffn", "up_DF"),
    ParameterKind(r"\bblocks\..*\.down$", "ffn", "down_FD"),
)


def keys(path: tuple) -> tuple[str, ...]:
    """The words of a JAX key path."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def path_name(path: tuple) -> str:
    """Dotted name of a JAX key path, e.g. blocks.s0.u0.attn.q"""
    return ".".join(keys(path))


def parameter_kind(path: str) -> ParameterKind:
    """The row of PARAMETERS for a dotted path. Raises ValueError where none matches."""
    for kind in PARAMETERS:
        if re.search(kind.pattern, path):
            return kind
    raise ValueError(
        f"parameter {path} is of no known kind; add a row to PARAMETERS in models/parameters.py"
    )


def label_params(params: Any) -> Any:
    """A tree of labels shaped like ``params``. Raises ValueError naming an unknown parameter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: parameter_kind(path_name(path)).label, params
    )


def is_table(path: tuple, leaf: Any) -> bool:
    """Is a leaf of a train state or of parameters a table [L, V, W], or a moment or a number of
    each of its rows?"""
    return leaf.ndim > 0 and bool(re.search(TABLE.pattern, path_name(path)))


# A train state holds parameters, and moments of their shape, in three parts: {"backbone": matrices
# and gains, "embed": [V, D], "tables": learned ones}. A token's id picks a row of the last two, of
# which a step sees R rows alone; the tables may be trained row by row, or lie in the host's memory.


def split(tree: Any) -> Any:
    """The tree with every nested dict of a model's parameters in three parts; parts keep the paths
    of what they hold."""

    def one(node: Any) -> Any:
        if not _is_params(node):
            return node
        flat = traverse_util.flatten_dict(node)
        tables = {path for path in flat if re.search(TABLE.pattern, ".".join(path))}
        return {
            "backbone": _nested({p: a for p, a in flat.items() if p not in tables | {("embed",)}}),
            "embed": node["embed"],
            "tables": _nested({path: flat[path] for path in tables}),
        }

    return jax.tree.map(one, tree, is_leaf=_is_params)


def join(tree: Any) -> Any:
    """The inverse of :func:`split`, for parameters or anything in their place."""

    def one(node: Any) -> Any:
        if not _is_parts(node):
            return node
        flat = traverse_util.flatten_dict(node["backbone"])
        return _nested(flat | traverse_util.flatten_dict(node["tables"])) | {"embed": node["embed"]}

    return jax.tree.map(one, tree, is_leaf=_is_parts)


def _is_params(node: Any) -> bool:
    return isinstance(node, dict) and "embed" in node and "backbone" not in node


def _is_parts(node: Any) -> bool:
    return isinstance(node, dict) and "backbone" in node


_nested = traverse_util.unflatten_dict


def addressed_rows(parts: dict, ids_R: jax.Array, places_R: jax.Array | None = None) -> dict:
    """{"embed", "tables"} of the rows of the addresses ids_R, see :func:`exchange.lookup`.
    places_R: where these rows are in tables that do not hold all of them."""
    embed, tables = {"embed": parts["embed"]}, {"tables": parts["tables"]}
    if places_R is None:
        return lookup(embed | tables, ids_R)
    return lookup(embed, ids_R) | lookup(tables, places_R)
