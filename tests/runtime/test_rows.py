"""Row sources: each gives exactly the table's rows, whatever its tiers do."""

import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tkv.making import SHARD, VOCAB, config, make_store, params

from flexmemory.errors import UserError
from flexmemory.runtime.cache import POLICIES
from flexmemory.runtime.rows import Budgets, LiveRows, ResidentRows
from flexmemory.runtime.tiers import TieredRows
from flexmemory.tkv.encoding import Layout
from flexmemory.tkv.format import model_groups
from flexmemory.tkv.store import open_store

V, L, W = 40, 2, 3
TABLE_VLW = np.arange(V * L * W, dtype=np.float32).reshape(V, L, W)
BUNDLE = L * W * 4


class FakeStore:
    """A store in memory that notes what is read, and can hold reads back."""

    def __init__(self):
        self.groups = (
            SimpleNamespace(name="w3", layout=Layout(L, W, "float32"), bundle_bytes=BUNDLE),
        )
        self.manifest = SimpleNamespace(bundle_bytes=BUNDLE, vocab_size=V)
        self.location = SimpleNamespace(url="fake")
        self.reads: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def bases(self):
        return {"w3": ()}

    def counts(self):
        return np.arange(V, 0, -1).astype(np.uint64)

    def read_bundles(self, ids_U, out):
        assert self.gate.wait(10)
        assert (np.diff(ids_U) > 0).all() and out["w3"].flags.carray
        self.reads.append(ids_U.tolist())
        out["w3"][:] = TABLE_VLW[ids_U].reshape(len(ids_U), -1).view(np.uint8)


def rows_of(ticket) -> np.ndarray:
    """Rows in the order of the ticket's ids; a copy, as later steps may use the buffer again."""
    return np.array(ticket.collect()["w3"])[ticket.index_U]


steps = st.lists(
    st.lists(st.integers(0, V - 1), unique=True, min_size=1, max_size=12).map(sorted), max_size=12
)


@given(
    st.integers(0, 8),
    st.integers(0, 8),
    st.sampled_from(POLICIES),
    st.sampled_from(POLICIES),
    steps,
    st.booleans(),
    st.data(),
)
def test_every_policy_gives_the_tables_rows(
    ram, hot, ram_policy, hot_policy, calls, overlapping, data
):
    """Also with two steps under way at once, collected in either order, and rows read ahead for
    steps that do or do not come.
    """
    source = TieredRows(
        store := FakeStore(),
        Budgets(
            ram=ram * BUNDLE,
            hot=hot * BUNDLE,
            ram_policy=ram_policy,
            hot_policy=hot_policy,
            window=3,
        ),
    )
    at = 0
    while at < len(calls):
        if data.draw(st.booleans()):
            source.read_ahead(
                np.asarray(data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=6)))
            )
        part = calls[at : at + (2 if overlapping else 1)]
        tickets = [(ids, source.request(np.asarray(ids), 12)) for ids in part]
        for ids, ticket in tickets if data.draw(st.booleans()) else tickets[::-1]:
            np.testing.assert_array_equal(rows_of(ticket), TABLE_VLW[ids])
        for _, ticket in tickets:
            ticket.release()
        at += len(part)
    stats = source.stats()
    looked = sum(len(ids) for ids in calls)
    assert (looked if hot else 0) == stats["hot"]["hits"] + stats["hot"]["misses"]
    assert looked - stats["hot"]["hits"] == stats["ram"]["hits"] + stats["ram"]["misses"]
    assert stats["ram"]["misses"] == stats["cold"]["rows"] + stats["cold"]["ahead_used"]
    assert stats["cold"]["bytes"] == (stats["cold"]["rows"] + stats["cold"]["ahead_rows"]) * BUNDLE
    assert (
        stats["hot"]["resident"] <= hot
        and stats["ram"]["resident"] <= ram
        and len(store.reads) >= (stats["cold"]["rows"] > 0)
    )
    source.close()


def test_only_what_is_missing_is_read():
    source = TieredRows(store := FakeStore(), Budgets(ram=3 * BUNDLE, ram_policy="lru"))
    ticket = source.request(np.asarray([1, 2, 3]), 3)
    ticket.collect()
    ticket.release()
    ids = np.asarray(
        [2, 3, 10, 11, 12, 13]
    )  # the misses would evict the hits 2 and 3 that this step hands out
    ticket = source.request(ids, 7)
    np.testing.assert_array_equal(rows_of(ticket), TABLE_VLW[ids])
    assert store.reads == [[1, 2, 3], [10, 11, 12, 13]]


def test_a_read_starts_at_the_request_and_is_waited_for_at_collect():
    source = TieredRows(store := FakeStore(), Budgets(ram=4 * BUNDLE))
    store.gate.clear()
    ticket = source.request(np.asarray([5, 6]), 2)  # returns although the store does not answer
    threading.Timer(0.05, store.gate.set).start()
    np.testing.assert_array_equal(rows_of(ticket), TABLE_VLW[[5, 6]])
    assert ticket.waited > 0.01 and source.stats()["cold"]["wait_seconds"] == ticket.waited
    again = source.request(np.asarray([5, 6]), 2)
    again.collect()
    assert again.waited == 0 and store.reads == [[5, 6]]


