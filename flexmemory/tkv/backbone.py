"""The backbone of a store: every parameter outside ``memory``, one safetensors tensor per layer, in names that need no JAX.

``embed``, ``head``, ``norm.scale``, ``layers.<i>.attn.q``, ``layers.<i>.ffn.gate``, ...: see docs/formats.md.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from flexmemory.config import ModelConfig
from flexmemory.errors import UserError
from flexmemory.models.blocks import layer_specs
from flexmemory.models.transformer import abstract_params, per_layer, stack_layers
from flexmemory.tkv.format import BackboneFile

FILE_BYTES = 2 << 30


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
    shapes = jax.eval_shape(lambda params: tensors(params, cfg), abstract_params(cfg, with_memory=False))
    return {name: array.shape for name, array in shapes.items()}


def save(params: dict, cfg: ModelConfig, store: Path, file_bytes: int = FILE_BYTES) -> tuple[BackboneFile, ...]:
    """Writes backbone/model-<k>-of-<n>.safetensors, each of at most ``file_bytes`` or one tensor, and syncs them."""
    named, files, size = tensors(params, cfg), [{}], 0
    for name, array in named.items():
        if files[-1] and size + array.nbytes > file_bytes:
            files.append({})
            size = 0
        files[-1][name] = array
        size += array.nbytes
    directory = store / "backbone"
    directory.mkdir(exist_ok=True)
    for stale in directory.iterdir():  # of an interrupted export
        stale.unlink()
    made = []
    for number, content in enumerate(files, 1):
        name = f"backbone/model-{number:05d}-of-{len(files):05d}.safetensors"
        data = safetensors.save({k: np.ascontiguousarray(v, np.float32) for k, v in content.items()})
        with open(store / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        made.append(BackboneFile(name, len(data), zlib.crc32(data)))
    return tuple(made)


def load(store: Path, files: tuple[BackboneFile, ...], cfg: ModelConfig) -> dict:
    """The params dict without ``memory`` (blocks stacked as the model wants them), float32. Raises UserError on a damaged file."""
    named: dict[str, np.ndarray] = {}
    for file in files:
        data = read_file(store, file)
        try:
            named |= safetensors.load(data)
        except SafetensorError as error:
            raise UserError(f"{store / file.name}: not a safetensors file ({error}); export the run again") from None
    shapes = tensor_shapes(cfg)
    for name in sorted(shapes.keys() ^ named.keys()):
        what = "has no tensor" if name in shapes else "has an unknown tensor"
        raise UserError(f"{store}/backbone: {what} {name!r}; export the run again")
    for name, shape in shapes.items():
        if named[name].shape != shape or named[name].dtype != np.float32:
            found = f"{named[name].dtype} {named[name].shape}"
            raise UserError(f"{store}/backbone: {name} is {found}, the model has float32 {shape}; export the run again")
    specs = layer_specs(cfg)
    prefixes = [f"layers.{i}." for i in range(len(specs))]
    layers = [nest({k.removeprefix(p): v for k, v in named.items() if k.startswith(p)}) for p in prefixes]
    return {**nest({k: v for k, v in named.items() if not k.startswith("layers.")}), "blocks": stack_layers(layers, specs)}


def read_file(store: Path, file: BackboneFile) -> bytes:
    path = store / file.name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again or export the run again") from None
    if len(data) != file.bytes:
        raise UserError(f"{path}: {len(data)} bytes, the manifest says {file.bytes}; copy it again or export the run again")
    if zlib.crc32(data) != file.crc32:
        raise UserError(f"{path}: its checksum is wrong, the file was changed or damaged; copy it again or export the run again")
    return data
