"""Bases of low-rank rows against the singular values of the rows themselves."""

import numpy as np
import pytest

from flexmemory.errors import UserError
from flexmemory.tkv import format
from flexmemory.tkv.encoding import Layout
from flexmemory.tkv.export import RowFormat, check_options
from flexmemory.tkv.lowrank import find_bases, uniform_ranks, useful_rank
from flexmemory.tkv.store import open_store

from .making import SHARD, VOCAB, config, make_store, params


@pytest.fixture(scope="module")
def rows(mixed, mixed_store):
    """{model layer: X float64 [V, W]} of the float32 store."""
    store = open_store(mixed_store)
    stored = store.read_rows(np.arange(VOCAB))
    return {
        layer: stored[group.name][:, place].astype(np.float64)
        for group in store.groups
        for place, layer in enumerate(group.layers)
    }


def tails(x_VW) -> np.ndarray:
    """Relative Frobenius error of the best rank 0..W approximation."""
    squares = np.linalg.svd(x_VW, compute_uv=False) ** 2
    return np.sqrt(np.append(np.cumsum(squares[::-1])[::-1], 0) / squares.sum())


def groups_of(cfg):
    return format.model_groups(cfg.model, "float32", SHARD)


def test_error_is_the_tail_of_the_singular_values(mixed, rows):
    cfg, weights = mixed
    ranks = uniform_ranks(groups_of(cfg), 0.5)
    assert ranks == (16, 16, 24, 16, 24, 24, 24)
    bases = find_bases(
        weights, cfg=cfg.model, groups=groups_of(cfg), fold_rows=SHARD, ranks=ranks, progress=False
    )
    assert list(bases) == sorted(rows)
    for layer, b_rW in bases.items():
        x_VW = rows[layer]
        np.testing.assert_allclose(b_rW @ b_rW.T, np.eye(len(b_rW)), atol=1e-5)
        error = np.linalg.norm(x_VW - x_VW @ b_rW.T @ b_rW) / np.linalg.norm(x_VW)
        assert error == pytest.approx(tails(x_VW)[len(b_rW)], rel=1e-4)


@pytest.mark.parametrize("budget", [0.05, 0.3, 0.9])
def test_an_error_budget_takes_the_smallest_rank(budget, mixed, rows, tmp_path):
    made = make_store(tmp_path / "s", *mixed, rank_error=budget)
    for layer in made["layers"]:
        tail = tails(rows[layer["layer"]])
        assert layer["rank"] == int(np.argmax(tail <= budget))
        assert layer["relative_rms"] == pytest.approx(tail[layer["rank"]], rel=1e-3, abs=1e-6)
    store = open_store(tmp_path / "s")
    assert [rank for group in store.groups for rank in group.layout.ranks] == [
        layer["rank"]
        for layer in sorted(made["layers"], key=lambda layer: (layer["width"], layer["layer"]))
    ]
    assert store.manifest.rank_error == budget


def test_full_rank_loses_nothing(mixed, rows, tmp_path):
    made = make_store(tmp_path / "s", *mixed, rank=1.0)
    assert max(layer["relative_rms"] for layer in made["layers"]) < 1e-6
    assert all(layer["rank"] == layer["width"] > 0 for layer in made["layers"])


def test_layers_of_zeros_get_rank_one(tmp_path):
    cfg = config("stem*2")
    weights = params(cfg)
    weights["memory"]["stacks"]["stack0"]["table"][1] = 0
    made = make_store(tmp_path / "s", cfg, weights, rank_error=0.1)
    assert made["layers"][1]["rank"] == 1 and made["layers"][1]["relative_rms"] == 0
    assert not open_store(tmp_path / "s").read_rows([0, 200])["w48"][:, 1].any()


def test_useful_rank():
    assert useful_rank(128_256, 2048) == 2015
    for v, w in ((260, 32), (48, 48), (7, 3), (1, 1)):
        r = useful_rank(v, w)
        assert r * (v + w) < v * w <= (r + 1) * (v + w)


def test_ranks_that_make_no_sense(mixed):
    groups = groups_of(mixed[0])
    for rank, message in (
        (0, "0 is not between 1 and 32"),
        (40, "40 is not between 1 and 32"),
        (0.0, "0.0 is not a share"),
        (1.5, "1.5 is not a share"),
    ):
        with pytest.raises(UserError, match=f"^rank: {message}"):
            uniform_ranks(groups, rank)
    assert uniform_ranks((format.Group("w48", (3,), Layout(1, 48, "int4"), 1, 0),), 0.01) == (1,)
    for rows, message in (
        (RowFormat(rank=3, rank_error=0.1), "both choose"),
        (RowFormat(rank_error=1.0), "^rank_error: 1.0"),
        (RowFormat(scale_group=4), "^scale_group"),
        (RowFormat(dtype="int8", scale_group=-1), "^scale_group: -1"),
    ):
        with pytest.raises(UserError, match=message):
            check_options(rows)


def test_rank_of_a_model_without_memory(tmp_path):
    cfg = config("dense")
    with pytest.raises(UserError, match="^rank: the model has no memory layer"):
        make_store(tmp_path / "s", cfg, params(cfg), rank=0.5)
