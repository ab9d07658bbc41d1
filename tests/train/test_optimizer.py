"""AdamW against NumPy, labels, schedules, clipping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmemory.config import OptimizerConfig
from flexmemory.models.blocks import KINDS
from flexmemory.models.config import ModelConfig
from flexmemory.models.memory import FFNRows, TableRows
from flexmemory.models.parameters import label_params
from flexmemory.models.transformer import abstract_params
from flexmemory.train.optimizer import clip, group_norms, make_optimizer, schedule

CFG = OptimizerConfig(
    lr=0.1,
    min_lr=0.01,
    warmup_steps=4,
    weight_decay=0.1,
    clip_norm=1.0,
    table_lr=3.0,
    table_weight_decay=0.05,
)


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "embed": rng.normal(size=(5, 3)),
        "norm": {"scale": rng.normal(size=3)},
        "memory": {"stacks": {"stack0": {"table": rng.normal(size=(2, 5, 4))}}},
    }


def as_jax(params):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_every_kind_has_a_label(kind):
    cfg = ModelConfig(
        pattern=kind, vocab_size=20, d_model=32, d_ff=88, x0_norm="layernorm", x0_norm_shared=True
    )
    labels = set(jax.tree.leaves(label_params(abstract_params(cfg))))
    assert {"embed", "head", "norm", "attention"} <= labels
    assert ("table" in labels) == (KINDS[kind].source is TableRows)
    assert ("memory" in labels) == (KINDS[kind].source is FFNRows)


def test_an_unlabelled_parameter_raises():
    with pytest.raises(ValueError, match="blocks.s0.mystery"):
        label_params({"blocks": {"s0": {"mystery": np.zeros(3)}}})


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_schedules(name):
    cfg = dataclasses.replace(CFG, schedule=name)
    rates = np.asarray([float(schedule(cfg, 24)(step)) for step in range(24)])
    np.testing.assert_allclose(rates[:4], [0.025, 0.05, 0.075, 0.1], rtol=1e-6)
    if name == "cosine":
        expected = 0.01 + 0.09 * 0.5 * (1 + np.cos(np.pi * np.arange(20) / 20))
    elif name == "wsd":
        expected = np.concatenate([np.full(16, 0.1), 0.1 - 0.09 * np.arange(4) / 4])
    else:
        expected = np.full(20, 0.1)
    np.testing.assert_allclose(rates[4:], expected, rtol=1e-5)


def test_adamw_against_numpy():
    params, opt = tree(), make_optimizer(CFG, 24)
    live, state = as_jax(params), opt.init(as_jax(params))
    m, v = jax.tree.map(np.zeros_like, params), jax.tree.map(np.zeros_like, params)
    decay = {
        "embed": 0.1,
        "norm": {"scale": 0.0},
        "memory": {"stacks": {"stack0": {"table": 0.05}}},
    }
    times = {"embed": 1.0, "norm": {"scale": 1.0}, "memory": {"stacks": {"stack0": {"table": 3.0}}}}
    for step in range(5):
        grads = tree(step + 1)
        updates, state = opt.update(as_jax(grads), state, live)
        live = optax.apply_updates(live, updates)
        lr = float(schedule(CFG, 24)(step))
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, v, grads)
        params = jax.tree.map(
            lambda p, m, v, wd, k, t=step + 1, lr=lr: (
                p - lr * k * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + wd * p)
            ),
            params,
            m,
            v,
            decay,
            times,
        )
    for got, wanted in zip(jax.tree.leaves(live), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("table_clip", [0.0, 0.5])
def test_clipping_is_by_the_true_global_norm(table_clip):
    grads = tree(3)
    cfg = dataclasses.replace(CFG, table_clip_norm=table_clip)
    clipped = clip(as_jax(grads), group_norms(as_jax(grads)), cfg)
    flat = {
        name: np.concatenate([np.ravel(x) for x in jax.tree.leaves(part)])
        for name, part in (
            ("all", grads),
            ("dense", {k: grads[k] for k in ("embed", "norm")}),
            ("table", grads["memory"]),
        )
    }
    whole = np.linalg.norm(flat["dense" if table_clip else "all"])
    assert whole > 1
    np.testing.assert_allclose(clipped["embed"], grads["embed"] / whole, rtol=1e-5)
    table = grads["memory"]["stacks"]["stack0"]["table"]
    np.testing.assert_allclose(
        clipped["memory"]["stacks"]["stack0"]["table"],
        table * (0.5 / np.linalg.norm(flat["table"]) if table_clip else 1 / whole),
        rtol=1e-5,
    )


def test_a_small_gradient_is_not_scaled():
    grads = jax.tree.map(lambda a: a * 1e-3, as_jax(tree()))
    clipped = clip(grads, group_norms(grads), CFG)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), grads, clipped))
