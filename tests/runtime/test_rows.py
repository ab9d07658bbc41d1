"""Row sources: each gives exactly the table's rows, whatever its cache does."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmemory.errors import UserError
from flexmemory.runtime.rows import LiveRows, OffloadedRows, ResidentRows
from flexmemory.tkv.store import open_store
from tkv.making import SHARD, VOCAB, config, make_store, params

V, L, W = 40, 2, 3
TABLE_VLW = np.arange(V * L * W, dtype=np.float32).reshape(V, L, W)


class FakeStore:
    """A store in memory that notes what is read."""

    def __init__(self):
        self.groups = (SimpleNamespace(name="w3", layers=(0, 1), width=W),)
        self.manifest = SimpleNamespace(bundle_bytes=L * W * 4, vocab_size=V, numpy_dtype=np.dtype(np.float32))
        self.reads: list[list[int]] = []

    def read_rows(self, ids_R):
        self.reads.append(ids_R.tolist())
        return {"w3": TABLE_VLW[ids_R]}


@given(st.integers(0, 6), st.lists(st.lists(st.integers(0, V - 1), unique=True, max_size=12), max_size=12))
def test_cache_against_a_model(slots, calls):
    store = FakeStore()
    source = OffloadedRows(store, slots * store.manifest.bundle_bytes)
    kept: list[int] = []  # ids, the least recently used first
    hits = misses = 0
    results = []
    for ids in calls:
        store.reads.clear()
        got = source.rows(np.asarray(ids, np.int32), len(ids) + 1)["w3"]
        results.append((ids, got))
        missing = [i for i in ids if i not in kept]
        assert store.reads == ([missing] if missing else [])  # one read of what is missing, nothing else
        hits, misses = hits + len(ids) - len(missing), misses + len(missing)
        kept = [i for i in kept if i not in ids] + [i for i in ids if i in kept] + missing
        kept = kept[max(0, len(kept) - slots) :]
        assert list(source._slot_of) == kept
        stats = source.stats()
        assert (stats["hits"], stats["misses"], stats["bytes_read"]) == (hits, misses, misses * store.manifest.bundle_bytes)
    for ids, got in results:  # after all calls: nothing handed out was overwritten since
        np.testing.assert_array_equal(got, np.concatenate([TABLE_VLW[ids], np.zeros((1, L, W), np.float32)]))


def test_more_ids_than_slots_in_one_call():
    source = OffloadedRows(store := FakeStore(), 3 * L * W * 4)
    source.rows(np.asarray([1, 2, 3]), 3)
    ids = np.asarray([2, 10, 11, 12, 13, 14, 3])  # the misses would evict the hits 2 and 3 that this call hands out
    np.testing.assert_array_equal(source.rows(ids, 7)["w3"], TABLE_VLW[ids])
    assert store.reads == [[1, 2, 3], [10, 11, 12, 13, 14]]
    np.testing.assert_array_equal(source.rows(ids[::-1], 7)["w3"], TABLE_VLW[ids[::-1]])


def test_slots_are_allocated_once():
    source = OffloadedRows(FakeStore(), 5 * L * W * 4 + 7)
    slab = source._slab["w3"]
    for start in range(0, 30, 3):
        source.rows(np.arange(start, start + 10), 16)
    assert source._slab["w3"] is slab and slab.shape == (5, L, W) and source.stats()["cache_bytes"] == slab.nbytes


def test_budget():
    assert OffloadedRows(FakeStore(), 10**9).slots == V
    assert OffloadedRows(FakeStore(), 0).slots == 0
    for bytes_ in (-1, 1, 23):
        with pytest.raises(UserError, match=f"--ram_budget: {bytes_} bytes is below one token's rows, 24 bytes"):
            OffloadedRows(FakeStore(), bytes_)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_source_gives_the_same_bits(dtype, mixed, tmp_path):
    cfg, weights = mixed
    make_store(tmp_path / "s", cfg, weights, dtype=dtype)
    store = open_store(tmp_path / "s")
    sources = [
        ResidentRows.from_store(store),
        ResidentRows.from_params(cfg.model, weights, dtype, SHARD),
        LiveRows(cfg.model, weights, dtype, SHARD),
        OffloadedRows(store, 10 * store.manifest.bundle_bytes),
        OffloadedRows(store, 0),
    ]
    for ids in (np.arange(0, 30), np.asarray([259, 7, 20]), np.arange(VOCAB - 1)):
        want = store.read_rows(ids)
        for source in sources:
            for name, got_SLW in source.rows(ids, VOCAB).items():
                np.testing.assert_array_equal(np.asarray(got_SLW)[: len(ids)], want[name])
                assert not np.asarray(got_SLW)[len(ids) :].any()
    assert {source.stats()["source"] for source in sources} == {"resident", "live", "offloaded"}


def test_sources_without_memory_layers(tmp_path):
    cfg = config("dense")
    make_store(tmp_path / "s", cfg, weights := params(cfg))
    store = open_store(tmp_path / "s")
    for source in (ResidentRows.from_store(store), ResidentRows.from_params(cfg.model, weights), OffloadedRows(store, 1 << 20),
                   LiveRows(cfg.model, weights, "float32", 64)):
        assert source.rows(np.asarray([1, 2]), 4) == {}
        source.stats()
