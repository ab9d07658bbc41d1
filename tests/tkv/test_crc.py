"""Checksums of a whole from those of its pieces, against zlib's own of the whole."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmemory.tkv import crc


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_of_two(first, second):
    assert crc.combined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_of_long_data():
    first, zeros = zlib.crc32(b"token"), zlib.crc32(bytes(10**6))
    in_turn = first
    for _ in range(5000):
        in_turn = crc.combined(in_turn, zeros, 10**6)
    many = zeros
    for k in range(3):
        many = crc.combined_rows(np.full(10, many, np.uint32), 10**6 * 10**k)
    assert in_turn == crc.combined(first, crc.combined_rows(np.full(5, many, np.uint32), 10**9), 5 * 10**9)  # more than 32 bits can count


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("length", [1, 24, 4096])
def test_of_rows(rows, length):
    data_RB = np.random.default_rng(rows).integers(0, 256, (rows, length), dtype=np.uint8)
    crc32_R = np.fromiter(map(zlib.crc32, data_RB), np.uint32, rows)
    assert crc.combined_rows(crc32_R, length) == zlib.crc32(data_RB.tobytes())


@given(st.lists(st.binary(max_size=50), max_size=6))
def test_by_threads(parts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crc, "PIECE_BYTES", 16)
        assert crc.crc32_of(parts) == zlib.crc32(b"".join(parts))
