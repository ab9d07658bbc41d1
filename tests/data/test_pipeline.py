"""Batches: pure in (seed, k), exact unique ids, hosts that partition, evaluation that counts each
token once.
"""

import json
import threading
import time

import numpy as np
import pytest

from flexmemory.data import pipeline
from flexmemory.data.pipeline import eval_batches, make_batches
from flexmemory.data.prefetch import prefetch
from flexmemory.data.prepare import prepare
from flexmemory.data.shards import TokenShards
from flexmemory.errors import UserError

T = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("pipeline") / "data"
    prepare(
        "facts:people=8,docs=3+tasks:n=60,eval=3",
        "bpe:400",
        out,
        val_fraction=0.2,
        shard_tokens=3000,
        progress=False,
    )
    return out


@pytest.fixture(scope="module")
def shards(data):
    return TokenShards(data, "train")


@pytest.fixture(scope="module")
def val(data):
    return TokenShards(data, "val")


def make(shards, **changes):
    return make_batches(shards, **({"seq_len": T, "batch_size": 8, "seed": 5} | changes))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_shapes_and_targets(shards):
    batch = make(shards, accum=2, segments=True)[3]
    assert {
        name: (value.shape, value.dtype)
        for name, value in batch.items()
        if name in ("ids", "targets", "inverse", "segments")
    } == {
        name: ((2, 4, T), np.dtype(np.int32)) for name in ("ids", "targets", "inverse", "segments")
    }
    assert (
        len(batch["unique_ids"]) in make(shards, accum=2).row_sizes
        and batch["unique_ids"].dtype == np.int32
    )
    np.testing.assert_array_equal(batch["ids"][..., 1:], batch["targets"][..., :-1])


def test_batches_hold_the_windows_they_name(shards):
    batches = make(shards, accum=2, segments=True)
    for k in (0, 1, 1000):
        numbers, batch = batches.window_numbers(k).reshape(-1), batches[k]
        for row, i in enumerate(numbers):
            window = shards.window(int(i), T)
            np.testing.assert_array_equal(batch["ids"].reshape(-1, T)[row], window[:-1])
            np.testing.assert_array_equal(batch["targets"].reshape(-1, T)[row], window[1:])
            np.testing.assert_array_equal(
                batch["segments"].reshape(-1, T)[row], shards.segments(int(i), T)[:-1]
            )


def test_batch_k_needs_nothing_but_k(data, shards):
    one_by_one = make(shards)
    history = [one_by_one[k] for k in range(2 * one_by_one.steps_per_epoch + 3)]
    for k in (len(history) - 1, 0, one_by_one.steps_per_epoch):
        assert_same(make(TokenShards(data, "train"))[k], history[k])
    with pytest.raises(IndexError):
        one_by_one[-1]


def test_an_epoch_sees_each_window_once_and_the_next_in_another_order(shards):
    n = shards.num_windows(T)
    batches = make(shards, batch_size=1)
    orders = [
        [int(batches.window_numbers(k).item()) for k in range(e * n, (e + 1) * n)] for e in (0, 1)
    ]
    assert [sorted(order) for order in orders] == [list(range(n))] * 2
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
    plain = make(shards, shuffle=False)
    assert np.concatenate([plain.window_numbers(k).ravel() for k in range(3)]).tolist() == list(
        range(24)
    )


def test_the_seed_changes_the_order(shards):
    assert (
        make(shards).window_numbers(0).tolist() != make(shards, seed=6).window_numbers(0).tolist()
    )


def check_unique(batch, vocab_size):
    unique, inverse = batch["unique_ids"], batch["inverse"]
    np.testing.assert_array_equal(unique[inverse], batch["ids"])
    assert unique.min() >= 0 and unique.max() < vocab_size
    used = inverse.max() + 1
    assert (np.diff(unique[:used]) > 0).all() and (
        len(unique) == vocab_size or (unique[used:] == 0).all()
    )


