"""Row-sparse tables in the host's memory: NumPy arrays, and a thread that brings every batch's rows
to the devices and takes the updated ones back.

A step is given tables of C rows, those of its batch's ``table_ids``, and trains them as if they
were whole. While step k computes, the rows of batch k+1 are read and sent; those of them that step
k changes are then taken from its result, on the devices, so that every row is what it would be if
nothing overlapped. After that the result of step k goes back into the tables. Each process holds
the columns of its own devices."""

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from flexmemory.config import Config
from flexmemory.evals.rows import RowsOf, live
from flexmemory.models.memory import TABLE_BLOCK, Rows
from flexmemory.models.parameters import is_table, join, keys, split
from flexmemory.models.transformer import drawing, first_table, fresh_params
from flexmemory.parallel import on_devices, placed
from flexmemory.sharding import local
from flexmemory.train.step import abstract_state

DRAW_BYTES = 256 << 20  # of a table's first values, drawn on the devices at a time
COPYING = 8  # threads that copy rows, at most
# batches whose rows may be on the devices at a time: one in work, one coming, one going
IN_FLIGHT = 3

Arrays = dict[int, jax.Array]  # leaf of the state -> rows


class HostTables:
    """The tables of a train state and their moments, or numbers per row: its leaves for which
    ``parameters.is_table`` is true.

    ``given``: a state as a checkpoint gives it; by default that of ``step.init_state``. The
    training loop begins with ``state`` and does, for every batch of :meth:`ahead`, ``state =
    rows_in(state)``, the step, and ``rows_out(state)``: the tables in its state have the rows of
    one batch. What fails in the background is raised by a later call."""

    def __init__(self, cfg: Config, given: dict | None = None):
        abstract, self._model = abstract_state(cfg), cfg.model
        paths, self._tree = jax.tree_util.tree_flatten_with_path(abstract)
        self._shapes = {i: a.shape for i, (path, a) in enumerate(paths) if is_table(path, a)}
        names = [keys(path) for path, _ in paths]
        self._params = [i for i in self._shapes if names[i][0] == "params"]
        self._whole_places, self._places = (
            jax.tree.leaves(placed(where, abstract)) for where in (cfg, on_devices(cfg))
        )
        # of every leaf, by columns, [L, V, w] or one number per row [L, V]; zeros take no memory
        # before they are written
        self._tables = {
            i: {
                _columns(index): np.zeros(self._places[i].shard_shape(shape), np.float32)
                for index in self._places[i].addressable_devices_indices_map(shape).values()
            }
            for i, shape in self._shapes.items()
        }
        if given is None:
            leaves = self._fresh(cfg.train.seed, [a for _, a in paths], names)
        else:
            leaves = jax.tree.leaves(given)
            for i in self._shapes:
                self._write(i, leaves[i])
        shapes = [a if i in self._shapes else leaves[i] for i, (_, a) in enumerate(paths)]
        self.state = jax.tree.unflatten(self._tree, shapes)
        # one thread, so that reads and writes keep their order
        self._thread = ThreadPoolExecutor(1, "tables")
        self._copying = ThreadPoolExecutor(min(COPYING, os.cpu_count() or 1), "rows")
        self._coming: deque[Future] = deque()  # rows of the batches to come
        self._going: deque[Future] = deque()  # rows of steps, on their way back
        # table_ids of the batch whose rows were read last; the thread's own
        self._fetched: np.ndarray | None = None
        # table_ids of the step under way, and the rows that the step before it has changed
        self._ids = np.zeros(0, np.int32)
        self._changed: Arrays = {}

    def ahead(self, batches: Iterable[dict]) -> Iterator[dict]:
        """The batches; each is given when the rows of the one after it have been asked for."""
        last = None
        for batch in batches:
            self._coming.append(self._thread.submit(self._fetch, batch["table_ids"]))
            if last is not None:
                yield last
            last = batch
        if last is not None:
            yield last

    def rows_in(self, state: dict) -> dict:
        """The state with the rows of the next batch: waits until they have been read."""
        self._ids, rows, from_C = self._coming.popleft().result()
        while self._going and self._going[0].done():
            self._going.popleft().result()
        if self._changed:
            new = _renewed(list(rows.values()), list(self._changed.values()), from_C)
            rows = dict(zip(rows, new, strict=True))
        return self._with(state, rows)

    def rows_out(self, state: dict) -> None:
        """Sends the rows of a state that the step has changed, or is about to change, back into the
        tables; waits for nothing."""
        leaves = jax.tree.leaves(state)
        self._changed = {i: leaves[i] for i in self._shapes}
        for rows in self._changed.values():
            rows.copy_to_host_async()
        self._going.append(self._thread.submit(self._put_back, self._ids, self._changed))

    def whole(self, state: dict) -> dict:
        """A state like that of ``step.init_state``, with a copy of the tables in ``pinned_host``
        memory."""
        self._settle()

        def copy(i: int) -> jax.Array:
            part = lambda index: self._tables[i][_columns(index)].copy()
            return jax.make_array_from_callback(self._shapes[i], self._whole_places[i], part)

        return self._with(state, {i: copy(i) for i in self._shapes})

    def rows_of(self, state: dict) -> RowsOf:
        """Rows of any ids for an evaluation of ``state``, until the next :meth:`rows_out`."""
        self._settle()

        def rows(ids_R: jax.Array) -> Rows:
            ids_N = np.asarray(_everywhere(ids_R))  # of all sections, which have many in common
            seen_V = np.zeros(self._model.vocab_size, bool)
            seen_V[ids_N] = True
            ids_C = np.zeros(min(len(ids_N), len(seen_V)), np.int32)
            ids_C[: seen_V.sum()] = np.flatnonzero(seen_V)
            place_V = np.cumsum(seen_V, dtype=np.int32) - 1
            places_R = _spread(place_V[ids_N], ids_R.sharding)
            params = self._with(state, self._read(self._params, ids_C))["params"]
            return live(join(params), ids_R, places_R, cfg=self._model)

        return rows

    def close(self) -> None:
        """Ends the threads; what has not begun is dropped."""
        self._thread.shutdown(cancel_futures=True)
        self._copying.shutdown()

    def _with(self, state: dict, arrays: Arrays) -> dict:
        leaves = jax.tree.leaves(state)
        leaves = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(self._tree, leaves)

    def _settle(self) -> None:
        """Waits until the rows of all steps are in the tables."""
        while self._going:
            self._going.popleft().result()

    # --- the thread's side ---

    def _fetch(self, table_ids: jax.Array) -> tuple[np.ndarray, Arrays, jax.Array]:
        """(table_ids, their rows, the place of each among the batch before, or -1)"""
        ids_C, vocab = np.asarray(table_ids), self._model.vocab_size
        place_V = np.full(vocab + 1, -1, np.int32)
        if self._fetched is not None:
            place_V[self._fetched] = np.arange(len(self._fetched), dtype=np.int32)
            place_V[vocab] = -1  # no row
        self._fetched = ids_C
        return ids_C, self._read(self._shapes, ids_C), _spread(place_V[ids_C], table_ids.sharding)

    def _read(self, leaves: Iterable[int], ids_C: np.ndarray) -> Arrays:
        """Rows of some leaves on the devices, [L, C, W] or [L, C]; an id equal to V gets the last
        row."""
        parts = {
            (i, columns): np.empty((len(table), len(ids_C), *table.shape[2:]), np.float32)
            for i in leaves
            for columns, table in self._tables[i].items()
        }
        self._copy(parts, lambda layer, rows: np.take(layer, ids_C, 0, rows, "clip"))

        def array(i: int) -> jax.Array:
            shape = self._shapes[i][0], len(ids_C), *self._shapes[i][2:]
            part = lambda index: parts[i, _columns(index)]
            return jax.make_array_from_callback(shape, self._places[i], part)

        return {i: array(i) for i in leaves}

    def _put_back(self, ids_C: np.ndarray, changed: Arrays) -> None:
        real_C = ids_C < self._model.vocab_size
        count = real_C.sum()
        # what is no row stands behind those that are one, unless C is V
        places, ids = slice(count) if real_C[:count].all() else real_C, ids_C[real_C]
        parts = {
            (i, _columns(shard.index)): np.asarray(shard.data)
            for i, rows in changed.items()
            for shard in rows.addressable_shards
        }

        def put(layer: np.ndarray, rows: np.ndarray) -> None:
            layer[ids] = rows[places]

        self._copy(parts, put)

    def _copy(self, parts: dict[tuple, np.ndarray], copy: Callable) -> None:
        """Runs ``copy(layer of a table, its rows)`` for every layer of {(leaf, columns): rows}."""
        jobs = [
            self._copying.submit(copy, layer, rows)
            for (i, columns), part in parts.items()
            for layer, rows in zip(self._tables[i][columns], part, strict=True)
        ]
        for job in jobs:
            job.result()

    # --- first values ---

    def _fresh(self, seed: int, abstract: list, names: list[tuple[str, ...]]) -> list:
        """Leaves of ``step.init_state``; the tables are drawn into the host's memory, some blocks
        at a time, and are None."""
        model, tables, leaves = self._model, self._shapes, [None] * len(names)
        weights = [i for i, name in enumerate(names) if name[0] == "params" and i not in tables]
        # moments and counts begin with zeros
        rest = [i for i, name in enumerate(names) if name[0] != "params" and i not in tables]
        draws = (
            (weights, lambda: jax.tree.leaves(split(fresh_params(model, seed)) | {"tables": {}})),
            (rest, lambda: [jnp.zeros(abstract[i].shape, abstract[i].dtype) for i in rest]),
        )
        for which, f in draws:
            for i, leaf in zip(which, drawing(f, [self._places[i] for i in which])(), strict=True):
                leaves[i] = leaf
        for i in self._params:
            layers, vocab, width = tables[i]
            blocks = -(-vocab // TABLE_BLOCK)
            count = min(blocks, max(1, DRAW_BYTES // (layers * TABLE_BLOCK * width * 4)))
            draw = drawing(
                lambda first: first_table(model, seed, names[i][-2], width, first, count),
                self._places[i],
            )
            for first in range(0, blocks, count):
                first = min(first, blocks - count)
                self._write(i, draw(np.int32(first)), first * TABLE_BLOCK)
        return leaves

    def _write(self, i: int, rows: jax.Array, first: int = 0) -> None:
        """Rows of a leaf into its table from row ``first`` on, as far as the table goes."""
        for shard in rows.addressable_shards:
            table = self._tables[i][_columns(shard.index)][:, first : first + rows.shape[1]]
            table[:] = np.asarray(shard.data)[:, : table.shape[1]]


def with_rows(abstract: Any, count: int) -> Any:
    """Shapes of a train state whose tables have ``count`` rows."""

    def rows(path: tuple, a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (a.shape[0], count, *a.shape[2:]) if is_table(path, a) else a.shape
        return jax.ShapeDtypeStruct(shape, a.dtype)

    return jax.tree_util.tree_map_with_path(rows, abstract)


def _columns(index: tuple) -> tuple:
    """Of a shard's index in a leaf."""
    return index[2:]


def _spread(whole: np.ndarray, place: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has, on its devices."""
    return jax.make_array_from_callback(whole.shape, place, whole.__getitem__)


@jax.jit
def _everywhere(ids_R: jax.Array) -> jax.Array:
    return ids_R if jax.sharding.get_abstract_mesh().empty else jax.reshard(ids_R, P(None))


@functools.partial(jax.jit, donate_argnums=0)
def _renewed(rows: list[jax.Array], changed: list[jax.Array], from_C: jax.Array) -> list[jax.Array]:
    """The rows, of which those with a place in ``changed`` are taken from there."""

    def one(row: jax.Array, changed: jax.Array, from_C: jax.Array) -> jax.Array:
        taken = changed.at[:, from_C].get(mode="clip")
        return jnp.where((from_C >= 0).reshape(1, -1, *(1,) * (row.ndim - 2)), taken, row)

    renew = local(one, lambda row, changed, places: row)
    return [renew(row, new, from_C) for row, new in zip(rows, changed, strict=True)]
