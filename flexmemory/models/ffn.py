"""Norms and feed-forward maps. Weights are float32 and cast to the input's dtype where they are used."""

import jax
import jax.numpy as jnp
from flax import nnx

from flexmemory.config import ModelConfig


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, computed in float32."""

    def __init__(self, d: int, eps: float):
        self.scale = nnx.Param(jnp.ones(d, jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias, computed in float32."""

    def __init__(self, d: int, eps: float):
        self.scale = nnx.Param(jnp.ones(d, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(d, jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale + self.bias).astype(x.dtype)


class SwiGLU(nnx.Module):
    """W_down(SiLU(x W_gate) * (x W_up)), MemoryLLM Eq 2.2. Weights: gate [D, F], up [D, F], down [F, D]."""

    def __init__(self, cfg: ModelConfig, d_ff: int, rngs: nnx.Rngs):
        init = nnx.initializers.normal(cfg.init_std)
        self.gate = nnx.Param(init(rngs.params(), (cfg.d_model, d_ff), jnp.float32))
        self.up = nnx.Param(init(rngs.params(), (cfg.d_model, d_ff), jnp.float32))
        self.down = nnx.Param(init(rngs.params(), (d_ff, cfg.d_model), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = x @ self.gate.astype(x.dtype), x @ self.up.astype(x.dtype)
        return (jax.nn.silu(gate) * up) @ self.down.astype(x.dtype)


class Square(nnx.Module):
    """FFN-C of ``count`` D x D matrices, the other reading of MemoryLLM section 4.2.

    1: a linear map; 2: SiLU(x A) B; 3: SwiGLU of width D. Weights: gate, up, down [D, D] as far as they exist.
    """

    def __init__(self, cfg: ModelConfig, count: int, rngs: nnx.Rngs):
        init = nnx.initializers.normal(cfg.init_std)
        shape = (cfg.d_model, cfg.d_model)
        self.down = nnx.Param(init(rngs.params(), shape, jnp.float32))
        if count >= 2:
            self.gate = nnx.Param(init(rngs.params(), shape, jnp.float32))
        if count == 3:
            self.up = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.count = count

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.count >= 2:
            gate = jax.nn.silu(x @ self.gate.astype(x.dtype))
            x = gate * (x @ self.up.astype(x.dtype)) if self.count == 3 else gate
        return x @ self.down.astype(x.dtype)
