"""CRC-32 as zlib has it, by ISA-L, which is six times as fast."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from isal.isal_zlib import crc32, crc32_combine

__all__ = ["crc32", "crc32_combine", "crc32_of_parts"]

PIECE_BYTES = 1 << 24  # checked by one thread: a millisecond


def crc32_of_parts(parts: Iterable) -> int:
    """CRC-32 of bytes and contiguous arrays one after another, each by all processors. No part is
    copied or kept."""
    crc = 0
    with ThreadPoolExecutor() as pool:
        for part in parts:
            data = np.frombuffer(part, np.uint8)
            pieces = [data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]
            for piece, piece_crc in zip(pieces, pool.map(crc32, pieces), strict=True):
                crc = crc32_combine(crc, piece_crc, len(piece))
    return crc
