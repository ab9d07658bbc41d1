"""Spectra, angles and growth against plain computations."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from flexmemory.analysis import geometry
from flexmemory.data.shards import read_train_counts
from flexmemory.evals.rows import live_rows

PATTERN = "stem memoryllm dense stem-gate"


@pytest.fixture(scope="module")
def rows(trained_of):
    """{layer: rows float64 [V, W]}"""
    trained = trained_of(PATTERN, 1)
    made = live_rows(trained.cfg.model, trained.params)(jnp.arange(400))
    return {
        0: np.asarray(made["w88"][0], np.float64),
        1: np.asarray(made["w32"][0], np.float64),
        3: np.asarray(made["w88"][1], np.float64),
    }


def test_spectra(trained_of, rows):
    got = geometry.spectra(trained_of(PATTERN, 1))
    json.dumps(got, allow_nan=False)
    assert [(layer["layer"], layer["kind"]) for layer in got["layers"]] == [
        (0, "stem"),
        (1, "memoryllm"),
        (3, "stem-gate"),
    ]
    for layer in got["layers"]:
        want = np.linalg.svd(rows[layer["layer"]], compute_uv=False)
        np.testing.assert_allclose(layer["singular_values"], want / want[0], atol=2e-3)
        assert layer["ranks"] == list(range(1, layer["width"] + 1))
        share = want**2 / (want**2).sum()
        assert layer["effective_rank"] == pytest.approx(
            np.exp(-(share * np.log(share)).sum()), rel=1e-3
        )
        assert layer["energy"][1]["kept"] == pytest.approx(
            share[: round(0.8 * layer["width"])].sum(), rel=1e-4
        )


def test_angular(trained_of, rows):
    trained = trained_of(PATTERN, 1)
    got = geometry.angular(trained)
    json.dumps(got, allow_nan=False)
    assert [layer["layer"] for layer in got["layers"]] == [0, 3]
    present = np.flatnonzero(read_train_counts(trained.cfg.data.path))
    for layer in got["layers"]:
        unit = rows[layer["layer"]][present]
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        every = np.abs(
            (unit @ unit.T)[np.triu_indices(len(unit), 1)]
        )  # all pairs, of which some were drawn
        assert layer["rows"]["p95"] == pytest.approx(np.percentile(every, 95), rel=0.05)
        assert layer["rows"]["p50"] == pytest.approx(np.percentile(every, 50), rel=0.08)
        # Xavier rows are Gaussian, before training and here
        assert layer["random_p95"] == pytest.approx(1.96 / 88**0.5)
        for name in ("rows", "weighted", "fresh"):
            assert layer[name]["p95"] == pytest.approx(layer["random_p95"], rel=0.1)
            assert np.sum(layer[name]["density"]) * (
                layer["edges"][1] - layer["edges"][0]
            ) == pytest.approx(1)
    assert (
        geometry.angular(trained_of(PATTERN))["layers"][0]["rows"]
        == geometry.angular(trained_of(PATTERN))["layers"][0]["fresh"]
    )


def test_cosines_of_rows_of_any_length():
    rng = np.random.default_rng(0)
    rows_LRW = rng.standard_normal((2, 6, 5)) * 10.0 ** rng.integers(-2, 3, (2, 6, 1))
    one, other = rows_LRW[:, :3], rows_LRW[:, 3:]
    want = (one * other).sum(-1) / np.sqrt((one**2).sum(-1) * (other**2).sum(-1))
    np.testing.assert_allclose(
        geometry._paired_cosines({"w5": jnp.asarray(rows_LRW)})["w5"], want, rtol=1e-4
    )


def test_weighted_pairs_are_drawn_by_weight_and_never_equal():
    pairs_2P = geometry._pairs(np.random.default_rng(0), np.array([0.0, 3.0, 1.0, 0.0, 0.0]))
    assert pairs_2P.shape == (2, geometry.PAIRS) and set(pairs_2P.ravel()) == {1, 2}
    assert (pairs_2P[0] != pairs_2P[1]).all()
    drawn = geometry._pairs(np.random.default_rng(0), np.array([0.0, 96.0, 2.0, 2.0]))
    assert np.mean(drawn == 1) == pytest.approx(0.5, abs=0.01) and np.mean(
        drawn == 3
    ) == pytest.approx(0.25, abs=0.02)


def test_unique_growth(trained_of):
    trained = trained_of(PATTERN)
    got = geometry.unique_growth(trained)
    json.dumps(got, allow_nan=False)
    tokens = np.concatenate(
        [
            trained.val.tokens(shard, 0, count)
            for shard, count in enumerate(trained.val.shard_tokens)
        ]
    )
    documents = np.split(tokens, np.flatnonzero(tokens[:-1] == trained.val.eos_id) + 1)
    documents = [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]
    tokens, starts = (
        np.concatenate(documents),
        [0, *np.cumsum([len(document) for document in documents])[:-1]],
    )
    taken = sorted({starts[i * len(starts) // 8] for i in range(8)})
    assert got["starts"] == len(taken)
    for point in got["points"]:
        unique = [
            len(set(np.take(tokens, range(start, start + point["tokens"]), mode="wrap").tolist()))
            for start in taken
        ]
        assert (point["unique"], point["lowest"], point["highest"]) == (
            pytest.approx(np.mean(unique)),
            min(unique),
            max(unique),
        )
        assert point["values"] == pytest.approx((88 + 32 + 88) * np.mean(unique))
    assert got["points"][0]["unique"] == 1 and got["points"][-1]["tokens"] == len(tokens)
    assert 0 < got["exponent"] < 1


def test_heaps_law_is_found(trained_of, monkeypatch):
    monkeypatch.setattr(
        geometry, "_documents", lambda trained: (np.arange(4096) // 4, np.array([0]))
    )
    got = geometry.unique_growth(trained_of(PATTERN))
    assert got["exponent"] == pytest.approx(1, abs=1e-3) and got["factor"] == pytest.approx(
        0.25, rel=1e-2
    )


def test_no_rows(trained_of):
    dense = trained_of("dense")
    assert all(
        measure(dense)["applies"] is False
        for measure in (geometry.spectra, geometry.angular, geometry.unique_growth)
    )
    assert geometry.angular(trained_of("memoryllm*2"))["applies"] is False
