"""Measured budgets against theory, and against what must hold of any of them."""

import json

import numpy as np
import pytest

from flexmemory.errors import UserError
from flexmemory.runtime.budget import (
    FRACTIONS,
    WAIT_SHARE,
    Text,
    hit_rate,
    measure_latency,
    probabilities,
    read_us,
    table,
    try_budgets,
)

V = 2000
COUNTS = (1e6 / np.arange(1, V + 1)).astype(np.uint64)
OPTIONS = {
    "batch": 8,
    "latency_us": {1: 100, 8: 200, 64: 1300},
    "step_ms": 10.0,
    "overlap_ms": 0.3,
    "ram_available": 1 << 40,
    "hot_available": 0,
}


HELD = np.arange(50), np.arange(50, 550)


def che(slots, policy, batch, window=0):
    """Expected hit rate of one cache by Che's approximation: an id is present if it was used in the
    last T tokens, where T makes the expected number of such ids ``slots``.
    """
    p = probabilities(COUNTS)
    looked = 1 - (1 - p) ** batch
    if policy in ("static", "lfu"):
        held = np.arange(V) < slots
    else:
        ages = np.geomspace(1, 1e8, 5000)
        age = ages[np.searchsorted([(1 - (1 - p) ** t).sum() for t in ages], slots)]
        held = 1 - (1 - p) ** min(age, window * batch or np.inf)
    return (looked * held).sum() / looked.sum()


@pytest.mark.parametrize(
    ("policy", "slots", "batch", "window"),
    [
        ("static", 400, 1, 0),
        ("static", 300, 16, 0),
        ("lru", 100, 1, 0),
        ("lru", 400, 16, 0),
        ("lru", 1200, 64, 0),
        ("lfu", 400, 1, 0),
        ("lfu", 300, 16, 0),
        ("window", 1500, 4, 50),
        ("window", 200, 4, 300),
        ("window", 1900, 64, 900),  # more steps than are drawn
    ],
)
def test_hit_rates_against_theory(policy, slots, batch, window):
    """The cache itself against an independent approximation."""
    changed = {"policy": policy, "batch": batch, "window": window, "ram_available": slots}
    result = try_budgets(COUNTS, 1, **OPTIONS | changed | {"latency_us": {1: 10**9}})
    best = result["proposal"]
    assert best["slots"] == slots and not best["meets"]
    assert best["hit_rate"] == pytest.approx(che(slots, policy, batch, window), abs=0.02)
    unique = (1 - (1 - probabilities(COUNTS)) ** batch).sum()
    assert result["unique_per_step"] == pytest.approx(unique, rel=0.02)
    if batch == 1 and not window:
        single = hit_rate(Text.draw(COUNTS, 1), COUNTS, slots, policy)
        assert single == pytest.approx(best["hit_rate"], abs=1e-9)


def test_static_tiers_keep_different_rows():
    """As TieredRows does: RAM keeps the most frequent rows after the hot ones."""
    result = try_budgets(COUNTS, 1, **OPTIONS | {"policy": "static", "hot_available": 50})
    quarter, steps = result["budgets"][4], Text.draw(COUNTS, 8).steps
    looked = sum(map(len, steps))
    hot, ram = (sum(np.isin(ids, held).sum() for ids in steps) for held in HELD)
    assert quarter["hot_hit_rate"] == pytest.approx(hot / looked)
    assert quarter["ram_hit_rate"] == pytest.approx(ram / looked)
    assert quarter["misses_per_step"] == pytest.approx((looked - hot - ram) / len(steps))


def test_probabilities_of_unseen_ids():
    p = probabilities(np.asarray([6, 1, 0, 1, 0], np.uint64))
    np.testing.assert_allclose(p, [6 / 8 * 7 / 9, 1 / 8 * 7 / 9, 1 / 9, 1 / 8 * 7 / 9, 1 / 9])
    for counts in ([0, 0, 0], [1, 1, 0], [5, 0], [3, 4]):
        p = probabilities(np.asarray(counts, np.uint64))
        assert p.sum() == pytest.approx(1) and (p > 0).all()
    np.testing.assert_allclose(p, [3 / 7, 4 / 7])


