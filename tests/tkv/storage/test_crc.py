"""Checksums against zlib's own, and that of a whole from those of its pieces."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmemory.tkv.storage import crc


@given(st.binary(max_size=300), st.integers(0, 2**32 - 1))
def test_equal_to_zlib(data, before):
    assert crc.crc32(data) == zlib.crc32(data)
    assert crc.crc32(data, before) == zlib.crc32(data, before)


def test_equal_to_zlib_over_long_data():
    data_RB = np.random.default_rng(0).integers(0, 256, (3, 1 << 20), dtype=np.uint8)
    assert crc.crc32(data_RB) == zlib.crc32(data_RB)
    assert crc.crc32(data_RB[:, 5:77].copy()) == zlib.crc32(data_RB[:, 5:77].copy())


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_of_two(first, second):
    assert crc.crc32_combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(
        first + second
    )


@given(st.lists(st.binary(max_size=40)), st.integers(1, 50))
def test_of_parts(parts, piece_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crc, "PIECE_BYTES", piece_bytes)
        arrays = (np.frombuffer(part, np.uint8) for part in parts)
        assert (
            crc.crc32_of_parts(parts) == crc.crc32_of_parts(arrays) == zlib.crc32(b"".join(parts))
        )


def test_of_long_data():
    first, zeros = zlib.crc32(b"token"), zlib.crc32(bytes(10**6))
    in_turn = first
    for _ in range(5000):
        in_turn = crc.crc32_combine(in_turn, zeros, 10**6)
    many, length = zeros, 10**6
    for _ in range(12):  # 4096 times the million
        many, length = crc.crc32_combine(many, many, length), 2 * length
    for _ in range(904):
        many = crc.crc32_combine(many, zeros, 10**6)
    assert in_turn == crc.crc32_combine(first, many, 5 * 10**9)  # more than 32 bits can count
