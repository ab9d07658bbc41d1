"""Encodings against plain NumPy: what is stored, how large it is, and how far a decoded row may be
off.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmemory.tkv.encoding import CODE_LIMIT, DTYPES, FLOATS, Layout, decode, encode, host_view

L, W = 3, 13  # odd: the last nibble is padding


@functools.partial(jax.jit, static_argnums=0)
def encoded(layout, rows_RLW, basis=()):
    return encode(layout, rows_RLW, basis)


@functools.partial(jax.jit, static_argnums=(0, 3))
def decoded(layout, stored, basis=(), dtype="float32"):
    return decode(layout, stored, basis, dtype)


def rows(r=6, scale=1.0) -> np.ndarray:
    made = (scale * np.random.default_rng(0).standard_normal((r, L, W))).astype(np.float32)
    made[2, 1] = 0
    return made


def bases(ranks) -> tuple:
    rng = np.random.default_rng(1)
    return tuple(np.linalg.qr(rng.standard_normal((W, W)))[0][:r].astype(np.float32) for r in ranks)


def through_the_disk(layout, rows_RLW, basis=()) -> np.ndarray:
    """Encoded, seen as bundles, and decoded from the host's view of them."""
    bundles_RB = (
        np.ascontiguousarray(encoded(layout, rows_RLW, basis))
        .view(np.uint8)
        .reshape(len(rows_RLW), -1)
    )
    assert bundles_RB.shape[1] == layout.bundle_bytes
    view = host_view(layout, bundles_RB)
    assert np.shares_memory(view, bundles_RB)
    return np.asarray(decoded(layout, view, basis))


@pytest.mark.parametrize("dtype", FLOATS)
def test_plain_rows_are_rounded_once(dtype):
    layout = Layout(L, W, dtype)
    assert (
        layout.plain
        and layout.row_dtype == dtype
        and layout.bundle_bytes == L * W * jnp.dtype(dtype).itemsize
    )
    want_LRW = np.swapaxes(rows().astype(jnp.dtype(dtype)).astype(np.float32), 0, 1)
    np.testing.assert_array_equal(through_the_disk(layout, rows()), want_LRW)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("scale_group", [0, 4, 5, 13, 64])
@pytest.mark.parametrize("dtype", CODE_LIMIT)
def test_codes_are_within_half_a_scale(dtype, scale_group, scale):
    layout, x_RLW, limit = Layout(L, W, dtype, scale_group), rows(scale=scale), CODE_LIMIT[dtype]
    group = scale_group or W
    scales = [
        np.abs(x_RLW[..., at : at + group]).max(-1, keepdims=True) / limit
        for at in range(0, W, group)
    ]
    scale_RLW = np.repeat(np.concatenate(scales, -1), group, -1)[..., :W]
    codes_bytes = W if dtype == "int8" else 7
    assert (
        not layout.plain
        and layout.row_dtype == "float32"
        and layout.bundle_bytes == L * (codes_bytes + 4 * len(scales))
    )
    got_RLW = np.swapaxes(through_the_disk(layout, x_RLW), 0, 1)
    assert (np.abs(got_RLW - x_RLW) <= scale_RLW * (0.5 + 1e-5)).all()
    assert not got_RLW[2, 1].any()
    largest = np.abs(x_RLW).max(-1) == np.abs(x_RLW)[..., :group].max(-1)
    np.testing.assert_allclose(
        np.abs(got_RLW).max(-1)[largest], np.abs(x_RLW).max(-1)[largest], rtol=1e-6
    )  # the largest number has the last code


def test_bytes_of_a_bundle():
    """By hand: two layers of three numbers."""
    x_RLW = np.asarray([[[7, -3.5, 0.4], [0, 0, 0]]], np.float32)
    assert np.asarray(encoded(Layout(2, 3, "int4"), x_RLW)).tobytes() == (
        bytes([7 | (-4 & 15) << 4, 0])
        + np.float32(1).tobytes()
        + bytes(2)
        + np.float32(0).tobytes()
    )  # -3.5 rounds to even
    x_RLW[0, 0] = [127, -63.5, 254]
    assert np.asarray(encoded(Layout(2, 3, "int8", 2), x_RLW)).tobytes() == (
        bytes([127, -64 & 255, 127])
        + np.float32([1, 2]).tobytes()
        + bytes(3)
        + np.float32([0, 0]).tobytes()
    )
    assert np.asarray(
        encoded(
            Layout(2, 3, "float32", ranks=(3, 1)),
            x_RLW,
            (np.eye(3, dtype="f4"), np.eye(3, dtype="f4")[:1]),
        )
    ).tobytes() == (x_RLW[0, 0].tobytes() + bytes(4))


def test_subnormal_numbers_do_not_overflow_the_codes():
    x_RLW = np.full((1, L, W), 1.4e-43, np.float32)
    for dtype in CODE_LIMIT:
        assert np.abs(through_the_disk(Layout(L, W, dtype), x_RLW)).max() <= 2 * 1.4e-43


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_is_the_projection_then_the_dtype(dtype):
    ranks, x_RLW = (13, 5, 1), rows()
    layout, basis = Layout(L, W, dtype, ranks=ranks), bases(ranks)
    assert not layout.plain and layout.bundle_bytes == sum(layout.record_bytes(r) for r in ranks)
    got_LRW = through_the_disk(layout, x_RLW, basis)
    for place, b_rW in enumerate(basis):
        numbers_Rr = x_RLW[:, place] @ b_rW.T
        step = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}.get(
            dtype
        ) or 0.5 / CODE_LIMIT[dtype]
        bound_R = step * np.abs(numbers_Rr).max(-1) * np.sqrt(b_rW.shape[0]) + 1e-5
        assert (np.linalg.norm(got_LRW[place] - numbers_Rr @ b_rW, axis=-1) <= bound_R).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_decode_gives_the_models_dtype(dtype):
    for layout in (Layout(L, W, "float16"), Layout(L, W, "int4")):
        stored = encoded(layout, rows())
        want = decoded(layout, stored)
        got = decoded(layout, stored, (), dtype)
        assert got.shape == (L, 6, W) and got.dtype == dtype
        np.testing.assert_array_equal(got, want.astype(dtype))
