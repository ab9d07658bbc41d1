"""The backbone of a store: every parameter outside ``memory``, one safetensors tensor per layer, in
names that need no JAX.

``embed``, ``head``, ``norm.scale``, ``layers.<i>.attn.q``, ``layers.<i>.ffn.gate``, ...: see
docs/formats.md.
"""

import functools
import json
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.errors import UserError
from flexmemory.files import allocate
from flexmemory.models.blocks import layer_specs
from flexmemory.models.config import ModelConfig
from flexmemory.models.transformer import abstract_params, per_layer, stack_layers
from flexmemory.tkv.format import MEND, File
from flexmemory.tkv.storage.crc import crc32, crc32_combine
from flexmemory.tkv.storage.location import Location

FILE_BYTES = 512 << 20  # of one file, which a remote location holds in memory while it is written
READ_BYTES, READERS = (
    4 << 20,
    4,
)  # of a file at a time, each of the readers; a disk wants several requests
LAYERS = "layers."  # begins the names of tensors that belong to one layer


def flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def nest(flat: dict) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def tensors(params: dict, cfg: ModelConfig) -> dict[str, object]:
    """Name -> float32 array of every tensor outside ``memory``, in file order."""
    named = dict(flatten({k: v for k, v in params.items() if k not in ("blocks", "memory")}))
    for i, layer in enumerate(per_layer(params, layer_specs(cfg))):
        named |= flatten(layer, f"layers.{i}.")
    return named


def tensor_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the backbone of ``cfg`` has."""
    shapes = jax.eval_shape(
        lambda params: tensors(params, cfg), abstract_params(cfg, with_memory=False)
    )
    return {name: array.shape for name, array in shapes.items()}


def save(
    params: dict, cfg: ModelConfig, location: Location, file_bytes: int = FILE_BYTES
) -> tuple[File, ...]:
    """Writes backbone/model-<k>-of-<n>.safetensors, each of at most ``file_bytes`` or one tensor."""
    named, files, size = tensors(params, cfg), [{}], 0
    for name, array in named.items():
        if files[-1] and size + array.nbytes > file_bytes:
            files.append({})
            size = 0
        files[-1][name] = array
        size += array.nbytes
    return tuple(
        save_tensors(
            location, f"backbone/model-{number:05d}-of-{len(files):05d}.safetensors", content
        )
        for number, content in enumerate(files, 1)
    )


def save_tensors(location: Location, name: str, content: dict[str, object]) -> File:
    """Writes one safetensors file of float32 arrays: the bytes that its library gives, without a
    second copy of them.
    """
    arrays, entries, at = (
        {name: np.ascontiguousarray(array, np.float32) for name, array in sorted(content.items())},
        {},
        0,
    )
    for key, array in arrays.items():
        entries[key] = {
            "dtype": "F32",
            "shape": array.shape,
            "data_offsets": (at, at + array.nbytes),
        }
        at += array.nbytes
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    parts = [
        len(head).to_bytes(8, "little"),
        head,
        *(array.reshape(-1).view(np.uint8) for array in arrays.values()),
    ]
    location.write_parts(name, parts)
    return File(
        name, sum(map(len, parts)), functools.reduce(lambda crc, part: crc32(part, crc), parts, 0)
    )


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
    second time).
    """
    named = {}
    with ThreadPoolExecutor(1) as pool:
        shapes = pool.submit(
            tensor_shapes, cfg
        )  # traces the model, which takes about as long as reading it
        for file in files:
            named |= load_tensors(location, file, dtype, served=not stacked)
        shapes = shapes.result()
    for name in sorted(shapes.keys() ^ named.keys()):
        what = "has no tensor" if name in shapes else "has an unknown tensor"
        raise UserError(f"{location.url}/backbone: {what} {name!r}; export the run again")
    for name, shape in shapes.items():
        found = named[name].shape[not stacked and name.startswith(LAYERS) :]
        if found != shape:
            raise UserError(
                f"{location.url}/backbone: {name} is {found}, the model has {shape}; export the run"
                " again"
            )
    specs = layer_specs(cfg)
    prefixes = [f"{LAYERS}{i}." for i in range(len(specs))]
    layers = [
        nest({k.removeprefix(p): v for k, v in named.items() if k.startswith(p)}) for p in prefixes
    ]
    blocks = (
        stack_layers(layers, specs)
        if stacked
        else {f"s{i}": {"u0": layer} for i, layer in enumerate(layers)}
    )
    return nest({k: v for k, v in named.items() if not k.startswith(LAYERS)}) | {"blocks": blocks}


