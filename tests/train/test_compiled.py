"""What XLA says of a compiled step, against sums known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmemory.models.accounting import account, train_flops_per_token
from flexmemory.train.compiled import compile_step
from flexmemory.train.step import init_state, make_train_step


def test_bytes_are_those_of_the_arrays():
    compiled, facts = compile_step(
        jax.jit(lambda state, x: (state + x.sum(), x[:2]), donate_argnums=0),
        jnp.zeros(1000),
        jnp.ones(500),
    )
    sizes = facts["bytes"]
    assert sizes["arguments"] == 6000 and sizes["aliased"] == 4000
    assert 4008 <= sizes["outputs"] < 4100
    parts = ("arguments", "outputs", "temporaries", "code")
    assert sizes["peak"] == sum(sizes[part] for part in parts) - sizes["aliased"]
    np.testing.assert_array_equal(compiled(jnp.zeros(1000), jnp.ones(500))[1], np.ones(2))


def test_xla_counts_the_body_of_a_loop_once():
    """As docs/formats.md says of compile.json."""
    n = 32
    x, weights = jnp.zeros((n, n)), jnp.zeros((5, n, n))
    step = jax.jit(lambda x, weights: jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0])
    _, facts = compile_step(step, x, weights)
    assert abs(facts["xla_loops_once"]["flops"] / (2 * n**3) - 1) < 0.01


def test_our_own_count_is_near_that_of_xla(tiny_config):
    """Of an unrolled model, whose loops XLA need not count. Recomputation aside, XLA counts more:
    the masked half of attention and what is no matrix product.
    """
    cfg = tiny_config(
        "(flex memoryllm)*3",
        **{"model.vocab_size": 400, "model.scan_layers": False, "data.seq_len": 32},
    )
    ids, unique = np.zeros((1, 4, 32), np.int32), np.arange(64, dtype=np.int32)
    batch = dict.fromkeys(("ids", "targets", "inverse"), ids)
    batch |= dict.fromkeys(("unique_ids", "table_ids", "places"), unique)
    xla = make_train_step(cfg).lower(init_state(cfg), batch).cost_analysis()["flops"]
    own = 128 * train_flops_per_token(account(cfg.model, 32), 64 / 128)
    assert xla / own == pytest.approx(1.15, abs=0.15)
