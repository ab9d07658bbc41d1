"""zarr encodings as TensorStore makes them: taken from small arrays in memory, so that whole files
can be written without its driver."""

import tensorstore as ts

from flexmemory.tkv import format
from flexmemory.tkv.format import Group, Manifest
from flexmemory.tkv.storage.reader import shard_index

MEMORY = {"driver": "memory"}


def zarr_metadata(manifest: Manifest, group: Group) -> dict[str, bytes]:
    """Name -> content of the zarr.json of a group's rows and checksums."""
    specs = {
        f"rows/{group.name}": format.rows_spec(MEMORY, manifest, group),
        f"checksums/{group.name}": format.checksums_spec(MEMORY, manifest),
    }
    return {f"{name}/zarr.json": _read(_create(spec), "zarr.json") for name, spec in specs.items()}


def shard_tails(manifest: Manifest, group: Group) -> tuple[bytes, bytes]:
    """What follows the bundles (index and its crc32c) in every full shard of a group, and in its
    last shard."""
    array = _create(format.index_spec(MEMORY, manifest))

    def tail(rows: int) -> bytes:
        array.write(shard_index(rows, manifest.shard_rows, group.bundle_bytes)).result()
        return _read(array, "c/0/0")

    start, stop = manifest.span(group.shards - 1)
    return tail(manifest.shard_rows), tail(stop - start)


def _create(spec: dict) -> ts.TensorStore:
    return ts.open(spec, create=True, context=ts.Context()).result()


def _read(array: ts.TensorStore, key: str) -> bytes:
    """A file of an array in memory."""
    assert array.kvstore is not None
    return array.kvstore.read(key).result().value
