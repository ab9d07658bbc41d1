"""Norms and feed-forward maps. Weights are float32 and cast to the input's dtype where they are
used."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, P
from jax.ad_checkpoint import checkpoint_name

from flexmemory.models.config import ModelConfig
from flexmemory.sharding import gathered, like, local, sharding, spec_of, sum_over_batch


@jax.custom_vjp
def linear(x: Array, weight_DF: Array) -> Array:
    """x [..., D] @ weight_DF, float32 and cast to x's dtype. The weight's gradient is summed and
    given in float32. Reverse-mode derivatives only.

    On a mesh the weight is gathered for use and its gradient scattered again. A matmul of its own
    also because JAX's own gradient forms its transpose, for which XLA's CPU compiler transposes the
    large operand [..., F] and then the result, a quarter of an FFN's time."""
    x, weight_DF = matching(x, weight_DF)
    return contract(x, weight_DF, x.ndim - 1, 0, P(*spec_of(x)[:-1], spec_of(weight_DF)[1]))


def _linear_forward(x: Array, weight_DF: Array) -> tuple:
    return linear(x, weight_DF), (x, weight_DF)


def _linear_backward(residuals: tuple, grad: Array) -> tuple:
    x, weight_DF = residuals
    cut_x, used_DF = matching(x, weight_DF)
    x_ND, grad_NF = cut_x.reshape(-1, weight_DF.shape[0]), grad.reshape(-1, weight_DF.shape[1])
    spec, by_rows = spec_of(weight_DF), (((0,), (0,)), ((), ()))

    # XLA would sum the whole gradient on every device and then cut it: twice the traffic
    def own(x_ND: Array, grad_NF: Array) -> Array:
        product = jax.lax.dot_general(x_ND, grad_NF, by_rows, preferred_element_type=jnp.float32)
        return sum_over_batch(product, spec)

    grad_DF = local(own, lambda *_: spec)(x_ND, grad_NF)
    return contract(grad, used_DF, grad.ndim - 1, 1, spec_of(x)), grad_DF.astype(weight_DF.dtype)


def matching(x: Array, weight_DF: Array) -> tuple[Array, Array]:
    """x, and the weight in its dtype whole over the batch's axes, both cut alike along D."""
    used_DF = gathered(weight_DF.astype(x.dtype))
    return like(x, P(*spec_of(x)[:-1], spec_of(used_DF)[0])), used_DF


def contract(a: Array, b: Array, axis_a: int, axis_b: int, out: P, dtype: Any = None) -> Array:
    """Sum of products over one axis of each; the result is cut as ``out`` says."""
    axes = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=dtype, out_sharding=sharding(out))


linear.defvjp(_linear_forward, _linear_backward)


@functools.partial(jax.checkpoint, prevent_cse=False)  # costs less to compute again than to keep
def gated(gate: Array, up: Array) -> Array:
    """SiLU(gate) * up"""
    return jax.nn.silu(gate) * up


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm(x: Array, scale_D: Array, eps: float) -> Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale_D).astype(x.dtype)


def weight(cfg: ModelConfig, rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    """A weight, float32, normal with ``cfg.init_std``."""
    return nnx.Param(nnx.initializers.normal(cfg.init_std)(rngs.params(), shape, jnp.float32))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, computed in float32."""

    def __init__(self, d: int, eps: float):
        self.scale = nnx.Param(jnp.ones(d, jnp.float32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.scale[...], self.eps)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias, computed in float32."""

    def __init__(self, d: int, eps: float):
        self.scale = nnx.Param(jnp.ones(d, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(d, jnp.float32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale + self.bias).astype(x.dtype)


class SwiGLU(nnx.Module):
    """W_down(SiLU(x W_gate) * (x W_up)), MemoryLLM Eq 2.2. Weights: gate [D, F], up [D, F], down
    [F, D]."""

    def __init__(self, cfg: ModelConfig, d_ff: int, rngs: nnx.Rngs):
        self.gate = weight(cfg, rngs, cfg.d_model, d_ff)
        self.up = weight(cfg, rngs, cfg.d_model, d_ff)
        self.down = weight(cfg, rngs, d_ff, cfg.d_model)

    def __call__(self, x: Array) -> Array:
        gate = checkpoint_name(linear(x, self.gate[...]), "gate")
        up = checkpoint_name(linear(x, self.up[...]), "up")
        return linear(gated(gate, up), self.down[...])


class Square(nnx.Module):
    """FFN-C of ``count`` D x D matrices, the other reading of MemoryLLM section 4.2.

    1: a linear map; 2: SiLU(x A) B; 3: SwiGLU of width D. Weights: gate, up, down [D, D] as far as
    they exist."""

    def __init__(self, cfg: ModelConfig, count: int, rngs: nnx.Rngs):
        self.count = count
        self.down = weight(cfg, rngs, cfg.d_model, cfg.d_model)
        if count >= 2:
            self.gate = weight(cfg, rngs, cfg.d_model, cfg.d_model)
        if count == 3:
            self.up = weight(cfg, rngs, cfg.d_model, cfg.d_model)

    def __call__(self, x: Array) -> Array:
        if self.count == 1:
            return linear(x, self.down[...])
        gate = checkpoint_name(linear(x, self.gate[...]), "gate")
        if self.count == 2:
            return linear(jax.nn.silu(gate), self.down[...])
        up = checkpoint_name(linear(x, self.up[...]), "up")
        return linear(gated(gate, up), self.down[...])