@pytest.mark.parametrize("row_sizes", [None, (8,), (24, 40, 64), (4000,)])
def test_unique_ids_are_exact_whatever_the_sizes(shards, row_sizes):
    batches = make(shards, batch_size=4, accum=2, row_sizes=row_sizes)
    enough = min(shards.vocab_size, 4 * T)
    assert (
        list(batches.row_sizes) == sorted(set(batches.row_sizes))
        and batches.row_sizes[-1] == enough
    )
    for k in range(60):
        batch = batches[k]
        check_unique(batch, shards.vocab_size)
        size, need = len(batch["unique_ids"]), batches.unique_counts(k)[0]
        assert need == len(np.unique(batch["ids"]))
        assert size == min(r for r in batches.row_sizes if r >= need)  # the smallest that holds it


def test_a_batch_above_the_typical_size_takes_the_next(shards):
    batches = make(shards, batch_size=2, row_sizes=(26,))
    sizes = {len(batches[k]["unique_ids"]) for k in range(100)}
    assert sizes == {26, 32}


def test_with_room_for_all_the_rows_are_the_vocabulary(shards):
    batch = make(shards, batch_size=64, accum=2, row_sizes=(10**6,))[0]
    np.testing.assert_array_equal(batch["unique_ids"], np.arange(shards.vocab_size))
    np.testing.assert_array_equal(batch["inverse"], batch["ids"])


def test_measured_sizes_are_pure_round_and_rarely_overflow(shards):
    batches = make(shards)
    assert batches.row_sizes == make(shards).row_sizes and len(batches.row_sizes) == 2
    typical, enough = batches.row_sizes
    assert typical % 8 == 0 and enough == min(shards.vocab_size, 8 * T)
    counts = [batches.unique_counts(k)[0] for k in range(200)]
    assert (
        0.7 * typical < sorted(counts)[100] < typical
        and sum(count > typical for count in counts) <= 4
    )
    assert [pipeline._round_up(n) for n in (1, 8, 100, 130, 513, 1000)] == [
        8,
        8,
        104,
        136,
        576,
        1024,
    ]


class TwoKinds:
    """Batches of which a quarter holds twice as many ids as the rest."""

    steps_per_epoch = 64

    def unique_counts(self, k):
        return 1000 + k % 10 if k % 4 else 2000, 3000


def test_a_size_for_the_median_where_batches_differ_much():
    assert pipeline.measured_sizes(TwoKinds(), samples=64) == ((1024, 2048, 2240), (3328,))


def test_padding_is_never_referred_to_even_where_id_0_is_used():
    ids = np.array([[[0, 5, 5, 9]], [[7, 7, 7, 7]]], np.int32)
    found = pipeline.unique_rows(ids, 100, (8, 50))
    assert found["unique_ids"].tolist() == [0, 5, 7, 9, 0, 0, 0, 0]
    assert found["inverse"].tolist() == [[[0, 1, 1, 3]], [[2, 2, 2, 2]]]
    np.testing.assert_equal(
        found, pipeline.unique_rows(ids, 100, (8, 50), table_sizes=(4, 6))
    )  # one section has as many places for both
    assert found["table_ids"].tolist() == [0, 5, 7, 9, 100, 100, 100, 100] and found[
        "places"
    ].tolist() == [0, 1, 2, 3, 8, 8, 8, 8]


@pytest.mark.parametrize(
    "row_sizes, table_sizes, count",
    [((5,), (3, 7, 11), 7), ((5,), (), 15), ((5,), (40,), 15), ((20,), (), 20), ((20,), (6,), 6)],
)
def test_every_sections_ids_have_their_place_among_those_of_all(row_sizes, table_sizes, count):
    ids = np.array(
        [[[0, 5], [5, 9], [19, 0]], [[7, 7], [0, 5], [1, 19]]], np.int32
    )  # three sections of up to four ids, six in all
    hosts = [
        pipeline.unique_rows(ids, 20, row_sizes, 3, own, table_sizes) for own in ((0, 2), (1,))
    ]
    for host, own in zip(hosts, ((0, 2), (1,)), strict=True):
        np.testing.assert_array_equal(host["table_ids"], hosts[0]["table_ids"])
        assert len(host["table_ids"]) == count and set(host["table_ids"]) - {20} == {
            0,
            1,
            5,
            7,
            9,
            19,
        }
        for s, unique_R, places_R in zip(
            own,
            host["unique_ids"].reshape(len(own), -1),
            host["places"].reshape(len(own), -1),
            strict=True,
        ):
            there = places_R < count
            np.testing.assert_array_equal(host["table_ids"][places_R[there]], unique_R[there])
            assert (
                sorted(unique_R[there]) == sorted(set(ids[:, s].ravel()))
                and (places_R[~there] == count).all()
            )


