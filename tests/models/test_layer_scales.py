"""One scale for all layers' FFNs and rows, or one for each."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmemory.models.blocks import layer_specs
from flexmemory.models.transformer import build, per_layer, served_blocks, stack_layers

from .tiny import SEQUENCES, deduplicated, random_params, relative_gap, tiny

BATCH = deduplicated(SEQUENCES)
MIXED = tiny("attn_only (dense memoryllm)*2 (flex stem)*2 parallel")
LAYERS = len(layer_specs(MIXED))


@pytest.fixture(scope="module")
def params():
    return random_params(MIXED)


def call(params, scale, cfg):
    model = build(cfg)(params)
    return model(BATCH.ids_BT, model.rows(BATCH.unique_R), BATCH.inverse_BT, ffn_scale=scale)


with_number = jax.jit(
    functools.partial(call, cfg=MIXED), static_argnums=1
)  # part of the program; an array is an argument of it


def logits(params, scale, cfg=MIXED):
    return jax.jit(call, static_argnums=2)(params, jnp.asarray(scale, jnp.float32), cfg)


def test_a_scale_of_1_is_not_in_the_program_and_an_array_is(params):
    def program(**switches):
        model = build(MIXED)(params)
        return str(
            jax.make_jaxpr(lambda rows: model(BATCH.ids_BT, rows, BATCH.inverse_BT, **switches))(
                model.rows(BATCH.unique_R)
            )
        )

    assert program() == program(ffn_scale=1.0) != program(ffn_scale=jnp.ones(LAYERS))
    assert program().count(" mul ") < program(ffn_scale=0.5).count(" mul ")


def test_equal_scales_are_one_scale(params):
    for value in (1.0, 0.6):
        got = logits(params, np.full(LAYERS, value))
        assert relative_gap(got, with_number(params, value)) < 1e-6
        assert relative_gap(got, logits(params, value)) < 1e-6
    assert relative_gap(got, logits(params, 1.0)) > 1e-3


def test_each_layer_gets_its_own_scale(params):
    """The same as scaling the matrix behind the FFN, or the live row's."""
    scale_L = np.linspace(0.2, 1.7, LAYERS).astype(np.float32)
    specs, layers = layer_specs(MIXED), per_layer(params, layer_specs(MIXED))
    scaled = jax.tree.map(lambda a: a, params)
    for layer, (spec, weights) in enumerate(zip(specs, layers, strict=True)):
        if spec.kind in ("dense", "parallel"):
            weights["ffn"]["down"] = weights["ffn"]["down"] * scale_L[layer]
        elif spec.kind.startswith("stem"):
            weights["down"] = weights["down"] * scale_L[layer]
    scaled["blocks"] = stack_layers(layers, specs)
    for stack, where in (("stack0", "memoryllm"), ("stack1", "flex")):
        of_kind = [layer for layer, spec in enumerate(specs) if spec.kind == where]
        down_LFD = scaled["memory"]["stacks"][stack]["ffn"]["down"]
        assert len(down_LFD) == len(of_kind)
        scaled["memory"]["stacks"][stack]["ffn"]["down"] = (
            down_LFD * scale_L[of_kind][:, None, None]
        )
    want = with_number(scaled, 1.0)
    assert relative_gap(logits(params, scale_L), want) < 1e-5
    assert relative_gap(logits(params, scale_L[::-1]), want) > 1e-3


def test_scales_in_a_loop_under_remat_and_from_a_later_layer(params):
    scale_L = np.linspace(0.2, 1.7, LAYERS).astype(np.float32)
    want = logits(params, scale_L)
    for settings in ({"scan_layers": False}, {"remat": True}):
        assert (
            relative_gap(logits(params, scale_L, dataclasses.replace(MIXED, **settings)), want)
            < 1e-6
        )
    served = {name: part for name, part in params.items() if name != "memory"} | {
        "blocks": served_blocks(params["blocks"], layer_specs(MIXED))
    }
    model, rows = (
        build(MIXED, with_memory=False, stacked=False)(served),
        build(MIXED)(params).rows(BATCH.unique_R),
    )
    positions_BT = jnp.broadcast_to(jnp.arange(BATCH.ids_BT.shape[1]), BATCH.ids_BT.shape)

    def layers(x_BTD, rows, **part):
        return model.layers(
            x_BTD, rows, BATCH.inverse_BT, positions_BT, ffn_scale=jnp.asarray(scale_L), **part
        )[0]

    whole = layers(model.embedded(BATCH.ids_BT), rows)
    halves = layers(
        layers(model.embedded(BATCH.ids_BT), {}, last=2), rows, first=2
    )  # the first row is that of layer 2
    assert relative_gap(halves, whole) < 1e-6
