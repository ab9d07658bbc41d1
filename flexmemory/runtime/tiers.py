"""The rows of a running model in tiers: hot ones on the device, warm ones in RAM, cold ones read
from the store, each where its policy puts it."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.errors import UserError
from flexmemory.runtime.cache import SlotCache, tier_caches
from flexmemory.runtime.rows import (
    Budgets,
    RowSource,
    Ticket,
    empty_tables,
    new_bundles,
    put_rows,
    read_parts,
    views,
)
from flexmemory.tkv.fold import Layouts, layouts_of
from flexmemory.tkv.store import Store

# ids of a step that are looked up one by one: up to so many, arrays cost more than they save
FEW = 16
STEP_SIZES = 2  # sizes of buffers that are kept for reuse: of a prompt's chunk and of a decode step


class Buffers:
    """Host memory for ``size`` rows of a step, used by step after step."""

    def __init__(self, layouts: Layouts, size: int):
        self.size, self.bundles = size, new_bundles(layouts, size)
        self.stored = views(layouts, self.bundles)
        self.index = np.arange(size, dtype=np.int32)
        self.index.flags.writeable = False  # shared by the tickets of all steps
        self.first = [
            (name, bundles[:1].reshape(-1).data, bundles.shape[1])
            for name, bundles in self.bundles.items()
        ]

    def part(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {name: bundles[start:stop] for name, bundles in self.bundles.items()}


class Read(NamedTuple):
    """A read under way of ``ids`` into ``bundles``; the future's result is its seconds."""

    ids: np.ndarray
    bundles: dict[str, np.ndarray]
    future: Future


class TieredTicket(Ticket):
    """In the buffers lie the rows from RAM, then those read for this step, then those that were
    read ahead. With a hot tier index_U is -1 for its rows until they are put together."""

    hot_slot_U: np.ndarray  # with a hot tier: slots there, -1 where absent
    read: Read | None = None  # of rows that no tier has
    ahead: Read | None = None  # has rows of ``ahead_ids``
    ahead_ids: np.ndarray
    late = 0  # the first row in the buffers that no tier has

    def __init__(self, source: "TieredRows", ids_U: np.ndarray, buffers: Buffers):
        index = buffers.index
        self.source, self.ids_U, self.buffers, self.stored = source, ids_U, buffers, buffers.stored
        self.index_U = index if len(ids_U) == buffers.size else index[: len(ids_U)]

    def collect(self) -> dict:
        if self.read is not None or self.ahead is not None:
            self.source._arrive(self)
        if self.source.hot.slots:
            self.stored = self.source._with_hot(self)
        return self.stored

    def release(self) -> None:
        self.source._end(self)


