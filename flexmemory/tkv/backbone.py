"""The backbone of a store: every parameter outside ``memory``, one safetensors tensor per layer, in
names that need no JAX.

``embed``, ``head``, ``norm.scale``, ``layers.<i>.attn.q``, ``layers.<i>.ffn.gate``, ...: see
docs/formats.md. Files are written and read here and not by the safetensors library, which copies
each once more and has no checksum (docs/architecture.md has the numbers)."""

import functools
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.errors import UserError
from flexmemory.files import allocate
from flexmemory.models.blocks import layer_specs
from flexmemory.models.config import ModelConfig
from flexmemory.models.transformer import abstract_params, per_layer, stack_layers
from flexmemory.tkv.storage.crc import crc32, crc32_combine
from flexmemory.tkv.storage.location import File, Location, refuse

AGAIN = "export the run again"
FILE_BYTES = 512 << 20  # of one file, which a remote location holds in memory while it is written
READ_BYTES, READERS = 4 << 20, 4  # at a time, each; a disk wants several requests
LAYERS = "layers."  # begins the names of tensors that belong to one layer


def flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) of a tree of dicts."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def nest(flat: dict) -> dict:
    """The inverse of :func:`flatten`."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def tensors(params: dict, cfg: ModelConfig) -> dict[str, Any]:
    """Name -> float32 array of every tensor outside ``memory``, in file order."""
    named = dict(flatten({k: v for k, v in params.items() if k not in ("blocks", "memory")}))
    for i, layer in enumerate(per_layer(params, layer_specs(cfg))):
        named |= flatten(layer, f"layers.{i}.")
    return named


def tensor_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the backbone of ``cfg`` has."""
    params = abstract_params(cfg, with_memory=False)
    shapes = jax.eval_shape(lambda params: tensors(params, cfg), params)
    return {name: array.shape for name, array in shapes.items()}


def save(
    params: dict, cfg: ModelConfig, location: Location, file_bytes: int = FILE_BYTES
) -> list[File]:
    """Writes backbone/model-<k>-of-<n>.safetensors, of at most ``file_bytes`` or one tensor."""
    contents: list[dict] = [{}]
    for name, array in tensors(params, cfg).items():
        size = sum(other.nbytes for other in contents[-1].values())
        if contents[-1] and size + array.nbytes > file_bytes:
            contents.append({})
        contents[-1][name] = array
    name = f"backbone/model-{{:05d}}-of-{len(contents):05d}.safetensors"
    return [save_tensors(location, name.format(k), c) for k, c in enumerate(contents, 1)]


def save_tensors(location: Location, name: str, content: dict[str, Any]) -> File:
    """Writes one safetensors file of float32 arrays: the bytes that its library gives."""
    arrays = {key: np.ascontiguousarray(content[key], np.float32) for key in sorted(content)}
    entries, at = {}, 0
    for key, array in arrays.items():
        offsets = at, at + array.nbytes
        entries[key] = {"dtype": "F32", "shape": array.shape, "data_offsets": offsets}
        at += array.nbytes
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    data = [array.reshape(-1).view(np.uint8) for array in arrays.values()]
    parts = [len(head).to_bytes(8, "little"), head, *data]
    location.write_parts(name, parts)
    crc = functools.reduce(lambda crc, part: crc32(part, crc), parts, 0)
    return File(name, sum(map(len, parts)), crc)


def load(
    location: Location,
    files: tuple[File, ...],
    cfg: ModelConfig,
    *,
    stacked: bool = True,
    dtype: str = "float32",
) -> dict:
    """The params dict without ``memory``, on the device. Raises UserError on a damaged file.

    stacked: blocks as the model's scan wants them, else as they are served, every layer by itself.
    dtype: of tensors with two or more dimensions, cast as they arrive; scales of norms stay
    float32. Beside the result at most 16 MiB of a file are in memory (stacking takes the blocks a
    second time)."""
    named: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(1) as pool:
        # traces the model, which takes about as long as reading it
        traced = pool.submit(tensor_shapes, cfg)
        for file in files:
            named |= load_tensors(location, file, dtype, served=not stacked)
        shapes = traced.result()
    for name in sorted(shapes.keys() ^ named.keys()):
        what = "has no tensor" if name in shapes else "has an unknown tensor"
        raise refuse(location, "backbone", f"{what} {name!r}", AGAIN)
    for name, shape in shapes.items():
        found = named[name].shape[not stacked and name.startswith(LAYERS) :]
        if found != shape:
            raise refuse(location, "backbone", f"{name} is {found}, the model has {shape}", AGAIN)
    specs, tree = layer_specs(cfg), nest(named)
    by_layer = tree.pop("layers")
    layers = [by_layer[str(i)] for i in range(len(specs))]
    served = {f"s{i}": {"u0": layer} for i, layer in enumerate(layers)}
    return tree | {"blocks": stack_layers(layers, specs) if stacked else served}


