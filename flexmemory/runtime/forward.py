"""The compiled steps of a served model.

A step is cut before the first memory layer: ``lead`` needs no row, so it runs while the rows are
being read; ``tail`` takes them. Whoever hands in the rows, these are the same programs, so equal
rows give equal bits."""

import functools

import jax
import jax.numpy as jnp

from flexmemory.models.blocks import layer_specs
from flexmemory.models.config import ModelConfig
from flexmemory.models.memory import row_groups
from flexmemory.models.transformer import build, output_logits, served_blocks
from flexmemory.tkv.encoding import decode
from flexmemory.tkv.fold import Bases, Layouts


def first_memory_layer(cfg: ModelConfig) -> int:
    """How many layers run before a row is needed; all of them in a model without memory."""
    specs = layer_specs(cfg)
    return min((layers[0] for layers in row_groups(specs).values()), default=len(specs))


def split_cache(cache: dict, cfg: ModelConfig) -> tuple[dict, dict]:
    """The cache of ``lead`` and that of ``tail``."""
    cut = first_memory_layer(cfg)
    lead = {f"s{i}": cache[f"s{i}"] for i in range(cut)}
    return lead, {name: part for name, part in cache.items() if name not in lead}


def served_params(params: dict, cfg: ModelConfig) -> dict:
    """The parameters that training uses as they are served, on the device: every layer by itself,
    matrices in compute dtype.

    Casting here gives the bits that casting in every step would. ``Store.backbone(stacked=False)``
    is in this form already."""

    def put(array: jax.Array) -> jax.Array:
        vector = array.size == array.shape[-1]  # the scale of a norm
        return jax.device_put(array if vector else array.astype(cfg.compute_dtype))

    kept = {name: value for name, value in params.items() if name != "memory"}
    return jax.tree.map(put, kept | {"blocks": served_blocks(params["blocks"], layer_specs(cfg))})


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def lead(
    params: dict,
    cache: dict,
    ids_BT: jax.Array,
    positions_BT: jax.Array,
    slot: jax.Array | None,
    *,
    cfg: ModelConfig,
) -> tuple[jax.Array, dict]:
    """(x_BTD before the first memory layer, cache). slot: None for all sequences of the cache, or
    the number of the one that ids_1T belongs to."""
    model = build(cfg, with_memory=False, stacked=False)(params)
    x_BTD, part = model.layers(
        model.embedded(ids_BT),
        {},
        ids_BT,  # of no use: no layer here has a row
        positions_BT,
        cache=_of_slot(cache, slot),
        last=first_memory_layer(cfg),
    )
    return x_BTD, _into_slot(cache, part, slot)


@functools.partial(jax.jit, static_argnames=("cfg", "layouts"), donate_argnames="cache")
def tail(
    params: dict,
    cache: dict,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    slot: jax.Array | None,
    stored: dict,
    bases: Bases,
    inverse_BT: jax.Array,
    last_B: jax.Array,
    *,
    cfg: ModelConfig,
    layouts: Layouts,
) -> tuple[jax.Array, dict]:
    """(logits_BV float32 of token last_B of each sequence, cache). stored, bases: {group: what
    ``encoding.decode`` takes}."""
    model = build(cfg, with_memory=False, stacked=False)(params)
    rows = model_rows(stored, bases, cfg, layouts)
    x_BTD, part = model.layers(
        x_BTD,
        rows,
        inverse_BT,
        positions_BT,
        cache=_of_slot(cache, slot),
        first=first_memory_layer(cfg),
    )
    last_B1D = jnp.take_along_axis(model.norm(x_BTD), last_B[:, None, None], axis=1)
    return output_logits(last_B1D, model.head_DV)[:, 0], _into_slot(cache, part, slot)


@functools.partial(jax.jit, static_argnames=("cfg", "layouts"))
def all_logits(
    params: dict,
    ids_BT: jax.Array,
    stored: dict,
    bases: Bases,
    inverse_BT: jax.Array,
    *,
    cfg: ModelConfig,
    layouts: Layouts,
) -> jax.Array:
    """logits_BTV float32 in one pass without a cache."""
    model = build(cfg, with_memory=False, stacked=False)(params)
    return model(ids_BT, model_rows(stored, bases, cfg, layouts), inverse_BT)


def model_rows(stored: dict, bases: Bases, cfg: ModelConfig, layouts: Layouts) -> dict:
    """{group: rows_LRW in compute dtype}"""
    return {
        name: decode(layout, stored[name], bases[name], cfg.compute_dtype)
        for name, layout in layouts
    }


def _of_slot(cache: dict, slot: jax.Array | None) -> dict:
    if slot is None:
        return cache
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, slot, 1, axis=1), cache)


def _into_slot(cache: dict, part: dict | None, slot: jax.Array | None) -> dict:
    assert part is not None  # layers that are given a cache return one
    if slot is None:
        return part
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
    return jax.tree.map(put, cache, part)
