"""The decoder: embedding, memory rows, a stack scanned over its repeating units, head.

Two calls make a forward pass: ``rows = model.rows(unique_ids)`` and ``model(ids, rows, inverse)``.
Serving leaves the first one out and hands in rows read from a TKV store."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, P
from jax.sharding import auto_axes, get_abstract_mesh

from flexmemory.models.attention import Context
from flexmemory.models.blocks import KINDS, layer_specs
from flexmemory.models.config import ModelConfig
from flexmemory.models.ffn import RMSNorm, contract, matching, weight
from flexmemory.models.memory import (
    TABLE_BLOCK,
    Rows,
    TokenMemory,
    apply_stack,
    first_rows,
    gather_rows,
    remat,
    row_groups,
    row_stacks,
    rows_by_unit,
    take_rows,
)
from flexmemory.models.patterns import LayerSpec, segments
from flexmemory.sharding import like, spec_of

Specs = tuple[LayerSpec, ...]
TABLE_KEYS = 0x7AB1E  # folded into the seed's key, so that tables share no key with other weights


class Transformer(nnx.Module):
    """Llama-style decoder. Parameters float32; the residual stream has ``cfg.compute_dtype``;
    logits are float32.

    Parameters: embed [V, D]; head [D, V] unless tied; norm; blocks.s<i>.u<j>.* stacked over the
    repeats of segment i; memory.* (only with ``with_memory``): everything that a fold makes
    superfluous, learned tables as zeros (:func:`init_params` draws them). With ``stacked`` False
    every layer is a segment of its own: the form that is served, in which a step reads each weight
    where it lies and the cache is updated in place."""

    def __init__(
        self, cfg: ModelConfig, rngs: nnx.Rngs, with_memory: bool = True, stacked: bool = True
    ):
        self.cfg, self.specs = cfg, layer_specs(cfg)
        self.cuts = segments(self.specs) if stacked else single_layers(self.specs)
        self.embed = weight(cfg, rngs, cfg.vocab_size, cfg.d_model)
        self.head = None if cfg.tied_head else weight(cfg, rngs, cfg.d_model, cfg.vocab_size)
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)

        def stack(spec: LayerSpec, repeats: int) -> nnx.Module:
            return jax.vmap(lambda key: KINDS[spec.kind](cfg, spec, key))(rngs.split(repeats))

        self.blocks = nnx.Dict(
            {
                f"s{i}": nnx.Dict({f"u{j}": stack(spec, n) for j, spec in enumerate(unit)})
                for i, (unit, n) in enumerate(self.cuts)
            }
        )
        sources = {kind: block.source for kind, block in KINDS.items() if block.source}
        has_memory = with_memory and row_groups(self.specs)
        self.memory = TokenMemory(cfg, self.specs, sources, rngs) if has_memory else None

    def rows(self, ids_R: Array | None) -> Rows:
        """Live rows of the addresses ids_R, int32: {group: rows_LRW in compute dtype}; {} for a
        model without memory. ids_R=None: embedding and tables are already gathered to the rows of
        these addresses, as in a train step."""
        return {} if self.memory is None else self.memory(ids_R, take_rows(self.embed[...], ids_R))

    def hidden(
        self,
        ids_BT: Array,
        rows: Rows,
        inverse_BT: Array,
        *,
        positions_BT: Array | None = None,
        segments_BT: Array | None = None,
        cache: dict | None = None,
        ffn_scale: float | Array = 1.0,
    ) -> tuple[Array, dict | None]:
        """Final normed states: (x_BTD in compute dtype, updated cache or None).

        ids_BT int32; rows as from :meth:`rows`; inverse_BT int32 points each token to its row:
        rows[:, inverse_BT]. positions_BT defaults to 0..T-1. segments_BT int32 document numbers or
        None. cache as from :func:`empty_cache`. ffn_scale of :class:`Context`: one number for all
        layers, or an array [L] of one for each layer of the model."""
        if positions_BT is None:
            positions_BT = jnp.arange(ids_BT.shape[1], dtype=jnp.int32)
            positions_BT = jnp.broadcast_to(positions_BT, ids_BT.shape)
        x_BTD, cache = self.layers(
            self.embedded(ids_BT), rows, inverse_BT, positions_BT, segments_BT, cache, ffn_scale
        )
        return self.norm(x_BTD), cache

    def embedded(self, ids_BT: Array) -> Array:
        """x_BTD, the residual stream before the first layer."""
        return gather_rows(self.embed[...], ids_BT).astype(self.cfg.compute_dtype)

    def layers(
        self,
        x_BTD: Array,
        rows: Rows,
        inverse_BT: Array,
        positions_BT: Array,
        segments_BT: Array | None = None,
        cache: dict | None = None,
        ffn_scale: float | Array = 1.0,
        first: int = 0,
        last: int | None = None,
    ) -> tuple[Array, dict | None]:
        """(x_BTD, cache) after segments ``first`` to before ``last``; ``rows`` and ``cache`` are
        those segments' own."""
        cfg = self.cfg
        kernel = attention_implementation(cfg, masked=segments_BT is not None)
        ctx = Context(positions_BT, segments_BT, ffn_scale, kernel)
        cuts, new_cache = self.cuts[first:last], {}
        start = sum(len(unit) * repeats for unit, repeats in self.cuts[:first])
        units = enumerate(zip(cuts, rows_by_unit(rows, cuts)), first)
        for i, ((unit, repeats), unit_rows) in units:

            def body(x_BTD: Array, layer: tuple, unit: Specs = unit) -> tuple[Array, Any]:
                blocks, layer_rows, layer_cache, scale_U = layer
                caches = {}
                for j, spec in enumerate(unit):
                    u = f"u{j}"
                    row_BTW = gather_rows(layer_rows[u], inverse_BT) if spec.row_width else None
                    own = ctx if scale_U is None else dataclasses.replace(ctx, ffn_scale=scale_U[j])
                    before = layer_cache and layer_cache[u]
                    y_BTD, caches[u] = blocks[u](x_BTD, row_BTW, own, before)
                    x_BTD = like(y_BTD, spec_of(x_BTD))
                return x_BTD, caches if layer_cache is not None else None

            body = remat(body, repeats, cfg.scan_layers, cfg.remat_keep) if cfg.remat else body
            stop = start + len(unit) * repeats
            scale_RU = None
            if jnp.ndim(ffn_scale) > 0:
                scale_RU = jnp.asarray(ffn_scale)[start:stop].reshape(repeats, -1)
            start, s = stop, f"s{i}"
            xs = (self.blocks[s], unit_rows, cache and cache[s], scale_RU)
            x_BTD, new_cache[s] = apply_stack(body, x_BTD, xs, repeats, cfg.scan_layers)
        return x_BTD, new_cache if cache is not None else None

    @property
    def head_DV(self) -> Array:
        """The output weights, float32: the head, or the transposed embedding."""
        return self.embed[...].T if self.head is None else self.head[...]

    def __call__(self, ids_BT: Array, rows: Rows, inverse_BT: Array, **kwargs: Any) -> Array:
        """logits_BTV float32; arguments as for :meth:`hidden`."""
        return output_logits(self.hidden(ids_BT, rows, inverse_BT, **kwargs)[0], self.head_DV)


