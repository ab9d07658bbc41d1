"""Row sources: where a running model takes its rows from. One interface, so that the engine cannot
tell them apart:

ticket = source.request(ids_U, size)   sorted different ids of one step; starts reading what must be
read, returns at once
stored = ticket.collect()              waits; {group: rows as ``encoding.decode`` takes them}, of
``size`` >= U places
ticket.places_U                        int32: the place of each id's row
ticket.release()                       the step has ended, its buffers may be used again
source.layouts, source.bases           how rows are stored, and the bases of low-rank ones
source.abandon()                       the steps under way will not end: after an error
source.stats()                         counters since the start
source.close()                         ends its threads
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.files import allocate
from flexmemory.models.config import ModelConfig
from flexmemory.progress import ProgressLine
from flexmemory.tkv import fold
from flexmemory.tkv.encoding import Layout, host_view
from flexmemory.tkv.fold import Bases, Layouts, layouts_of
from flexmemory.tkv.format import Group
from flexmemory.tkv.store import Store

PRELOAD = 512  # rows in one read of a table that is loaded ahead


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Bytes of rows that each tier may hold, and by which policy: static, lru, lfu or window
    (runtime/cache.py).

    hot: on the device. ram: in host memory; None for the whole table on the device, then nothing is
    read while running. window: steps that the policy ``window`` keeps.
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
    """The rows of one step. ``waited``: seconds that :meth:`collect` stood still."""

    waited = 0.0

    def __init__(self, ids_U: np.ndarray, places_U: np.ndarray, stored: dict):
        self.ids_U, self.places_U, self.stored = ids_U, places_U, stored

    def collect(self) -> dict:
        return self.stored

    def release(self) -> None:
        pass


class ResidentRows:
    """The whole table on the device: {group: stored rows of all V addresses}."""

    def __init__(self, tables: dict[str, jax.Array], layouts: Layouts, bases: Bases):
        self.tables, self.layouts, self.bases = tables, layouts, bases

    @classmethod
    def from_params(
        cls, cfg: ModelConfig, params: dict, groups: tuple[Group, ...], bases: Bases, fold_rows: int
    ) -> "ResidentRows":
        """Folds live parameters. Equal bits to a store with these groups and ``fold_rows`` that was
        exported on the same backend.
        """
        layouts, params = layouts_of(groups), jax.device_put(params)
        tables = {name: empty_table(layout, cfg.vocab_size) for name, layout in layouts}
        for start, bundles in (
            fold.fold_table(
                params, bases, cfg=cfg, groups=groups, fold_rows=fold_rows, shard_rows=fold_rows
            )
            if groups
            else ()
        ):
            places = np.arange(start, min(start + fold_rows, cfg.vocab_size), dtype=np.int32)
            tables = put_rows(tables, views(layouts, bundles), places)
        return cls(tables, layouts, bases)

    @classmethod
    def from_store(cls, store: Store, progress: bool = False) -> "ResidentRows":
        """Reads the whole table of a store, one shard at a time."""
        layouts, v = layouts_of(store.groups), store.manifest.vocab_size
        tables = {name: empty_table(layout, v) for name, layout in layouts}
        with ProgressLine("load rows", v, "rows", enabled=progress) as line:
            for start in range(0, v if layouts else 0, PRELOAD):
                ids = np.arange(start, min(start + PRELOAD, v))
                buffers = {
                    name: allocate(len(ids), layout.bundle_bytes) for name, layout in layouts
                }
                store.read_bundles(ids, buffers)
                tables = put_rows(tables, views(layouts, buffers), ids.astype(np.int32))
                line.update(start + len(ids))
        return cls(tables, layouts, store.bases())

    def request(self, ids_U: np.ndarray, size: int) -> Ticket:
        ids_S = np.zeros(size, np.int32)
        ids_S[: len(ids_U)] = ids_U
        return Ticket(ids_U, np.arange(len(ids_U), dtype=np.int32), take_rows(self.tables, ids_S))

    def abandon(self) -> None:
        pass

    def stats(self) -> dict:
        return {
            "source": "resident",
            "resident_bytes": sum(table.nbytes for table in self.tables.values()),
        }

    def close(self) -> None:
        pass


class LiveRows:
    """Rows folded from the weights when an id is first asked for, and kept; for checking a store
    against its run.

    The fold runs at ``fold_rows`` addresses a call, the shape of the export, so on the same backend
    the bits are the same.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: dict,
        groups: tuple[Group, ...],
        bases: Bases,
        fold_rows: int,
    ):
        self.cfg, self.params, self.fold_rows = cfg, jax.device_put(params), fold_rows
        self.layouts, self.bases = layouts_of(groups), bases
        self._known: dict[int, dict[str, np.ndarray]] = {}  # id: {group: its bundle as stored}

    def request(self, ids_U: np.ndarray, size: int) -> Ticket:
        new = [int(i) for i in ids_U if int(i) not in self._known] if self.layouts else []
        for at in range(0, len(new), self.fold_rows):
            part = new[at : at + self.fold_rows]
            ids = np.asarray(part + [part[-1]] * (self.fold_rows - len(part)), np.int32)
            stored, _ = fold.fold_call(
                self.params, self.bases, ids, len(part), cfg=self.cfg, layouts=self.layouts
            )
            stored = {name: np.asarray(rows) for name, rows in stored.items()}
            self._known |= {
                i: {name: rows[place].copy() for name, rows in stored.items()}
                for place, i in enumerate(part)
            }
        out = {}
        for name, layout in self.layouts:
            view = host_view(layout, np.zeros((size, layout.bundle_bytes), np.uint8))
            for place, i in enumerate(ids_U):
                view[place] = self._known[int(i)][name]
            out[name] = view
        return Ticket(ids_U, np.arange(len(ids_U), dtype=np.int32), out)

    def abandon(self) -> None:
        pass

    def stats(self) -> dict:
        return {"source": "live", "computed": len(self._known)}

    def close(self) -> None:
        pass


def views(layouts, buffers: dict) -> dict:
    return {name: host_view(layout, buffers[name]) for name, layout in layouts}


def empty_table(layout: Layout, rows: int) -> jax.Array:
    view = host_view(layout, np.empty((0, layout.bundle_bytes), np.uint8))
    return jnp.zeros((rows, *view.shape[1:]), view.dtype)


@jax.jit
def take_rows(tables: dict, ids_S: jax.Array) -> dict:
    """{group: tables[ids_S]}"""
    return {name: table[ids_S] for name, table in tables.items()}


@jax.jit(donate_argnums=0)
def put_rows(tables: dict, stored: dict, slots_S: jax.Array) -> dict:
    """tables with stored[s] at slots_S[s]; a slot beyond the table is dropped."""
    return {
        name: table.at[slots_S].set(stored[name], mode="drop") for name, table in tables.items()
    }
