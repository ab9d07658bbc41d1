"""Rows of tables: their lookup, their gradients, and the sums over sections, without a mesh and on one.

Tables are trees of arrays [.., V, W]. Without a mesh their rows are an ordinary gather. On a mesh every device holds some columns of all V rows,
so that no token, however frequent, loads one device more than another; sections of the batch and columns of the table change places
in one all-to-all of (ids of a section) x W numbers for all tables together, whatever V.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import P
from jax.experimental.compute_on import compute_on
from jax.sharding import get_abstract_mesh

from flexmemory.parallel import BATCH, local, names, sections, sharding, spec_of

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def lookup(tables, ids_R: jax.Array):
    """rows [.., R, W] of every table; an id equal to V gets the last row. On a mesh ids_R is cut into sections, and so are the rows."""
    if get_abstract_mesh().empty:
        return jax.tree.map(lambda table: take_whole(table, ids_R), tables)

    def at_columns(exchanged, tables, ids_R, read):
        ids_N = _all_ids(ids_R, exchanged)
        rows = [_rows_at(table, ids_N).get(mode="clip") if rows is None else rows for table, rows in zip(tables, read, strict=True)]
        return _to_sections(rows, exchanged)

    # a table in the host's memory is read there, and only its rows come
    read = jax.tree.map(lambda table: take_whole(table, jax.reshard(ids_R, P(None))) if in_host_memory(table) else None, tables)
    return _by_exchange(at_columns, tables, ids_R, read, out=_row_spec)


def dense_gradient(row_grads, ids_R: jax.Array, tables):
    """The gradient of every table, of its own size, from that of the rows ids_R; an id equal to V is no row."""

    def add(grad, ids_N, table, unique):
        return _rows_at(jnp.zeros_like(table), ids_N).add(grad, mode="drop", unique_indices=unique)

    if get_abstract_mesh().empty:
        return jax.tree.map(lambda grad, table: add(grad, ids_R, table, True), row_grads, tables)

    def at_columns(exchanged, tables, ids_R, grads):
        ids_N, rest = _all_ids(ids_R, exchanged), tuple(axis for axis in BATCH if axis not in exchanged)
        made = [add(grad, ids_N, table, not exchanged) for grad, table in zip(_to_columns(grads, exchanged), tables, strict=True)]
        return [jax.lax.psum(grad, rest) for grad in made] if rest else made

    return _by_exchange(at_columns, tables, ids_R, row_grads, out=spec_of)


def combine(row_grads, rows, ids_R: jax.Array, tables):
    """What the row-sparse optimiser takes, (grads, rows, ids_C): every id at most once and V for no row, whole on every device, with
    gradients [.., C, W] summed over equal ids and cut as the table's columns. Without a mesh these are the arguments.

    C is the number of ids of all sections, or V where that is less.
    """
    if get_abstract_mesh().empty:
        return row_grads, rows, ids_R
    vocab = jax.tree.leaves(tables)[0].shape[-2]
    ids_N = jax.reshard(ids_R, P(None))
    grads = _by_exchange(lambda exchanged, tables, ids_R, grads: _to_columns(grads, exchanged), tables, ids_R, row_grads, out=spec_of)
    if sections() > 1:
        ids_C = jnp.unique(ids_N, size=min(ids_N.size, vocab), fill_value=vocab)
        place_N = jnp.searchsorted(ids_C, ids_N)  # of an id equal to V perhaps beyond the end, where it is dropped
        grads = jax.tree.map(lambda grad: _rows_at(jnp.zeros(grad.shape[:-2] + (ids_C.size, grad.shape[-1]), grad.dtype, out_sharding=spec_of(grad)),
                                                   place_N).add(grad, mode="drop"), grads)
        ids_N = ids_C
    return grads, jax.tree.map(lambda table: take_whole(table, ids_N), tables), ids_N


def take_whole(table: jax.Array, ids_C: jax.Array) -> jax.Array:
    """Rows of ids that are whole on every device, cut as the table's columns: nothing moves but, from the host's memory, the rows."""
    cut = sharding(P(*(None,) * (table.ndim - 1), spec_of(table)[-1]))
    if not in_host_memory(table):
        return _rows_at(table, ids_C).get(mode="clip", out_sharding=cut)
    rows = _on_host(lambda flat_XW, ids_X: flat_XW.at[ids_X].get(mode="clip", out_sharding=sharding(spec_of(flat_XW))), DEVICE, table, ids_C)
    return rows.reshape(*table.shape[:-2], len(ids_C), table.shape[-1])


def put_whole(table: jax.Array, ids_C: jax.Array, rows: jax.Array) -> jax.Array:
    """The table in the host's memory with ``rows``, as :func:`take_whole` gives them, in the place of the rows ids_C; an id equal to V is no row."""
    flat_XW = jax.device_put(rows.reshape(-1, rows.shape[-1]), HOST)
    return _on_host(lambda flat, ids_X, rows_XW: flat.at[ids_X].set(rows_XW, mode="drop", unique_indices=True), HOST, table, ids_C,
                    flat_XW).reshape(table.shape)


