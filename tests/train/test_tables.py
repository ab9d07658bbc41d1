"""Row-sparse optimisers against NumPy references that walk over the rows one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from flexmemory.config import OptimizerConfig
from flexmemory.exchange import lookup
from flexmemory.models.blocks import KINDS
from flexmemory.models.config import ModelConfig
from flexmemory.models.parameters import join, label_params, split
from flexmemory.models.transformer import abstract_params, init_params
from flexmemory.train.optimizer import schedule
from flexmemory.train.tables import apply_rows, make_table_optimizer, scale_by_lazy_adam

NAMES = ("lazy_adam", "rowwise_adagrad")
STEPS, R = 6, 5
SHAPES = {"a": (3, 11, 4), "b": {"c": (1, 11, 7)}}  # one vocabulary, several stacks
CFG = OptimizerConfig(
    lr=0.1,
    min_lr=0.01,
    warmup_steps=2,
    b1=0.9,
    b2=0.95,
    weight_decay=0.3,
    table_lr=3.0,
    table_weight_decay=0.05,
)


def config(name, **sets):
    return dataclasses.replace(CFG, table_optimizer=name, **sets)


def is_shape(x):
    return isinstance(x, tuple)


def trees(seed, rows=None):
    """A tree of normal draws shaped like SHAPES, with ``rows`` in V's place."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: rng.normal(size=(s[0], rows or s[1], s[2])).astype(np.float32),
        SHAPES,
        is_leaf=is_shape,
    )


def reference(cfg, table_LVW, batches):
    """The documented equations in float64, a row at a time. batches: (ids_R, grad_LRW) per step.
    Returns (table, first moment, second or sums).
    """
    p = table_LVW.astype(np.float64)
    m, v, s = np.zeros_like(p), np.zeros_like(p), np.zeros(p.shape[:2])
    for t, (ids, grad_LRW) in enumerate(batches, 1):
        rate = float(schedule(cfg, STEPS)(t - 1)) * cfg.table_lr
        for layer in range(len(p)):
            for r, i in enumerate(ids):
                if i == p.shape[1]:
                    continue
                at, g = (layer, i), grad_LRW[layer, r].astype(np.float64)
                if cfg.table_optimizer == "lazy_adam":
                    m[at] = cfg.b1 * m[at] + (1 - cfg.b1) * g
                    v[at] = cfg.b2 * v[at] + (1 - cfg.b2) * g**2
                    u = m[at] / (1 - cfg.b1**t) / (np.sqrt(v[at] / (1 - cfg.b2**t)) + cfg.eps)
                else:
                    s[at] += np.mean(g**2)
                    u = g / (np.sqrt(s[at]) + cfg.eps)
                p[at] -= rate * (u + cfg.table_weight_decay * p[at])
    return (p, m, v) if cfg.table_optimizer == "lazy_adam" else (p, s)


@functools.cache
def compiled_step(cfg):
    optimizer = make_table_optimizer(cfg, STEPS)

    def step(tables, state, grads, ids_R):
        updates, state = optimizer.update(grads, state, lookup(tables, ids_R), ids_R=ids_R)
        return apply_rows(tables, updates, ids_R), state

    return jax.jit(step, donate_argnums=(0, 1))


def run(cfg, tables, batches):
    """(tables, state) after a jitted, donating step per batch."""
    tables = jax.tree.map(jnp.array, tables)
    state = make_table_optimizer(cfg, STEPS).init(tables)
    for ids, grads in batches:
        tables, state = compiled_step(cfg)(
            tables, state, jax.tree.map(jnp.asarray, grads), jnp.asarray(ids, jnp.int32)
        )
    return tables, state


def moments(state):
    """The trees of the state that have rows."""
    return (state[0].mu, state[0].nu) if hasattr(state[0], "mu") else (state[0].sums,)


def leaf(tree, name):
    return np.asarray(tree["a"] if name == "a" else tree["b"]["c"])


