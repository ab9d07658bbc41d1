"""The papers' parameter tables, by counting the real parameters."""

import json
from pathlib import Path

import jax
import pytest

from flexmemory.cli.main import main
from flexmemory.models.accounting import account, size
from flexmemory.models.config import ModelConfig
from flexmemory.models.transformer import init_params
from flexmemory.recipes import MEMORYLLM_SIZES, STEM_SIZES

ROOT = Path(__file__).parents[2]
# MemoryLLM Table 5 with the swapped rows put right, in millions: size -> (total, {beta: active})
TABLE5 = {
    "250m": (265.4, {0: 88.5, 1: 110.6, 2: 132.7, 3: 154.8}),
    "750m": (737.3, {0: 245.8, 1: 307.2, 2: 368.6, 3: 430.1}),
    "1b": (1208.0, {0: 402.7, 1: 503.3, 2: 604.0, 3: 704.6}),
}


def paper_model(sizes: dict, name: str, pattern: str, **more) -> ModelConfig:
    return ModelConfig(
        pattern=pattern.format(sizes[name].get("layers")), **sizes[name]["model"], **more
    )


@pytest.mark.parametrize("name", TABLE5)
@pytest.mark.parametrize("beta", [0, 1, 2, 3])
def test_table5_of_memoryllm(name, beta):
    total, active = TABLE5[name]
    numbers = account(paper_model(MEMORYLLM_SIZES, name, "flex*{}", beta=str(beta)))
    assert numbers["total"] == pytest.approx(total * 1e6, rel=0.005)
    assert numbers["active"] == pytest.approx(active[beta] * 1e6, rel=0.005)


@pytest.mark.parametrize("name", TABLE5)
def test_dense_base_has_the_same_total(name):
    numbers = account(paper_model(MEMORYLLM_SIZES, name, "dense*{}"))
    assert numbers["total"] == numbers["active"] == pytest.approx(TABLE5[name][0] * 1e6, rel=0.005)


def test_stem_1b_as_the_paper_counts():
    numbers = account(paper_model(STEM_SIZES, "1b", "(dense stem dense)*5 dense"))
    assert numbers["paper_active"] == numbers["active_all"] == pytest.approx(1.41e9, rel=0.005)
    assert numbers["paper_total"] == pytest.approx(6.75e9, rel=0.005)
    # the paper does not subtract the five up-projections that the tables replace
    assert numbers["paper_total"] - numbers["total_all"] == 5 * 2048 * 8192


@pytest.mark.parametrize(("stems", "active"), [(10, 351.4e6), (16, 336.7e6), (31, 299.8e6)])
def test_stem_350m_active(stems, active):
    pattern = "dense " + "stem " * stems + "dense " * (31 - stems)
    assert account(paper_model(STEM_SIZES, "350m", pattern))["active_all"] == pytest.approx(
        active, rel=0.001
    )


def test_bytes_of_the_1b_table():
    numbers = account(paper_model(MEMORYLLM_SIZES, "1b", "memoryllm*24", compute_dtype="bfloat16"))
    assert numbers["row_bytes_per_token"] == 98_304
    assert numbers["table_bytes"]["bfloat16"] == 128_256 * 24 * 2048 * 2
    assert numbers["table_bytes"]["int4"] == numbers["table_bytes"]["bfloat16"] / 4
    assert numbers["table_over_ffn"] == pytest.approx(
        7.83, rel=0.005
    )  # papers/memoryllm section 4.2


def test_flops_of_the_1b_models_by_hand():
    h, layers, vocab, seq = 2048, 24, 128_256, 2048
    attention = layers * (2 * 4 * h * h + 4 * h * (seq + 1) / 2)
    head = 2 * h * vocab
    memory = account(paper_model(MEMORYLLM_SIZES, "1b", "memoryllm*24"), seq)
    dense = account(paper_model(MEMORYLLM_SIZES, "1b", "dense*24"), seq)
    assert memory["flops_per_token"] == attention + head
    assert dense["flops_per_token"] == attention + head + layers * 2 * 3 * h * 5464
    assert memory["memory_flops_per_row"] == layers * 2 * 3 * h * 5464


def test_totals_are_the_parameters_that_exist():
    cfg = ModelConfig(
        pattern="flex stem-dagger memoryllm dense", vocab_size=50, d_model=32, d_ff=88
    )
    params = init_params(cfg, 0)
    numbers = account(cfg)
    assert numbers["total_all"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert numbers["active_all"] == numbers["total_all"] - size(params["memory"])


def test_params_command_prints_json(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["params", "--config=configs/memoryllm.py:1b", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    for key in (
        "total",
        "active",
        "embed",
        "total_all",
        "active_all",
        "flops_per_token",
        "row_bytes_per_token",
        "table_bytes",
        "table_over_ffn",
    ):
        assert key in numbers
    assert numbers["total"] == pytest.approx(1208e6, rel=0.005)
