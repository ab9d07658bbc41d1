"""Hit rates against a slow search and against each other."""

import functools
import itertools
import json

import numpy as np
import pytest

from flexmemory.analysis import caching


def most_hits(tokens, slots):
    """By trying everything that a cache may keep."""

    @functools.cache
    def best(i, held):
        if i == len(tokens):
            return 0
        seen = held | {tokens[i]}
        options = [
            frozenset(kept)
            for size in (len(seen) - 1, len(seen))
            for kept in itertools.combinations(sorted(seen), size)
            if size <= slots
        ]
        return (tokens[i] in held) + max(best(i + 1, kept) for kept in options)

    return best(0, frozenset())


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_clairvoyant_is_the_best_there_is(slots):
    rng = np.random.default_rng(slots)
    for _ in range(40):
        tokens = rng.integers(0, 5, 12)
        assert caching.clairvoyant_hits(tokens, slots) == most_hits(tuple(tokens.tolist()), slots)


def test_clairvoyant_lets_a_row_go_by():
    """It would have no hit if every missed row had to be kept."""
    assert caching.clairvoyant_hits(np.array([0, 1, 0, 2, 0, 3, 0]), 1) == 3


def test_nothing_beats_the_clairvoyant():
    rng = np.random.default_rng(0)
    for slots in (1, 3, 10, 40):
        tokens = rng.zipf(1.3, 600) % 50
        counts_V = np.bincount(tokens[::-2], minlength=50)
        best = caching.clairvoyant_hits(tokens, slots)
        found = {
            policy: caching.hits(tokens, slots, policy, counts_V) for policy in caching.POLICIES
        }
        assert 0 < max(found.values()) <= best, (slots, found, best)
    every = len(tokens) - len(np.unique(tokens))
    assert all(caching.hits(tokens, 50, policy, counts_V) == every for policy in caching.POLICIES)
    assert caching.clairvoyant_hits(tokens, 50) == every
    top = np.argsort(-counts_V, kind="stable")[:10]
    assert caching.hits(tokens, 10, "static", counts_V) == np.isin(tokens, top).sum() - len(
        np.intersect1d(tokens, top)
    )


def test_hit_curves(trained_of):
    got = caching.hit_curves(trained_of("memoryllm stem"))
    json.dumps(got, allow_nan=False)
    assert got["tokens"] == 480  # windows of 96, of 512 tokens asked for
    assert got["row_bytes"] == 4 * (32 + 88)
    assert [point["slots"] for point in got["points"]] == [4, 8, 20, 40, 100, 200]
    for point, later in itertools.pairwise(got["points"]):
        assert point["clairvoyant"] <= later["clairvoyant"] <= 1 - got["cold"]
    for point in got["points"]:
        for policy in caching.POLICIES:
            assert point[policy] <= point["clairvoyant"]
            assert 0 < point["expected"][policy] <= 1
    assert caching.hit_curves(trained_of("dense"))["applies"] is False
