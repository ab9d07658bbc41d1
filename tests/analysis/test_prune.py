"""Pruned weights against plain rules, and layers run one by one against the model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmemory.analysis import prune
from flexmemory.analysis.trained import scores
from flexmemory.models.accounting import account
from flexmemory.models.transformer import build, output_logits, per_layer

PATTERN = "dense parallel attn_only dense"


def test_layers_one_by_one_are_the_model(trained_of):
    trained = trained_of(PATTERN)
    x_BTD, segments_BT = prune.calibration(trained)
    windows = trained.train.num_windows(96)
    count = min(windows, prune.CALIBRATION // 96)
    ids_BT = np.stack(
        [
            trained.train.tokens(0, start, start + 96)
            for start in (96 * (i * windows // count) for i in range(count))
        ]
    )
    for layer, spec in zip(per_layer(trained.params, trained.specs), trained.specs, strict=True):
        x_BTD, norms = prune.run_layer(layer, x_BTD, segments_BT, cfg=trained.cfg.model, spec=spec)
    merge = build(trained.cfg.model)
    want = jax.jit(lambda params: merge(params)(ids_BT, {}, ids_BT))(trained.params)
    got = output_logits(merge(trained.params).norm(x_BTD), trained.params["head"])
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    assert norms["up"].shape == (32,) and norms["down"].shape == (88,)


def test_the_norms_are_those_of_what_the_matrices_read(trained_of):
    """The layer's own weights put to use: with gate, up and down as they are, the FFN's output
    follows from them; here one layer in NumPy.
    """
    trained = trained_of(PATTERN)
    layer, spec = per_layer(trained.params, trained.specs)[1], trained.specs[1]
    x_BTD, _ = prune.calibration(trained)
    _, norms = prune.run_layer(layer, x_BTD, None, cfg=trained.cfg.model, spec=spec)
    x = np.asarray(x_BTD, np.float64).reshape(-1, 32)
    h = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * np.asarray(layer["ffn_norm"]["scale"])
    gate, up = h @ np.asarray(layer["ffn"]["gate"]), h @ np.asarray(layer["ffn"]["up"])
    np.testing.assert_allclose(norms["up"], np.linalg.norm(h, axis=0), rtol=1e-4)
    np.testing.assert_allclose(
        norms["down"], np.linalg.norm(gate / (1 + np.exp(-gate)) * up, axis=0), rtol=1e-4
    )


def test_largest():
    rng = np.random.default_rng(0)
    weight_DF, score_DF = rng.standard_normal((8, 6)), rng.random((8, 6))
    got = np.asarray(prune.largest(jnp.asarray(weight_DF), jnp.asarray(score_DF), 0.25))
    for column, score, weight in zip(got.T, score_DF.T, weight_DF.T, strict=True):
        best = sorted(np.argsort(score)[-2:])
        assert np.flatnonzero(column).tolist() == best
        np.testing.assert_allclose(column[best], weight[best], rtol=1e-6)
    whole = np.asarray(
        prune.largest(jnp.asarray(weight_DF), jnp.asarray(score_DF), 0.25, whole=True)
    )
    np.testing.assert_array_equal(whole != 0, score_DF >= np.sort(score_DF.ravel())[-12])
    assert (
        np.count_nonzero(prune.largest(jnp.ones((8, 6)), jnp.ones((8, 6)), 0.5)) == 24
    )  # equal scores too


def test_wanda_looks_at_the_inputs_of_pruned_layers(trained_of):
    trained = trained_of(PATTERN)
    layers, inputs = per_layer(trained.params, trained.specs), prune.calibration(trained)
    made = prune.wanda(trained, layers, inputs, 0.25)
    x_BTD = inputs[0]
    for spec, layer, new in zip(trained.specs, layers, made, strict=True):
        if "ffn" in layer:
            _, norms = prune.run_layer(layer, x_BTD, None, cfg=trained.cfg.model, spec=spec)
            for name, norm in (("gate", norms["up"]), ("up", norms["up"]), ("down", norms["down"])):
                score = np.abs(np.asarray(layer["ffn"][name])) * np.asarray(norm)[:, None]
                kept = np.asarray(new["ffn"][name]) != 0
                assert (kept.sum(0) == round(0.25 * len(score))).all()
                assert (
                    np.where(kept, score, np.inf).min(0) >= np.where(kept, 0, score).max(0)
                ).all()
        x_BTD, _ = prune.run_layer(new, x_BTD, None, cfg=trained.cfg.model, spec=spec)
    plain = prune.magnitude(layers, 0.25)
    assert any(
        (np.asarray(a["ffn"]["up"] != 0) != np.asarray(b["ffn"]["up"] != 0)).any()
        for a, b in zip(made, plain, strict=True)
        if "ffn" in a
    )


def test_pruned(trained_of):
    trained = trained_of(PATTERN)
    got = prune.pruned(trained)
    json.dumps(got, allow_nan=False)
    whole = account(trained.cfg.model)["active"]
    assert [(point["rule"], point["kept"]) for point in got["points"]] == [
        ("none", 1),
        *((rule, kept) for kept in prune.KEPT for rule in ("magnitude", "wanda")),
    ]
    assert {
        name: value
        for name, value in got["points"][0].items()
        if name not in ("rule", "kept", "active")
    } == scores(trained)
    for point in got["points"]:
        assert point["active"] == pytest.approx(
            whole - (1 - point["kept"]) * 3 * 3 * 32 * 88, rel=1e-3
        )
    losses = {(point["rule"], point["kept"]): point["val_loss"] for point in got["points"]}
    assert len(set(losses.values())) == len(losses)
    for pattern in ("memoryllm dense", "attn_only", "stem"):
        assert prune.pruned(trained_of(pattern))["applies"] is False