def output_logits(x_BTD: Array, head_DV: Array) -> Array:
    """logits_BTV float32 of final states x_BTD."""
    x_BTD, used_DV = matching(x_BTD, head_DV)
    return contract(x_BTD, used_DV, 2, 0, P(*spec_of(x_BTD)[:-1], spec_of(used_DV)[1]), jnp.float32)


def attention_implementation(cfg: ModelConfig, masked: bool) -> str:
    """``Context.implementation``: "auto" is cpu on a CPU, cudnn on a GPU where cuDNN surely can
    (bfloat16, head width a multiple of 8 and at most 128, no document mask), else xla."""
    if cfg.attention != "auto":
        return cfg.attention
    width_fits = cfg.head_width % 8 == 0 and cfg.head_width <= 128
    can = cfg.compute_dtype == "bfloat16" and width_fits and not masked
    return {"cpu": "cpu", "gpu": "cudnn" if can else "xla"}.get(jax.default_backend(), "xla")


# --- parameters: plain nested dicts outside of jit ---


def init_params(cfg: ModelConfig, seed: int, shardings: Any = None) -> dict:
    """Fresh parameters as a nested dict of float32 arrays, a pure function of (cfg, seed).
    ``shardings``: a tree of where they lie."""
    return drawing(lambda: fresh_params(cfg, seed), shardings)()


