"""Loss, accumulation, and the golden first step of every kind."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from flexmemory.data.pipeline import make_batches
from flexmemory.data.shards import TokenShards
from flexmemory.models.blocks import KINDS
from flexmemory.train.loop import resolve
from flexmemory.train.step import init_state, make_train_step, token_losses

GOLDEN = Path(__file__).parent / "golden_first_step.json"


def batch_of(cfg, accum=1):
    shards = TokenShards(cfg.data.path, "train")
    return make_batches(shards, seq_len=cfg.data.seq_len, batch_size=cfg.data.batch_size, seed=0, accum=accum)[0]


def test_token_losses_against_numpy():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 5, 11)).astype(np.float32) * 5, rng.integers(0, 11, (2, 5))
    ce, z = token_losses(logits, targets)
    lse = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(ce, lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0], rtol=2e-6)
    np.testing.assert_allclose(z, lse**2, rtol=2e-6)


def test_accumulation_of_micro_batches_is_one_batch(tiny_config):
    # eps of 1 makes Adam's first update lr * g / (|g| + 1), smooth in g, so that gradients are compared and not their signs
    made = []
    for accum in (1, 2, 4):
        cfg, _, _ = resolve(tiny_config("flex memoryllm stem", **{"train.accum_steps": accum, "optimizer.eps": 1.0}))
        state, metrics = make_train_step(cfg)(init_state(cfg), batch_of(cfg, accum))
        made.append((state["params"], {name: float(value) for name, value in metrics.items()}))
    for params, metrics in made[1:]:
        for name, value in made[0][1].items():
            assert metrics[name] == pytest.approx(value, rel=2e-6), name
        assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.abs(a - b).max() <= 1e-8 + 1e-6 * np.abs(b).max()), params, made[0][0]))


def test_z_loss_enters_the_gradient_but_not_the_reported_loss(tiny_config):
    norms, losses = [], []
    for weight in (0.0, 1.0):
        cfg, _, _ = resolve(tiny_config("dense", **{"train.z_loss": weight}))
        _, metrics = make_train_step(cfg)(init_state(cfg), batch_of(cfg))
        norms.append(float(metrics["grad_norm"]))
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1]
    assert norms[1] > 2 * norms[0]


def first_step(cfg) -> dict:
    cfg, _, _ = resolve(cfg)
    step, state, batch = make_train_step(cfg), init_state(cfg), batch_of(cfg)
    state, first = step(state, batch)
    _, second = step(state, batch)
    return {"loss": float(first["loss"]), "grad_norm": float(first["grad_norm"]), "loss_after": float(second["loss"])}


@pytest.mark.parametrize("kind", [*KINDS, "flex-square"])
def test_golden_first_step(kind, tiny_config):
    sets = {"model.ffn_c_kind": "square"} if kind == "flex-square" else {}
    got = first_step(tiny_config(f"dense {kind.removesuffix('-square')}", **sets))
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for name, value in got.items():
        assert golden.get(kind, {}).get(name) == pytest.approx(value, rel=1e-4), (
            f"the first step of {kind} moved: {name} is {value!r}, golden {golden.get(kind)}. If the change is meant to alter the numbers "
            f"(init, equation, optimiser, data), say so in the commit and put {json.dumps(got)} under {kind!r} in {GOLDEN.name}; "
            "a refactoring must not move it.")
