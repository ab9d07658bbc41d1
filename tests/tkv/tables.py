"""Tables of random bundles, written by hand as a store's shards are, for tests of the readers."""

import dataclasses
import os

import numpy as np
import tensorstore as ts

from flexmemory.files import allocate
from flexmemory.tkv import format
from flexmemory.tkv.encoding import Layout
from flexmemory.tkv.format import Group
from flexmemory.tkv.storage.location import open_location

SHARD_ROWS, VOCAB = 16, 40  # the last of three shards is half full


@dataclasses.dataclass(frozen=True)
class Table:
    """What a reader needs of a manifest."""

    vocab_size: int = VOCAB
    shard_rows: int = SHARD_ROWS


LAYOUTS = {
    "4096": Layout(2, 512, "float32"),  # a multiple of the page
    "8192": Layout(4, 1024, "bfloat16"),
    "5000": Layout(5, 500, "float16"),  # bundles begin anywhere
    "100": Layout(1, 25, "float32"),
    "99": Layout(1, 95, "int8"),  # encoded: [V, B] of bytes
}


def make(path, layout, order=slice(None)):
    """Writes the shard files by hand; returns (location, group, rows uint8 [V, B]). ``order``: of
    the bundles in each file.
    """
    group = Group(
        "w",
        tuple(range(layout.layers)),
        layout,
        -(-VOCAB // SHARD_ROWS),
        VOCAB * layout.bundle_bytes,
    )
    rows_VB = np.random.default_rng(0).integers(0, 256, (VOCAB, layout.bundle_bytes), np.uint8)
    rows_VB[3] = 0  # a bundle of zeros is stored like any other
    location = open_location(path)
    spec = format.rows_spec(location.spec("rows/w"), Table(), group)
    ts.open({**spec, "create": True}).result()
    for shard in range(group.shards):
        part = rows_VB[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]
        places = np.arange(len(part))[order]
        index = np.full((SHARD_ROWS, 2), 2**64 - 1, np.uint64)
        index[places, 0], index[places, 1] = (
            np.arange(len(part)) * layout.bundle_bytes,
            layout.bundle_bytes,
        )
        file = path / format.shard_file(group, shard)
        file.parent.mkdir(parents=True)
        file.write_bytes(
            part[order].tobytes() + index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little")
        )
    return location, group, rows_VB


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 & -(crc & 1))
    return crc ^ 0xFFFFFFFF


def read(r, ids, size=4096):
    ids = np.asarray(ids, np.int64)
    out = allocate(len(ids), size)
    out[:] = 0xEE
    r.read(ids, out)
    return out


def fail(code):
    """A function that raises this OSError whatever it is called with."""

    def failing(*args):
        raise OSError(code, os.strerror(code))

    return failing


def drop(location, group):
    """Empties the page cache of the table."""
    for shard in range(group.shards):
        fd = os.open(location.local / format.shard_file(group, shard), os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
