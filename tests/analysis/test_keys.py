"""Coefficients of the keys against the rows that they make, clusters that are there and that are
not.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.preprocessing import normalize

from flexmemory.analysis import keys
from flexmemory.data.shards import read_train_counts
from flexmemory.evals.rows import live_rows
from flexmemory.models.transformer import init_params

PATTERN = "dense (memoryllm flex)*2 stem"


def blobs(rng, k=5, rows=300, width=20, spread=0.02):
    """(rows of length 1 around k directions, which one)"""
    centre_KF, label_R = (
        np.linalg.qr(rng.standard_normal((width, k)))[0].T,
        rng.integers(0, k, rows),
    )
    x_RF = centre_KF[label_R] + spread * rng.standard_normal((rows, width))
    return normalize(x_RF).astype(np.float32), label_R


@pytest.mark.parametrize(
    ("settings", "layers"),
    [({}, (1, 2, 3, 4)), ({"model.x0_norm_shared": True, "model.x0_norm": "layernorm"}, (4,))],
    ids=str,
)
def test_values_weighted_by_coefficients_are_the_rows(tiny_config, settings, layers):
    """Eq 2.8."""
    from flexmemory.train.loop import resolve

    cfg = resolve(tiny_config(PATTERN, **settings))[0].model
    params, ids = init_params(cfg, 3), np.arange(5, 105)
    rows_LRW = live_rows(cfg, params)(jnp.asarray(ids))["w32"]
    of_kind = {"memoryllm": "stack0", "flex": "stack1"}
    for layer in layers:
        down_FD = params["memory"]["stacks"][of_kind["flex" if layer % 2 == 0 else "memoryllm"]][
            "ffn"
        ]["down"][(layer - 1) // 2]
        c_RF = keys.coefficients(cfg, params, layer, ids)
        np.testing.assert_allclose(c_RF @ down_FD, rows_LRW[layer - 1], atol=1e-6)
        assert not np.allclose(keys.coefficients(cfg, params, layer, ids, before_gate=True), c_RF)


def test_a_stream_is_its_calls(trained_of, monkeypatch):
    trained = trained_of(PATTERN)
    model, whole = (
        trained.cfg.model,
        keys.coefficients(trained.cfg.model, trained.params, 1, np.arange(400)),
    )
    monkeypatch.setattr(keys, "AT_ONCE", 150)
    np.testing.assert_allclose(
        keys.coefficients(model, trained.params, 1, np.arange(400)), whole, atol=1e-7
    )


def test_kmeans_finds_what_is_there_and_is_the_same_every_time():
    x_RF, label_R = blobs(np.random.default_rng(0))
    fitted = keys.kmeans(x_RF, 5, seed=0)
    pairs = set(zip(label_R.tolist(), fitted.labels_.tolist(), strict=True))
    assert len(pairs) == 5 == len({new for _, new in pairs})
    again = keys.kmeans(x_RF, 5, seed=0)
    assert again.inertia_ == fitted.inertia_ and np.array_equal(again.labels_, fitted.labels_)


def test_silhouette_of_one_cluster_is_0():
    x_RF, label_R = blobs(np.random.default_rng(1), rows=60)
    assert keys.silhouette(x_RF, np.zeros(60, int)) == keys.silhouette(x_RF, np.arange(60)) == 0
    assert keys.silhouette(x_RF, label_R) > 0.9


def test_clusters_stand_out_from_their_permutation():
    x_RF, label_R = blobs(np.random.default_rng(2))
    assert keys.silhouette(x_RF, label_R) > 0.9
    mixed_RF = normalize(np.random.default_rng(0).permuted(x_RF, axis=0))
    assert keys.silhouette(mixed_RF, keys.kmeans(mixed_RF, 5, 0).labels_) < 0.7


def test_clusters(trained_of):
    trained = trained_of(PATTERN)
    got = keys.clusters(trained)
    json.dumps(got, allow_nan=False)
    sizes = [found["size"] for found in got["clusters"]]
    assert (
        got["layer"] == 1
        and got["k"] == 4
        and sum(sizes) == len(got["points"]) == 400
        and sizes == sorted(sizes, reverse=True)
    )
    assert np.bincount([place for _, _, place in got["points"]]).tolist() == sizes
    assert sum(found["seen"] for found in got["clusters"]) == np.count_nonzero(
        read_train_counts(trained.cfg.data.path)
    )
    assert all(len(found["examples"]) == min(12, found["size"]) for found in got["clusters"])
    x_RF = np.asarray(
        normalize(keys.coefficients(trained.cfg.model, trained.params, 1, np.arange(400))),
        np.float64,
    )
    values = np.linalg.svd(x_RF - x_RF.mean(0), compute_uv=False)
    assert got["explained"] == pytest.approx((values**2 / (values**2).sum())[:2].tolist(), rel=1e-3)
    assert np.linalg.norm([x for x, _, _ in got["points"]]) == pytest.approx(values[0], rel=1e-2)


def test_cluster_coefficient(trained_of):
    same, other = (
        keys.cluster_coefficient(trained_of(PATTERN)),
        keys.cluster_coefficient(trained_of(PATTERN, 1)),
    )
    json.dumps(same, allow_nan=False)
    assert [(row["layer"], row["kind"]) for row in same["layers"]] == [
        (1, "memoryllm"),
        (2, "flex"),
        (3, "memoryllm"),
        (4, "flex"),
    ]
    for row, changed in zip(same["layers"], other["layers"], strict=True):
        assert row["coefficient"] == row["fresh"] == changed["fresh"] != changed["coefficient"]
        assert -1 <= row["permuted"] <= 1


def test_outliers(trained_of, with_params):
    trained = trained_of(PATTERN)
    planted = jax.tree.map(lambda a: a, trained.params)
    up = planted["memory"]["stacks"]["stack0"]["ffn"]["up"]
    planted["memory"]["stacks"]["stack0"]["ffn"]["up"] = up.at[0, :, 5].multiply(
        1e4
    )  # layer 1: one key takes all
    got = keys.outliers(with_params(trained, planted))
    json.dumps(got, allow_nan=False)
    assert [row["layer"] for row in got["layers"]] == [1, 2, 3, 4] and [
        row["keys"] for row in got["layers"]
    ] == [88, 55, 88, 55]
    c_RF = np.asarray(keys.coefficients(trained.cfg.model, trained.params, 1, np.arange(400)))
    for sigma in keys.SIGMAS:
        want = (np.abs(c_RF) > sigma * c_RF.std(axis=1, keepdims=True)).sum() / 400
        assert got["layers"][0][f"fresh_above_{sigma}"] == pytest.approx(want, abs=0.01)
        assert got["layers"][0][f"above_{sigma}"] == pytest.approx(1, abs=0.05)
        assert got["layers"][2][f"above_{sigma}"] == got["layers"][2][f"fresh_above_{sigma}"]


def test_no_keys(trained_of):
    for measure in (keys.clusters, keys.cluster_coefficient, keys.outliers):
        assert (
            measure(trained_of("dense"))["applies"]
            is measure(trained_of("stem"))["applies"]
            is False
        )