def test_rows_read_ahead_are_not_read_again():
    source = TieredRows(store := FakeStore(), Budgets(ram=0))
    source.read_ahead(np.asarray([7, 3, 9, 3]))
    ticket = source.request(np.asarray([3, 8, 9]), 4)
    np.testing.assert_array_equal(rows_of(ticket), TABLE_VLW[[3, 8, 9]])
    assert sorted(store.reads) == [[3, 7, 9], [8]] and source.stats()["cold"]["ahead_used"] == 2


def test_a_failed_read_reaches_the_step_that_needs_it():
    source = TieredRows(store := FakeStore(), Budgets(ram=4 * BUNDLE))

    def fail(ids_U, out):
        raise UserError("rows: damaged")

    store.read_bundles = fail
    ticket = source.request(np.asarray([1]), 1)
    with pytest.raises(UserError, match="damaged"):
        ticket.collect()
    source.read_ahead(np.asarray([2]))
    del store.read_bundles
    source.abandon()
    ticket = source.request(
        np.asarray([2]), 1
    )  # read again, not taken from the read-ahead that failed
    np.testing.assert_array_equal(rows_of(ticket), TABLE_VLW[[2]])
    ticket = source.request(np.asarray([1]), 1)  # nothing of the failed read was kept
    np.testing.assert_array_equal(rows_of(ticket), TABLE_VLW[[1]])


def test_buffers_are_used_again():
    source = TieredRows(FakeStore(), Budgets(ram=5 * BUNDLE))
    seen = set()
    for start in range(0, 30, 3):
        ticket = source.request(np.arange(start, start + 10), 16)
        seen.add(ticket.collect()["w3"].ctypes.data)
        ticket.release()
        ticket.release()  # twice does not hand it out twice
    assert len(seen) == 1
    first, second = (source.request(np.arange(4), 16) for _ in range(2))
    assert first.collect()["w3"].ctypes.data != second.collect()["w3"].ctypes.data


@pytest.mark.parametrize("policy", ["lru", "window"])
def test_rows_beyond_2_gib_of_ram(policy):
    """Of the RAM only what is used is touched: the slots are given out from the last one down."""
    store, width, count = FakeStore(), 1 << 18, 2100
    store.groups = (
        SimpleNamespace(name="w3", layout=Layout(1, width, "float32"), bundle_bytes=4 * width),
    )
    store.manifest = SimpleNamespace(bundle_bytes=4 * width, vocab_size=count)
    store.read_bundles = lambda ids_U, out: (
        out["w3"].view(np.float32).__setitem__(slice(None), ids_U[:, None])
    )
    source = TieredRows(store, Budgets(ram=4 * width * count, ram_policy=policy))
    source.ram._free_K[:] = source.ram._free_K[::-1].copy()
    for ids in ([5, 9], [5], [9], [5, 9], [5, 7], [7]):
        ticket = source.request(np.asarray(ids), 2)
        assert (rows_of(ticket)[:, 0] == np.asarray(ids)[:, None]).all()
        ticket.release()
    assert source.stats()["ram"]["hits"] == 6 and source.ram.peek(np.asarray([5, 7, 9])).min() > (
        1 << 31
    ) // (4 * width)


def test_budgets():
    source = TieredRows(FakeStore(), Budgets(ram=10**9, hot=2 * BUNDLE + 7))
    assert source.stats()["ram"]["slots"] == V and source.stats()["ram"]["bytes"] == V * BUNDLE
    assert (
        source.stats()["hot"] | {"slots": 2, "resident": 2, "bytes": 2 * BUNDLE}
        == source.stats()["hot"]
    )  # static: loaded at the start
    for budget in (-1, 1, BUNDLE - 1):
        with pytest.raises(
            UserError,
            match=f"ram: {budget} bytes is below one token's rows, {BUNDLE} bytes",
        ):
            TieredRows(FakeStore(), Budgets(ram=budget))
        with pytest.raises(UserError, match=f"hot: {budget} bytes"):
            TieredRows(FakeStore(), Budgets(hot=budget))
    store = FakeStore()
    store.counts = lambda: None
    with pytest.raises(
        UserError,
        match=(
            "ram_policy: static needs how often each token occurs, and fake has no counts.npy;"
            " use lru"
        ),
    ):
        TieredRows(store, Budgets(ram_policy="static"))
    with pytest.raises(UserError, match="policy: 'lruu'"):
        TieredRows(store, Budgets(ram_policy="lruu"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16"},
        {"dtype": "int4", "scale_group": 8},
        {"dtype": "int8", "rank": 0.5},
    ],
)
def test_every_source_gives_the_same_bytes(options, mixed, tmp_path):
    cfg, weights = mixed
    make_store(tmp_path / "s", cfg, weights, **options)
    store = open_store(tmp_path / "s")
    m, bases = store.manifest, store.bases()
    sources = [
        ResidentRows.from_store(store),
        ResidentRows.from_params(cfg.model, weights, store.groups, bases, m.fold_rows),
        LiveRows(cfg.model, weights, store.groups, bases, m.fold_rows),
        TieredRows(store, Budgets(ram=10 * m.bundle_bytes)),
        TieredRows(store, Budgets(ram=0, hot=20 * m.bundle_bytes, hot_policy="lru")),
    ]
    for ids in (np.arange(0, 30), np.asarray([7, 20, 259]), np.arange(VOCAB - 1)):
        want = {
            group.name: np.empty((len(ids), group.bundle_bytes), np.uint8) for group in store.groups
        }
        store.read_bundles(ids, want)
        for source in sources:
            ticket = source.request(ids, VOCAB)
            for name, stored in ticket.collect().items():
                got = (
                    np.ascontiguousarray(np.asarray(stored)[ticket.index_U])
                    .view(np.uint8)
                    .reshape(len(ids), -1)
                )
                np.testing.assert_array_equal(got, want[name])
            ticket.release()
    assert [source.stats()["source"] for source in sources] == [
        "resident",
        "resident",
        "live",
        "tiered",
        "tiered",
    ]