def load_tensors(
    location: Location, file: File, dtype: str = "float32", served: bool = False
) -> dict[str, jax.Array]:
    """The tensors of one safetensors file of float32, on the device; those of two or more
    dimensions in ``dtype``, with ``served`` those of layers with a first axis of 1.

    Raises UserError unless the file has the size and the CRC-32 that ``file`` says. Arrays go to
    the device before the whole file is checked, but none is handed out.
    """
    found = location.sizes([file.name]).get(file.name, file.bytes)
    if found not in (None, file.bytes):
        raise UserError(
            f"{location.url}/{file.name}: {found} bytes, the manifest says {file.bytes}; {MEND}"
        )
    try:
        head, entries = _header(location, file)
        made, crc = {}, crc32(head)
        with ThreadPoolExecutor(READERS) as pool:
            try:
                for name, shape, start in entries:
                    host, pieces = _start_tensor(
                        pool, location, file, start, shape, dtype if len(shape) > 1 else "float32"
                    )
                    made[name] = host[None] if served and name.startswith(LAYERS) else host, pieces
                for name, (host, pieces) in made.items():
                    for piece in pieces:
                        crc = crc32_combine(crc, *piece.result())
                    made[name] = jax.device_put(host)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if _whole_crc32(location, file) != file.crc32:
            raise damaged(location, file) from None
        raise UserError(
            f"{location.url}/{file.name}: not a safetensors file ({error}); export the run again"
        ) from None
    if crc != file.crc32:
        raise damaged(location, file)
    return made


def _header(location: Location, file: File) -> tuple[bytes, list[tuple[str, list[int], int]]]:
    """(the bytes before the first tensor, [(name, shape, where it starts)]). Raises ValueError and
    the like unless float32 tensors fill the file.
    """
    size = int.from_bytes(first := read_exactly(location, file, 0, 8), "little")
    if 8 + size > file.bytes:
        raise ValueError("its header is longer than the file")
    head = first + read_exactly(location, file, 8, 8 + size)
    found, at = [], 0
    entries = json.loads(head[8:])
    for (begin, end), name, entry in sorted(
        (entry["data_offsets"], name, entry)
        for name, entry in entries.items()
        if name != "__metadata__"
    ):
        if entry["dtype"] != "F32" or begin != at or end - begin != 4 * math.prod(entry["shape"]):
            raise ValueError(f"tensor {name!r} is not float32, or out of place")
        found.append((name, entry["shape"], len(head) + begin))
        at = end
    if len(head) + at != file.bytes:
        raise ValueError("its tensors do not fill it")
    return head, found


def _start_tensor(
    pool: ThreadPoolExecutor,
    location: Location,
    file: File,
    start: int,
    shape: list[int],
    dtype: str,
) -> tuple[np.ndarray, list[Future]]:
    """Memory for a tensor, and the reads that fill it, in order; each returns (CRC-32, length) of
    its bytes in the file.
    """
    count, dtype = math.prod(shape), jnp.dtype(dtype)
    host = (
        allocate(1, count * dtype.itemsize, huge=False).reshape(-1).view(dtype)
    )  # page-aligned: a CPU device takes it without a copy

    def read(first: int, last: int) -> tuple[int, int]:
        data = read_exactly(location, file, start + 4 * first, start + 4 * last)
        host[first:last] = np.frombuffer(data, np.float32)
        return crc32(data), len(data)

    step = READ_BYTES // 4
    return host.reshape(shape), [
        pool.submit(read, first, min(first + step, count)) for first in range(0, count, step)
    ]


def read_exactly(location: Location, file: File, start: int, stop: int) -> bytes:
    """Bytes start..stop-1 of a file of the store. Raises UserError when it is missing, cannot be
    read, or ends before.
    """
    try:
        data = location.read(file.name, start, stop)
    except OSError as error:
        raise UserError(
            f"{location.url}/{file.name}: cannot be read ({error.strerror or 'missing'}); {MEND}"
        ) from None
    if len(data) != stop - start:
        raise UserError(
            f"{location.url}/{file.name}: ends after {start + len(data)} bytes, the manifest says"
            f" {file.bytes}; {MEND}"
        )
    return data


def damaged(location: Location, file: File) -> UserError:
    return UserError(
        f"{location.url}/{file.name}: its checksum is wrong, the file was changed or damaged;"
        f" {MEND}"
    )


def _whole_crc32(location: Location, file: File) -> int:
    crc = 0
    for start in range(0, file.bytes, READ_BYTES):
        crc = crc32(read_exactly(location, file, start, min(start + READ_BYTES, file.bytes)), crc)
    return crc
