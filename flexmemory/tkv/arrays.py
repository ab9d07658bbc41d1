"""zarr encodings as TensorStore makes them: taken from small arrays in memory, so that whole files
can be written without its driver.
"""

import numpy as np
import tensorstore as ts

from flexmemory.tkv import format
from flexmemory.tkv.format import Group, Manifest

MEMORY = {"driver": "memory"}


def zarr_metadata(manifest: Manifest, group: Group) -> dict[str, bytes]:
    """Name -> content of the zarr.json of a group's rows and checksums."""
    specs = {
        f"rows/{group.name}": format.rows_spec(MEMORY, manifest, group),
        f"checksums/{group.name}": format.checksums_spec(MEMORY, manifest),
    }
    return {
        f"{name}/zarr.json": _create(spec).kvstore.read("zarr.json").result().value
        for name, spec in specs.items()
    }


def shard_tails(manifest: Manifest, group: Group) -> tuple[bytes, bytes]:
    """What follows the bundles (index and its crc32c) in every full shard of a group, and in its
    last shard.
    """
    array = _create(format.index_spec(MEMORY, manifest))

    def tail(rows: int) -> bytes:
        index_S2 = np.full(array.shape, 2**64 - 1, np.uint64)  # of a place without a bundle
        index_S2[:rows, 0], index_S2[:rows, 1] = (
            np.arange(rows) * group.bundle_bytes,
            group.bundle_bytes,
        )
        array.write(index_S2).result()
        return array.kvstore.read("c/0/0").result().value

    return tail(manifest.shard_rows), tail(
        manifest.vocab_size - (group.shards - 1) * manifest.shard_rows
    )


def _create(spec: dict) -> ts.TensorStore:
    return ts.open(spec, create=True, context=ts.Context()).result()
