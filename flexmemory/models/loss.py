"""Cross-entropy over a large vocabulary, a piece of the batch at a time: logits of all its tokens
never exist at once."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from flexmemory.sharding import gathered, local, names, spec_of, sum_over_batch, varying

# Of one piece's logits [tokens, V] in float32, where no chunk is given. A CPU is as fast with an
# eighth of it; a GPU reads and writes the head's gradient [D, V] once per piece, which takes 200 /
# tokens of the piece's matmuls.
LOGITS_BYTES = 1 << 29


def token_losses(logits_BTV: Array, targets_BT: Array) -> tuple[Array, Array]:
    """(cross-entropy in nats, logsumexp^2), each float32 [B, T]."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return lse_BT - picked_BT, lse_BT**2


def chunked_losses(
    x_BTD: Array, head_DV: Array, targets_BT: Array, chunk: int | None = None
) -> tuple[Array, Array]:
    """:func:`token_losses` of the logits x_BTD @ head_DV, for evaluation: its derivative would keep
    every logit.

    x_BTD final states in compute dtype; head_DV float32; targets_BT int32. ``chunk``: the most
    tokens whose logits exist at once; None: as many as LOGITS_BYTES holds. On a mesh every device
    takes its own tokens, and its own part of the vocabulary."""
    weight_DV = gathered(head_DV.astype(x_BTD.dtype))
    vocab_axes = names(spec_of(weight_DV)[1])

    def losses(x_BTD: Array, weight_DV: Array, targets_BT: Array) -> tuple:
        count = pieces(targets_BT.size, weight_DV.shape[1], chunk)

        def piece(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            x_ND, targets_N = inputs
            _, _, _, lse_N, picked_N = _scores(x_ND, targets_N, weight_DV, vocab_axes)
            return lse_N - picked_N, lse_N**2

        by_piece = jax.lax.map(piece, (split(x_BTD, count), split(targets_BT, count)))
        return jax.tree.map(lambda loss_CN: join(loss_CN, targets_BT.shape), by_piece)

    losses = local(losses, lambda x, weight, targets: (targets, targets))
    return losses(x_BTD, weight_DV, targets_BT)


def _scores(
    x_ND: Array, targets_N: Array, weight_DV: Array, vocab_axes: tuple[str, ...]
) -> tuple[Array, ...]:
    """(exp(logits - the largest) [N, V], their sum, place of the target in V, logsumexp, logit of
    the target), float32. ``vocab_axes``: mesh axes over which the vocabulary is cut; V is the own
    part, outside of which a place may lie, and all else but the first is of the whole."""
    logits_NV = _matmul(x_ND, weight_DV)
    own = weight_DV.shape[1]
    place_N = targets_N - (jax.lax.axis_index(vocab_axes) * own if vocab_axes else 0)
    near_N1 = jnp.clip(place_N, 0, own - 1)[:, None]
    picked_N = jnp.take_along_axis(logits_NV, near_N1, axis=-1)[:, 0]
    top_N = logits_NV.max(axis=-1)
    if vocab_axes:
        top_N = jax.lax.pmax(top_N, vocab_axes)
        is_own_N = (place_N >= 0) & (place_N < own)
        picked_N = jax.lax.psum(jnp.where(is_own_N, picked_N, 0), vocab_axes)
    exp_NV = jnp.exp(logits_NV - top_N[:, None])
    sum_N = exp_NV.sum(axis=-1)
    if vocab_axes:
        sum_N = jax.lax.psum(sum_N, vocab_axes)
    return exp_NV, sum_N, place_N, jnp.log(sum_N) + top_N, picked_N


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def mean_loss(
    x_BTD: Array,
    head_DV: Array,
    targets_BT: Array,
    tokens: int,
    z_weight: float,
    chunk: int | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """(loss + z_weight * z, (loss, z)): float32 sums over the batch of :func:`chunked_losses`,
    whose arguments it takes, over ``tokens``.

    Only the first output is differentiable; its gradient is computed piece by piece in the forward
    pass, so that logits are computed once; that of head_DV is summed in float32. ``tokens`` and
    ``z_weight`` are plain numbers."""
    return _means(*chunked_losses(x_BTD, head_DV, targets_BT, chunk), tokens, z_weight)


def _means(ce_BT: Array, z_BT: Array, tokens: int, z_weight: float) -> tuple:
    loss, z = ce_BT.sum() / tokens, z_BT.sum() / tokens
    return loss + z_weight * z, (loss, z)


def _forward(
    x_BTD: Array, head_DV: Array, targets_BT: Array, tokens: int, z_weight: float, chunk: int | None
) -> tuple:
    head_spec, weight_DV = spec_of(head_DV), gathered(head_DV.astype(x_BTD.dtype))
    vocab_axes = names(spec_of(weight_DV)[1])

    def losses(x_BTD: Array, weight_DV: Array, targets_BT: Array) -> tuple:
        def piece(grad_DV: Array, inputs: tuple[Array, Array]) -> tuple:
            x_ND, targets_N = inputs
            scores = _scores(x_ND, targets_N, weight_DV, vocab_axes)
            exp_NV, sum_N, place_N, lse_N, picked_N = scores
            # d ce = softmax - onehot; d lse^2 = 2 lse softmax
            scale_N = (1 + 2 * z_weight * lse_N) / (sum_N * tokens)
            hit_NV = jnp.arange(exp_NV.shape[1]) == place_N[:, None]
            grad_NV = (exp_NV * scale_N[:, None] - hit_NV / tokens).astype(x_ND.dtype)
            grad_ND = _matmul(grad_NV, weight_DV.T)
            grad_ND = jax.lax.psum(grad_ND, vocab_axes) if vocab_axes else grad_ND
            losses = lse_N - picked_N, lse_N**2, grad_ND.astype(x_ND.dtype)
            return grad_DV + _matmul(x_ND.T, grad_NV), losses

        count = pieces(targets_BT.size, weight_DV.shape[1], chunk)
        # a token that only fills up the last piece has x = 0: it adds nothing to grad_DV, and join
        # drops the rest
        zeros_DV = varying(jnp.zeros(weight_DV.shape, jnp.float32), vocab_axes)
        inputs = split(x_BTD, count), split(targets_BT, count)
        by_piece: tuple[Array, ...]
        grad_DV, by_piece = jax.lax.scan(piece, zeros_DV, inputs)
        ce_BT, z_BT, grad_BTD = (join(a_CN, targets_BT.shape) for a_CN in by_piece)
        return ce_BT, z_BT, grad_BTD, sum_over_batch(grad_DV, head_spec)

    losses = local(losses, lambda x, weight, targets: (targets, targets, x, head_spec))
    ce_BT, z_BT, grad_BTD, grad_DV = losses(x_BTD, weight_DV, targets_BT)
    return _means(ce_BT, z_BT, tokens, z_weight), (grad_BTD, grad_DV)


def _backward(
    tokens: int, z_weight: float, chunk: int | None, residuals: tuple, cotangents: tuple
) -> tuple:
    grad_BTD, grad_DV = residuals
    by, _ = cotangents  # 1 in a plain gradient, which XLA leaves out
    return grad_BTD * by.astype(grad_BTD.dtype), grad_DV * by, None


mean_loss.defvjp(_forward, _backward)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def pieces(tokens: int, vocab: int, chunk: int | None) -> int:
    """Into how many pieces to cut ``tokens``."""
    return -(-tokens // (chunk or max(1, LOGITS_BYTES // (4 * vocab))))


def split(a_BT: Array, count: int) -> Array:
    """[B, T, ...] -> [count, N, ...], filled up with 0. Piece c is every count-th token from c on:
    a batch spread over devices stays spread."""
    a_T = a_BT.reshape(-1, *a_BT.shape[2:])
    a_T = jnp.pad(a_T, [(0, -len(a_T) % count)] + [(0, 0)] * (a_T.ndim - 1))
    return a_T.reshape(-1, count, *a_T.shape[1:]).swapaxes(0, 1)


def join(a_CN: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of :func:`split`: [C, N, ...] -> [B, T, ...]."""
    a_T = a_CN.swapaxes(0, 1).reshape(-1, *a_CN.shape[2:])
    return a_T[: shape[0] * shape[1]].reshape(*shape, *a_CN.shape[2:])