def load_tensors(
    location: Location, file: File, dtype: str = "float32", served: bool = False
) -> dict[str, jax.Array]:
    """The tensors of one safetensors file of float32, on the device; those of two or more
    dimensions in ``dtype``, with ``served`` those of layers with a first axis of 1.

    Raises UserError unless the file has the size and the CRC-32 that ``file`` says: the CRC-32 of
    the very bytes that become the arrays. These go to the device before the whole file is checked,
    but none is handed out."""
    size = location.sizes([file.name]).get(file.name, file.bytes)
    if size not in (None, file.bytes):
        raise refuse(location, file.name, f"{size} bytes, the manifest says {file.bytes}")
    with ThreadPoolExecutor(READERS) as pool:

        def tensor(start: int, shape: list[int]) -> tuple[np.ndarray, list]:
            """Memory for a tensor, and the reads that fill it; each gives (CRC-32, length)."""
            kind, count = jnp.dtype(dtype if len(shape) > 1 else "float32"), math.prod(shape)
            # page-aligned: a CPU device takes it without a copy
            host = allocate(1, count * kind.itemsize, huge=False).reshape(-1).view(kind)

            def read(first: int) -> tuple[int, int]:
                last = min(first + READ_BYTES // 4, count)
                data = read_exactly(location, file, start + 4 * first, start + 4 * last)
                host[first:last] = np.frombuffer(data, np.float32)
                return crc32(data), len(data)

            reads = [pool.submit(read, first) for first in range(0, count, READ_BYTES // 4)]
            return host.reshape(shape), reads

        try:
            head, entries = _header(location, file)
            started = [(name, *tensor(start, shape)) for name, shape, start in entries]
            arrays, crc = {}, crc32(head)
            for name, host, reads in started:
                for read in reads:
                    crc = crc32_combine(crc, *read.result())
                leading = served and name.startswith(LAYERS)
                arrays[name] = jax.device_put(host[None] if leading else host)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if _whole_crc32(location, file) != file.crc32:
                raise damaged(location, file) from None
            raise refuse(location, file.name, f"not a safetensors file ({error})", AGAIN) from None
        finally:
            pool.shutdown(cancel_futures=True)
    if crc != file.crc32:
        raise damaged(location, file)
    return arrays


def _header(location: Location, file: File) -> tuple[bytes, list[tuple[str, list[int], int]]]:
    """(the bytes before the first tensor, [(name, shape, where it starts)]). Raises ValueError and
    the like unless float32 tensors fill the file."""
    size = int.from_bytes(first := read_exactly(location, file, 0, 8), "little")
    if 8 + size > file.bytes:
        raise ValueError("its header is longer than the file")
    head, tensors, at = first + read_exactly(location, file, 8, 8 + size), [], 0
    entries = {k: e for k, e in json.loads(head[8:]).items() if k != "__metadata__"}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if entry["dtype"] != "F32" or begin != at or end - begin != 4 * math.prod(entry["shape"]):
            raise ValueError(f"tensor {name!r} is not float32, or out of place")
        tensors.append((name, entry["shape"], len(head) + begin))
        at = end
    if len(head) + at != file.bytes:
        raise ValueError("its tensors do not fill it")
    return head, tensors


def read_exactly(location: Location, file: File, start: int, stop: int) -> bytes:
    """Bytes start..stop-1 of a file. Raises UserError when it cannot be read or ends before."""
    try:
        data = location.read(file.name, start, stop)
    except OSError as error:
        what = f"cannot be read ({error.strerror or 'missing'})"
        raise refuse(location, file.name, what) from None
    if len(data) != stop - start:
        what = f"ends after {start + len(data)} bytes, the manifest says {file.bytes}"
        raise refuse(location, file.name, what)
    return data


def damaged(location: Location, file: File) -> UserError:
    return refuse(location, file.name, "its checksum is wrong, the file was changed or damaged")


def _whole_crc32(location: Location, file: File) -> int:
    crc = 0
    for start in range(0, file.bytes, READ_BYTES):
        crc = crc32(read_exactly(location, file, start, min(start + READ_BYTES, file.bytes)), crc)
    return crc
