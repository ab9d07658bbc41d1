"""The decoder: embedding, memory rows, a stack scanned over its repeating units, head.

Two calls make a forward pass: ``rows = model.rows(unique_ids)`` and ``model(ids, rows, inverse)``.
Serving leaves the first one out and hands in rows read from a TKV store.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jax.sharding import auto_axes, get_abstract_mesh

from flexmemory.models.attention import Context
from flexmemory.models.blocks import KINDS, layer_specs
from flexmemory.models.config import ModelConfig
from flexmemory.models.ffn import RMSNorm, contract, matching
from flexmemory.models.memory import (
    Rows,
    TableRows,
    TokenMemory,
    apply_stack,
    gather_rows,
    remat,
    row_groups,
    rows_by_unit,
    take_rows,
)
from flexmemory.models.patterns import segments
from flexmemory.sharding import like, spec_of


class Transformer(nnx.Module):
    """Llama-style decoder. Parameters float32; the residual stream has ``cfg.compute_dtype``;
    logits are float32.

    Parameters: embed [V, D]; head [D, V] unless tied; norm; blocks.s<i>.u<j>.* stacked over the
    repeats of segment i; memory.* (only with ``with_memory``): everything that a fold makes
    superfluous. With ``stacked`` False every layer is a segment of its own: the form that is
    served, in which a step reads each weight where it lies and the cache is updated in place.
    ``draw(key, shape, dtype)`` makes the first values of a learned table.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        rngs: nnx.Rngs,
        with_memory: bool = True,
        stacked: bool = True,
        draw: Callable = jax.random.normal,
    ):
        init = nnx.initializers.normal(cfg.init_std)
        self.specs = layer_specs(cfg)
        self.cuts = segments(self.specs) if stacked else single_layers(self.specs)
        self.cfg = cfg
        self.embed = nnx.Param(init(rngs.params(), (cfg.vocab_size, cfg.d_model), jnp.float32))
        self.head = (
            None
            if cfg.tied_head
            else nnx.Param(init(rngs.params(), (cfg.d_model, cfg.vocab_size), jnp.float32))
        )
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.blocks = nnx.Dict(
            {
                f"s{i}": nnx.Dict(
                    {
                        f"u{j}": jax.vmap(lambda key, spec=spec: KINDS[spec.kind](cfg, spec, key))(
                            rngs.split(repeats)
                        )
                        for j, spec in enumerate(unit)
                    }
                )
                for i, (unit, repeats) in enumerate(self.cuts)
            }
        )
        sources = {
            kind: (
                functools.partial(TableRows, draw=draw)
                if block.source is TableRows
                else block.source
            )
            for kind, block in KINDS.items()
        }
        self.memory = (
            TokenMemory(cfg, self.specs, sources, rngs)
            if with_memory and row_groups(self.specs)
            else None
        )

    def rows(self, ids_R: jax.Array | None) -> Rows:
        """Live rows of the addresses ids_R, int32: {group: rows_LRW in compute dtype}; {} for a
        model without memory.

        ids_R None: embedding and tables hold the rows of the R addresses alone, in their order
        (``train.step.ADDRESSED``).
        """
        return {} if self.memory is None else self.memory(ids_R, take_rows(self.embed[...], ids_R))

    def hidden(
        self,
        ids_BT,
        rows: Rows,
        inverse_BT,
        *,
        positions_BT=None,
        segments_BT=None,
        cache=None,
        ffn_scale=1.0,
    ):
        """Final normed states.

        ids_BT int32; rows as from :meth:`rows`; inverse_BT int32 places each token's row: rows[:,
        inverse_BT]. positions_BT defaults to 0..T-1. segments_BT int32 document numbers or None.
        cache as from :func:`empty_cache`. ffn_scale of :class:`Context`: one number for all layers,
        or an array [L] of one for each layer of the model. Returns (x_BTD in compute dtype, updated
        cache or None).
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(
                jnp.arange(ids_BT.shape[1], dtype=jnp.int32), ids_BT.shape
            )
        x_BTD, cache = self.layers(
            self.embedded(ids_BT), rows, inverse_BT, positions_BT, segments_BT, cache, ffn_scale
        )
        return self.norm(x_BTD), cache

    def embedded(self, ids_BT) -> jax.Array:
        """x_BTD, the residual stream before the first layer."""
        return gather_rows(self.embed[...], ids_BT).astype(self.cfg.compute_dtype)

    def layers(
        self,
        x_BTD,
        rows: Rows,
        inverse_BT,
        positions_BT,
        segments_BT=None,
        cache=None,
        ffn_scale=1.0,
        first: int = 0,
        last: int | None = None,
    ):
        """(x_BTD, cache) after segments ``first`` to before ``last``; ``rows`` and ``cache`` are
        those segments' own.
        """
        cfg = self.cfg
        ctx = Context(
            positions_BT,
            segments_BT,
            ffn_scale,
            attention_implementation(cfg, masked=segments_BT is not None),
        )
        cuts, new_cache = self.cuts[first:last], {}
        start = sum(len(unit) * repeats for unit, repeats in self.cuts[:first])
        for i, ((unit, repeats), unit_rows) in enumerate(
            zip(cuts, rows_by_unit(rows, cuts), strict=True), first
        ):

            def body(x_BTD, layer, unit=unit):
                blocks, layer_rows, layer_cache, scale_U = layer
                made = {}
                for j, spec in enumerate(unit):
                    u = f"u{j}"
                    row_BTW = gather_rows(layer_rows[u], inverse_BT) if spec.row_width else None
                    own_ctx = (
                        ctx if scale_U is None else dataclasses.replace(ctx, ffn_scale=scale_U[j])
                    )
                    y_BTD, made[u] = blocks[u](
                        x_BTD, row_BTW, own_ctx, layer_cache and layer_cache[u]
                    )
                    x_BTD = like(y_BTD, spec_of(x_BTD))
                return x_BTD, made if layer_cache is not None else None

            body = remat(body, repeats, cfg.scan_layers, cfg.remat_keep) if cfg.remat else body
            layers = slice(start, start + len(unit) * repeats)
            scale_RU = (
                ffn_scale[layers].reshape(repeats, len(unit)) if jnp.ndim(ffn_scale) else None
            )
            start = layers.stop
            xs = (self.blocks[f"s{i}"], unit_rows, cache and cache[f"s{i}"], scale_RU)
            x_BTD, new_cache[f"s{i}"] = apply_stack(body, x_BTD, xs, repeats, cfg.scan_layers)
        return x_BTD, new_cache if cache is not None else None

    @property
    def head_DV(self) -> jax.Array:
        """The output weights, float32: the head, or the transposed embedding."""
        return self.embed[...].T if self.head is None else self.head[...]

    def __call__(self, ids_BT, rows: Rows, inverse_BT, **kwargs) -> jax.Array:
        """logits_BTV float32; arguments as for :meth:`hidden`."""
        return output_logits(self.hidden(ids_BT, rows, inverse_BT, **kwargs)[0], self.head_DV)


def output_logits(x_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """logits_BTV float32 of final states x_BTD."""
    x_BTD, used_DV = matching(x_BTD, head_DV)
    return contract(x_BTD, used_DV, 2, 0, P(*spec_of(x_BTD)[:-1], spec_of(used_DV)[1]), jnp.float32)


def attention_implementation(cfg: ModelConfig, masked: bool) -> str:
    """``Context.implementation``: "auto" is cpu on a CPU, cudnn on a GPU where cuDNN surely can
    (bfloat16, head width a multiple of 8 and at most 128, no document mask), else xla.
    """
    if cfg.attention != "auto":
        return cfg.attention
    can = (
        cfg.compute_dtype == "bfloat16"
        and cfg.head_width % 8 == 0
        and cfg.head_width <= 128
        and not masked
    )
    return {"cpu": "cpu", "gpu": "cudnn" if can else "xla"}.get(jax.default_backend(), "xla")


def init_params(cfg: ModelConfig, seed: int, places=None) -> dict:
    """Fresh parameters as a nested dict of float32 arrays, a pure function of (cfg, seed).
    ``places``: a tree of their shardings.
    """
    return initialiser(cfg, seed, lambda params: params, places)()


def initialiser(
    cfg: ModelConfig, seed: int, pick: Callable, places=None, draw: Callable = jax.random.normal
) -> Callable:
    """The jitted function ``f(*arguments) -> pick(parameters)`` of fresh ones, of which no more are
    made than is picked. ``places``: shardings of the result; ``draw(*arguments, key, shape,
    dtype)``: the first values of a learned table.
    """

    def fresh(*args):
        return pick(
            nnx.to_pure_dict(
                nnx.state(Transformer(cfg, nnx.Rngs(seed), draw=functools.partial(draw, *args)))
            )
        )

    if (
        places is not None and not get_abstract_mesh().empty
    ):  # in explicit mode every device would draw all numbers of every table
        fresh = auto_axes(fresh, out_sharding=jax.tree.map(lambda place: place.spec, places))
    # it runs once: on a CPU the compiler's optimiser takes 14 s over the random draws of a mixed
    # stack, without it 2 s
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(fresh, out_shardings=places, compiler_options=quick)


def abstract_params(cfg: ModelConfig, with_memory: bool = True) -> dict:
    """Shapes and dtypes of the parameters, without computing them."""
    return jax.eval_shape(
        lambda: nnx.to_pure_dict(nnx.state(Transformer(cfg, nnx.Rngs(0), with_memory)))
    )


def build(cfg: ModelConfig, with_memory: bool = True, stacked: bool = True):
    """Returns ``merge(params) -> Transformer``, cheap, for use inside jit; outside, parameters stay
    plain dicts.
    """
    graph = nnx.graphdef(
        nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(0), with_memory, stacked))
    )
    return lambda params: nnx.merge(graph, params)


def single_layers(specs) -> tuple:
    """The segments of a model that is served: every layer by itself."""
    return tuple(((spec,), 1) for spec in specs)


def empty_cache(cfg: ModelConfig, batch: int, length: int) -> dict:
    """KV cache of a served model for ``batch`` sequences of up to ``length`` tokens: {"s<layer>":
    {"u0": {"k", "v"}}}, each [1, B, S, K, H].
    """
    shape = (1, batch, length, cfg.kv_heads, cfg.head_width)
    return {
        f"s{i}": {"u0": {name: jnp.zeros(shape, cfg.compute_dtype) for name in ("k", "v")}}
        for i in range(len(layer_specs(cfg)))
    }


def served_blocks(blocks: dict, specs) -> dict:
    """The value of ``params["blocks"]`` of a served model from that of the stacked one."""
    made, start = {}, 0
    for i, (unit, repeats) in enumerate(segments(specs)):
        for r in range(repeats):
            for j in range(len(unit)):
                made[f"s{start}"] = {
                    "u0": jax.tree.map(lambda a, r=r: a[r : r + 1], blocks[f"s{i}"][f"u{j}"])
                }
                start += 1
    return made


def per_layer(params: dict, specs) -> list[dict]:
    """Views of the block parameters by layer, from input to output: [{"attn": {"q": ...}, ...}]."""
    made = []
    for i, (unit, repeats) in enumerate(segments(specs)):
        for r in range(repeats):
            for j in range(len(unit)):
                made.append(jax.tree.map(lambda a, r=r: a[r], params["blocks"][f"s{i}"][f"u{j}"]))
    return made


def stack_layers(layers: list[dict], specs) -> dict:
    """Inverse of :func:`per_layer`: the value of ``params["blocks"]``."""
    made, start = {}, 0
    for i, (unit, repeats) in enumerate(segments(specs)):
        made[f"s{i}"] = {
            f"u{j}": jax.tree.map(
                lambda *a: jnp.stack(a),
                *layers[start + j : start + repeats * len(unit) : len(unit)],
            )
            for j in range(len(unit))
        }
        start += len(unit) * repeats
    return made
