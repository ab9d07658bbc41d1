"""The rows of a running model in tiers: hot ones on the device, warm ones in RAM, cold ones read
from the store, each where its policy puts it.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.errors import UserError
from flexmemory.files import allocate
from flexmemory.progress import ProgressLine
from flexmemory.runtime.cache import SlotCache
from flexmemory.runtime.rows import PRELOAD, Budgets, Ticket, empty_table, put_rows, views
from flexmemory.tkv.fold import layouts_of
from flexmemory.tkv.store import Store

# ids of a step that are looked up one by one: up to so many, arrays cost more than they save
FEW = 16
STEP_SIZES = 2  # sizes of buffers that are kept for reuse: of a prompt's chunk and of a decode step


class Buffers:
    """Memory for the rows of a step of ``size`` places, made once and used by step after step."""

    def __init__(self, layouts, size: int):
        self.size, self.bundles = (
            size,
            {name: allocate(size, layout.bundle_bytes) for name, layout in layouts},
        )
        self.stored = views(layouts, self.bundles)
        self.places = np.arange(size, dtype=np.int32)
        self.places.flags.writeable = False  # shared by the tickets of all steps
        self.first = [
            (name, bundles[:1].reshape(-1).data, bundles.shape[1])
            for name, bundles in self.bundles.items()
        ]

    def part(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {name: bundles[start:stop] for name, bundles in self.bundles.items()}


class TieredTicket(Ticket):
    """In the buffers lie the rows from RAM, then those read for this step, then those that were
    read ahead.
    """

    hot_slot_U: np.ndarray | None = (
        None  # with a hot tier: the slot of each id there, -1 where absent
    )
    fresh_place_U: np.ndarray | None = (
        None  # with a hot tier: the place of each id's row in the buffers, -1 for a hot one
    )
    late_ids: np.ndarray | None = None  # of the rows that no tier has, in the order of their places
    late_start = late_read = 0  # their first place; how many of them are read for this step
    read: Future | None = None
    ahead: tuple[np.ndarray, dict, Future] | None = None  # of the others

    def __init__(self, source: "TieredRows", ids_U: np.ndarray, buffers: Buffers):
        self.source, self.ids_U, self.buffers, self.stored = source, ids_U, buffers, buffers.stored
        self.places_U = (
            buffers.places if len(ids_U) == buffers.size else buffers.places[: len(ids_U)]
        )

    def collect(self) -> dict:
        if self.late_ids is not None:
            self.source._arrive(self)
        if self.hot_slot_U is not None:
            self.stored = self.source._with_hot(self)
        return self.stored

    def release(self) -> None:
        self.source._end(self)


class TieredRows:
    """A row source of three tiers.

    A request looks its ids up in both caches, starts one read of all that neither has in a thread
    of its own, and copies the warm rows into the step's buffer at once: what is evicted later in
    the same step has been copied before. Hot rows that outstanding tickets point to are pinned.
    Raises UserError for a budget below one row, or a policy that needs counts which the store has
    not.
    """

    def __init__(self, store: Store, budgets: Budgets, progress: bool = False):
        self.store, self.layouts, self.bases, self.budgets = (
            store,
            layouts_of(store.groups),
            store.bases(),
            budgets,
        )
        self.bundle_bytes = store.manifest.bundle_bytes
        self._free: dict[int, list[Buffers]] = {}  # by size
        self._readers = ThreadPoolExecutor(2, "rows")  # the step's read and a read-ahead
        self.cold = {
            "rows": 0,
            "bytes": 0,
            "read_seconds": 0.0,
            "wait_seconds": 0.0,
            "ahead_rows": 0,
            "ahead_used": 0,
        }
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
        self._slab = {
            name: allocate(self.ram.slots, layout.bundle_bytes) for name, layout in self.layouts
        }
        self._flat = {name: slab.reshape(-1).data for name, slab in self._slab.items()}
        self._tables = (
            {name: empty_table(layout, self.hot.slots) for name, layout in self.layouts}
            if self.hot.slots
            else {}
        )
        self._outstanding: set[Ticket] = set()
        self._ahead: tuple[np.ndarray, dict, Future] | None = None  # ids, buffers, read
        self._preload(progress)
        self._broken = False

    def _cache(self, tier: str, budget: int, policy: str, counts_V: np.ndarray | None) -> SlotCache:
        v, bundle = self.store.manifest.vocab_size, self.bundle_bytes
        if budget < 0 or 0 < budget < bundle:
            raise UserError(
                f"--{tier}_budget: {budget} bytes is below one token's rows, {bundle} bytes; give"
                " more, or 0 for none"
            )
        slots = min(budget // bundle, v) if bundle else 0
        if not slots and policy == "static":
            policy = "lru"  # an empty tier keeps nothing by any policy, and needs no counts
        if policy == "static" and counts_V is None:
            raise UserError(
                f"--{tier}_policy: static needs how often each token occurs, and"
                f" {self.store.location.url} has no counts.npy; use lru, lfu or window"
            )
        return SlotCache(
            slots,
            v,
            policy,
            counts_V=counts_V if policy in ("static", "lfu") else None,
            window=self.budgets.window if policy == "window" else 0,
        )

    def request(self, ids_U: np.ndarray, size: int) -> Ticket:
        if not self.layouts:
            return Ticket(ids_U, np.arange(len(ids_U), dtype=np.int32), {})
        if self._broken:
            self._begin()
        free = self._free.get(size)
        ticket = TieredTicket(self, ids_U, free.pop() if free else Buffers(self.layouts, size))
        if self._tables:
            ticket.hot_slot_U = self.hot.lookup(ids_U)
            rest = np.flatnonzero(ticket.hot_slot_U < 0)
            self._place(ticket, rest, self.ram.lookup(ids_U[rest]))
        else:
            # the whole step is in RAM: nothing to sort, and nothing but the copy takes time
            if len(ids_U) <= FEW and (slots := self.ram.found(ids_U.tolist())) is not None:
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
        """Finds places in the buffers for the rows that are not hot, starts to read those that RAM
        has not, and copies the others.
        """
        ids_U, in_ram = ticket.ids_U, ram_slot >= 0
        warm, cold = rest[in_ram], rest[~in_ram]
        borrowed = cold[:0]
        if self._ahead is not None and len(cold):
            known = np.isin(ids_U[cold], self._ahead[0])
            cold, borrowed, ticket.ahead = cold[~known], cold[known], self._ahead
        order, start = np.concatenate([warm, cold, borrowed]), len(warm)
        places_U = np.full(len(ids_U), -1, np.int32)
        places_U[order] = np.arange(len(order), dtype=np.int32)
        if len(cold):
            ticket.read = self._read(ids_U[cold], ticket.buffers.part(start, start + len(cold)))
            self.cold["rows"] += len(cold)
            self.cold["bytes"] += len(cold) * self.bundle_bytes
        if start:
            self._copy_warm(ram_slot[in_ram], ticket.buffers)
        if start < len(order):
            ticket.late_ids, ticket.late_start, ticket.late_read = (
                ids_U[order[start:]],
                start,
                len(cold),
            )
        if ticket.hot_slot_U is None:
            ticket.places_U = places_U
        else:  # rows are put together on the device in the order of the ids
            ticket.fresh_place_U = places_U

    def _copy_warm(self, slots: np.ndarray | list[int], buffers: Buffers) -> None:
        if len(slots) == 1:  # NumPy would take half as long to begin as to copy
            for name, out, size in buffers.first:
                start = int(slots[0]) * size  # beyond 2 GiB an int32 would wrap
                out[:] = self._flat[name][start : start + size]
        else:
            for name, slab in self._slab.items():
                slab.take(
                    slots, 0, buffers.bundles[name][: len(slots)], "clip"
                )  # other modes copy twice

    def _arrive(self, ticket: TieredTicket) -> None:
        """Waits for the rows of a step that no tier has, and keeps of them in RAM what its policy
        says.
        """
        began, start = time.perf_counter(), ticket.late_start
        stop = start + len(ticket.late_ids)
        if ticket.read is not None:
            self.cold["read_seconds"] += ticket.read.result()
        if ticket.late_read < len(ticket.late_ids):
            self._take_ahead(
                ticket.ahead,
                ticket.late_ids[ticket.late_read :],
                ticket.buffers.part(start + ticket.late_read, stop),
            )
        ticket.waited = time.perf_counter() - began
        self.cold["wait_seconds"] += ticket.waited
        self._keep_warm(ticket.late_ids, ticket.buffers.part(start, stop))

    def _end(self, ticket: TieredTicket) -> None:
        """Gives a step's buffers back, once. Those of the few sizes that steps have are kept; those
        of a rarer size go when a new size comes.
        """
        try:
            self._outstanding.remove(ticket)
        except KeyError:
            return
        if self._tables:
            jax.block_until_ready(
                ticket.stored
            )  # a device that shares memory with the host reads the buffers themselves
        free = self._free.get(ticket.buffers.size)
        if free is None:
            free = self._free[ticket.buffers.size] = []
            while len(self._free) > STEP_SIZES:
                del self._free[next(iter(self._free))]
        free.append(ticket.buffers)

    def read_ahead(self, ids: np.ndarray) -> None:
        """Starts to read rows that the next step may want. They serve the requests until the next
        call. A local reader does one read at a time, so a step that misses all the same waits for
        this one first.
        """
        ids_U = np.unique(ids)
        ids_U = (
            ids_U[(self.hot.peek(ids_U) < 0) & (self.ram.peek(ids_U) < 0)]
            if self.layouts
            else ids_U[:0]
        )
        if not len(ids_U):
            self._ahead = None
            return
        buffers = Buffers(self.layouts, len(ids_U)).bundles
        self.cold["ahead_rows"] += len(ids_U)
        self.cold["bytes"] += len(ids_U) * self.bundle_bytes
        self._ahead = (ids_U, buffers, self._read(ids_U, buffers))

    def abandon(self) -> None:
        # a read may still write into the buffers of the steps under way, so these are not used
        # again; and an interrupt may have come between a cache's word that it has a row and the
        # copy of the row, so the tiers start anew with the next request
        self._outstanding.clear()
        self._ahead, self._broken = None, True

    def stats(self) -> dict:
        def tier(cache: SlotCache) -> dict:
            return {
                **cache.stats(),
                "bytes": cache.slots * self.bundle_bytes,
                "hit_bytes": cache.hits * self.bundle_bytes,
            }

        return {
            "source": "tiered",
            "hot": tier(self.hot),
            "ram": tier(self.ram),
            "cold": dict(self.cold),
        }

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

    def _take_ahead(
        self, ahead: tuple[np.ndarray, dict, Future], ids_U: np.ndarray, out: dict
    ) -> None:
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

    def _with_hot(self, ticket: TieredTicket) -> dict:
        """The step's rows on the device, hot and fresh; of the fresh ones those stay there that its
        policy chooses.
        """
        ids_U, hot_slot_U, size = ticket.ids_U, ticket.hot_slot_U, ticket.buffers.size
        hot_S, fresh_S = np.full(size, -1, np.int32), np.zeros(size, np.int32)
        hot_S[: len(ids_U)] = hot_slot_U
        fresh_S[: len(ids_U)] = np.maximum(ticket.fresh_place_U, 0)
        stored = merge_rows(self._tables, ticket.buffers.stored, hot_S, fresh_S)
        new = np.flatnonzero((hot_slot_U < 0) & (self.hot.peek(ids_U) < 0))
        slots = self.hot.admit(
            ids_U[new], np.concatenate([other.hot_slot_U for other in self._outstanding])
        )
        if (slots >= 0).any():
            slot_S = np.full(size, self.hot.slots, np.int32)  # beyond the table: dropped
            slot_S[new] = np.where(slots >= 0, slots, self.hot.slots)
            self._tables = put_rows(self._tables, stored, slot_S)
        return stored

    def _preload(self, progress: bool) -> None:
        for cache, label in ((self.hot, "hot rows"), (self.ram, "RAM rows")):
            ids = (
                cache.preload_ids() if cache.policy == "static" else np.empty(0, np.int64)
            )  # the others fill as they run: a quick start
            with ProgressLine(label, len(ids), "rows", enabled=progress) as line:
                for start in range(0, len(ids), PRELOAD):
                    part = ids[start : start + PRELOAD]
                    buffers = Buffers(self.layouts, len(part))
                    self.store.read_bundles(part, buffers.bundles)
                    slots = cache.admit(part)  # there is one for each
                    if cache is self.hot:
                        self._tables = put_rows(self._tables, buffers.stored, slots)
                    else:
                        for name, slab in self._slab.items():
                            slab[slots] = buffers.bundles[name]
                    line.update(start + len(part))


@jax.jit
def merge_rows(tables: dict, fresh: dict, hot_S: jax.Array, fresh_S: jax.Array) -> dict:
    """Row s from place hot_S[s] of the tables where that is not negative, else from place
    fresh_S[s] of ``fresh``.
    """

    def one(table, new):
        hot = (hot_S >= 0).reshape(-1, *[1] * (table.ndim - 1))
        return jnp.where(hot, table[jnp.maximum(hot_S, 0)], new[fresh_S])

    return {name: one(table, fresh[name]) for name, table in tables.items()}
