"""Rows of tables: their lookup, their gradients, and the sums over sections, without a mesh and on
one.

Tables are trees of arrays [.., V, W]. Without a mesh their rows are an ordinary gather. On a mesh
every device holds some columns of all V rows, so that no token, however frequent, loads one device
more than another. One all-to-all for all tables together exchanges them for all columns of a
section's rows: (ids of a section) x W numbers, whatever V.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import get_abstract_mesh

from flexmemory.sharding import BATCH, names, sections, sharding, spec_of

Axes = tuple[str, ...]
Arrays = list[jax.Array]


def lookup(tables: Any, ids_R: jax.Array) -> Any:
    """rows [.., R, W] of every table; an id equal to V gets the last row. On a mesh ids_R is cut
    into sections, and so are the rows.
    """
    if get_abstract_mesh().empty:
        return jax.tree.map(lambda table: _own_columns(table, ids_R), tables)

    def at_columns(exchanged: Axes, tables: Arrays, ids_R: jax.Array, _: list) -> Arrays:
        ids_N = _all_ids(ids_R, exchanged)
        rows = [_rows_at(table, ids_N).get(mode="clip") for table in tables]
        return _to_sections(rows, exchanged)

    return _by_exchange(at_columns, tables, ids_R, None, out=_row_spec)


def dense_gradient(row_grads: Any, ids_R: jax.Array, tables: Any) -> Any:
    """The gradient of every table, of its own size, from that of the rows ids_R; an id equal to V
    is no row.
    """

    def add(grad: jax.Array, ids_N: jax.Array, table: jax.Array, unique: bool) -> jax.Array:
        return _rows_at(jnp.zeros_like(table), ids_N).add(grad, mode="drop", unique_indices=unique)

    if get_abstract_mesh().empty:
        return jax.tree.map(lambda grad, table: add(grad, ids_R, table, True), row_grads, tables)

    def at_columns(exchanged: Axes, tables: Arrays, ids_R: jax.Array, grads: Arrays) -> Arrays:
        ids_N, unique = _all_ids(ids_R, exchanged), not exchanged
        columns = zip(_to_columns(grads, exchanged), tables, strict=True)
        own = [add(grad, ids_N, table, unique) for grad, table in columns]
        rest = tuple(axis for axis in BATCH if axis not in exchanged)
        return [jax.lax.psum(grad, rest) for grad in own] if rest else own

    return _by_exchange(at_columns, tables, ids_R, row_grads, out=spec_of)


def sum_over_sections(
    row_grads: Any, rows: Any, ids_C: jax.Array, places_R: jax.Array, tables: Any
) -> tuple[Any, Any]:
    """(grads, rows) of the ids ids_C for the row-sparse optimiser: gradients [.., C, W], summed
    over the sections' equal ids and cut as the table's columns.

    row_grads and rows: as :func:`lookup` gives rows. ids_C and places_R: table_ids and places of a
    batch, see data/pipeline.py. Without a mesh the arguments themselves.
    """
    if get_abstract_mesh().empty:
        return row_grads, rows

    def at_columns(exchanged: Axes, tables: Arrays, ids_R: jax.Array, grads: Arrays) -> Arrays:
        return _to_columns(grads, exchanged)

    def summed(grad: jax.Array) -> jax.Array:
        shape = (*grad.shape[:-2], ids_C.size, grad.shape[-1])
        zeros = jnp.zeros(shape, grad.dtype, out_sharding=spec_of(grad))
        return _rows_at(zeros, place_N).add(grad, mode="drop")

    grads = _by_exchange(at_columns, tables, places_R, row_grads, out=spec_of)
    if sections() > 1:
        place_N = jax.reshard(places_R, P(None))
        grads = jax.tree.map(summed, grads)
    return grads, jax.tree.map(lambda table: _own_columns(table, ids_C), tables)


def _own_columns(table: jax.Array, ids_C: jax.Array) -> jax.Array:
    """Rows of ids that every device has, cut as the table's columns: nothing moves."""
    cut = sharding(P(*(None,) * (table.ndim - 1), spec_of(table)[-1]))
    return _rows_at(table, ids_C).get(mode="clip", out_sharding=cut)


