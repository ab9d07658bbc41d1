"""The planner against simulations with the cache itself, and against what must hold of any plan."""

import json

import numpy as np
import pytest

from flexmemory.errors import UserError
from flexmemory.runtime.cache import SlotCache
from flexmemory.runtime.plan import (
    FRACTIONS,
    WAIT_SHARE,
    _read_and_wait,
    hit_rates,
    measure_latency,
    plan,
    probabilities,
    read_us,
    table,
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


def simulate(hot_slots, ram_slots, policy, batch, window, steps):
    """(hot, ram, unique per step): shares of looked-up ids that two caches in a row answer, after a
    warm-up.
    """
    rng = np.random.default_rng(0)
    tiers = [
        SlotCache(slots, V, policy, counts_V=COUNTS, window=window)
        for slots in (hot_slots, ram_slots)
    ]
    for tier in tiers:
        tier.admit(tier.preload_ids())
    drawn = rng.choice(V, (steps, batch), p=probabilities(COUNTS))
    found, looked = np.zeros(2), 0
    for step, ids in enumerate(drawn):
        ids = np.unique(ids)
        for place, tier in enumerate(tiers):
            slots = tier.lookup(ids)
            if step >= steps // 2:
                found[place] += np.count_nonzero(slots >= 0)
                looked += 0 if place else len(ids)
            ids = ids[slots < 0]
            tier.admit(ids)
    return found[0] / looked, found[1] / looked, looked / (steps - steps // 2)


@pytest.mark.parametrize(
    ("policy", "hot", "ram", "batch", "window"),
    [
        ("static", 50, 400, 1, 0),
        ("static", 100, 300, 16, 0),
        ("lru", 0, 100, 1, 0),
        ("lru", 60, 400, 1, 0),
        ("lru", 100, 600, 16, 0),
        ("lru", 500, 1200, 16, 0),
        ("lru", 0, 1000, 64, 0),
        ("lfu", 50, 400, 1, 0),
        ("lfu", 0, 300, 16, 0),
        ("window", 0, 1500, 4, 50),
        ("lru", 500, 600, 16, 0),
        ("window", 0, 200, 4, 300),
    ],
)
def test_hit_rates_against_a_simulation(policy, hot, ram, batch, window):
    found = simulate(hot, ram, policy, batch, window, 8000 if batch == 1 else 2000)
    expected = hit_rates(COUNTS, hot, ram, policy, batch=batch, window=window)
    np.testing.assert_allclose(expected, found[:2], atol=0.02)
    assert plan(COUNTS, 1, **OPTIONS | {"batch": batch})["unique_per_step"] == pytest.approx(
        found[2], rel=0.02
    )


def test_static_is_the_sum_of_the_likeliest():
    p = np.sort(probabilities(COUNTS))[::-1]
    hot, ram = hit_rates(np.random.default_rng(0).permutation(COUNTS), 37, 500, "static")
    assert hot == pytest.approx(p[:37].sum()) and ram == pytest.approx(p[37:500].sum())
    assert hit_rates(COUNTS, 500, 37, "static")[1] == 0


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
    made = plan(
        COUNTS,
        4096,
        **OPTIONS | {"policy": policy, "window": window, "hot_available": hot * 4096 + 5},
    )
    assert made["hot_slots"] == hot
    rows = made["budgets"]
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
    made = plan(COUNTS, 4096, **options)
    best = made["proposal"]
    assert best["meets"] and best["wait_ms"] <= WAIT_SHARE * 1.0 and 0 < best["slots"] < V
    short = plan(COUNTS, 4096, **options | {"ram_available": (best["slots"] - 1) * 4096})[
        "proposal"
    ]
    assert short["slots"] == best["slots"] - 1 and not short["meets"] and short["fits"]
    assert plan(COUNTS, 4096, **options | {"overlap_ms": 99})["proposal"]["slots"] == 0
    aimed = plan(COUNTS, 4096, **options | {"hit_target": 0.8})["proposal"]
    assert (
        aimed["hit_rate"] >= 0.8 > sum(hit_rates(COUNTS, 0, aimed["slots"] - 1, "static", batch=8))
    )


def test_values_of_a_row():
    row = plan(
        np.ones(64, np.uint64),
        100,
        **OPTIONS | {"batch": 1, "policy": "static", "overlap_ms": 0.04},
    )["budgets"][5]  # half of 64 equal ids
    eight = plan(np.ones(64, np.uint64), 100, **OPTIONS)["budgets"][5]
    assert eight["bytes_per_token"] == pytest.approx(eight["misses_per_step"] * 100 / 8)
    assert (
        row["ram_bytes"] == 3200
        and row["hit_rate"] == pytest.approx(0.5)
        and row["bytes_per_token"] == pytest.approx(50)
    )


def test_reads_and_waits():
    np.testing.assert_allclose(
        read_us({8: 200, 1: 100, 64: 1320}, np.asarray([0, 1, 4.5, 8, 36, 64, 84])),
        [0, 100, 150, 200, 760, 1320, 1720],
    )
    np.testing.assert_allclose(read_us({4: 100}, np.asarray([0, 1, 4, 8])), [0, 100, 100, 200])
    drawn = np.random.default_rng(0).poisson(2.5, 400_000)
    ms = read_us(OPTIONS["latency_us"], drawn) / 1000
    read, wait = _read_and_wait(2.5, OPTIONS["latency_us"], 0.12)
    assert read == pytest.approx(ms.mean(), rel=0.01) and wait == pytest.approx(
        np.maximum(0, ms - 0.12).mean(), rel=0.02
    )
    assert _read_and_wait(0, OPTIONS["latency_us"], 0) == (0, 0)
    assert _read_and_wait(1e5, {1: 10}, 3)[1] == pytest.approx(997, rel=0.01)


def test_a_plan_is_json_and_a_table():
    made = plan(
        COUNTS, 98304, **OPTIONS | {"step_ms": 1, "overlap_ms": 0, "ram_available": 60 << 20}
    )
    assert json.loads(json.dumps(made)) == made
    lines = table(made).splitlines()
    assert len(lines) == 2 + len(FRACTIONS) + 2 and max(map(len, lines)) < 150
    assert [line.endswith("more than is free") for line in lines[2:9]] == [
        not row["fits"] for row in made["budgets"]
    ]
    assert (
        "187.5 MiB   100.00%" in lines[8]
        and lines[9]
        == "no budget that fits has waits of at most 5% of the step; the best that fits:"
    )
    assert (
        table(plan(COUNTS, 98304, **OPTIONS)).splitlines()[9]
        == "proposed, the smallest with waits of at most 5% of the step:"
    )


def test_what_is_free_is_the_default():
    made = plan(COUNTS, 64, **OPTIONS | {"ram_available": None, "hot_available": None})
    assert made["ram_available"] > 1 << 20 and made["hot_slots"] >= 0


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
        ({"hit_target": 2}, "hit_target: 2"),
        ({"ram_available": -1}, "ram_available: -1"),
    ],
)
def test_user_errors(changed, message):
    with pytest.raises(UserError, match=message):
        plan(COUNTS, 64, **OPTIONS | changed)
