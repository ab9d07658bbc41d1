"""Row sources: where a running model takes its rows from. One interface, so that the engine cannot tell them apart:

    source.rows(ids_R, size) -> {group: rows_SLW}   S = size >= R; place i < R has the rows of ids_R[i], the rest is zero
    source.stats() -> counters since the start

ids_R are different int ids inside the vocabulary. Results are the caller's: no later call changes them.
"""

import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.config import ModelConfig
from flexmemory.errors import UserError
from flexmemory.tkv import fold, format
from flexmemory.tkv.store import Store


class RowSource(Protocol):
    def rows(self, ids_R: np.ndarray, size: int) -> dict: ...

    def stats(self) -> dict: ...


class ResidentRows:
    """The whole table on the device: {group: table_VLW}."""

    def __init__(self, tables: dict[str, jax.Array]):
        self.tables = tables

    @classmethod
    def from_params(cls, cfg: ModelConfig, params: dict, dtype: str = "float32", block_rows: int | None = None) -> "ResidentRows":
        """Folds live parameters. Equal bits to a store of the same dtype and block_rows exported on the same backend."""
        shard_rows = block_rows or format.default_shard_rows(cfg, dtype)
        blocks = fold.fold_table(params, cfg=cfg, dtype=dtype, fold_rows_count=min(shard_rows, format.FOLD_ROWS), block_rows=shard_rows)
        return cls(_join(rows for _, rows in blocks))

    @classmethod
    def from_store(cls, store: Store) -> "ResidentRows":
        """Reads the whole table of a store."""
        v, step = store.manifest.vocab_size, store.manifest.shard_rows
        return cls(_join(store.read_rows(np.arange(start, min(start + step, v))) for start in range(0, v, step)))

    def rows(self, ids_R: np.ndarray, size: int) -> dict[str, jax.Array]:
        places_S = np.full(size, -1, np.int32)
        places_S[: len(ids_R)] = ids_R
        return _take(self.tables, places_S)

    def stats(self) -> dict:
        return {"source": "resident", "resident_bytes": sum(table.nbytes for table in self.tables.values())}


class LiveRows:
    """Rows computed from the weights when an id is first asked for, and kept; for checking a store against its run.

    The fold runs at ``fold_rows`` addresses a call, the shape of the export, so on the same backend the bits are the same.
    """

    def __init__(self, cfg: ModelConfig, params: dict, dtype: str, fold_rows: int):
        self.cfg, self.params, self.dtype, self.fold_rows = cfg, jax.device_put(params), dtype, fold_rows
        self._shapes = {g.name: (len(g.layers), g.width) for g in format.model_groups(cfg, dtype, fold_rows)}
        self._known: dict[int, dict[str, np.ndarray]] = {}

    def rows(self, ids_R: np.ndarray, size: int) -> dict[str, np.ndarray]:
        out = {name: np.zeros((size, *shape), jnp.dtype(self.dtype)) for name, shape in self._shapes.items()}
        if not out:
            return out
        new = [int(i) for i in ids_R if int(i) not in self._known]
        for at in range(0, len(new), self.fold_rows):
            part = new[at : at + self.fold_rows]
            ids = np.asarray(part + [part[-1]] * (self.fold_rows - len(part)), np.int32)
            made = {name: np.asarray(rows) for name, rows in fold.fold_rows(self.params, ids, cfg=self.cfg, dtype=self.dtype).items()}
            for place, i in enumerate(part):
                self._known[i] = {name: rows_RLW[place].copy() for name, rows_RLW in made.items()}
        for place, i in enumerate(ids_R):
            for name, rows_SLW in out.items():
                rows_SLW[place] = self._known[int(i)][name]
        return out

    def stats(self) -> dict:
        return {"source": "live", "computed": len(self._known)}


def _join(blocks: Iterable[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
    parts: dict[str, list] = {}
    for rows in blocks:
        for name, rows_RLW in rows.items():
            parts.setdefault(name, []).append(rows_RLW)
    return {name: jnp.asarray(np.concatenate(made)) for name, made in parts.items()}


@jax.jit
def _take(tables: dict, places_S: jax.Array) -> dict:
    return {name: table.at[places_S].get(mode="fill", fill_value=0, wrap_negative_indices=False) for name, table in tables.items()}


class OffloadedRows:
    """Rows of a store behind a least-recently-used cache of whole token bundles in RAM, in slots allocated once.

    budget_bytes: of the slots; 0 for no cache. A call with more different ids than slots is served all the same: what
    does not fit is handed out without being kept. Raises UserError for a budget below one bundle.
    """

    def __init__(self, store: Store, budget_bytes: int):
        bundle = store.manifest.bundle_bytes
        if budget_bytes < 0 or 0 < budget_bytes < bundle:
            raise UserError(f"--ram_budget: {budget_bytes} bytes is below one token's rows, {bundle} bytes; give more, or 0 for no cache")
        self.store = store
        self.slots = min(budget_bytes // bundle, store.manifest.vocab_size) if bundle else 0
        dtype = store.manifest.numpy_dtype
        self._slab = {g.name: np.empty((self.slots, len(g.layers), g.width), dtype) for g in store.groups}
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # token id -> slot, the least recently used first
        self._shapes = {g.name: (len(g.layers), g.width) for g in store.groups}
        self._dtype = dtype
        self.hits = self.misses = self.bytes_read = 0
        self.wait_seconds = 0.0

    def rows(self, ids_R: np.ndarray, size: int) -> dict[str, np.ndarray]:
        out = {name: np.zeros((size, *shape), self._dtype) for name, shape in self._shapes.items()}
        if not out:
            return out
        ids = [int(i) for i in ids_R]
        hit = [place for place, i in enumerate(ids) if i in self._slot_of]
        miss = [place for place, i in enumerate(ids) if i not in self._slot_of]
        if hit:
            slots = [self._slot_of[ids[place]] for place in hit]
            for name, rows_SLW in out.items():  # copied out before anything is evicted
                rows_SLW[hit] = self._slab[name][slots]
            for place in hit:
                self._slot_of.move_to_end(ids[place])
        if miss:
            began = time.perf_counter()
            read = self.store.read_rows(np.asarray([ids[place] for place in miss]))
            self.wait_seconds += time.perf_counter() - began
            for name, rows_SLW in out.items():
                rows_SLW[miss] = read[name]
            self._keep([ids[place] for place in miss], read)
        self.hits += len(hit)
        self.misses += len(miss)
        self.bytes_read += len(miss) * self.store.manifest.bundle_bytes
        return out

    def _keep(self, ids: list[int], read: dict[str, np.ndarray]) -> None:
        """Puts the last of ``ids`` into slots, as many as there are, evicting the least recently used."""
        first = max(0, len(ids) - self.slots)
        slots = []
        for i in ids[first:]:
            slot = len(self._slot_of) if len(self._slot_of) < self.slots else self._slot_of.popitem(last=False)[1]
            self._slot_of[i] = slot
            slots.append(slot)
        for name, rows_RLW in read.items():
            self._slab[name][slots] = rows_RLW[first:]

    def stats(self) -> dict:
        looked = self.hits + self.misses
        return {"source": "offloaded", "hits": self.hits, "misses": self.misses, "hit_rate": self.hits / looked if looked else None,
                "bytes_read": self.bytes_read, "wait_seconds": self.wait_seconds, "slots": self.slots,
                "cache_bytes": sum(slab.nbytes for slab in self._slab.values())}
