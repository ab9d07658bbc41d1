"""zarr encodings as TensorStore makes them: taken once from a store in memory, so that whole files can be written without its driver."""

import numpy as np
import tensorstore as ts

from flexmemory.tkv import format
from flexmemory.tkv.format import Group, Manifest

MEMORY = {"driver": "memory"}


def zarr_metadata(manifest: Manifest, group: Group) -> dict[str, bytes]:
    """Name -> content of the zarr.json of a group's rows and checksums."""
    specs = {f"rows/{group.name}": format.rows_spec(MEMORY, manifest, group), f"checksums/{group.name}": format.checksums_spec(MEMORY, manifest)}
    return {f"{name}/zarr.json": _create(spec).kvstore.read("zarr.json").result().value for name, spec in specs.items()}


def shard_tails(manifest: Manifest, group: Group) -> tuple[bytes, bytes]:
    """What follows the bundles (index and its crc32c) in every full shard of a group, and in its last shard."""
    array = _create(format.rows_spec(MEMORY, manifest, group))
    full = _tail(array, manifest, group, 0)
    last = full if manifest.vocab_size % manifest.shard_rows == 0 or group.shards == 1 else _tail(array, manifest, group, group.shards - 1)
    return full, last


def _tail(array: ts.TensorStore, manifest: Manifest, group: Group, block: int) -> bytes:
    start, size = block * manifest.shard_rows, format.shard_bytes(manifest, group, block)
    rows = min(manifest.shard_rows, manifest.vocab_size - start)
    zeros = np.zeros((), array.dtype.numpy_dtype)
    array[start : start + rows].write(np.broadcast_to(zeros, (rows, *array.shape[1:]))).result()
    key = format.shard_key(group, block)
    data = array.kvstore.read(key).result().value
    array.kvstore.write(key, None).result()  # frees it
    tail = data[rows * group.bundle_bytes :]
    offsets = np.frombuffer(tail, "<u8", 2 * rows).reshape(rows, 2)[:, 0]
    if len(data) != size or (offsets != np.arange(rows, dtype=np.uint64) * group.bundle_bytes).any():
        raise RuntimeError("this version of TensorStore lays the bundles of a shard out in another order than docs/formats.md says")
    return tail


def _create(spec: dict) -> ts.TensorStore:
    return ts.open(spec, create=True, context=ts.Context()).result()