def _on_host(f: Callable, out: jax.memory.Space, table, ids_C, *others):
    """``f`` of the table as [L V, W] and of the rows' places in it, computed by the host where the table lies; the result lies in ``out``. (Indices of two
    axes would be put together there from numbers that lie on the device, which JAX refuses.)"""
    layers, vocab = math.prod(table.shape[:-2]), table.shape[-2]
    if layers * vocab >= 1 << 31:
        raise ValueError(f"table of {layers} layers and {vocab} rows: their product must be below 2^31 in the host's memory")
    ids_X = jnp.where(ids_C == vocab, layers * vocab, ids_C + vocab * jnp.arange(layers, dtype=jnp.int32)[:, None]).ravel()
    args = table.reshape(layers * vocab, -1), jax.device_put(ids_X, HOST), *others
    return compute_on(f, compute_type="device_host", out_memory_spaces=out)(*args)


def in_host_memory(a: jax.Array) -> bool:
    return jax.typeof(a).memory_space == HOST


def touched(unique_R: jax.Array, inverse: jax.Array, vocab_size: int) -> jax.Array:
    """``unique_R`` with V, which is no row, where no token of the section refers to the place: padding, or the rest of a whole vocabulary."""

    def section(unique_R, inverse):
        touched_R = jnp.zeros(unique_R.shape, bool).at[inverse.ravel()].set(True)
        return jnp.where(touched_R, unique_R, vocab_size)

    return local(section, lambda unique, inverse: unique)(unique_R, inverse)


def _rows_at(table, ids):
    # (layer, id) pairs: on a CPU this outruns slices [L, 1, W] at axis 1, the more so the larger the table
    return table.at[ids] if table.ndim == 2 else table.at[jnp.arange(len(table), dtype=jnp.int32)[:, None], ids]


def _row_spec(table) -> P:
    kept = tuple(axis for axis in names(spec_of(table)[-1]) if axis not in BATCH)
    return P(*(None,) * (table.ndim - 2), BATCH, kept or None)


def _by_exchange(f: Callable, tables, ids_R, rows, *, out: Callable):
    """A tree like ``tables`` of ``f(exchanged axes, [tables], ids_R, [rows])`` on each device's own parts, called once for all tables that exchange
    over the same axes. Of a table in the host's memory there is None. The results lie as ``out(table)`` says."""
    leaves, treedef = jax.tree.flatten(tables)
    rows = treedef.flatten_up_to(rows)
    made = [None] * len(leaves)
    for exchanged in dict.fromkeys(map(_exchanged, leaves)):
        mine = [i for i, leaf in enumerate(leaves) if _exchanged(leaf) == exchanged]
        args = [None if in_host_memory(leaves[i]) else leaves[i] for i in mine], ids_R, [rows[i] for i in mine]
        part = jax.shard_map(functools.partial(f, exchanged), in_specs=jax.tree.map(spec_of, args), out_specs=[out(leaves[i]) for i in mine])
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
    flat_NX = jnp.concatenate([jnp.moveaxis(part, -2, 0).reshape(part.shape[-2], -1) for part in parts], axis=1)
    count = jax.lax.axis_size(exchanged)
    flat_RSX = jax.lax.all_to_all(flat_NX, exchanged, 0, 1, tiled=True).reshape(len(flat_NX) // count, count, -1)
    made, start = [], 0
    for part in parts:
        size = part.size // part.shape[-2]
        piece = flat_RSX[:, :, start : start + size].reshape(*flat_RSX.shape[:2], *part.shape[:-2], part.shape[-1])
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
