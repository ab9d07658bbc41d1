"""CRC-32, zlib's, of data whose pieces several threads look at: the checksum of the whole follows from those of the pieces."""

import functools
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

THREADS = 4
PIECE_BYTES = 16 << 20


def combined(first: int, second: int, length: int) -> int:
    """CRC-32 of two pieces of data one after the other, of the CRC-32 of each (or of many such pairs, uint32 [R] each); ``length``: bytes of the
    second."""
    return _product(_shift(length), first) ^ second


def combined_rows(crc32_R: np.ndarray, length: int) -> int:
    """CRC-32 of R pieces of ``length`` bytes each one after another, of the CRC-32 of each, uint32 [R]."""
    while len(crc32_R) > 1:
        even_R = np.concatenate([np.zeros(len(crc32_R) % 2, np.uint32), crc32_R])  # nothing has the CRC-32 0
        crc32_R, length = combined(even_R[::2], even_R[1::2], length), 2 * length
    return int(crc32_R.sum())


def crc32_of(parts: Iterable) -> int:
    """CRC-32 of all parts (bytes, or C-contiguous buffers) one after another, by several threads."""
    views = [memoryview(part).cast("B") for part in parts]
    pieces = [view[start : start + PIECE_BYTES] for view in views for start in range(0, len(view), PIECE_BYTES)]
    with ThreadPoolExecutor(THREADS) as pool:  # zlib lets other threads run meanwhile
        return functools.reduce(lambda crc, piece: combined(crc, piece[0], piece[1]), zip(pool.map(zlib.crc32, pieces), map(len, pieces)), 0)


# A CRC is the remainder of a polynomial over the field of two elements; bit 31 is the constant term, and data followed by n bytes are the data
# times x^8n.


@functools.cache
def _shift(length: int) -> int:
    """x^(8 length)"""
    power, square, n = 1 << 31, 1 << 30, 8 * length
    while n:
        if n & 1:
            power = _product(square, power)
        square, n = _product(square, square), n >> 1
    return power


def _product(a: int, b):
    """b: int, or many as uint32 [R]."""
    product, bit = b & 0, 1 << 31
    while a:
        if a & bit:
            product, a = product ^ b, a ^ bit
        bit, b = bit >> 1, (b >> 1) ^ (b & 1) * 0xEDB88320
    return product