class TieredRows(RowSource):
    """A row source of three tiers.

    A request looks its ids up in both caches, starts one read of all that neither has in a thread
    of its own, and copies the warm rows into the step's buffer at once: what is evicted later in
    the same step has been copied before. Hot rows that outstanding tickets point to are pinned.
    Raises UserError for a budget below one row, or a policy that needs counts which the store has
    not."""

    def __init__(self, store: Store, budgets: Budgets, progress: bool = False):
        self.store, self.budgets = store, budgets
        self.layouts, self.bases = layouts_of(store.groups), store.bases()
        self.bundle_bytes = store.manifest.bundle_bytes
        self._free: dict[int, list[Buffers]] = {}  # by size
        self._readers = ThreadPoolExecutor(2, "rows")  # the step's read and a read-ahead
        self.cold = dict(
            rows=0, bytes=0, read_seconds=0.0, wait_seconds=0.0, ahead_rows=0, ahead_used=0
        )
        self._begin(progress)

    def _begin(self, progress: bool = False) -> None:
        """Empty tiers, but for what a static policy keeps."""
        budgets, counts_V = self.budgets, None
        policies = (budgets.hot_policy, budgets.ram_policy)
        if {"static", "lfu"} & {*policies}:
            counts_V = self.store.counts()
        slots = self._slots("hot", budgets.hot), self._slots("ram", budgets.ram or 0)
        for tier, count, policy in zip(("hot", "ram"), slots, policies, strict=True):
            if count and policy == "static" and counts_V is None:
                raise UserError(
                    f"{tier}_policy: static needs how often each token occurs, and"
                    f" {self.store.location.url} has no counts.npy; use lru, lfu or window"
                )
        vocab = self.store.manifest.vocab_size
        self.hot, self.ram = tier_caches(vocab, slots, policies, counts_V, budgets.window)
        self._slab = new_bundles(self.layouts, self.ram.slots)
        self._flat = {name: slab.reshape(-1).data for name, slab in self._slab.items()}
        self._tables = empty_tables(self.layouts, self.hot.slots) if self.hot.slots else {}
        self._outstanding: set[TieredTicket] = set()
        self._ahead: Read | None = None
        self._preload(progress)
        self._broken = False

    def _slots(self, tier: str, budget: int) -> int:
        if budget < 0 or 0 < budget < self.bundle_bytes:
            raise UserError(
                f"{tier}: {budget} bytes is below one token's rows, {self.bundle_bytes} bytes; give"
                " more, or 0 for none"
            )
        vocab = self.store.manifest.vocab_size
        return min(budget // self.bundle_bytes, vocab) if self.bundle_bytes else 0

    def _preload(self, progress: bool) -> None:
        """Reads what static tiers keep; the others fill as they run: a quick start."""
        for cache, label in ((self.hot, "hot rows"), (self.ram, "RAM rows")):
            ids = cache.preload_ids() if cache.policy == "static" else np.empty(0, np.int64)
            for part, bundles in read_parts(self.store, ids, label, progress):
                slots = cache.admit(part)  # there is one for each
                if cache is self.hot:
                    self._tables = put_rows(self._tables, views(self.layouts, bundles), slots)
                else:
                    for name, slab in self._slab.items():
                        slab[slots] = bundles[name]

    def request(self, ids_U: np.ndarray, size: int) -> Ticket:
        if not self.layouts:
            return Ticket(ids_U, {})
        if self._broken:
            self._begin()
        free = self._free.get(size)
        ticket = TieredTicket(self, ids_U, free.pop() if free else Buffers(self.layouts, size))
        if self._tables:
            ticket.hot_slot_U = self.hot.lookup(ids_U)
            rest = np.flatnonzero(ticket.hot_slot_U < 0)
            self._place(ticket, rest, self.ram.lookup(ids_U[rest]))
        # the whole step is in RAM: nothing to sort, and nothing but the copy takes time
        elif len(ids_U) <= FEW and (slots := self.ram.lookup_few(ids_U.tolist())) is not None:
            self._copy_warm(slots, ticket.buffers)
        else:
            ram_slot_U = self.ram.lookup(ids_U)
            if self.ram.absent:
                self._place(ticket, np.arange(len(ids_U)), ram_slot_U)
            else:
                self._copy_warm(ram_slot_U, ticket.buffers)
        self._outstanding.add(ticket)
        return ticket

    def _place(self, ticket: TieredTicket, rest: np.ndarray, ram_slot: np.ndarray) -> None:
        """Gives the rows that are not hot (``rest``, indices into ids_U) a place in the buffers,
        starts to read those that RAM has not, and copies the others."""
        ids_U, buffers, in_ram = ticket.ids_U, ticket.buffers, ram_slot >= 0
        warm, cold = rest[in_ram], rest[~in_ram]
        borrowed = cold[:0]
        if self._ahead is not None and len(cold):
            known = np.isin(ids_U[cold], self._ahead.ids)
            cold, borrowed = cold[~known], cold[known]
        ticket.late = late = len(warm)
        order = np.concatenate([warm, cold, borrowed])
        ticket.index_U = np.full(len(ids_U), -1, np.int32)
        ticket.index_U[order] = buffers.index[: len(order)]
        if len(cold):
            ticket.read = self._read(ids_U[cold], buffers.part(late, late + len(cold)))
            self.cold["rows"] += len(cold)
            self.cold["bytes"] += len(cold) * self.bundle_bytes
        if len(borrowed):
            ticket.ahead, ticket.ahead_ids = self._ahead, ids_U[borrowed]
        if late:
            self._copy_warm(ram_slot[in_ram], buffers)

    def _copy_warm(self, slots: np.ndarray | list[int], buffers: Buffers) -> None:
        if len(slots) == 1:  # NumPy would take half as long to begin as to copy
            for name, out, size in buffers.first:
                start = int(slots[0]) * size  # beyond 2 GiB an int32 would wrap
                out[:] = self._flat[name][start : start + size]
        else:
            for name, slab in self._slab.items():  # modes other than clip copy twice
                slab.take(slots, 0, buffers.bundles[name][: len(slots)], "clip")

    def _arrive(self, ticket: TieredTicket) -> None:
        """Waits for the rows of a step that no tier has. RAM keeps what its policy says."""
        began, at, kept = time.perf_counter(), ticket.late, []
        if ticket.read is not None:
            self.cold["read_seconds"] += ticket.read.future.result()
            kept.append((ticket.read.ids, ticket.read.bundles))
            at += len(ticket.read.ids)
        if ticket.ahead is not None:
            out = ticket.buffers.part(at, at + len(ticket.ahead_ids))
            self._take_ahead(ticket.ahead, ticket.ahead_ids, out)
            kept.append((ticket.ahead_ids, out))
        ticket.waited = time.perf_counter() - began
        self.cold["wait_seconds"] += ticket.waited
        ids = np.concatenate([ids for ids, _ in kept]) if len(kept) > 1 else kept[0][0]
        self._keep_warm(ids, ticket.buffers.part(ticket.late, ticket.late + len(ids)))

    def _take_ahead(self, ahead: Read, ids_U: np.ndarray, out: dict) -> None:
        """Waits for a read-ahead and takes some of its rows."""
        try:
            ahead.future.result()
        except UserError:  # perhaps of a row that no step needs
            self.store.read_bundles(ids_U, out)
            return
        where = np.searchsorted(ahead.ids, ids_U)
        for name, bundles in out.items():
            bundles[:] = ahead.bundles[name][where]
        self.cold["ahead_used"] += len(ids_U)

    def _keep_warm(self, ids: np.ndarray, bundles: dict) -> None:
        new = self.ram.peek(ids) < 0  # another ticket may have brought the same row
        if not self.ram.slots or not new.any():
            return
        slots = self.ram.admit(ids[new])
        kept = slots >= 0
        for name, slab in self._slab.items():
            slab[slots[kept]] = bundles[name][new][kept]

    def _with_hot(self, ticket: TieredTicket) -> dict:
        """The step's rows on the device, hot and fresh, in the order of the ids. The hot tier keeps
        of the fresh ones what its policy says."""
        ids_U, hot_slot_U, size = ticket.ids_U, ticket.hot_slot_U, ticket.buffers.size
        hot_S, fresh_S = np.full(size, -1, np.int32), np.zeros(size, np.int32)
        hot_S[: len(ids_U)] = hot_slot_U
        fresh_S[: len(ids_U)] = np.maximum(ticket.index_U, 0)
        ticket.index_U = ticket.buffers.index[: len(ids_U)]
        stored = merge_rows(self._tables, ticket.buffers.stored, hot_S, fresh_S)
        new = np.flatnonzero((hot_slot_U < 0) & (self.hot.peek(ids_U) < 0))
        pinned = np.concatenate([other.hot_slot_U for other in self._outstanding])
        slots = self.hot.admit(ids_U[new], pinned)
        if (slots >= 0).any():
            slot_S = np.full(size, self.hot.slots, np.int32)  # beyond the table: dropped
            slot_S[new] = np.where(slots >= 0, slots, self.hot.slots)
            self._tables = put_rows(self._tables, stored, slot_S)
        return stored

    def _end(self, ticket: TieredTicket) -> None:
        """Gives a step's buffers back, once. Those of the few sizes that steps have are kept; those
        of a rarer size go when a new size comes."""
        if ticket not in self._outstanding:
            return
        self._outstanding.remove(ticket)
        if self._tables:  # a device that shares memory with the host reads the buffers themselves
            jax.block_until_ready(ticket.stored)
        free = self._free.setdefault(ticket.buffers.size, [])
        while len(self._free) > STEP_SIZES:
            del self._free[next(iter(self._free))]
        free.append(ticket.buffers)

    def read_ahead(self, ids: np.ndarray) -> None:
        """Starts to read rows that the next step may want. They serve the requests until the next
        call. A local reader does one read at a time, so a step that misses all the same waits for
        this one first."""
        self._ahead = None
        if not self.layouts:
            return
        ids_U = np.unique(ids)
        ids_U = ids_U[(self.hot.peek(ids_U) < 0) & (self.ram.peek(ids_U) < 0)]
        if len(ids_U):
            self.cold["ahead_rows"] += len(ids_U)
            self.cold["bytes"] += len(ids_U) * self.bundle_bytes
            self._ahead = self._read(ids_U, new_bundles(self.layouts, len(ids_U)))

    def _read(self, ids_U: np.ndarray, out: dict) -> Read:
        def timed() -> float:
            began = time.perf_counter()
            self.store.read_bundles(ids_U, out)
            return time.perf_counter() - began

        return Read(ids_U, out, self._readers.submit(timed))

    def abandon(self) -> None:
        # a read may still write into the buffers of the steps under way, so these are not used
        # again; and an interrupt may have come between a cache's word that it has a row and the
        # copy of the row, so the tiers start anew with the next request
        self._outstanding.clear()
        self._ahead, self._broken = None, True

    def stats(self) -> dict:
        def tier(cache: SlotCache) -> dict:
            each = self.bundle_bytes
            return cache.stats() | {"bytes": cache.slots * each, "hit_bytes": cache.hits * each}

        tiers = {"hot": tier(self.hot), "ram": tier(self.ram), "cold": dict(self.cold)}
        return {"source": "tiered"} | tiers

    def slab(self, group: str) -> np.ndarray:
        """Memory of the warm rows of a group, uint8 [slots, B]."""
        return self._slab[group]

    def close(self) -> None:
        self._readers.shutdown()


@jax.jit
def merge_rows(tables: dict, fresh: dict, hot_S: jax.Array, fresh_S: jax.Array) -> dict:
    """Row s from hot_S[s] of the tables where that is not negative, else from fresh_S[s] of
    ``fresh``."""

    def one(table: jax.Array, new: jax.Array) -> jax.Array:
        hot = (hot_S >= 0).reshape(-1, *[1] * (table.ndim - 1))
        return jnp.where(hot, table[jnp.maximum(hot_S, 0)], new[fresh_S])

    return {name: one(table, fresh[name]) for name, table in tables.items()}