def test_hosts_partition_the_global_batch_whatever_the_cut(shards):
    whole = make(shards, batch_size=12, accum=2, segments=True)
    hosts = [
        make(shards, batch_size=12, accum=2, segments=True, sections=6, own=own)
        for own in ((0, 1, 4), (2, 5), (3,))
    ]
    assert len({host.row_sizes for host in hosts}) == 1 and hosts[0].row_sizes[-1] == 2 * T
    for k in (0, 7, 500):
        parts = [host[k] for host in hosts]
        order = np.argsort((0, 1, 4, 2, 5, 3))
        for name in ("ids", "targets", "segments"):
            np.testing.assert_array_equal(
                np.concatenate([part[name] for part in parts], axis=1)[:, order], whole[k][name]
            )
        sections = np.concatenate([part["unique_ids"] for part in parts]).reshape(6, -1)[order]
        assert sections.shape[1] == next(
            size for size in hosts[0].row_sizes if size >= hosts[0].unique_counts(k)[0]
        )
        inverse = np.concatenate([part["inverse"] for part in parts], axis=1)[:, order]
        for s, unique_R in enumerate(sections):
            mine = {
                "ids": whole[k]["ids"][:, s : s + 1],
                "inverse": inverse[:, s : s + 1],
                "unique_ids": unique_R,
            }
            check_unique(mine, shards.vocab_size)


def test_sections_that_may_hold_the_vocabulary_are_it(shards):
    batch = make(shards, batch_size=64, sections=2, row_sizes=(10**6,))[0]
    np.testing.assert_array_equal(batch["unique_ids"], np.tile(np.arange(shards.vocab_size), 2))
    np.testing.assert_array_equal(batch["inverse"], batch["ids"])


@pytest.mark.parametrize(
    "changes, match",
    [
        (
            {"batch_size": 10, "accum": 4},
            r"batch_size=10 is not divisible by accum\*sections=4\*1; use a multiple of 4",
        ),
        ({"batch_size": 8, "sections": 3}, "batch_size=8 is not divisible"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"accum": 0}, "accum=0"),
        ({"sections": 2, "own": (2,)}, r"own=\(2,\) are not sections inside 0..1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1 << 32}, "seed="),
        ({"seq_len": 0}, "seq_len=0"),
        ({"seq_len": 100_000}, "seq_len 100000 is longer"),
        ({"row_sizes": (0, 9)}, "row_sizes"),
    ],
)
def test_bad_sizes_are_named(shards, changes, match):
    with pytest.raises(UserError, match=match):
        make(shards, **changes)


@pytest.mark.parametrize("seq_len, batch_size", [(16, 4), (7, 5), (50, 3), (100_000, 2)])
def test_evaluation_counts_every_target_once(val, seq_len, batch_size):
    seq_len = min(seq_len, 2 * max(val.shard_tokens))  # also windows that no shard fills
    expected = [val.tokens(s, 0, n) for s, n in enumerate(val.shard_tokens)]
    pairs = []
    for batch in eval_batches(val, seq_len=seq_len, batch_size=batch_size, segments=True):
        assert {
            value.shape
            for name, value in batch.items()
            if name in ("ids", "targets", "inverse", "segments")
        } == {(batch_size, seq_len)}
        assert batch["weight"].dtype == np.float32 and set(np.unique(batch["weight"])) <= {0.0, 1.0}
        check_unique(batch, val.vocab_size)
        counted = batch["weight"] == 1
        pairs += zip(
            batch["ids"][counted].tolist(), batch["targets"][counted].tolist(), strict=True
        )
    assert pairs == [
        pair
        for tokens in expected
        for pair in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True)
    ]