def _rows_at(table: jax.Array, ids: jax.Array) -> Any:
    # (layer, id) pairs: on a CPU this outruns slices [L, 1, W] at axis 1, the more so the larger
    # the table
    if table.ndim == 2:
        return table.at[ids]
    return table.at[jnp.arange(len(table), dtype=jnp.int32)[:, None], ids]


def _row_spec(table: jax.Array) -> P:
    kept = tuple(axis for axis in names(spec_of(table)[-1]) if axis not in BATCH)
    return P(*(None,) * (table.ndim - 2), BATCH, kept or None)


def _by_exchange(f: Callable, tables: Any, ids_R: jax.Array, rows: Any, *, out: Callable) -> Any:
    """A tree like ``tables`` of ``f(exchanged axes, [tables], ids_R, [rows])`` on each device's own
    parts, called once for all tables that exchange over the same axes. The results lie as
    ``out(table)`` says.
    """
    leaves, treedef = jax.tree.flatten(tables)
    rows = jax.tree.leaves(rows)
    results = [None] * len(leaves)
    for exchanged in dict.fromkeys(map(_exchanged, leaves)):
        which = [i for i, leaf in enumerate(leaves) if _exchanged(leaf) == exchanged]
        args = [leaves[i] for i in which], ids_R, [rows[i] for i in which if rows]
        part = jax.shard_map(
            functools.partial(f, exchanged),
            in_specs=jax.tree.map(spec_of, args),
            out_specs=[out(leaves[i]) for i in which],
        )
        for i, result in zip(which, part(*args), strict=True):
            results[i] = result
    return jax.tree.unflatten(treedef, results)


def _exchanged(table: jax.Array) -> Axes:
    return tuple(axis for axis in names(spec_of(table)[-1]) if axis in BATCH)


def _all_ids(ids_R: jax.Array, exchanged: Axes) -> jax.Array:
    return jax.lax.all_gather(ids_R, exchanged, tiled=True) if exchanged else ids_R


def _to_sections(parts: Arrays, exchanged: Axes) -> Arrays:
    """[.., N, w]: own columns, all sections -> [.., R, W]: own section, all columns."""
    if not exchanged:
        return parts
    flat = [jnp.moveaxis(part, -2, 0).reshape(part.shape[-2], -1) for part in parts]
    flat_NX, count = jnp.concatenate(flat, axis=1), jax.lax.axis_size(exchanged)
    flat_RSX = jax.lax.all_to_all(flat_NX, exchanged, 0, 1, tiled=True)
    flat_RSX = flat_RSX.reshape(len(flat_NX) // count, count, -1)
    rows, start = [], 0
    for part in parts:
        size = part.size // part.shape[-2]
        piece = flat_RSX[:, :, start : start + size]
        piece = piece.reshape(*piece.shape[:2], *part.shape[:-2], part.shape[-1])
        piece = jnp.moveaxis(jnp.moveaxis(piece, 1, -2), 0, -3)  # [.., R, S, w]
        rows.append(piece.reshape(*piece.shape[:-2], -1))
        start += size
    return rows


def _to_columns(parts: Sequence[jax.Array], exchanged: Axes) -> Arrays:
    """The inverse of :func:`_to_sections`."""
    if not exchanged:
        return list(parts)
    count = jax.lax.axis_size(exchanged)
    pieces = [part.reshape(*part.shape[:-1], count, -1) for part in parts]
    pieces = [jnp.moveaxis(jnp.moveaxis(piece, -3, 0), -2, 1) for piece in pieces]  # [R, S, .., w]
    flat_RSX = jnp.concatenate([p.reshape(*p.shape[:2], -1) for p in pieces], axis=2)
    flat_NX = jax.lax.all_to_all(flat_RSX, exchanged, 1, 0, tiled=True)
    flat_NX = flat_NX.reshape(-1, flat_RSX.shape[-1])
    columns, start = [], 0
    for piece in pieces:
        shape = piece.shape[2:]
        own = flat_NX[:, start : start + math.prod(shape)].reshape(-1, *shape)
        columns.append(jnp.moveaxis(own, 0, -2))
        start += math.prod(shape)
    return columns