def test_sources_without_memory_layers(tmp_path):
    cfg = config("dense")
    make_store(tmp_path / "s", cfg, weights := params(cfg))
    store = open_store(tmp_path / "s")
    groups = model_groups(cfg.model, "float32", SHARD)
    for source in (
        ResidentRows.from_store(store),
        ResidentRows.from_params(cfg.model, weights, groups, {}, SHARD),
        TieredRows(store, Budgets()),
        LiveRows(cfg.model, weights, groups, {}, SHARD),
    ):
        assert source.request(np.asarray([1, 2]), 4).collect() == {}


@jax.jit
def later(tables: dict) -> dict:
    """The same tables, after some time."""
    busy = jax.lax.fori_loop(0, 40, lambda _, m: jnp.tanh(m @ m), jnp.ones((400, 400)))
    return {name: table + 0 * busy[0, 0] for name, table in tables.items()}


def test_a_hot_tier_has_its_rows_before_buffers_are_used_again():
    """A device that shares the host's memory reads the step's buffers themselves, perhaps later
    than the call returns.
    """
    layout, v = Layout(8, 1024, "float32"), 200
    table_VN = np.repeat(np.arange(v, dtype=np.float32)[:, None], 8 * 1024, 1).view(np.uint8)
    store = FakeStore()
    store.groups = (SimpleNamespace(name="w3", layout=layout, bundle_bytes=layout.bundle_bytes),)
    store.manifest, store.counts = (
        SimpleNamespace(bundle_bytes=layout.bundle_bytes, vocab_size=v),
        lambda: None,
    )
    store.read_bundles = lambda ids_U, out: out["w3"].__setitem__(slice(None), table_VN[ids_U])
    for _ in range(3):  # the first time compiles
        source = TieredRows(store, Budgets(ram=0, hot=v * layout.bundle_bytes, hot_policy="lru"))
        source._tables = later(source._tables)
        for ids in (np.arange(0, 64), np.arange(64, 128)):
            ticket = source.request(ids, 64)
            ticket.collect()
            ticket.release()
        stored = source.request(np.arange(64), 64).collect()["w3"]
        np.testing.assert_array_equal(
            np.asarray(stored).reshape(64, -1).view(np.uint8), table_VN[:64]
        )


def test_static_tiers_keep_different_rows():
    source = TieredRows(
        store := FakeStore(),
        Budgets(ram=5 * BUNDLE, hot=3 * BUNDLE, ram_policy="static", hot_policy="static"),
    )
    assert sorted(store.reads) == [[0, 1, 2], [3, 4, 5, 6, 7]]
    ticket = source.request(np.arange(9), 9)
    np.testing.assert_array_equal(rows_of(ticket), TABLE_VLW[:9])
    assert store.reads[2:] == [[8]]


@pytest.mark.parametrize("tier", ["ram", "hot"])
def test_an_interrupt_between_a_slot_and_its_row_leaves_no_wrong_row(tier, monkeypatch):
    source = TieredRows(
        FakeStore(),
        Budgets(
            ram=6 * BUNDLE if tier == "ram" else 0,
            hot=6 * BUNDLE if tier == "hot" else 0,
            ram_policy="lru",
            hot_policy="lru",
        ),
    )
    cache = getattr(source, tier)
    admit = cache.admit

    def interrupted(*args):
        admit(*args)
        raise KeyboardInterrupt

    ticket = source.request(np.asarray([4, 5]), 2)
    monkeypatch.setattr(cache, "admit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ticket.collect()
    source.abandon()  # as the engine does
    np.testing.assert_array_equal(
        rows_of(source.request(np.asarray([4, 5, 6]), 3)), TABLE_VLW[[4, 5, 6]]
    )


def test_buffers_of_rare_sizes_are_not_kept():
    source = TieredRows(FakeStore(), Budgets(ram=0))
    for size in range(3, 30):
        ticket = source.request(np.arange(3), size)
        ticket.collect()
        ticket.release()
    assert len(source._free) == 2