def fresh_params(cfg: ModelConfig, seed: int) -> dict:
    """:func:`init_params` for use inside :func:`drawing`: what is not used of it is not drawn."""
    params = nnx.to_pure_dict(nnx.state(Transformer(cfg, nnx.Rngs(seed))))
    for name, stack in params.get("memory", {}).get("stacks", {}).items():
        if "table" in stack:
            vocab, width = stack["table"].shape[1:]
            blocks = -(-vocab // TABLE_BLOCK)
            stack["table"] = first_table(cfg, seed, name, width, 0, blocks)[:, :vocab]
    return params


def first_table(
    cfg: ModelConfig, seed: int, stack: str, width: int, first: int | Array, blocks: int
) -> Array:
    """First values [L, blocks * TABLE_BLOCK, width] of the tables of a stack of row sources, from
    block ``first`` on; behind row V stand numbers that no table holds. See
    :func:`memory.first_rows`."""
    specs = layer_specs(cfg)
    layers = dict(itertools.chain(*row_stacks(specs).values()))[stack]
    spec, key = specs[layers[0]], jax.random.fold_in(jax.random.key(seed), TABLE_KEYS)
    source = KINDS[spec.kind].source
    assert source is not None  # a layer with rows has one
    keys_L = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(layers))
    return first_rows(keys_L, source.table_std(cfg, spec), first, blocks, width)


def drawing(f: Callable, shardings: Any = None) -> Callable:
    """``f``, which draws random numbers, jitted. ``shardings``: of its result."""
    if shardings is not None and not get_abstract_mesh().empty:
        # in explicit mode every device would draw all numbers of every table
        f = auto_axes(f, out_sharding=jax.tree.map(lambda sharding: sharding.spec, shardings))
    # it runs once: on a CPU the compiler's optimiser takes 14 s over the random draws of a mixed
    # stack, without it 2 s
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(f, out_shardings=shardings, compiler_options=quick)


def abstract_params(cfg: ModelConfig, with_memory: bool = True) -> dict:
    """Shapes and dtypes of the parameters, without computing them."""
    return jax.eval_shape(
        lambda: nnx.to_pure_dict(nnx.state(Transformer(cfg, nnx.Rngs(0), with_memory)))
    )


def build(
    cfg: ModelConfig, with_memory: bool = True, stacked: bool = True
) -> Callable[[dict], Transformer]:
    """Returns ``merge(params) -> Transformer``, cheap, for use inside jit."""
    model = nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(0), with_memory, stacked))
    graph = nnx.graphdef(model)
    return lambda params: nnx.merge(graph, params)


# --- the layers of a stack, one by one ---


def single_layers(specs: Specs) -> tuple[tuple[Specs, int], ...]:
    """The segments of a model that is served: every layer by itself."""
    return tuple(((spec,), 1) for spec in specs)


def empty_cache(cfg: ModelConfig, batch: int, length: int) -> dict:
    """KV cache of a served model for ``batch`` sequences of up to ``length`` tokens: {"s<layer>":
    {"u0": {"k", "v"}}}, each [1, B, S, K, H]."""
    shape = (1, batch, length, cfg.kv_heads, cfg.head_width)
    return {
        f"s{i}": {"u0": {name: jnp.zeros(shape, cfg.compute_dtype) for name in ("k", "v")}}
        for i in range(len(layer_specs(cfg)))
    }


def _places(specs: Specs) -> Iterator[tuple[str, str, int]]:
    """(segment, unit, repeat) of every layer in the stacked parameters, from input to output."""
    for i, (unit, repeats) in enumerate(segments(specs)):
        for r in range(repeats):
            yield from ((f"s{i}", f"u{j}", r) for j in range(len(unit)))


def served_blocks(blocks: dict, specs: Specs) -> dict:
    """The value of ``params["blocks"]`` of a served model from that of the stacked one."""
    return {
        f"s{i}": {"u0": jax.tree.map(lambda a: a[r : r + 1], blocks[s][u])}
        for i, (s, u, r) in enumerate(_places(specs))
    }


def per_layer(params: dict, specs: Specs) -> list[dict]:
    """Views of the block parameters by layer, from input to output: [{"attn": {"q": ...}, ...}]."""
    blocks = params["blocks"]
    return [jax.tree.map(lambda a: a[r], blocks[s][u]) for s, u, r in _places(specs)]


def stack_layers(layers: list[dict], specs: Specs) -> dict:
    """Inverse of :func:`per_layer`: the value of ``params["blocks"]``."""
    parts: dict[str, dict[str, list]] = {}
    for layer, (s, u, _) in zip(layers, _places(specs), strict=True):
        parts.setdefault(s, {}).setdefault(u, []).append(layer)
    return {
        s: {u: jax.tree.map(lambda *a: jnp.stack(a), *each) for u, each in units.items()}
        for s, units in parts.items()
    }
