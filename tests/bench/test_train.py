"""`flexmemory bench train` at smoke scale: what it reports must be there and hang together. It says
nothing about speed.
"""

import dataclasses

import jax
import numpy as np
import pytest

from flexmemory.bench import train
from flexmemory.bench.train import (
    CONFIGS,
    DEFAULT_KINDS,
    Zipf,
    measure,
    no_compilation_cache,
    prepare,
    ratios,
    variant,
)
from flexmemory.errors import UserError
from flexmemory.models.accounting import account
from flexmemory.models.blocks import layer_specs


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return measure(tmp_path_factory.mktemp("bench"), "smoke", "dense,memoryllm,memoryllm:naive")


@pytest.mark.slow
def test_figures_hang_together(smoke):
    assert (
        set(smoke["kinds"]) == {"dense", "memoryllm", "memoryllm:naive"}
        and smoke["tokens_per_step"] == 128
    )
    dense, once, naive = smoke["kinds"].values()
    for figure in (dense, once, naive):
        assert len(figure["step_seconds"]) == smoke["rounds"] == 2 and figure["compile_seconds"] > 0
        assert figure["tokens_per_s"] == pytest.approx(128 / np.median(figure["step_seconds"]))
        assert figure["flops_per_s"] == pytest.approx(
            figure["tokens_per_s"] * figure["flops_per_token"]
        )
        assert figure["matmul_share"] == pytest.approx(
            figure["flops_per_s"] / smoke["matmul"]["flops_per_s"]
        )
        assert (
            figure["memory"]["peak"]
            >= figure["memory"]["arguments"]
            > 12 * figure["parameters_with_embedding_and_head"]
        )
        assert figure["mfu"] is None
    assert dense["total_parameters"] == once["total_parameters"]
    assert 0 == dense["rows_per_token"] < once["rows_per_token"] < naive["rows_per_token"] == 1
    assert (
        once["flops_per_token"] + once["flops_saved_per_token"]
        == naive["flops_per_token"]
        == dense["flops_per_token"]
    )
    assert set(smoke["seam"]) == {"memoryllm"} and min(smoke["seam"]["memoryllm"].values()) > 0
    assert set(smoke["compile"]["layers"]) == {2, 24} and smoke["compile"]["ratio"] > 0


@pytest.mark.slow
def test_naive_and_deduplicated_are_the_same_model(smoke):
    assert smoke["kinds"]["memoryllm"]["first_loss"] == pytest.approx(
        smoke["kinds"]["memoryllm:naive"]["first_loss"], rel=1e-6
    )
    assert smoke["kinds"]["memoryllm"]["first_loss"] != smoke["kinds"]["dense"]["first_loss"]


@pytest.mark.slow
def test_ratios_are_medians_over_paired_rounds(smoke):
    assert set(smoke["ratios"]) == {"memoryllm / dense", "memoryllm / memoryllm:naive"}
    figures = {
        "memoryllm": {"step_seconds": [1, 2, 4], "flops_per_token": 2},
        "dense": {"step_seconds": [2, 2, 2], "flops_per_token": 3},
    }
    assert ratios(figures, "cpu")["memoryllm / dense"] == {
        "measured": 1,
        "rounds": [2, 1, 0.5],
        "by_flops": 1.5,
        "goal": 1.5,
    }
    assert ratios(figures, "gpu")["memoryllm / dense"]["goal"] == 1.6


@pytest.mark.parametrize("scale", CONFIGS)
def test_default_kinds_have_equal_totals_at_every_scale(scale):
    totals = {
        name: account(variant(name, CONFIGS[scale]).config.model)["total"]
        for name in DEFAULT_KINDS.split(",")
    }
    without_ffn = totals.pop("attn_only")
    assert max(totals.values()) < 1.003 * min(totals.values()) and without_ffn < min(
        totals.values()
    )


def test_a_naive_batch_has_a_row_for_every_token():
    cfg, batch, _ = prepare(CONFIGS["smoke"], None)
    naive = variant("flex:3:naive", cfg).batch(batch)
    assert naive["unique_ids"].shape == (batch["ids"].size,)
    np.testing.assert_array_equal(naive["unique_ids"][naive["inverse"]], batch["ids"])
    np.testing.assert_array_equal(batch["unique_ids"][batch["inverse"]], batch["ids"])


def test_options_of_a_kind():
    made = variant("stem:lazy_adam", CONFIGS["smoke"]).config
    assert made.optimizer.table_optimizer == "lazy_adam" and made.model.pattern == "stem*2"
    assert [
        spec.d_ffn for spec in layer_specs(variant("flex:2", CONFIGS["smoke"]).config.model)
    ] < [spec.d_ffn for spec in layer_specs(variant("flex", CONFIGS["smoke"]).config.model)]


def test_data_gives_the_ids_and_the_vocabulary(tiny_data):
    cfg = dataclasses.replace(
        CONFIGS["smoke"], model=dataclasses.replace(CONFIGS["smoke"].model, vocab_size=0)
    )
    cfg, batch, ids = prepare(cfg, str(tiny_data))
    assert (
        cfg.model.vocab_size == 400
        and batch["ids"].shape == (1, 4, 32)
        and ids.startswith("dataset ")
    )
    with pytest.raises(UserError, match="vocab_size: 400 is smaller|vocab_size: 256 is smaller"):
        prepare(CONFIGS["smoke"], str(tiny_data))


def test_zipf_windows_are_pure_and_skewed():
    shards = Zipf(50)
    ids = np.concatenate([shards.window(i, 999) for i in range(20)])
    np.testing.assert_array_equal(ids[:1000], shards.window(0, 999))
    counts = np.sort(np.bincount(ids, minlength=50))[::-1]
    assert 1.7 < counts[0] / counts[1] < 2.3 and counts[49] > 0


def test_the_compilation_cache_is_off_inside_and_back_after(tmp_path):
    before = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        train.compilation_cache.reset_cache()
        with no_compilation_cache():
            jax.jit(lambda x: x + 17)(np.ones(3))
            assert not list(tmp_path.iterdir())
        jax.jit(lambda x: x + 18)(np.ones(3))
        assert list(tmp_path.iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
        train.compilation_cache.reset_cache()
