"""`flexmemory bench decode` at smoke scale: what it reports must be there and hang together. It
says nothing about speed.
"""

import numpy as np
import pytest
from tkv.making import config, make_store, params

from flexmemory.bench.decode import Forced, measure
from flexmemory.bench.machine import zipf
from flexmemory.runtime.rows import Budgets


@pytest.mark.slow
def test_smoke(tmp_path):
    made = measure(tmp_path, "smoke")
    for placement in made["placements"].values():
        cold = placement["offloaded_lru"]["rows"]["cold"]
        assert cold["rows"] > 0 and cold["bytes"] == cold["rows"] * placement["bundle_bytes"]
        assert placement["cold"]["most_cached_pages_found"] in (0, None)
        assert (
            0 <= placement["offloaded_lru"]["wait_share"] < 1
            and placement["resident"]["wait_share"] == 0
        )
    assert made["placements"]["compute_first"]["pattern"] == "dense*1 memoryllm*3"
    kinds = {name: figure for name, figure in made["kinds"].items() if isinstance(figure, dict)}
    assert (
        len(kinds) == 5
        and kinds["dense"]["total_parameters"] == kinds["memoryllm"]["total_parameters"]
    )
    assert (
        kinds["memoryllm"]["memory_over_dense"]
        < kinds["flex beta=1"]["memory_over_dense"]
        < kinds["flex beta=3"]["memory_over_dense"]
        < 1
    )
    large = made["processes"]["memory"]
    assert (
        large["peak_rss"] > large["backbone_bytes"]
        and 0 < large["open_seconds"] < large["first_token_seconds"]
    )


def test_forced_tokens_are_taken(tmp_path):
    make_store(tmp_path / "s", cfg := config("memoryllm"), params(cfg))
    engine = Forced(tmp_path / "s", Budgets(ram=0), max_batch=1)
    ids_N = np.asarray([5, 9, 200, 7, 5])
    engine.force(ids_N)
    assert engine.generate([[3]], 4, stop_at_eos=False)[0].ids == [5, 9, 200, 7]


def test_zipf_prefers_low_ranks():
    counts = np.bincount(zipf(np.random.default_rng(0), 50, 20_000), minlength=50)
    assert 1.7 < counts[0] / counts[1] < 2.3 and counts[49] > 0