@pytest.mark.parametrize("name", NAMES)
@given(
    st.lists(st.tuples(st.permutations(range(11)), st.integers(0, R)), min_size=1, max_size=STEPS),
    st.integers(0, 99),
)
def test_touched_rows_follow_the_equations_and_all_others_keep_their_bits(name, draws, seed):
    cfg, tables = config(name), trees(seed)
    # R ids per step, the last of them padding; what stands at padding is wild
    batches = []
    for k, (order, kept) in enumerate(draws):
        ids = np.asarray([*order[:kept], *[11] * (R - kept)], np.int32)
        grads = jax.tree.map(
            lambda g, kept=kept: np.where(np.arange(R)[:, None] < kept, g, np.float32(np.nan)),
            trees(seed + k + 1, R),
        )
        batches.append((ids, grads))
    made, state = run(cfg, tables, batches)
    seen = sorted({int(i) for ids, _ in batches for i in ids if i < 11})
    rest = [i for i in range(11) if i not in seen]
    for which in ("a", "c"):
        expected = reference(
            cfg, leaf(tables, which), [(ids, leaf(grads, which)) for ids, grads in batches]
        )
        for ours, theirs in zip((made, *moments(state)), expected, strict=True):
            np.testing.assert_allclose(
                leaf(ours, which)[:, seen], theirs[:, seen], rtol=2e-5, atol=2e-6
            )
        assert leaf(made, which)[:, rest].tobytes() == leaf(tables, which)[:, rest].tobytes()
        assert all(not leaf(tree, which)[:, rest].any() for tree in moments(state))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_padding_changes_nothing(name):
    tables, wild = trees(0), trees(1, R)
    first = (np.arange(R), trees(2, R))
    one, state = run(config(name), tables, [first])
    two, after = run(config(name), tables, [first, (np.full(R, 11), wild)])
    for a, b in zip(
        jax.tree.leaves((one, moments(state))), jax.tree.leaves((two, moments(after))), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_lazy_adam_with_every_row_touched_is_dense_adamw():
    tables, cfg = trees(0), config("lazy_adam")
    rng, batches = np.random.default_rng(3), []
    for k in range(STEPS):
        batches.append((rng.permutation(11), trees(k + 1, 11)))
    made, state = run(cfg, tables, batches)
    dense = optax.adamw(
        lambda t: cfg.table_lr * schedule(cfg, STEPS)(t),
        cfg.b1,
        cfg.b2,
        cfg.eps,
        weight_decay=cfg.table_weight_decay,
    )
    params, dense_state = jax.tree.map(jnp.asarray, tables), dense.init(tables)
    for ids, grads in batches:
        spread = jax.tree.map(lambda g, ids=ids: jnp.asarray(g[:, np.argsort(ids)]), grads)
        updates, dense_state = jax.jit(dense.update)(spread, dense_state, params)
        params = optax.apply_updates(params, updates)
    for a, b in zip(
        jax.tree.leaves((made, moments(state))),
        jax.tree.leaves((params, dense_state[0].mu, dense_state[0].nu)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_an_unseen_row_stands_still_where_dense_adam_moves_it():
    # also what counts per row would change: the row that comes late takes the global count's small
    # first step
    tables, grad = {"t": jnp.ones((1, 4, 2))}, {"t": jnp.ones((1, 1, 2))}
    optimizer = scale_by_lazy_adam(0.9, 0.95, 1e-8)
    state, update = optimizer.init(tables), jax.jit(optimizer.update)
    for i in [0] * 400 + [1]:
        updates, state = update(grad, state, ids_R=jnp.asarray([i], jnp.int32))
    np.testing.assert_allclose(updates["t"], 0.1 / np.sqrt(0.05), rtol=1e-4)
    np.testing.assert_allclose(state.mu["t"][0, 0], 1, rtol=1e-6)  # not decayed by the last step


@pytest.mark.parametrize("name", NAMES)
def test_decay_is_decoupled_and_only_for_touched_rows(name):
    tables = {"t": np.full((2, 6, 3), 2, np.float32)}
    batch = (np.asarray([4, 1, 6]), {"t": np.zeros((2, 3, 3), np.float32)})
    made, _ = run(config(name, schedule="constant", warmup_steps=0), tables, [batch])
    expected = np.full((2, 6, 3), 2.0)
    expected[:, [1, 4]] *= (
        1 - 0.1 * 3.0 * 0.05
    )  # lr, table_lr, table_weight_decay; weight_decay has no say
    np.testing.assert_allclose(made["t"], expected, rtol=1e-6)
    none, _ = run(config(name, table_weight_decay=0.0), tables, [batch])
    np.testing.assert_array_equal(none["t"], tables["t"])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_tables_size_is_made(name):
    v, r, optimizer = 50_000, 16, make_table_optimizer(config(name), STEPS)
    tables = {
        "a": jax.ShapeDtypeStruct((3, v, 4), jnp.float32),
        "b": jax.ShapeDtypeStruct((1, v, 8), jnp.float32),
    }
    state = jax.eval_shape(optimizer.init, tables)

    def step(tables, state, ids_R):
        rows = lookup(tables, ids_R)
        grads = jax.grad(lambda rows: sum(jnp.sum(jnp.sin(row)) for row in jax.tree.leaves(rows)))(
            rows
        )
        updates, state = optimizer.update(grads, state, rows, ids_R=ids_R)
        return apply_rows(tables, updates, ids_R), state

    compiled = (
        jax.jit(step, donate_argnums=(0, 1))
        .lower(tables, state, jax.ShapeDtypeStruct((r,), jnp.int32))
        .compile()
    )
    memory = compiled.memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((tables, state)))
    assert memory.temp_size_in_bytes < 100_000  # the smaller table has 1.6 MB
    assert held <= memory.alias_size_in_bytes and memory.output_size_in_bytes < held + 1000


@pytest.mark.parametrize("name", NAMES)
def test_the_state_survives_a_checkpoint(name, tmp_path):
    optimizer, tables = make_table_optimizer(config(name), STEPS), trees(0)
    _, state = run(config(name), tables, [(np.arange(R), trees(1, R))])
    ocp.save(tmp_path / "state", state)
    again = ocp.load(tmp_path / "state", jax.eval_shape(optimizer.init, tables))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_split_and_join(kind):
    params = abstract_params(
        ModelConfig(pattern=f"{kind}*2 dense", vocab_size=20, d_model=32, d_ff=88)
    )
    parts = split(params)
    assert list(parts) == ["backbone", "embed", "tables"] and parts["embed"] is params["embed"]
    assert set(jax.tree.leaves(label_params(parts["tables"]))) == (
        {"table"} if kind.startswith("stem") else set()
    )
    assert not {"table", "embed"} & set(jax.tree.leaves(label_params(parts["backbone"])))
    assert join(parts) == params and join({"a": (parts, 1)}) == {"a": (params, 1)}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_tables_has_an_optimizer_that_does_nothing(name):
    params = init_params(ModelConfig(pattern="dense", vocab_size=20, d_model=32, d_ff=88), 0)
    made, _ = run(config(name), split(params)["tables"], [(np.arange(R), {})])
    assert made == {}


def test_gathered_rows_are_the_tables_rows():
    tables = trees(0)
    ids = np.asarray([7, 0, 10])
    for a, b in zip(
        jax.tree.leaves(lookup(jax.tree.map(jnp.asarray, tables), jnp.asarray(ids))),
        jax.tree.leaves(tables),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b[:, ids])
