"""Causal self-attention with RoPE, grouped queries, document masks and a KV cache."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from flexmemory.models.config import ModelConfig
from flexmemory.models.ffn import linear, weight
from flexmemory.sharding import local

BLOCK = 128  # queries at once in cpu_attention: their scores stay in the cache


@dataclasses.dataclass(frozen=True)
class Context:
    """What a block needs to know of the sequence, the same for every layer.

    positions_BT: int32, position of each token in its sequence. segments_BT: int32 document
    numbers, attention stays inside one, or None. ffn_scale: alpha of MemoryLLM section 3.2,
    multiplies what the FFN or the row adds to the residual; a plain 1.0 leaves the multiplication
    out, an array of one number is a value of the compiled program.
    implementation: of ``jax.nn.dot_product_attention``, or "cpu": :func:`cpu_attention`."""

    positions_BT: Array
    segments_BT: Array | None
    ffn_scale: float | Array
    implementation: str

    def scaled(self, x: Array) -> Array:
        if isinstance(self.ffn_scale, float) and self.ffn_scale == 1.0:
            return x
        return x * jnp.asarray(self.ffn_scale, x.dtype)


def rope(x_BTNH: Array, positions_BT: Array, base: float) -> Array:
    """Rotary embedding: dimension i is paired with i + H/2, angle position * base^(-2i/H); computed
    in float32."""
    half = x_BTNH.shape[-1] // 2
    frequency_h = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_h
    cos, sin = jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)
    left, right = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def causal_attention(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None, implementation: Any
) -> Array:
    """Causal attention, inside a document only where there are ``segments_BT``."""
    mask = None
    if segments_BT is not None:
        mask = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask, is_causal=True, implementation=implementation
    )


def cpu_attention(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array | None) -> Array:
    """Causal attention, one sequence and BLOCK queries at a time (an eighth of a long sequence);
    the keys behind them are not read.

    For the caches of a CPU: 1.9 times as fast as all scores at once (T 512). Scores are computed
    again in the backward pass."""
    length = q_BTNH.shape[1]
    block = max(BLOCK, -(-length // 8))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def sequence(q_TNH: Array, k_TKH: Array, v_TKH: Array, segments_T: Array | None) -> Array:
        parts = []
        for start in range(0, length, block):
            stop = min(start + block, length)
            mask_TS = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
            if segments_T is not None:
                mask_TS &= segments_T[start:stop, None] == segments_T[:stop]
            q, k, v = q_TNH[start:stop], k_TKH[:stop], v_TKH[:stop]
            parts.append(
                jax.nn.dot_product_attention(q, k, v, mask=mask_TS[None], implementation="xla")
            )
        return jnp.concatenate(parts)

    return jax.lax.map(lambda inputs: sequence(*inputs), (q_BTNH, k_BTKH, v_BTKH, segments_BT))


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(H)) v with an output projection (MemoryLLM Eq 2.1 with the Llama
    recipe); no biases.

    Weights: q [D, N, H], k [D, K, H], v [D, K, H], o [N, H, D], float32."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        d, n, k, h = cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.head_width
        self.q = weight(cfg, rngs, d, n, h)
        self.k = weight(cfg, rngs, d, k, h)
        self.v = weight(cfg, rngs, d, k, h)
        self.o = weight(cfg, rngs, n, h, d)
        self.rope_base = cfg.rope_base

    def __call__(
        self, h_BTD: Array, ctx: Context, cache: dict | None = None
    ) -> tuple[Array, dict | None]:
        """Returns (attention output BTD, updated cache).

        ``cache`` is {"k", "v"} of [B, S, K, H], S > every position (a position beyond it is not
        kept). Raises ValueError for document masks together with a cache: a served sequence is one
        document."""
        if cache is not None and ctx.segments_BT is not None:
            raise ValueError("segments_BT with a cache: a served sequence is one document")
        dtype, at = h_BTD.dtype, ctx.positions_BT
        q_BTNH = checkpoint_name(rope(heads(h_BTD, self.q[...]), at, self.rope_base), "q")
        k_BTKH = checkpoint_name(rope(heads(h_BTD, self.k[...]), at, self.rope_base), "k")
        v_BTKH = checkpoint_name(heads(h_BTD, self.v[...]), "v")
        if cache is None:
            # every device's own sequences and heads: they know nothing of others
            kernel: Callable = cpu_attention
            if ctx.implementation != "cpu":
                kernel = functools.partial(causal_attention, implementation=ctx.implementation)
            kernel = local(kernel, lambda q, *_: q)
            y_BTNH = kernel(q_BTNH, k_BTKH, v_BTKH, ctx.segments_BT)
        else:
            b = jnp.arange(h_BTD.shape[0])[:, None]
            cache = {
                "k": cache["k"].at[b, at].set(k_BTKH.astype(cache["k"].dtype)),
                "v": cache["v"].at[b, at].set(v_BTKH.astype(cache["v"].dtype)),
            }
            mask = (jnp.arange(cache["k"].shape[1]) <= at[:, :, None])[:, None]
            k, v = cache["k"].astype(dtype), cache["v"].astype(dtype)
            y_BTNH = jax.nn.dot_product_attention(q_BTNH, k, v, mask=mask, implementation="xla")
        # as one matrix: for two contracted axes XLA's CPU compiler copies the whole weight,
        # transposed, in every step
        o_ED = self.o.reshape(-1, h_BTD.shape[-1])
        y_BTE = checkpoint_name(y_BTNH, "attention").reshape(*h_BTD.shape[:2], -1)
        return linear(y_BTE, o_ED), cache


def heads(h_BTD: Array, weight_DNH: Array) -> Array:
    """h_BTD weight_DNH -> [B, T, N, H]"""
    flat_BTE = linear(h_BTD, weight_DNH.reshape(len(weight_DNH), -1))
    return flat_BTE.reshape(*h_BTD.shape[:2], *weight_DNH.shape[1:])
