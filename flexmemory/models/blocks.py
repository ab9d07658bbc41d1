"""The layer kinds. A block takes the residual stream and, where it has a memory, this layer's row
of every token.

One class is one variant: ``spec`` resolves its widths, ``source`` makes its rows,
``after_attention`` is its equation. x is the residual stream X_L, h its norm, row the value that
the memory hands in."""

from typing import Any

from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from flexmemory.errors import UserError, nearest
from flexmemory.models.attention import Attention, Context
from flexmemory.models.config import ModelConfig
from flexmemory.models.ffn import RMSNorm, Square, SwiGLU, gated, linear, weight
from flexmemory.models.memory import KEEPABLE, FFNRows, RowSource, TableRows
from flexmemory.models.patterns import LayerSpec, flex_widths, parse_betas, parse_pattern

Row = Any  # [B, T, W] in compute dtype, None for a kind without memory
Output = tuple[Array, dict | None]  # (x_BTD of the next layer, updated KV cache)


class AttnOnly(nnx.Module):
    """Control: x + Attn(norm x), a MemoryLLM layer whose row is zero. Every other kind starts from
    this one."""

    source: type[RowSource] | None = None  # what makes the rows
    takes_beta = False  # is one of the numbers in ``model.beta`` meant for this layer?

    @classmethod
    def spec(cls, cfg: ModelConfig, beta: float) -> LayerSpec:
        """Widths of a layer. Raises UserError for a ``beta`` that the kind cannot have."""
        return LayerSpec("attn_only")

    def __init__(self, cfg: ModelConfig, layer: LayerSpec, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn = Attention(cfg, rngs)

    def attend(self, x_BTD: Array, ctx: Context, cache: dict | None) -> Output:
        """(Attn(norm x), cache)"""
        return self.attn(self.attn_norm(x_BTD), ctx, cache)

    def __call__(
        self, x_BTD: Array, row_BTW: Row, ctx: Context, cache: dict | None = None
    ) -> Output:
        """x_BTD in compute dtype; a cache as :class:`Attention` takes it."""
        attn_BTD, cache = self.attend(x_BTD, ctx, cache)
        return self.after_attention(x_BTD, x_BTD + attn_BTD, row_BTW, ctx), cache

    def after_attention(self, x_BTD: Array, a_BTD: Array, row_BTW: Row, ctx: Context) -> Array:
        """x' from A = x + Attn(norm x): a kind's own equation."""
        return a_BTD


class Dense(AttnOnly):
    """C layer: A = x + Attn(norm x); x' = A + SwiGLU(norm A) (MemoryLLM Eq 2.1-2.3)."""

    parallel = False  # does the FFN read x instead of A?

    @classmethod
    def spec(cls, cfg: ModelConfig, beta: float) -> LayerSpec:
        return LayerSpec("parallel" if cls.parallel else "dense", d_ffn=cfg.d_ff, nominal=True)

    def __init__(self, cfg: ModelConfig, layer: LayerSpec, rngs: nnx.Rngs):
        super().__init__(cfg, layer, rngs)
        self.ffn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.ffn = SwiGLU(cfg, layer.d_ffn, rngs)

    def after_attention(self, x_BTD: Array, a_BTD: Array, row_BTW: Row, ctx: Context) -> Array:
        return a_BTD + ctx.scaled(self.ffn(self.ffn_norm(x_BTD if self.parallel else a_BTD)))


class Parallel(Dense):
    """Control: x' = x + Attn(norm x) + SwiGLU(norm' x), parallel like MemoryLLM but the FFN reads
    the context."""

    parallel = True


class MemoryLLM(AttnOnly):
    """M layer: x' = x + Attn(norm x) + row, row = SwiGLU_l(norm_l(E[id])) (MemoryLLM Eq 2.4-2.6).
    W = D."""

    source = FFNRows

    @classmethod
    def spec(cls, cfg: ModelConfig, beta: float) -> LayerSpec:
        d, f = cfg.d_model, cfg.d_ff
        return LayerSpec("memoryllm", d_memory=f, row_width=d, replaces=3 * d * f, nominal=True)

    def after_attention(self, x_BTD: Array, a_BTD: Array, row_BTW: Row, ctx: Context) -> Array:
        return a_BTD + ctx.scaled(row_BTW)


class Flex(AttnOnly):
    """A = x + Attn(norm x); x' = A + FFN-C(norm A) + row, row = FFN-M_l(norm_l(E[id])) (MemoryLLM
    section 4.2). W = D.

    The paper gives no equation: docs/variants.md says which switch covers which reading. beta = 0
    is memoryllm, beta = 8 dense."""

    source = FFNRows
    takes_beta = True

    @classmethod
    def spec(cls, cfg: ModelConfig, beta: float) -> LayerSpec:
        if beta == 0:
            return MemoryLLM.spec(cfg, beta)
        if beta == 8:
            return (Parallel if cfg.ffn_c_input == "parallel" else Dense).spec(cfg, beta)
        d_ffn, d_memory = flex_widths(cfg.d_model, cfg.d_ff, beta)
        square = 0
        if cfg.ffn_c_kind == "square":
            if beta not in (1, 2, 3):
                raise UserError(
                    f"config model.beta: {beta:g} with ffn_c_kind=square; square matrices need beta"
                    " 1, 2 or 3"
                )
            square, d_ffn = int(beta), cfg.d_model
        if not d_memory or not d_ffn:
            raise UserError(
                f"config model.beta: {beta:g} leaves FFN-{'M' if not d_memory else 'C'} of d_ff"
                f" {cfg.d_ff} without a unit; use {0 if d_memory else 8}"
            )
        replaces = 3 * cfg.d_model * d_memory
        return LayerSpec("flex", d_ffn, d_memory, cfg.d_model, square, replaces, nominal=True)

    def __init__(self, cfg: ModelConfig, layer: LayerSpec, rngs: nnx.Rngs):
        super().__init__(cfg, layer, rngs)
        self.parallel = cfg.ffn_c_input == "parallel"
        self.ffn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.ffn: SwiGLU | Square = (
            Square(cfg, layer.square, rngs) if layer.square else SwiGLU(cfg, layer.d_ffn, rngs)
        )

    def after_attention(self, x_BTD: Array, a_BTD: Array, row_BTW: Row, ctx: Context) -> Array:
        ffn_c_BTD = self.ffn(self.ffn_norm(x_BTD if self.parallel else a_BTD))
        return a_BTD + ffn_c_BTD + ctx.scaled(row_BTW)


class Stem(AttnOnly):
    """A = x + Attn(norm x); x' = A + W_down(SiLU(W_gate h) * row), h = norm A, row = U_l[id] (STEM
    section 1.1). W = F."""

    kind = "stem"
    source = TableRows
    context_maps: tuple[str, ...] = ("gate",)  # the projections of h that stay

    @classmethod
    def spec(cls, cfg: ModelConfig, beta: float) -> LayerSpec:
        replaces = (2 - len(cls.context_maps)) * cfg.d_model * cfg.d_ff
        return LayerSpec(cls.kind, cfg.d_ff, 0, cfg.d_ff, replaces=replaces, learned=True)

    def __init__(self, cfg: ModelConfig, layer: LayerSpec, rngs: nnx.Rngs):
        super().__init__(cfg, layer, rngs)
        self.ffn_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        for name in self.context_maps:
            setattr(self, name, weight(cfg, rngs, cfg.d_model, layer.d_ffn))
        self.down = weight(cfg, rngs, layer.d_ffn, cfg.d_model)

    def inner(self, h_BTD: Array, row_BTF: Array) -> Array:
        """What W_down reads, [B, T, F]."""
        return gated(self.context_map("gate", h_BTD), row_BTF)

    def context_map(self, name: str, h_BTD: Array) -> Array:
        return checkpoint_name(linear(h_BTD, getattr(self, name)[...]), name)

    def after_attention(self, x_BTD: Array, a_BTD: Array, row_BTW: Row, ctx: Context) -> Array:
        inner_BTF = self.inner(self.ffn_norm(a_BTD), row_BTW)
        return a_BTD + ctx.scaled(linear(inner_BTF, self.down[...]))


class StemGate(Stem):
    """The row replaces the gate: W_down(SiLU(row) * (W_up h)). SiLU on the row is assumed: the
    paper does not say."""

    kind = "stem-gate"
    context_maps = ("up",)

    def inner(self, h_BTD: Array, row_BTF: Array) -> Array:
        return gated(row_BTF, self.context_map("up", h_BTD))


class StemDagger(Stem):
    """The row is added to the up-projection: W_down(SiLU(W_gate h) * (W_up h + row)), STEM Eq 5."""

    kind = "stem-dagger"
    context_maps = ("gate", "up")

    def inner(self, h_BTD: Array, row_BTF: Array) -> Array:
        return gated(self.context_map("gate", h_BTD), self.context_map("up", h_BTD) + row_BTF)


KINDS: dict[str, type[AttnOnly]] = {
    "dense": Dense,
    "memoryllm": MemoryLLM,
    "flex": Flex,
    "stem": Stem,
    "stem-gate": StemGate,
    "stem-dagger": StemDagger,
    "parallel": Parallel,
    "attn_only": AttnOnly,
}


def layer_specs(model: ModelConfig) -> tuple[LayerSpec, ...]:
    """The resolved layers of a model, from input to output. Raises UserError on a bad pattern or
    beta."""
    blocks = [KINDS[kind] for kind in parse_pattern(model.pattern, KINDS)]
    count = sum(block.takes_beta for block in blocks)
    betas = iter(parse_betas(model.beta, count) if count else ())
    return tuple(block.spec(model, next(betas) if block.takes_beta else 0.0) for block in blocks)


def check_model(model: ModelConfig) -> None:
    """Shape rules of a model. Raises UserError."""
    if not model.head_dim and model.d_model % model.n_heads:
        raise UserError(
            f"config model.n_heads: {model.n_heads} does not divide d_model {model.d_model}; set"
            " model.head_dim or another count"
        )
    if model.n_heads % model.kv_heads:
        raise UserError(
            f"config model.n_kv_heads: {model.n_kv_heads} does not divide n_heads {model.n_heads}"
        )
    if model.head_width % 2:
        raise UserError(
            f"config model.head_dim: {model.head_width} is odd; RoPE needs an even width"
        )
    if model.attention == "cudnn" and (model.head_width % 8 or model.compute_dtype != "bfloat16"):
        raise UserError(
            "config model.attention: cudnn needs bfloat16 and a head width that is a multiple of"
            f" 8, not {model.head_width} in {model.compute_dtype}; use auto"
        )
    for name in model.remat_keep.split():
        if name not in KEEPABLE:
            raise UserError(
                f"config model.remat_keep: no tensor {name!r}; {nearest(name, KEEPABLE)}"
            )
    if model.remat_keep and not model.remat:
        raise UserError(
            f"config model.remat_keep: {model.remat_keep!r} without model.remat, which keeps"
            " everything; set model.remat"
        )
    layer_specs(model)
