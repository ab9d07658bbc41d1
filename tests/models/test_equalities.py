"""Two ways to the same numbers: bit for bit where the arithmetic is the same, else within a stated
share of the largest value.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmemory.models.attention import cpu_attention
from flexmemory.models.blocks import layer_specs
from flexmemory.models.ffn import linear
from flexmemory.models.memory import gather_rows
from flexmemory.models.transformer import (
    abstract_params,
    build,
    empty_cache,
    init_params,
    output_logits,
    per_layer,
    served_blocks,
    stack_layers,
)

from .tiny import (
    SEQUENCES,
    assert_same_bits,
    cross_entropy,
    deduplicated,
    logits,
    loss_and_grads,
    mixed,
    naive,
    random_params,
    relative_gap,
    tiny,
    widest_gap,
)

# Another compilation may sum in another order: 2e-7 of a leaf's largest gradient is the most seen.
REORDERED = 1e-6

BATCH = deduplicated(SEQUENCES)
MEMORIES = tiny("(memoryllm stem)*2")  # both sources of rows, scanned


@pytest.fixture(scope="module")
def params():
    return random_params(MEMORIES)


@pytest.fixture(scope="module")
def scanned(params):
    """(loss, gradients), scanned, deduplicated, nothing recomputed."""
    return loss_and_grads(MEMORIES, params, BATCH)


def assert_equal_training(got, want):
    """The same loss to the last bit; the same gradients but for the order of sums."""
    assert float(got[0]) == float(want[0])
    assert widest_gap(got[1], want[1]) < REORDERED


def test_loop_equals_scan(params, scanned):
    assert_equal_training(
        loss_and_grads(dataclasses.replace(MEMORIES, scan_layers=False), params, BATCH), scanned
    )


def test_loop_equals_scan_for_every_kind():
    cfg = mixed()
    params = random_params(cfg)
    assert (
        relative_gap(
            logits(dataclasses.replace(cfg, scan_layers=False), params, BATCH),
            logits(cfg, params, BATCH),
        )
        < REORDERED
    )


@pytest.mark.parametrize("scan", [True, False])
def test_remat_recomputes_and_changes_nothing(params, scanned, scan):
    cfg = dataclasses.replace(MEMORIES, remat=True, scan_layers=scan)
    model = build(cfg)(params)
    traced = str(
        jax.make_jaxpr(lambda ids_R: model(BATCH.ids_BT, model.rows(ids_R), BATCH.inverse_BT))(
            BATCH.unique_R
        )
    )
    assert "checkpoint" in traced or "remat" in traced
    if scan:
        assert_equal_training(loss_and_grads(cfg, params, BATCH), scanned)


def test_remat_saves_memory_where_nothing_repeats():
    """A segment of one repeat is unrolled, and XLA must not merge the recomputation with the
    forward pass.
    """

    def activations(remat):
        cfg = tiny("dense parallel dense", remat=remat)
        params, ids = abstract_params(cfg), jax.ShapeDtypeStruct((4, 64), jnp.int32)
        loss = jax.jit(jax.grad(lambda params, ids: build(cfg)(params)(ids, {}, ids).sum()))
        return loss.lower(params, ids).compile().memory_analysis().temp_size_in_bytes

    assert activations(remat=True) < 0.8 * activations(remat=False)


def test_naive_equals_deduplicated(params, scanned):
    assert_equal_training(loss_and_grads(MEMORIES, params, naive(SEQUENCES)), scanned)


def test_padding_the_unique_ids_changes_nothing(params, scanned):
    padding = np.resize([0, SEQUENCES[0, 0], 41], SEQUENCES.size - len(BATCH.unique_R))
    assert_equal_training(
        loss_and_grads(MEMORIES, params, deduplicated(SEQUENCES, padding)), scanned
    )


def test_flex_with_beta_0_is_memoryllm():
    flex, memoryllm = tiny("flex*2", beta="0"), tiny("memoryllm*2")
    assert abstract_params(flex) == abstract_params(memoryllm)
    params = random_params(flex)
    np.testing.assert_array_equal(logits(flex, params, BATCH), logits(memoryllm, params, BATCH))


def test_no_row_leaves_attention_alone():
    memoryllm, attn_only = tiny("memoryllm*2"), tiny("attn_only*2")
    params = random_params(memoryllm)
    without = {name: value for name, value in params.items() if name != "memory"}
    assert jax.tree.structure(without) == jax.tree.structure(abstract_params(attn_only))
    np.testing.assert_array_equal(
        logits(memoryllm, params, BATCH, ffn_scale=0.0), logits(attn_only, without, BATCH)
    )


def test_detach_x0_stops_the_way_from_rows_to_the_embedding_and_no_other():
    cfg = tiny("memoryllm")
    params, merge = random_params(cfg), build(cfg)
    loss, whole = loss_and_grads(cfg, params, BATCH)
    loss_detached, detached = loss_and_grads(
        dataclasses.replace(cfg, detach_x0=True), params, BATCH
    )

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def by_way(stream_embed_VD, row_embed_VD):
        rows = merge(params | {"embed": row_embed_VD}).rows(BATCH.unique_R)
        return cross_entropy(
            merge(params | {"embed": stream_embed_VD})(BATCH.ids_BT, rows, BATCH.inverse_BT),
            BATCH.ids_BT,
        )

    by_stream_VD, by_rows_VD = by_way(params["embed"], params["embed"])
    assert loss_detached == loss
    assert np.abs(by_rows_VD).max() > 0.01 * np.abs(by_stream_VD).max()
    assert relative_gap(whole["embed"], by_stream_VD + by_rows_VD) < REORDERED
    assert relative_gap(detached["embed"], by_stream_VD) < REORDERED
    assert widest_gap(detached | {"embed": 1.0}, whole | {"embed": 1.0}) < REORDERED


def test_a_masked_document_is_read_as_if_alone():
    """Positions go on counting over documents; RoPE only sees differences, so the angles' rounding
    is all that differs.
    """
    cfg = tiny("(dense memoryllm)*2")
    params, ids_BT = random_params(cfg), SEQUENCES[:, :8]
    documents = [slice(0, 4), slice(4, 8)]
    segments_BT = np.repeat([[3, 8], [0, 1]], 4, axis=1).astype(np.int32)
    batch = naive(ids_BT)
    together, unmasked = (
        logits(cfg, params, batch, segments_BT=segments_BT),
        logits(cfg, params, batch),
    )
    for document in documents:
        alone = logits(cfg, params, naive(ids_BT[:, document]))
        assert relative_gap(together[:, document], alone) < 1e-5
    assert relative_gap(together[:, documents[1]], unmasked[:, documents[1]]) > 0.1, (
        "the mask must matter"
    )


def test_decoding_with_a_cache_equals_the_full_forward():
    """A prompt at once, then token by token, the second sequence one token behind; the cache is
    longer than the text.

    The served form: rows handed in, every layer by itself, the step cut before the first memory
    layer.
    """
    cfg = tiny("(dense memoryllm)*2")
    params = random_params(cfg)
    want, rows = (
        logits(cfg, params, BATCH),
        jax.jit(lambda params: build(cfg)(params).rows(BATCH.unique_R))(params),
    )
    merge = build(cfg, with_memory=False, stacked=False)
    params = {k: v for k, v in params.items() if k != "memory"} | {
        "blocks": served_blocks(params["blocks"], layer_specs(cfg))
    }

    @jax.jit
    def step(params, ids_BT, inverse_BT, positions_BT, cache):
        model = merge(params)
        x_BTD, lead = model.layers(
            model.embedded(ids_BT), {}, inverse_BT, positions_BT, cache={"s0": cache["s0"]}, last=1
        )
        x_BTD, tail = model.layers(
            x_BTD,
            rows,
            inverse_BT,
            positions_BT,
            cache={k: v for k, v in cache.items() if k != "s0"},
            first=1,
        )
        return output_logits(model.norm(x_BTD), model.head_DV), lead | tail

    cache = empty_cache(cfg, batch=2, length=12)
    for positions_BT in [np.tile(np.arange(3), (2, 1))] + [
        np.array([[min(t, 8)], [t - 1]]) for t in range(3, 10)
    ]:
        here = np.arange(2)[:, None], positions_BT
        got, cache = step(params, SEQUENCES[here], BATCH.inverse_BT[here], positions_BT, cache)
        assert relative_gap(got, want[here]) < 5e-6


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("length", [9, 128, 300])  # less than a block, one block, two and a rest
def test_attention_for_a_cpu_is_attention(length, documents):
    rng = np.random.default_rng(0)
    q_BTNH, k_BTKH, v_BTKH, grad_BTNH = (
        jnp.asarray(rng.standard_normal((2, length, n, 4), np.float32)) for n in (4, 2, 2, 4)
    )
    segments_BT = jnp.asarray(np.sort(rng.integers(0, 5, (2, length)))) if documents else None
    mask = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None] if documents else None

    def value_and_grads(attention):
        value, pull_back = jax.vjp(attention, q_BTNH, k_BTKH, v_BTKH)
        return value, *pull_back(grad_BTNH)

    got = jax.jit(value_and_grads, static_argnums=0)(
        lambda q, k, v: cpu_attention(q, k, v, segments_BT)
    )
    want = jax.jit(value_and_grads, static_argnums=0)(
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)
    )
    assert max(map(relative_gap, got, want)) < 2e-6


def test_linear_and_its_gradients():
    rng = np.random.default_rng(0)
    x_BTD, weight_DF, grad_BTF = (
        rng.standard_normal(shape, np.float32) for shape in ((2, 3, 5), (5, 4), (2, 3, 4))
    )
    value, pull_back = jax.vjp(linear, x_BTD, weight_DF)
    np.testing.assert_allclose(value, x_BTD @ weight_DF, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pull_back(grad_BTF)[0], grad_BTF @ weight_DF.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        pull_back(grad_BTF)[1], np.einsum("BTD,BTF->DF", x_BTD, grad_BTF), rtol=1e-5, atol=1e-6
    )


def test_linear_gives_a_float32_gradient_to_a_weight_used_in_bfloat16():
    """A bfloat16 sum of ones stands still at 256, and 1001 is no bfloat16."""
    value, pull_back = jax.vjp(
        linear, jnp.ones((1001, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.float32)
    )
    assert value.dtype == jnp.bfloat16
    grad_x, grad_weight = pull_back(value)
    assert grad_x.dtype == jnp.bfloat16 and grad_weight.dtype == jnp.float32
    np.testing.assert_array_equal(grad_weight, [[1001.0]])


def test_bfloat16_stays_near_float32():
    """bfloat16 rounds by up to 2^-8 = 0.4 %; 18 layers make 2 % of it (root mean square over the
    logits), 3 % at the worst logit.
    """
    cfg = mixed()
    params = random_params(cfg)
    full, half = (
        logits(cfg, params, BATCH),
        logits(dataclasses.replace(cfg, compute_dtype="bfloat16"), params, BATCH),
    )
    assert half.dtype == np.float32
    assert 1e-3 < np.std(half - full) / np.std(full) < 0.04
    assert relative_gap(half, full) < 0.06


def test_gather_rows_gradient():
    rng = np.random.default_rng(0)
    rows_RW, inverse_BT = rng.standard_normal((5, 3), np.float32), rng.integers(0, 4, (2, 7))
    weight_BTW = rng.standard_normal((2, 7, 3), np.float32)
    got = jax.grad(lambda rows: (gather_rows(rows, inverse_BT) * weight_BTW).sum())(rows_RW)
    want = np.zeros((5, 3))
    np.add.at(want, inverse_BT, weight_BTW)
    np.testing.assert_array_equal(gather_rows(rows_RW, inverse_BT), rows_RW[inverse_BT])
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert not got[4].any(), "a row that no token uses"


def test_gather_rows_sums_bfloat16_gradients_in_float32():
    """A bfloat16 sum of ones stands still at 256."""
    rows_RW = jnp.zeros((2, 1), jnp.bfloat16)
    got = jax.grad(
        lambda rows: gather_rows(rows, jnp.zeros((1, 1000), jnp.int32)).astype(jnp.float32).sum()
    )(rows_RW)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), [[1000.0], [0.0]])


def test_layers_are_stacked_and_unstacked_without_loss():
    cfg = mixed(beta="3 0 1.5")
    params, specs = random_params(cfg), layer_specs(cfg)
    layers = per_layer(params, specs)
    assert len(layers) == len(specs)
    assert_same_bits(stack_layers(layers, specs), params["blocks"])


def test_initial_values():
    """The test of init_params itself; elsewhere parameters are drawn in NumPy, because every tensor
    here costs a compilation.
    """
    cfg = tiny("stem*2", d_model=32, d_ff=40, vocab_size=100, init_std=0.05)
    params = init_params(cfg, seed=3)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract_params(cfg)
    )
    first_values, tensors = set(), 0
    for path, leaf in jax.tree.leaves_with_path(params):
        if path[-1].key == "scale":
            np.testing.assert_array_equal(leaf, 1.0)
            continue
        std = (
            (2 / (100 + 40)) ** 0.5 if path[-1].key == "table" else 0.05
        )  # Xavier for tables, as the STEM code does
        assert np.std(leaf) == pytest.approx(std, rel=0.15)
        assert abs(np.mean(leaf)) < 0.1 * std
        layers = leaf if path[0].key in ("blocks", "memory") else [leaf]
        tensors += len(layers)
        first_values |= {float(np.ravel(layer)[0]) for layer in layers}
    assert len(first_values) == tensors == 2 + 2 * 7, (
        "no two tensors, of no two layers, start alike"
    )
