"""The loss by pieces against the loss of all logits at once, and against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmemory.models.loss import chunked_losses, mean_loss, token_losses

B, T, D, V = 3, 7, 16, 40
CHUNKS = [
    None,
    21,
    100,
    7,
    5,
    1,
]  # all at once (three times), dividing 21 tokens, not dividing, one by one


def draw(dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(0)
    x_BTD, head_DV = (
        rng.standard_normal((B, T, D), np.float32),
        scale * rng.standard_normal((D, V), np.float32),
    )
    return (
        jnp.asarray(x_BTD, dtype),
        jnp.asarray(head_DV),
        jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
    )


def plain_loss(x_BTD, head_DV, targets_BT, tokens, z_weight):
    logits_BTV = jnp.einsum(
        "BTD,DV->BTV", x_BTD, head_DV.astype(x_BTD.dtype), preferred_element_type=jnp.float32
    )
    ce_BT, z_BT = token_losses(logits_BTV, targets_BT)
    loss, z = ce_BT.sum() / tokens, z_BT.sum() / tokens
    return loss + z_weight * z, (loss, z)


@functools.partial(jax.jit, static_argnames=("loss", "z_weight", "chunk"))
def loss_and_grads(loss, x_BTD, head_DV, targets_BT, z_weight, **chunk):
    return jax.value_and_grad(
        lambda x, head: loss(x, head, targets_BT, targets_BT.size, z_weight, **chunk),
        (0, 1),
        has_aux=True,
    )(x_BTD, head_DV)


def gap(got, want):
    """max |got - want| / max |want|"""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


def test_token_losses_against_float64():
    rng = np.random.default_rng(0)
    logits, targets = (
        rng.normal(size=(2, 5, 11)).astype(np.float32) * 5,
        rng.integers(0, 11, (2, 5)),
    )
    ce, z = token_losses(logits, targets)
    lse = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(
        ce, lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0], rtol=2e-6
    )
    np.testing.assert_allclose(z, lse**2, rtol=2e-6)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_losses_by_pieces_are_those_of_all_logits(chunk):
    x_BTD, head_DV, targets_BT = draw()
    got = jax.jit(chunked_losses, static_argnames="chunk")(x_BTD, head_DV, targets_BT, chunk=chunk)
    want = token_losses(x_BTD @ head_DV, targets_BT)
    for got_BT, want_BT in zip(got, want, strict=True):
        assert got_BT.dtype == jnp.float32 and got_BT.shape == (B, T)
        np.testing.assert_allclose(got_BT, want_BT, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("z_weight", [0.0, 0.3])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_and_gradients_by_pieces_are_those_of_all_logits(chunk, z_weight):
    batch = draw()
    (got, got_sums), got_grads = loss_and_grads(mean_loss, *batch, z_weight, chunk=chunk)
    (want, want_sums), want_grads = loss_and_grads(plain_loss, *batch, z_weight)
    np.testing.assert_allclose([got, *got_sums], [want, *want_sums], rtol=5e-7)
    assert float(got) == pytest.approx(float(got_sums[0]) + z_weight * float(got_sums[1]), rel=1e-6)
    assert [grad.dtype for grad in got_grads] == [jnp.float32] * 2
    assert max(map(gap, got_grads, want_grads)) < 1e-6


def test_the_loss_without_a_gradient_is_the_loss_with_one():
    batch = draw()
    objective, sums = jax.jit(mean_loss, static_argnums=(3, 4, 5))(*batch, B * T, 0.3, 5)
    (want, want_sums), _ = loss_and_grads(mean_loss, *batch, 0.3, chunk=5)
    np.testing.assert_allclose([objective, *sums], [want, *want_sums], rtol=5e-7)


def test_the_gradient_scales_with_what_follows_and_the_sums_carry_none():
    x_BTD, head_DV, targets_BT = draw()

    def scaled(x_BTD, head_DV):
        objective, (loss, z) = mean_loss(x_BTD, head_DV, targets_BT, B * T, 0.3, 5)
        return -2.5 * objective + 7 * loss - 3 * z

    _, grads = loss_and_grads(mean_loss, x_BTD, head_DV, targets_BT, 0.3, chunk=5)
    for got, want in zip(jax.jit(jax.grad(scaled, (0, 1)))(x_BTD, head_DV), grads, strict=True):
        assert gap(got, -2.5 * want) < 1e-6


def test_a_tied_head_gets_its_gradient():
    x_BTD, head_DV, targets_BT = draw()

    def of_embedding(embed_VD, loss, *chunk):
        return loss(x_BTD * embed_VD[targets_BT], embed_VD.T, targets_BT, B * T, 0.3, *chunk)[0]

    grad = jax.jit(jax.grad(of_embedding), static_argnums=(1, 2))
    assert gap(grad(head_DV.T, mean_loss, 5), grad(head_DV.T, plain_loss)) < 1e-6


def test_extreme_logits_stay_finite_and_right():
    """Logits of up to 1e4: exp of one alone overflows, and all tokens are certain, most of them of
    the wrong word.
    """
    x_BTD, head_DV, targets_BT = draw(scale=1e3)
    (objective, (loss, _)), grads = loss_and_grads(
        mean_loss, x_BTD, head_DV, targets_BT, 0.0, chunk=5
    )
    logits = np.asarray(x_BTD, np.float64) @ np.asarray(head_DV, np.float64)
    want = np.mean(
        logits.max(-1) - np.take_along_axis(logits, np.asarray(targets_BT)[..., None], -1)[..., 0]
    )
    assert float(loss) == pytest.approx(want, rel=1e-5) and want > 1e3
    assert all(np.isfinite(grad).all() and np.abs(grad).max() > 0 for grad in grads)


def test_bfloat16_states_and_a_float32_gradient_of_the_head():
    """x and d logits are rounded to bfloat16 (2^-9 = 0.2 % each), sums are not: 0.5 % of the
    largest gradient; the loss as in the plain form.
    """
    x_BTD, head_DV, targets_BT = draw(jnp.bfloat16)
    (got, _), got_grads = loss_and_grads(mean_loss, x_BTD, head_DV, targets_BT, 0.3, chunk=5)
    (half, _), _ = loss_and_grads(plain_loss, x_BTD, head_DV, targets_BT, 0.3)
    rounded = head_DV.astype(jnp.bfloat16).astype(jnp.float32)
    _, want_grads = loss_and_grads(plain_loss, x_BTD.astype(jnp.float32), rounded, targets_BT, 0.3)
    assert float(got) == pytest.approx(float(half), rel=5e-7)
    assert [grad.dtype for grad in got_grads] == [jnp.bfloat16, jnp.float32]
    assert 1e-5 < max(map(gap, got_grads, want_grads)) < 5e-3


def test_the_gradient_of_the_head_is_summed_in_float32_over_pieces():
    """Many equal tokens, each in a piece of its own: a bfloat16 sum of ones stands still at 256."""
    x_BTD, targets_BT = jnp.ones((1, 1000, 1), jnp.bfloat16), jnp.zeros((1, 1000), jnp.int32)
    grad_DV = jax.grad(lambda head_DV: mean_loss(x_BTD, head_DV, targets_BT, 1, 0.0, 1)[0])(
        jnp.zeros((1, 2), jnp.float32)
    )
    np.testing.assert_array_equal(grad_DV, [[-500.0, 500.0]])


def test_temporaries_are_pieces_and_never_all_logits():
    batch = [
        jax.ShapeDtypeStruct(*shape)
        for shape in (((4, 512, 8), jnp.float32), ((8, 4096), jnp.float32), ((4, 512), jnp.int32))
    ]

    def temporaries(loss, **chunk):
        return (
            loss_and_grads.lower(loss, *batch, 0.3, **chunk)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    logits = 4 * 4 * 512 * 4096
    assert temporaries(plain_loss) > 1.9 * logits
    assert temporaries(mean_loss, chunk=256) < 0.3 * logits, (
        "an eighth of the tokens, logits and their gradient"
    )


def test_the_default_chunk_is_what_the_budget_holds(monkeypatch):
    batch = draw()
    monkeypatch.setattr(
        "flexmemory.models.loss.LOGITS_BYTES", 4 * V * 8 + 3
    )  # 8 tokens: three pieces of 7
    traced = str(jax.make_jaxpr(lambda x, head: chunked_losses(x, head, batch[2]))(*batch[:2]))
    assert f"f32[7,{V}]" in traced and f"f32[21,{V}]" not in traced