@pytest.mark.parametrize("policy", ["static", "lru", "lfu", "window"])
@pytest.mark.parametrize("hot", [0, 150])
def test_more_memory_is_never_worse_and_all_of_it_finds_all(policy, hot):
    window = 10**6 if policy == "window" else 0
    result = try_budgets(
        COUNTS,
        4096,
        **OPTIONS | {"policy": policy, "window": window, "hot_available": hot * 4096 + 5},
    )
    assert result["hot_slots"] == hot
    rows = result["budgets"]
    assert [row["slots"] for row in rows] == [round(part * V) for part in FRACTIONS]
    for less, more in zip(rows, rows[1:]):
        assert (
            more["hit_rate"] >= less["hit_rate"]
            and more["wait_ms"] <= less["wait_ms"]
            and more["bytes_per_token"] <= less["bytes_per_token"]
        )
    assert rows[0]["hit_rate"] < rows[3]["hit_rate"] < 1
    last = rows[-1]
    assert last["fraction"] == 1
    if policy != "window":
        assert last["hit_rate"] == pytest.approx(1, abs=1e-12) and last[
            "misses_per_step"
        ] == pytest.approx(0, abs=1e-9)
    assert last["hit_rate"] > 0.999 and last["wait_ms"] == pytest.approx(0, abs=1e-3)


def test_the_proposal_is_the_smallest_that_is_good_enough():
    options = OPTIONS | {"step_ms": 1.0, "overlap_ms": 0.05, "policy": "static"}
    best = try_budgets(COUNTS, 4096, **options)["proposal"]
    assert best["meets"] and best["wait_ms"] <= WAIT_SHARE * 1.0 and 0 < best["slots"] < V
    less = round(0.98 * best["slots"])
    short = try_budgets(COUNTS, 4096, **options | {"ram_available": less * 4096})["proposal"]
    assert short["slots"] == less and not short["meets"] and short["fits"]
    assert try_budgets(COUNTS, 4096, **options | {"overlap_ms": 99})["proposal"]["slots"] == 0


def test_values_of_a_row():
    row = try_budgets(
        np.ones(64, np.uint64),
        100,
        **OPTIONS | {"batch": 1, "policy": "static", "overlap_ms": 0.04},
    )["budgets"][5]  # half of 64 equal ids
    eight = try_budgets(np.ones(64, np.uint64), 100, **OPTIONS)["budgets"][5]
    assert eight["bytes_per_token"] == pytest.approx(eight["misses_per_step"] * 100 / 8)
    assert (
        row["ram_bytes"] == 3200
        and row["hit_rate"] == pytest.approx(0.5, abs=0.02)
        and row["bytes_per_token"] == pytest.approx(50, abs=2)
    )


def test_reads_and_waits():
    np.testing.assert_allclose(
        read_us({8: 200, 1: 100, 64: 1320}, np.asarray([0, 1, 4.5, 8, 36, 64, 84])),
        [0, 100, 150, 200, 760, 1320, 1720],
    )
    np.testing.assert_allclose(read_us({4: 100}, np.asarray([0, 1, 4, 8])), [0, 100, 100, 200])


def test_budgets_are_json_and_a_table():
    result = try_budgets(
        COUNTS, 98304, **OPTIONS | {"step_ms": 1, "overlap_ms": 0, "ram_available": 60 << 20}
    )
    assert json.loads(json.dumps(result)) == result
    lines = table(result).splitlines()
    assert len(lines) == 2 + len(FRACTIONS) + 2 and max(map(len, lines)) < 150
    assert [line.endswith("more than is free") for line in lines[2:9]] == [
        not row["fits"] for row in result["budgets"]
    ]
    assert (
        "187.5 MiB   100.00%" in lines[8]
        and lines[9]
        == "no budget that fits has waits of at most 5% of the step; the best that fits:"
    )
    assert (
        table(try_budgets(COUNTS, 98304, **OPTIONS)).splitlines()[9]
        == "proposed, the smallest with waits of at most 5% of the step:"
    )


def test_what_is_free_is_the_default():
    result = try_budgets(COUNTS, 64, **OPTIONS | {"ram_available": None, "hot_available": None})
    assert result["ram_available"] > 1 << 20 and result["hot_slots"] >= 0


def test_measured_latency():
    asked = []
    found = measure_latency(asked.append, 40, np.random.default_rng(0), repeats=3)
    assert list(found) == [1, 8] and all(us >= 0 for us in found.values())
    assert [len(ids) for ids in asked] == [1] * 4 + [8] * 3
    assert all(
        (np.diff(ids) > 0).all() and ids.dtype == np.int64 and ids.max() < 40 for ids in asked
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"policy": "best"}, "policy: 'best'"),
        ({"policy": "window"}, "window: 0 with policy 'window'"),
        ({"batch": 0}, "batch: 0 must be at least 1"),
        ({"step_ms": 0}, "step_ms: 0 must be above 0"),
        ({"latency_us": {}}, "latency_us"),
        ({"ram_available": -1}, "ram_available: -1"),
    ],
)
def test_user_errors(changed, message):
    with pytest.raises(UserError, match=message):
        try_budgets(COUNTS, 64, **OPTIONS | changed)
