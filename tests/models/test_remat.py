"""What is kept for the backward pass, and that keeping less changes no number."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from flexmemory.errors import UserError
from flexmemory.models.blocks import check_model
from flexmemory.models.memory import KEEPABLE
from flexmemory.models.transformer import abstract_params, build

from .tiny import SEQUENCES, deduplicated, loss_and_grads, random_params, tiny, widest_gap

PATTERN = "(dense memoryllm stem)*2"
BATCH = deduplicated(SEQUENCES)


@pytest.fixture(scope="module")
def params():
    return random_params(tiny(PATTERN))


@pytest.fixture(scope="module")
def all_kept(params):
    return loss_and_grads(tiny(PATTERN), params, BATCH)


@pytest.mark.parametrize("keep", ["", "attention gate up", " ".join(KEEPABLE)])
@pytest.mark.parametrize("scan", [True, False])
def test_remat_changes_no_number(params, all_kept, keep, scan):
    loss, grads = loss_and_grads(
        tiny(PATTERN, remat=True, remat_keep=keep, scan_layers=scan), params, BATCH
    )
    assert float(loss) == float(all_kept[0])
    assert widest_gap(grads, all_kept[1]) < 1e-6


@functools.cache
def kept_shapes(keep: str, pattern: str = PATTERN) -> list[tuple[int, ...]]:
    """Shapes of all arrays that the backward pass gets from the forward pass."""
    cfg = tiny(pattern, remat=True, remat_keep=keep)
    merge = build(cfg)

    def logits(params):
        model = merge(params)
        return model(BATCH.ids_BT, model.rows(BATCH.unique_R), BATCH.inverse_BT)

    return [
        leaf.shape
        for leaf in jax.tree.leaves(
            jax.eval_shape(lambda params: jax.vjp(logits, params)[1], abstract_params(cfg))
        )
    ]


@pytest.mark.parametrize(
    ("name", "tails"),
    {
        "q": [(2, 9, 4, 4)] * 3,
        "k": [(2, 9, 2, 4)] * 3,
        "v": [(2, 9, 2, 4)] * 3,
        "attention": [(2, 9, 4, 4)] * 3,
        "gate": (
            [(2, 9, 24)] * 2 + [(len(BATCH.unique_R), 24)]
        ),  # of dense and stem, and of memoryllm's rows: one each per unique id
        "up": [(2, 9, 24), (len(BATCH.unique_R), 24)],
    }.items(),
)
def test_each_name_keeps_its_tensors_and_no_other(name, tails):
    more = kept_shapes(name)
    for shape in kept_shapes(""):
        more.remove(shape)
    assert sorted(more) == sorted((2, *tail) for tail in tails)  # 2: the scan's repeats


def test_what_is_kept_costs_memory():
    def temporaries(**settings):
        cfg = tiny("dense*8", d_model=32, d_ff=96, **settings)
        ids = jax.ShapeDtypeStruct((4, 64), jnp.int32)
        loss = jax.jit(jax.grad(lambda params, ids: build(cfg)(params)(ids, {}, ids).sum()))
        return loss.lower(abstract_params(cfg), ids).compile().memory_analysis().temp_size_in_bytes

    nothing, some, everything = (
        temporaries(remat=True),
        temporaries(remat=True, remat_keep="attention gate"),
        temporaries(),
    )
    assert 1.2 * nothing < some < everything / 1.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(remat=True, remat_keep="attention gates"), "no tensor 'gates'; did you mean 'gate'"),
        (
            dict(remat=True, remat_keep="rows"),
            "no tensor 'rows'; known: attention, gate, k, q, up, v",
        ),
        (dict(remat_keep="gate"), "'gate' without model.remat"),
    ],
)
def test_a_bad_remat_keep_is_one_clear_line(settings, message):
    with pytest.raises(UserError, match="^config model.remat_keep: ") as raised:
        check_model(dataclasses.replace(tiny("dense"), **settings))
    assert message in str(raised.value) and "\n" not in str(raised.value)
