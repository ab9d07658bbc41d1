"""Causal self-attention with RoPE, grouped queries, document masks and a KV cache."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flexmemory.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Context:
    """What a block needs to know of the sequence, the same for every layer.

    positions_BT: int32, position of each token in its sequence. segments_BT: int32 document numbers, attention stays inside
    one, or None. ffn_scale: alpha of MemoryLLM section 3.2, multiplies what the FFN or the row adds to the residual.
    implementation: of ``jax.nn.dot_product_attention``.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    ffn_scale: float
    implementation: str

    def scaled(self, x: jax.Array) -> jax.Array:
        return x if self.ffn_scale == 1.0 else x * jnp.asarray(self.ffn_scale, x.dtype)


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, base: float) -> jax.Array:
    """Rotary embedding: dimension i is paired with i + H/2, angle position * base^(-2i/H); computed in float32."""
    half = x_BTNH.shape[-1] // 2
    frequency_h = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_h
    cos, sin = jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)
    left, right = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x_BTNH.dtype)


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(H)) v with an output projection (MemoryLLM Eq 2.1 with the Llama recipe); no biases.

    Weights: q [D, N, H], k [D, K, H], v [D, K, H], o [N, H, D], float32.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        d, n = cfg.d_model, cfg.n_heads
        k, h = cfg.n_kv_heads or n, cfg.head_dim or d // n
        init = nnx.initializers.normal(cfg.init_std)
        self.q = nnx.Param(init(rngs.params(), (d, n, h), jnp.float32))
        self.k = nnx.Param(init(rngs.params(), (d, k, h), jnp.float32))
        self.v = nnx.Param(init(rngs.params(), (d, k, h), jnp.float32))
        self.o = nnx.Param(init(rngs.params(), (n, h, d), jnp.float32))
        self.rope_base = cfg.rope_base

    def __call__(self, h_BTD: jax.Array, ctx: Context, cache: dict | None = None) -> tuple[jax.Array, dict | None]:
        """Returns (attention output BTD, updated cache).

        ``cache`` is {"k", "v"} of [B, S, K, H], S > every position (a position beyond it is not kept). Raises ValueError for
        document masks together with a cache: a served sequence is one document.
        """
        if cache is not None and ctx.segments_BT is not None:
            raise ValueError("segments_BT with a cache: a served sequence is one document")
        dtype = h_BTD.dtype
        q_BTNH = rope(jnp.einsum("BTD,DNH->BTNH", h_BTD, self.q.astype(dtype)), ctx.positions_BT, self.rope_base)
        k_BTKH = rope(jnp.einsum("BTD,DKH->BTKH", h_BTD, self.k.astype(dtype)), ctx.positions_BT, self.rope_base)
        v_BTKH = jnp.einsum("BTD,DKH->BTKH", h_BTD, self.v.astype(dtype))
        if cache is None:
            mask = None
            if ctx.segments_BT is not None:
                mask = (ctx.segments_BT[:, :, None] == ctx.segments_BT[:, None, :])[:, None]
            y_BTNH = jax.nn.dot_product_attention(
                q_BTNH, k_BTKH, v_BTKH, mask=mask, is_causal=True, implementation=ctx.implementation)
        else:
            b = jnp.arange(h_BTD.shape[0])[:, None]
            cache = {"k": cache["k"].at[b, ctx.positions_BT].set(k_BTKH.astype(cache["k"].dtype)),
                     "v": cache["v"].at[b, ctx.positions_BT].set(v_BTKH.astype(cache["v"].dtype))}
            slots = jnp.arange(cache["k"].shape[1])
            mask = (slots <= ctx.positions_BT[:, :, None])[:, None]
            y_BTNH = jax.nn.dot_product_attention(
                q_BTNH, cache["k"].astype(dtype), cache["v"].astype(dtype), mask=mask, implementation="xla")
        # as one matrix: for two contracted axes XLA's CPU compiler copies the whole weight, transposed, in every step
        o_ND = self.o.astype(dtype).reshape(-1, h_BTD.shape[-1])
        return y_BTNH.reshape(*h_BTD.shape[:2], -1) @ o_ND, cache
