"""Row sources: where a running model takes its rows from. The engine sees one interface:

ticket = source.request(ids_U, size)   # starts to read what must be read, returns at once
stored = ticket.collect()              # waits for the rows
inverse_BT = ticket.inverse(ids_BT)    # where in them each token's row is
ticket.release()                       # the step has ended, its buffers may be used again"""

import dataclasses
from collections.abc import Iterable, Iterator

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

Groups = tuple[Group, ...]
PRELOAD = 512  # rows in one read of a table that is loaded ahead


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Bytes of rows that each tier may hold, and by which policy: static, lru, lfu or window
    (runtime/cache.py).

    hot: on the device. ram: in host memory; None for the whole table on the device, then nothing is
    read while running. window: steps that the policy ``window`` keeps."""

    ram: int | None = 64 << 20
    hot: int = 0
    ram_policy: str = "lfu"
    hot_policy: str = "static"
    window: int = 256


class Ticket:
    """The rows of one step. ids_U: sorted; index_U int32: where each id's row is in ``stored``;
    waited: seconds that :meth:`collect` stood still."""

    waited = 0.0

    def __init__(self, ids_U: np.ndarray, stored: dict):
        self.ids_U, self.stored = ids_U, stored
        self.index_U = np.arange(len(ids_U), dtype=np.int32)

    def collect(self) -> dict:
        """{group: at least U rows as ``encoding.decode`` takes them}"""
        return self.stored

    def inverse(self, ids_BT: np.ndarray) -> np.ndarray:
        """int32 [B, T], where each token's row is; after :meth:`collect`."""
        return self.index_U[np.searchsorted(self.ids_U, ids_BT)]

    def release(self) -> None:
        pass


class RowSource:
    """layouts, bases: how rows are stored, and the bases of low-rank ones."""

    layouts: Layouts
    bases: Bases

    def request(self, ids_U: np.ndarray, size: int) -> Ticket:
        """ids_U: sorted different ids of one step; ``size`` >= U: rows that are handed over."""
        raise NotImplementedError

    def read_ahead(self, ids: np.ndarray) -> None:
        """Starts to read rows that the next step may want."""

    def abandon(self) -> None:
        """The steps under way will not end: after an error."""

    def stats(self) -> dict:
        """Counters since the start."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the source's threads."""


class ResidentRows(RowSource):
    """The whole table on the device: {group: stored rows of all V addresses}."""

    def __init__(self, layouts: Layouts, bases: Bases, vocab: int, parts: Iterable[tuple]):
        """parts: (ids, their bundles) of all addresses."""
        self.layouts, self.bases = layouts, bases
        self.tables = empty_tables(layouts, vocab)
        for ids, bundles in parts:
            self.tables = put_rows(self.tables, views(layouts, bundles), ids.astype(np.int32))

    @classmethod
    def from_params(
        cls, cfg: ModelConfig, params: dict, groups: Groups, bases: Bases, fold_rows: int
    ) -> "ResidentRows":
        """Folds live parameters. Equal bits to a store with these groups and ``fold_rows`` that was
        exported on the same backend."""
        v, params = cfg.vocab_size, jax.device_put(params)
        call: dict = dict(cfg=cfg, groups=groups, fold_rows=fold_rows, shard_rows=fold_rows)
        parts = fold.fold_table(params, bases, **call) if groups else ()
        folded = ((np.arange(at, min(at + fold_rows, v)), bundles) for at, bundles in parts)
        return cls(layouts_of(groups), bases, v, folded)

    @classmethod
    def from_store(cls, store: Store, progress: bool = False) -> "ResidentRows":
        """Reads the whole table of a store."""
        layouts, v = layouts_of(store.groups), store.manifest.vocab_size
        ids = np.arange(v if layouts else 0)
        return cls(layouts, store.bases(), v, read_parts(store, ids, "load rows", progress))

    def request(self, ids_U: np.ndarray, size: int) -> Ticket:
        ids_S = np.zeros(size, np.int32)
        ids_S[: len(ids_U)] = ids_U
        return Ticket(ids_U, take_rows(self.tables, ids_S))

    def stats(self) -> dict:
        size = sum(table.nbytes for table in self.tables.values())
        return {"source": "resident", "resident_bytes": size}


class LiveRows(RowSource):
    """Rows folded from the weights when an id is first asked for, and kept; for checking a store
    against its run.

    The fold runs at ``fold_rows`` addresses a call, the shape of the export, so on the same backend
    the bits are the same."""

    def __init__(
        self, cfg: ModelConfig, params: dict, groups: Groups, bases: Bases, fold_rows: int
    ):
        self.cfg, self.params, self.fold_rows = cfg, jax.device_put(params), fold_rows
        self.layouts, self.bases = layouts_of(groups), bases
        self._known: dict[int, dict[str, np.ndarray]] = {}  # id: {group: its row as stored}

    def request(self, ids_U: np.ndarray, size: int) -> Ticket:
        new = [i for i in ids_U.tolist() if i not in self._known] if self.layouts else []
        for at in range(0, len(new), self.fold_rows):
            part = new[at : at + self.fold_rows]
            ids = np.asarray(part + [part[-1]] * (self.fold_rows - len(part)), np.int32)
            stored, _ = fold.fold_call(
                self.params, self.bases, ids, len(part), cfg=self.cfg, layouts=self.layouts
            )
            stored = {name: np.asarray(rows) for name, rows in stored.items()}
            for k, i in enumerate(part):
                self._known[i] = {name: rows[k].copy() for name, rows in stored.items()}
        result = views(self.layouts, new_bundles(self.layouts, size))
        for name, rows in result.items():
            for k, i in enumerate(ids_U.tolist()):
                rows[k] = self._known[i][name]
        return Ticket(ids_U, result)

    def stats(self) -> dict:
        return {"source": "live", "computed": len(self._known)}


def read_parts(
    store: Store, ids: np.ndarray, label: str, progress: bool
) -> Iterator[tuple[np.ndarray, dict]]:
    """(PRELOAD ids, {group: their bundles}), one after another."""
    with ProgressLine(label, len(ids), "rows", enabled=progress) as line:
        for start in range(0, len(ids), PRELOAD):
            part = ids[start : start + PRELOAD]
            bundles = new_bundles(layouts_of(store.groups), len(part))
            store.read_bundles(part, bundles)
            yield part, bundles
            line.update(start + len(part))


def new_bundles(layouts: Layouts, size: int) -> dict[str, np.ndarray]:
    return {name: allocate(size, layout.bundle_bytes) for name, layout in layouts}


def views(layouts: Layouts, bundles: dict) -> dict:
    return {name: host_view(layout, bundles[name]) for name, layout in layouts}


def empty_tables(layouts: Layouts, rows: int) -> dict[str, jax.Array]:
    def empty(layout: Layout) -> jax.Array:
        view = host_view(layout, np.empty((0, layout.bundle_bytes), np.uint8))
        return jnp.zeros((rows, *view.shape[1:]), view.dtype)

    return {name: empty(layout) for name, layout in layouts}


@jax.jit
def take_rows(tables: dict, ids_S: jax.Array) -> dict:
    """{group: tables[ids_S]}"""
    return {name: table[ids_S] for name, table in tables.items()}


@jax.jit(donate_argnums=0)
def put_rows(tables: dict, stored: dict, slots_S: jax.Array) -> dict:
    """tables with stored[s] at slots_S[s]; a slot beyond the table is dropped."""
    put = lambda name, table: table.at[slots_S].set(stored[name], mode="drop")
    return {name: put(name, table) for name, table in tables.items()}
