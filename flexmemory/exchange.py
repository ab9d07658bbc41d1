"""Rows of tables: their lookup, their gradients, and the sums over sections, without a mesh and on
one.

Tables are trees of arrays [.., V, W]. Without a mesh their rows are an ordinary gather. On a mesh
every device holds some columns of all V rows, so that no token, however frequent, loads one device
more than another; sections of the batch and columns of the table change places in one all-to-all of
(ids of a section) x W numbers for all tables together, whatever V.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import get_abstract_mesh

from flexmemory.sharding import BATCH, names, sections, sharding, spec_of


def lookup(tables, ids_R: jax.Array):
    """rows [.., R, W] of every table; an id equal to V gets the last row. On a mesh ids_R is cut
    into sections, and so are the rows.
    """
    if get_abstract_mesh().empty:
        return jax.tree.map(lambda table: take_whole(table, ids_R), tables)

    def at_columns(exchanged, tables, ids_R, _):
        ids_N = _all_ids(ids_R, exchanged)
        return _to_sections(
            [_rows_at(table, ids_N).get(mode="clip") for table in tables], exchanged
        )

    return _by_exchange(
        at_columns, tables, ids_R, jax.tree.map(lambda table: None, tables), out=_row_spec
    )


def dense_gradient(row_grads, ids_R: jax.Array, tables):
    """The gradient of every table, of its own size, from that of the rows ids_R; an id equal to V
    is no row.
    """

    def add(grad, ids_N, table, unique):
        return _rows_at(jnp.zeros_like(table), ids_N).add(grad, mode="drop", unique_indices=unique)

    if get_abstract_mesh().empty:
        return jax.tree.map(lambda grad, table: add(grad, ids_R, table, True), row_grads, tables)

    def at_columns(exchanged, tables, ids_R, grads):
        ids_N, rest = (
            _all_ids(ids_R, exchanged),
            tuple(axis for axis in BATCH if axis not in exchanged),
        )
        made = [
            add(grad, ids_N, table, not exchanged)
            for grad, table in zip(_to_columns(grads, exchanged), tables, strict=True)
        ]
        return [jax.lax.psum(grad, rest) for grad in made] if rest else made

    return _by_exchange(at_columns, tables, ids_R, row_grads, out=spec_of)


def sum_over_sections(row_grads, rows, ids_C: jax.Array, places_R: jax.Array, tables):
    """(grads, rows) of the ids ids_C for the row-sparse optimiser: gradients [.., C, W], summed
    over the sections' equal ids and cut as the table's columns.

    row_grads and rows: as :func:`lookup` gives rows. ids_C and places_R: table_ids and places of a
    batch, see data/pipeline.py. Without a mesh the arguments themselves.
    """
    if get_abstract_mesh().empty:
        return row_grads, rows
    grads = _by_exchange(
        lambda exchanged, tables, ids_R, grads: _to_columns(grads, exchanged),
        tables,
        places_R,
        row_grads,
        out=spec_of,
    )
    if sections() > 1:
        place_N = jax.reshard(places_R, P(None))
        grads = jax.tree.map(
            lambda grad: _rows_at(
                jnp.zeros(
                    grad.shape[:-2] + (ids_C.size, grad.shape[-1]),
                    grad.dtype,
                    out_sharding=spec_of(grad),
                ),
                place_N,
            ).add(grad, mode="drop"),
            grads,
        )
    return grads, jax.tree.map(lambda table: take_whole(table, ids_C), tables)


def take_whole(table: jax.Array, ids_C: jax.Array) -> jax.Array:
    """Rows of ids that are whole on every device, cut as the table's columns: nothing moves."""
    cut = sharding(P(*(None,) * (table.ndim - 1), spec_of(table)[-1]))
    return _rows_at(table, ids_C).get(mode="clip", out_sharding=cut)


def _rows_at(table, ids):
    # (layer, id) pairs: on a CPU this outruns slices [L, 1, W] at axis 1, the more so the larger
    # the table
    return (
        table.at[ids]
        if table.ndim == 2
        else table.at[jnp.arange(len(table), dtype=jnp.int32)[:, None], ids]
    )


def _row_spec(table) -> P:
    kept = tuple(axis for axis in names(spec_of(table)[-1]) if axis not in BATCH)
    return P(*(None,) * (table.ndim - 2), BATCH, kept or None)


def _by_exchange(f: Callable, tables, ids_R, rows, *, out: Callable):
    """A tree like ``tables`` of ``f(exchanged axes, [tables], ids_R, [rows])`` on each device's own
    parts, called once for all tables that exchange over the same axes. The results lie as
    ``out(table)`` says.
    """
    leaves, treedef = jax.tree.flatten(tables)
    rows = treedef.flatten_up_to(rows)
    made = [None] * len(leaves)
    for exchanged in dict.fromkeys(map(_exchanged, leaves)):
        mine = [i for i, leaf in enumerate(leaves) if _exchanged(leaf) == exchanged]
        args = [leaves[i] for i in mine], ids_R, [rows[i] for i in mine]
        part = jax.shard_map(
            functools.partial(f, exchanged),
            in_specs=jax.tree.map(spec_of, args),
            out_specs=[out(leaves[i]) for i in mine],
        )
        for i, result in zip(mine, part(*args), strict=True):
            made[i] = result
    return treedef.unflatten(made)


def _exchanged(table) -> tuple[str, ...]:
    return tuple(axis for axis in names(spec_of(table)[-1]) if axis in BATCH)


def _all_ids(ids_R, exchanged):
    return jax.lax.all_gather(ids_R, exchanged, tiled=True) if exchanged else ids_R


def _to_sections(parts, exchanged):
    """[.., N, w] of own columns and all sections -> [.., R, W] of the own section and all columns."""
    if not exchanged:
        return parts
    flat_NX = jnp.concatenate(
        [jnp.moveaxis(part, -2, 0).reshape(part.shape[-2], -1) for part in parts], axis=1
    )
    count = jax.lax.axis_size(exchanged)
    flat_RSX = jax.lax.all_to_all(flat_NX, exchanged, 0, 1, tiled=True).reshape(
        len(flat_NX) // count, count, -1
    )
    made, start = [], 0
    for part in parts:
        size = part.size // part.shape[-2]
        piece = flat_RSX[:, :, start : start + size].reshape(
            *flat_RSX.shape[:2], *part.shape[:-2], part.shape[-1]
        )
        piece = jnp.moveaxis(jnp.moveaxis(piece, 1, -2), 0, -3)  # [.., R, S, w]
        made.append(piece.reshape(*piece.shape[:-2], -1))
        start += size
    return made


def _to_columns(parts, exchanged):
    """The inverse of :func:`_to_sections`."""
    if not exchanged:
        return list(parts)
    count = jax.lax.axis_size(exchanged)
    pieces, shapes = [], []
    for part in parts:
        piece = part.reshape(*part.shape[:-1], count, -1)
        piece = jnp.moveaxis(jnp.moveaxis(piece, -3, 0), -2, 1)  # [R, S, .., w]
        shapes.append(piece.shape)
        pieces.append(piece.reshape(*piece.shape[:2], -1))
    flat_RSX = jnp.concatenate(pieces, axis=2)
    flat_NX = jax.lax.all_to_all(flat_RSX, exchanged, 1, 0, tiled=True)
    flat_NX = flat_NX.reshape(-1, flat_RSX.shape[-1])
    made, start = [], 0
    for shape in shapes:
        size = math.prod(shape[2:])
        made.append(jnp.moveaxis(flat_NX[:, start : start + size].reshape(-1, *shape[2:]), 0, -2))
        start += size
    return made