def test_a_bounded_evaluation_is_spread_over_the_split_and_is_the_same_again(val):
    batches = list(eval_batches(val, seq_len=T, batch_size=4, max_tokens=100))
    rows = 100 // T
    starts = [(s, start) for s, n in enumerate(val.shard_tokens) for start in range(0, n - 1, T)]
    taken = [starts[i * len(starts) // rows] for i in range(rows)]
    firsts = np.concatenate([batch["ids"][:, 0][batch["weight"][:, 0] == 1] for batch in batches])
    assert firsts.tolist() == [
        int(val.tokens(shard, start, start + 1)[0]) for shard, start in taken
    ]
    assert taken[-1][0] == len(val.shard_tokens) - 1
    assert 0 < sum(batch["weight"].sum() for batch in batches) <= 100
    for a, b in zip(
        batches, eval_batches(val, seq_len=T, batch_size=4, max_tokens=100), strict=True
    ):
        assert_same(a, b)
    for bad in ({"max_tokens": 0}, {"batch_size": 0}, {"seq_len": 0}):
        with pytest.raises(UserError):
            eval_batches(val, **({"seq_len": T, "batch_size": 4} | bad))


def test_evaluation_segments_are_the_documents(val):
    eos = val.eos_id
    for batch in eval_batches(val, seq_len=T, batch_size=4, segments=True):
        for ids, segments, weight in zip(
            batch["ids"], batch["segments"], batch["weight"], strict=True
        ):
            n = int(weight.sum())
            documents = np.cumsum(np.concatenate([[0], ids[: max(n - 1, 0)] == eos]))[:n]
            np.testing.assert_array_equal(segments[:n], documents)
            assert n == T or n == 0 or (segments[n:] > segments[n - 1]).all()


class Numbers:
    """Stands in for batches: number k, an error at one place, a record of what was asked for."""

    def __init__(self, bad=None):
        self.bad, self.asked = bad, []

    def __getitem__(self, k):
        self.asked.append(k)
        if k == self.bad:
            raise OSError(f"disk gone at {k}")
        return k


def test_prefetch_gives_the_batches_in_order(shards):
    batches = make(shards)
    with prefetch(batches, start=3, stop=9) as stream:
        for k, batch in enumerate(stream, start=3):
            assert_same(batch, batches[k])
    assert k == 8


def test_prefetch_works_ahead_by_its_depth_only():
    numbers = Numbers()
    with prefetch(numbers, start=10, depth=2) as stream:
        assert next(stream) == 10
        deadline = time.monotonic() + 5
        while len(numbers.asked) < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert numbers.asked == [10, 11, 12, 13]  # two queued, one in hand


def test_prefetch_raises_an_error_where_its_batch_would_come_and_ends():
    stream = prefetch(Numbers(bad=2), depth=4)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(OSError, match="disk gone at 2"):
        next(stream)
    assert list(stream) == []


def test_prefetch_leaves_no_thread_behind():
    before = threading.active_count()
    streams = [prefetch(Numbers(), depth=1) for _ in range(3)]
    next(streams[0])
    list(zip(range(5), streams[1]))
    for stream in streams:
        stream.close()
        stream.close()
    assert threading.active_count() == before


def test_the_order_of_batches_is_pinned(tmp_path):
    """A change here means that old runs do not resume with their own data: bump the format version,
    do not mend the numbers.
    """
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 399}) + "\n")
    prepare(str(tmp_path / "a.jsonl"), "byte", tmp_path / "data", val_fraction=0, progress=False)
    batches = make(TokenShards(tmp_path / "data", "train"), batch_size=6, seed=11)
    assert [batches.window_numbers(k).ravel().tolist() for k in (0, 4, 10**6)] == PINNED


PINNED = [[17, 1, 8, 4, 21, 11], [14, 22, 1, 0, 16, 4], [21, 20, 13, 11, 0, 17]]
