"""Row sources: where a running model takes its rows from. One interface, so that the engine cannot tell them apart:

    ticket = source.request(ids_U, size)   sorted different ids of one step; starts reading what must be read, returns at once
    stored = ticket.collect()              waits; {group: rows as ``encoding.decode`` takes them}, of ``size`` >= U places
    ticket.places_U                        int32: the place of each id's row
    ticket.release()                       the step has ended, its buffers may be used again
    source.layouts, source.bases           how rows are stored, and the bases of low-rank ones
    source.abandon()                       the steps under way will not end: after an error
    source.stats()                         counters since the start
    source.close()                         ends its threads
"""

import dataclasses
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.config import ModelConfig
from flexmemory.errors import UserError
from flexmemory.progress import ProgressLine
from flexmemory.runtime.cache import SlotCache
from flexmemory.tkv import fold
from flexmemory.tkv.encoding import Layout, host_view
from flexmemory.tkv.fold import Bases, Layouts, layouts_of
from flexmemory.tkv.format import Group
from flexmemory.tkv.reader import allocate
from flexmemory.tkv.store import Store

NO_SLOTS = np.empty(0, np.int32)
STEP_SIZES = 2  # sizes of buffers that are kept for reuse: of a prompt's chunk and of a decode step
PRELOAD = 512  # rows in one read of a table that is loaded ahead


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Bytes of rows that each tier may hold, and by which policy: static, lru, lfu or window (runtime/cache.py).

    hot: on the device. ram: in host memory; None for the whole table on the device, then nothing is read while running. window: steps
    that the policy ``window`` keeps.
    """

    ram: int | None = 64 << 20
    hot: int = 0
    ram_policy: str = "lfu"
    hot_policy: str = "static"
    window: int = 256


class RowSource(Protocol):
    layouts: Layouts
    bases: Bases

    def request(self, ids_U: np.ndarray, size: int) -> "Ticket": ...

    def abandon(self) -> None: ...

    def stats(self) -> dict: ...

    def close(self) -> None: ...


class Ticket:
    """The rows of one step on their way. ``waited``: seconds that :meth:`collect` stood still."""

    def __init__(self, ids_U: np.ndarray, places_U: np.ndarray, collect, release=lambda stored: None, hot_slots: np.ndarray | None = None):
        self.ids_U, self.places_U, self.hot_slots = ids_U, places_U, hot_slots
        self._collect, self._release, self._stored = collect, release, {}
        self.waited = 0.0

    def collect(self) -> dict:
        self._stored, self.waited = self._collect()
        return self._stored

    def release(self) -> None:
        self._release(self._stored)


class ResidentRows:
    """The whole table on the device: {group: stored rows of all V addresses}."""

    def __init__(self, tables: dict[str, jax.Array], layouts: Layouts, bases: Bases):
        self.tables, self.layouts, self.bases = tables, layouts, bases

    @classmethod
    def from_params(cls, cfg: ModelConfig, params: dict, groups: tuple[Group, ...], bases: Bases, fold_rows: int) -> "ResidentRows":
        """Folds live parameters. Equal bits to a store with these groups and ``fold_rows`` that was exported on the same backend."""
        layouts, params = layouts_of(groups), jax.device_put(params)
        tables = {name: _empty_table(layout, cfg.vocab_size) for name, layout in layouts}
        for start, bundles in fold.fold_table(params, bases, cfg=cfg, groups=groups, fold_rows=fold_rows, block_rows=fold_rows) if groups else ():
            places = np.arange(start, min(start + fold_rows, cfg.vocab_size), dtype=np.int32)
            tables = put_rows(tables, _views(layouts, bundles), places)
        return cls(tables, layouts, bases)

    @classmethod
    def from_store(cls, store: Store, progress: bool = False) -> "ResidentRows":
        """Reads the whole table of a store, one shard at a time."""
        layouts, v = layouts_of(store.groups), store.manifest.vocab_size
        tables = {name: _empty_table(layout, v) for name, layout in layouts}
        with ProgressLine("load rows", v, "rows", enabled=progress) as line:
            for start in range(0, v if layouts else 0, PRELOAD):
                ids = np.arange(start, min(start + PRELOAD, v))
                buffers = {name: allocate(len(ids), layout.bundle_bytes) for name, layout in layouts}
                store.read_bundles(ids, buffers)
                tables = put_rows(tables, _views(layouts, buffers), ids.astype(np.int32))
                line.update(start + len(ids))
        return cls(tables, layouts, store.bases())

    def request(self, ids_U: np.ndarray, size: int) -> Ticket:
        ids_S = np.zeros(size, np.int32)
        ids_S[: len(ids_U)] = ids_U
        return Ticket(ids_U, np.arange(len(ids_U), dtype=np.int32), lambda: (take_rows(self.tables, ids_S), 0.0))

    def abandon(self) -> None:
        pass

    def stats(self) -> dict:
        return {"source": "resident", "resident_bytes": sum(table.nbytes for table in self.tables.values())}

    def close(self) -> None:
        pass


class LiveRows:
    """Rows folded from the weights when an id is first asked for, and kept; for checking a store against its run.

    The fold runs at ``fold_rows`` addresses a call, the shape of the export, so on the same backend the bits are the same.
    """

    def __init__(self, cfg: ModelConfig, params: dict, groups: tuple[Group, ...], bases: Bases, fold_rows: int):
        self.cfg, self.params, self.fold_rows = cfg, jax.device_put(params), fold_rows
        self.layouts, self.bases = layouts_of(groups), bases
        self._known: dict[int, dict[str, np.ndarray]] = {}  # id: {group: its bundle as stored}

    def request(self, ids_U: np.ndarray, size: int) -> Ticket:
        new = [int(i) for i in ids_U if int(i) not in self._known] if self.layouts else []
        for at in range(0, len(new), self.fold_rows):
            part = new[at : at + self.fold_rows]
            ids = np.asarray(part + [part[-1]] * (self.fold_rows - len(part)), np.int32)
            stored, _ = fold.fold_call(self.params, self.bases, ids, len(part), cfg=self.cfg, layouts=self.layouts)
            stored = {name: np.asarray(rows) for name, rows in stored.items()}
            self._known |= {i: {name: rows[place].copy() for name, rows in stored.items()} for place, i in enumerate(part)}
        out = {}
        for name, layout in self.layouts:
            view = host_view(layout, np.zeros((size, layout.bundle_bytes), np.uint8))
            for place, i in enumerate(ids_U):
                view[place] = self._known[int(i)][name]
            out[name] = view
        return Ticket(ids_U, np.arange(len(ids_U), dtype=np.int32), lambda: (out, 0.0))

    def abandon(self) -> None:
        pass

    def stats(self) -> dict:
        return {"source": "live", "computed": len(self._known)}

    def close(self) -> None:
        pass


class TieredRows:
    """Hot rows on the device, warm rows in RAM, cold rows read from the store, each row where its policy puts it.

    A request looks its ids up in both caches, starts one read of all that neither has in a thread of its own, and copies the warm rows
    into the step's buffer at once: what is evicted later in the same step has been copied before. Hot rows that outstanding tickets
    point to are pinned. Raises UserError for a budget below one row, or a policy that needs counts which the store has not.
    """

    def __init__(self, store: Store, budgets: Budgets, progress: bool = False):
        self.store, self.layouts, self.bases, self.budgets = store, layouts_of(store.groups), store.bases(), budgets
        self.bundle_bytes = store.manifest.bundle_bytes
        self._buffers: dict[int, list[dict]] = {}  # by size, free ones
        self._readers = ThreadPoolExecutor(2, "rows")  # the step's read and a read-ahead
        self.cold = {"rows": 0, "bytes": 0, "read_seconds": 0.0, "wait_seconds": 0.0, "ahead_rows": 0, "ahead_used": 0}
        self._begin(progress)

    def _begin(self, progress: bool = False) -> None:
        """Empty tiers, but for what a static policy keeps."""
        budgets, counts_V = self.budgets, None
        if {"static", "lfu"} & {budgets.hot_policy, budgets.ram_policy}:
            counts_V = self.store.counts()
        self.hot = self._cache("hot", budgets.hot, budgets.hot_policy, counts_V)
        if self.hot.policy == "static" == budgets.ram_policy:  # RAM keeps the next most frequent
            counts_V = counts_V.copy()
            counts_V[self.hot.preload_ids()] = 0
        self.ram = self._cache("ram", budgets.ram, budgets.ram_policy, counts_V)
        self._slab = {name: allocate(self.ram.slots, layout.bundle_bytes) for name, layout in self.layouts}
        self._tables = {name: _empty_table(layout, self.hot.slots) for name, layout in self.layouts} if self.hot.slots else {}
        self._outstanding: set[Ticket] = set()
        self._ahead: tuple[np.ndarray, dict, Future] | None = None  # ids, buffers, read
        self._preload(progress)
        self._broken = False

    def _cache(self, tier: str, budget: int, policy: str, counts_V: np.ndarray | None) -> SlotCache:
        v, bundle = self.store.manifest.vocab_size, self.bundle_bytes
        if budget < 0 or 0 < budget < bundle:
            raise UserError(f"--{tier}_budget: {budget} bytes is below one token's rows, {bundle} bytes; give more, or 0 for none")
        slots = min(budget // bundle, v) if bundle else 0
        if not slots and policy == "static":
            policy = "lru"  # an empty tier keeps nothing by any policy, and needs no counts
        if policy == "static" and counts_V is None:
            raise UserError(f"--{tier}_policy: static needs how often each token occurs, and {self.store.location.url} has no counts.npy; "
                            "use lru, lfu or window")
        return SlotCache(slots, v, policy, counts_V=counts_V if policy in ("static", "lfu") else None,
                         window=self.budgets.window if policy == "window" else 0)

    def request(self, ids_U: np.ndarray, size: int) -> Ticket:
        if not self.layouts:
            return Ticket(ids_U, np.arange(len(ids_U), dtype=np.int32), lambda: ({}, 0.0))
        if self._broken:
            self._begin()
        if self.hot.slots:
            hot_slot_U = self.hot.lookup(ids_U)
            rest = np.flatnonzero(hot_slot_U < 0)
            ram_slot = self.ram.lookup(ids_U[rest])
        else:
            hot_slot_U, rest, ram_slot = NO_SLOTS, np.arange(len(ids_U)), self.ram.lookup(ids_U)
        in_ram = ram_slot >= 0
        warm, cold = rest[in_ram], rest[~in_ram]
        ahead, borrowed = self._ahead, cold[:0]
        if ahead is not None and len(cold):
            known = np.isin(ids_U[cold], ahead[0])
            cold, borrowed = cold[~known], cold[known]
        # in the step's buffer: warm rows, rows read for this step, rows read ahead
        order = np.concatenate([warm, cold, borrowed])
        places_U = np.full(len(ids_U), -1, np.int32)
        places_U[order] = np.arange(len(order), dtype=np.int32)
        buffers = self._take_buffers(size)
        read = None
        if len(cold):
            read = self._read(ids_U[cold], {name: b[len(warm) : len(warm) + len(cold)] for name, b in buffers.items()})
            self.cold["rows"] += len(cold)
            self.cold["bytes"] += len(cold) * self.bundle_bytes
        if len(warm):
            for name, slab in self._slab.items():
                slab.take(ram_slot[in_ram], 0, buffers[name][: len(warm)], "clip")

        def collect():
            waited = 0.0
            if len(order) > len(warm):
                began = time.perf_counter()
                if read is not None:
                    self.cold["read_seconds"] += read.result()
                if len(borrowed):
                    self._collect_ahead(ahead, ids_U[borrowed], {name: b[len(warm) + len(cold) : len(order)] for name, b in buffers.items()})
                waited = time.perf_counter() - began
                self.cold["wait_seconds"] += waited
                self._keep_warm(ids_U[order[len(warm) :]], {name: b[len(warm) : len(order)] for name, b in buffers.items()})
            fresh = _views(self.layouts, {name: b[:size] for name, b in buffers.items()})
            if not self._tables:
                return fresh, waited
            return self._with_hot(ids_U, hot_slot_U, places_U, fresh, size), waited

        def release(stored):
            if ticket in self._outstanding:
                if self._tables:
                    jax.block_until_ready(stored)  # a device that shares memory with the host reads the buffers themselves
                self._outstanding.discard(ticket)
                self._give_back(size, buffers)

        # with a hot tier rows are put together on the device in the order of the ids
        ticket = Ticket(ids_U, np.arange(len(ids_U), dtype=np.int32) if self._tables else places_U, collect, release, hot_slot_U[hot_slot_U >= 0])
        self._outstanding.add(ticket)
        return ticket

    def read_ahead(self, ids: np.ndarray) -> None:
        """Starts to read rows that the next step may want. They serve the requests until the next call. A local reader does one read at a
        time, so a step that misses all the same waits for this one first."""
        ids_U = np.unique(ids)
        ids_U = ids_U[(self.hot.peek(ids_U) < 0) & (self.ram.peek(ids_U) < 0)] if self.layouts else ids_U[:0]
        if not len(ids_U):
            self._ahead = None
            return
        buffers = {name: allocate(len(ids_U), layout.bundle_bytes) for name, layout in self.layouts}
        self.cold["ahead_rows"] += len(ids_U)
        self.cold["bytes"] += len(ids_U) * self.bundle_bytes
        self._ahead = (ids_U, buffers, self._read(ids_U, buffers))

    def abandon(self) -> None:
        # a read may still write into the buffers of the steps under way, so these are not used again; and an interrupt may have come between
        # a cache's word that it has a row and the copy of the row, so the tiers start anew with the next request
        self._outstanding.clear()
        self._ahead, self._broken = None, True

    def stats(self) -> dict:
        def tier(cache: SlotCache) -> dict:
            return {**cache.stats(), "bytes": cache.slots * self.bundle_bytes, "hit_bytes": cache.hits * self.bundle_bytes}

        return {"source": "tiered", "hot": tier(self.hot), "ram": tier(self.ram), "cold": dict(self.cold)}

    def slab(self, group: str) -> np.ndarray:
        """Memory of the warm rows of a group, uint8 [slots, B]."""
        return self._slab[group]

    def close(self) -> None:
        self._readers.shutdown()

    def _read(self, ids_U: np.ndarray, out: dict) -> Future:
        def timed() -> float:
            began = time.perf_counter()
            self.store.read_bundles(ids_U, out)
            return time.perf_counter() - began

        return self._readers.submit(timed)

    def _collect_ahead(self, ahead: tuple[np.ndarray, dict, Future], ids_U: np.ndarray, out: dict) -> None:
        """Waits for a read-ahead and takes some of its rows."""
        try:
            ahead[2].result()
        except UserError:  # perhaps of a row that no step needs
            self.store.read_bundles(ids_U, out)
            return
        where = np.searchsorted(ahead[0], ids_U)
        for name, b in out.items():
            b[:] = ahead[1][name][where]
        self.cold["ahead_used"] += len(ids_U)

    def _keep_warm(self, ids: np.ndarray, bundles: dict) -> None:
        new = self.ram.peek(ids) < 0  # another ticket may have brought the same row
        if not self.ram.slots or not new.any():
            return
        slots = self.ram.admit(ids[new])
        kept = slots >= 0
        for name, slab in self._slab.items():
            slab[slots[kept]] = bundles[name][new][kept]

    def _with_hot(self, ids_U, hot_slot_U, places_U, fresh, size: int) -> dict:
        hot_S, fresh_S = np.full(size, -1, np.int32), np.zeros(size, np.int32)
        hot_S[: len(ids_U)] = hot_slot_U
        fresh_S[: len(ids_U)] = np.maximum(places_U, 0)
        stored = merge_rows(self._tables, fresh, hot_S, fresh_S)
        new = np.flatnonzero((hot_slot_U < 0) & (self.hot.peek(ids_U) < 0))
        slots = self.hot.admit(ids_U[new], np.concatenate([ticket.hot_slots for ticket in self._outstanding]))
        if (slots >= 0).any():
            slot_S = np.full(size, self.hot.slots, np.int32)  # beyond the table: dropped
            slot_S[new] = np.where(slots >= 0, slots, self.hot.slots)
            self._tables = put_rows(self._tables, stored, slot_S)
        return stored

    def _preload(self, progress: bool) -> None:
        for cache, label in ((self.hot, "hot rows"), (self.ram, "RAM rows")):
            ids = cache.preload_ids() if cache.policy == "static" else np.empty(0, np.int64)  # the others fill as they run: a quick start
            with ProgressLine(label, len(ids), "rows", enabled=progress) as line:
                for start in range(0, len(ids), PRELOAD):
                    part = ids[start : start + PRELOAD]
                    buffers = {name: allocate(len(part), layout.bundle_bytes) for name, layout in self.layouts}
                    self.store.read_bundles(part, buffers)
                    slots = cache.admit(part)  # there is one for each
                    if cache is self.hot:
                        self._tables = put_rows(self._tables, _views(self.layouts, buffers), slots)
                    else:
                        for name, slab in self._slab.items():
                            slab[slots] = buffers[name]
                    line.update(start + len(part))

    def _take_buffers(self, size: int) -> dict:
        free = self._buffers.get(size)
        return free.pop() if free else {name: allocate(size, layout.bundle_bytes) for name, layout in self.layouts}

    def _give_back(self, size: int, buffers: dict) -> None:
        """Keeps buffers of the few sizes that steps have; those of a rarer size go when a new size comes."""
        self._buffers.setdefault(size, []).append(buffers)
        while len(self._buffers) > STEP_SIZES:
            del self._buffers[next(iter(self._buffers))]


def _views(layouts, buffers: dict) -> dict:
    return {name: host_view(layout, buffers[name]) for name, layout in layouts}


def _empty_table(layout: Layout, rows: int) -> jax.Array:
    view = host_view(layout, np.empty((0, layout.bundle_bytes), np.uint8))
    return jnp.zeros((rows, *view.shape[1:]), view.dtype)


@jax.jit
def take_rows(tables: dict, ids_S: jax.Array) -> dict:
    """{group: tables[ids_S]}"""
    return {name: table[ids_S] for name, table in tables.items()}


@jax.jit
def merge_rows(tables: dict, fresh: dict, hot_S: jax.Array, fresh_S: jax.Array) -> dict:
    """Row s from place hot_S[s] of the tables where that is not negative, else from place fresh_S[s] of ``fresh``."""
    def one(table, new):
        hot = (hot_S >= 0).reshape(-1, *[1] * (table.ndim - 1))
        return jnp.where(hot, table[jnp.maximum(hot_S, 0)], new[fresh_S])

    return {name: one(table, fresh[name]) for name, table in tables.items()}


@jax.jit(donate_argnums=0)
def put_rows(tables: dict, stored: dict, slots_S: jax.Array) -> dict:
    """tables with stored[s] at slots_S[s]; a slot beyond the table is dropped."""
    return {name: table.at[slots_S].set(stored[name], mode="drop") for name, table in tables.items()}
