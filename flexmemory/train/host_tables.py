"""Row-sparse tables in the host's memory: NumPy arrays, and a thread that brings every batch's rows
to the devices and takes the updated ones back.

A step is given tables of C rows, those of its batch's ``table_ids``, and trains them as if they
were whole. While step k computes, the rows of batch k+1 are read and sent; those of them that step
k changes are then taken from its result, on the devices, so that every row is what it would be if
nothing overlapped. After that the result of step k goes back into the tables. Each process holds
the columns of its own devices.
"""

import functools
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import P
from jax.extend.random import define_prng_impl, threefry2x32_p

from flexmemory.config import Config
from flexmemory.evals.rows import RowsOf, live
from flexmemory.models.parameters import is_table, join, keys, split
from flexmemory.models.transformer import initialiser
from flexmemory.parallel import on_devices, placed
from flexmemory.sharding import local
from flexmemory.train.step import abstract_state, init_optimizer

BLOCK_BYTES = 256 << 20  # of a fresh table, made on the devices at a time
COPYING = 8  # threads that copy rows, at most
IN_FLIGHT = (
    3  # batches whose rows may be on the devices at a time: one in work, one coming, one going
)

Arrays = dict[int, jax.Array]  # leaf of the state -> rows


class HostTables:
    """The tables of a train state and their moments, or numbers per row: its leaves for which
    ``parallel.is_table`` is true.

    ``given``: a state as a checkpoint gives it; by default that of ``step.init_state``. The
    training loop begins with ``state`` and makes, for every batch of :meth:`ahead`, ``state =
    rows_in(state)``, the step, and ``rows_out(state)``: the tables in its state have the rows of
    one batch. What fails in the background is raised by a later call.
    """

    def __init__(self, cfg: Config, given: dict | None = None):
        abstract, self._model = abstract_state(cfg), cfg.model
        paths, self._tree = jax.tree_util.tree_flatten_with_path(abstract)
        self._shapes = {
            i: leaf.shape for i, (path, leaf) in enumerate(paths) if is_table(path, leaf)
        }
        self._params = [i for i in self._shapes if keys(paths[i][0])[0] == "params"]
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
            leaves = self._fresh(cfg, paths)
        else:
            leaves = jax.tree.leaves(given)
            for i in self._shapes:
                for shard in leaves[i].addressable_shards:
                    self._tables[i][_columns(shard.index)][:] = shard.data
        self.state = self._tree.unflatten(
            [paths[i][1] if i in self._shapes else leaf for i, leaf in enumerate(leaves)]
        )
        self._thread = ThreadPoolExecutor(
            1, "tables"
        )  # one, so that reads and writes keep their order
        self._copying = ThreadPoolExecutor(min(COPYING, os.cpu_count()), "rows")
        self._coming: deque[Future] = deque()  # rows of the batches to come
        self._going: deque[Future] = deque()  # rows of steps, on their way back
        self._fetched: np.ndarray | None = (
            None  # table_ids of the batch whose rows were read last; the thread's own
        )
        self._ids, self._made = (
            None,
            {},
        )  # table_ids of the step under way, rows that the step before it made

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
        self._ids, rows, places_C = self._coming.popleft().result()
        while self._going and self._going[0].done():
            self._going.popleft().result()
        if self._made:
            rows = dict(
                zip(
                    rows,
                    _renewed(list(rows.values()), list(self._made.values()), places_C),
                    strict=True,
                )
            )
        return self._with(state, rows)

    def rows_out(self, state: dict) -> None:
        """Sends the rows of a state that the step has made, or is about to make, back into the
        tables; waits for nothing.
        """
        leaves = jax.tree.leaves(state)
        self._made = {i: leaves[i] for i in self._shapes}
        for rows in self._made.values():
            rows.copy_to_host_async()
        self._going.append(self._thread.submit(self._put_back, self._ids, self._made))

    def whole(self, state: dict) -> dict:
        """A state like that of ``step.init_state``, with a copy of the tables in ``pinned_host``
        memory.
        """
        self._settle()

        def copy(i, shape):
            return jax.make_array_from_callback(
                shape, self._whole_places[i], lambda index: self._tables[i][_columns(index)].copy()
            )

        return self._with(state, {i: copy(i, shape) for i, shape in self._shapes.items()})

    def rows_of(self, state: dict) -> RowsOf:
        """Rows of any ids for an evaluation of ``state``, until the next :meth:`rows_out`."""
        self._settle()

        def rows(ids_R):
            ids_N = np.asarray(_everywhere(ids_R))  # of all sections, which have many in common
            seen_V = np.zeros(self._vocab, bool)
            seen_V[ids_N] = True
            ids_C = np.zeros(min(len(ids_N), self._vocab), np.int32)
            ids_C[: seen_V.sum()] = np.flatnonzero(seen_V)
            place_V = np.cumsum(seen_V, dtype=np.int32) - 1
            places_R = jax.make_array_from_callback(
                ids_N.shape, ids_R.sharding, place_V[ids_N].__getitem__
            )
            params = self._with(state, self._read(self._params, ids_C))["params"]
            return live(join(params), ids_R, places_R, cfg=self._model)

        return rows

    def close(self) -> None:
        """Ends the threads; what has not begun is dropped."""
        self._thread.shutdown(cancel_futures=True)
        self._copying.shutdown()

    def _with(self, state: dict, arrays: Arrays) -> dict:
        return self._tree.unflatten(
            [arrays.get(i, leaf) for i, leaf in enumerate(jax.tree.leaves(state))]
        )

    def _settle(self) -> None:
        """Waits until the rows of all steps are in the tables."""
        while self._going:
            self._going.popleft().result()

    # --- the thread's side ---

    def _fetch(self, table_ids: jax.Array) -> tuple[np.ndarray, Arrays, jax.Array]:
        """(table_ids, their rows, the place of each among the batch before, or -1)"""
        ids_C = np.asarray(table_ids)
        place_V = np.full(self._vocab + 1, -1, np.int32)
        if self._fetched is not None:
            place_V[self._fetched] = np.arange(len(self._fetched), dtype=np.int32)
            place_V[self._vocab] = -1  # no row
        self._fetched = ids_C
        return (
            ids_C,
            self._read(self._shapes, ids_C),
            jax.make_array_from_callback(
                ids_C.shape, table_ids.sharding, place_V[ids_C].__getitem__
            ),
        )

    def _read(self, leaves: Iterable[int], ids_C: np.ndarray) -> Arrays:
        """Rows of some leaves on the devices, [L, C, W] or [L, C]; an id equal to V gets the last
        row.
        """
        parts = {
            (i, columns): np.empty((len(table), len(ids_C), *table.shape[2:]), np.float32)
            for i in leaves
            for columns, table in self._tables[i].items()
        }
        self._copy(
            [
                (np.take, layer, ids_C, 0, rows, "clip")
                for (i, columns), out in parts.items()
                for layer, rows in zip(self._tables[i][columns], out, strict=True)
            ]
        )
        shapes = {i: (self._shapes[i][0], len(ids_C), *self._shapes[i][2:]) for i in leaves}
        return {
            i: jax.make_array_from_callback(
                shapes[i], self._places[i], lambda index, i=i: parts[i, _columns(index)]
            )
            for i in leaves
        }

    def _put_back(self, ids_C: np.ndarray, made: Arrays) -> None:
        real_C = ids_C < self._vocab
        in_front = bool(
            real_C[: real_C.sum()].all()
        )  # what is no row stands behind those that are one, unless C is V
        places, ids = slice(real_C.sum()) if in_front else real_C, ids_C[real_C]
        parts = {
            (i, _columns(shard.index)): np.asarray(shard.data)
            for i, rows in made.items()
            for shard in rows.addressable_shards
        }
        self._copy(
            [
                (_put, layer, ids, rows, places)
                for (i, columns), part in parts.items()
                for layer, rows in zip(self._tables[i][columns], part, strict=True)
            ]
        )

    def _copy(self, jobs: list[tuple]) -> None:
        for future in [self._copying.submit(*job) for job in jobs]:
            future.result()

    def _fresh(self, cfg: Config, paths) -> list:
        """Leaves of ``step.init_state``; the tables are filled in, a block at a time, and are None."""
        model, seed, names = cfg.model, cfg.train.seed, [keys(path) for path, _ in paths]
        rest = [i for i in range(len(paths)) if i not in self._shapes]
        weights = [i for i in rest if names[i][0] == "params"]

        def pick_weights(params):
            flat = traverse_util.flatten_dict(split(params))
            return [flat[names[i][1:]] for i in weights]

        def others(leaves):
            leaves = dict(zip(weights, leaves, strict=True)) | {
                i: jnp.zeros(self._shapes[i]) for i in self._params
            }
            params = traverse_util.unflatten_dict(
                {names[i][1:]: leaf for i, leaf in leaves.items()}
            )
            made = jax.tree.leaves(
                {
                    "params": params,
                    "optimizer": init_optimizer(cfg, params),
                    "step": jnp.zeros((), jnp.int32),
                }
            )
            return [made[i] for i in rest]  # a table's moments begin with zeros, as they are

        made = initialiser(model, seed, pick_weights, [self._places[i] for i in weights])()
        made = jax.jit(others, out_shardings=[self._places[i] for i in rest], donate_argnums=0)(
            made
        )
        for i in self._params:
            layers, vocab, width = self._shapes[i]
            rows = min(vocab, max(1, BLOCK_BYTES // (layers * width * 4)))
            block = initialiser(
                model,
                seed,
                lambda params, i=i: traverse_util.flatten_dict(split(params))[names[i][1:]],
                self._places[i],
                functools.partial(_draw_rows, rows),
            )
            for start in (min(start, vocab - rows) for start in range(0, vocab, rows)):
                first = start * width  # of the numbers of a layer, as two of 32 bits
                for shard in block(
                    np.uint32(first >> 32), np.uint32(first & 0xFFFFFFFF)
                ).addressable_shards:
                    self._tables[i][_columns(shard.index)][:, start : start + rows] = shard.data
        made = dict(zip(rest, made, strict=True))
        return [made.get(i) for i in range(len(paths))]

    @property
    def _vocab(self) -> int:
        return self._model.vocab_size


def _draw_rows(
    rows: int, high: jax.Array, low: jax.Array, key: jax.Array, shape: tuple[int, int], dtype
) -> jax.Array:
    """``jax.random.normal(key, shape, dtype)`` from its number high * 2^32 + low on, ``rows`` of
    its rows, bit for bit: of such a key JAX makes the numbers of an array from their places in it.
    """

    def bits(words, width, shape):
        places = words[3] + jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
        one, other = threefry2x32_p.bind(
            words[0], words[1], words[2] + (places < words[3]).astype(jnp.uint32), places
        )
        return one ^ other

    impl = define_prng_impl(
        key_shape=(4,),
        seed=None,
        split=None,
        fold_in=None,
        random_bits=bits,
        name="threefry2x32 from a place on",
    )
    words = jnp.append(jax.random.key_data(key), jnp.stack([high, low]))
    return jax.random.normal(jax.random.wrap_key_data(words, impl=impl), (rows, shape[1]), dtype)


def with_rows(abstract: dict, count: int) -> dict:
    """Shapes of a train state whose tables have ``count`` rows."""
    return jax.tree_util.tree_map_with_path(
        lambda path, a: (
            jax.ShapeDtypeStruct((a.shape[0], count, *a.shape[2:]), a.dtype)
            if is_table(path, a)
            else a
        ),
        abstract,
    )


def _columns(index: tuple) -> tuple:
    """Of a shard's index in a leaf."""
    return index[2:]


def _put(layer: np.ndarray, ids: np.ndarray, rows: np.ndarray, places) -> None:
    layer[ids] = rows[places]


@jax.jit
def _everywhere(ids_R: jax.Array) -> jax.Array:
    return ids_R if jax.sharding.get_abstract_mesh().empty else jax.reshard(ids_R, P(None))


@functools.partial(jax.jit, donate_argnums=0)
def _renewed(rows: list[jax.Array], made: list[jax.Array], places_C: jax.Array) -> list[jax.Array]:
    """The rows, of which those with a place among ``made`` are taken from there."""

    def one(row, made, places_C):
        taken = made.at[:, places_C].get(mode="clip")
        return jnp.where((places_C >= 0).reshape(1, -1, *(1,) * (row.ndim - 2)), taken, row)

    return [
        local(one, lambda row, made, places: row)(row, new, places_C)
        for row, new in zip(rows, made, strict=True)
    ]
