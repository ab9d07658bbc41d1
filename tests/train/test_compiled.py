"""XLA's figures of a compiled step, against sums known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmemory.models.accounting import account, train_flops_per_token
from flexmemory.train.compiled import compile_step, xla_flops
from flexmemory.train.step import init_state, make_train_step

N = 32
MATMUL = 2 * N**3


def nested(x, weights_ABNN):
    """2 + A (B + 1) matrix products."""

    def outer(x, weights_BNN):
        x = jax.lax.scan(lambda x, w: (x @ w, None), x, weights_BNN)[0]
        return jax.jit(jnp.matmul)(x, x), None

    return jax.lax.scan(outer, x, weights_ABNN)[0] @ (x @ x)


def test_loops_count_as_often_as_they_run():
    x, weights = jnp.zeros((N, N)), jnp.zeros((3, 5, N, N))
    _, facts = compile_step(jax.jit(nested), x, weights)
    assert facts["xla_flops"] == pytest.approx((2 + 3 * (5 + 1)) * MATMUL, rel=1e-3)
    assert facts["xla_loops_once"]["flops"] == pytest.approx(
        (2 + 1 + 1) * MATMUL, rel=1e-3
    )  # where XLA changes this, xla_flops must too


def test_bytes_are_those_of_the_arrays():
    compiled, facts = compile_step(
        jax.jit(lambda state, x: (state + x.sum(), x[:2]), donate_argnums=0),
        jnp.zeros(1000),
        jnp.ones(500),
    )
    said = facts["bytes"]
    assert said["arguments"] == 6000 and said["aliased"] == 4000 and 4008 <= said["outputs"] < 4100
    assert (
        said["peak"]
        == said["arguments"]
        + said["outputs"]
        - said["aliased"]
        + said["temporaries"]
        + said["code"]
    )
    np.testing.assert_array_equal(compiled(jnp.zeros(1000), jnp.ones(500))[1], np.ones(2))


def test_the_step_counts_alike_scanned_and_unrolled_and_near_our_own_count(tiny_config):
    found = {}
    for scan in (True, False):
        cfg = tiny_config(
            "(flex memoryllm)*3",
            **{"model.vocab_size": 400, "model.scan_layers": scan, "data.seq_len": 32},
        )
        ids, unique = np.zeros((1, 4, 32), np.int32), np.arange(64, dtype=np.int32)
        batch = {
            "ids": ids,
            "targets": ids,
            "inverse": ids,
            "unique_ids": unique,
            "table_ids": unique,
            "places": unique,
        }
        traced = make_train_step(cfg).trace(init_state(cfg), batch)
        found[scan] = xla_flops(traced.jaxpr, traced.lower())
    assert found[True] == pytest.approx(found[False], rel=0.01)
    assert found[True] / (
        128 * train_flops_per_token(account(cfg.model, 32), 64 / 128)
    ) == pytest.approx(1.15, abs=0.15)
