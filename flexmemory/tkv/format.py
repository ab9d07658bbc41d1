"""The TKV store's layout: manifest, names, zarr3 metadata. docs/formats.md describes the same bytes for other readers.

    STORE/tkv.json                  manifest, written last: a directory without it is not a store
    STORE/tkv.partial.json          only while an export is unfinished
    STORE/rows/<group>/             zarr3 [V, L, W], one token's rows of all layers contiguous
    STORE/checksums/<group>/        zarr3 uint32 [V], CRC-32 of each token's bundle
    STORE/backbone/*.safetensors    every parameter that is not folded away
    STORE/tokenizer.json
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from flexmemory.config import Config, ModelConfig, from_dict
from flexmemory.errors import UserError
from flexmemory.models.blocks import layer_specs
from flexmemory.models.memory import row_groups

FORMAT, VERSION = "tkv", 1
MANIFEST, PARTIAL, TOKENIZER = "tkv.json", "tkv.partial.json", "tokenizer.json"
DTYPES = ("float32", "bfloat16", "float16")
SHARD_BYTES = 32 << 20  # of the widest group; papers/offload.md 3.3: 32-64 MiB, size hardly matters once indexes are cached
FOLD_ROWS = 1024  # largest number of addresses in one call of the fold
INDEX_ENTRY_BYTES, INDEX_CRC_BYTES = 16, 4
BACKBONE_NAME = re.compile(r"backbone/model-\d{5}-of-\d{5}\.safetensors")


@dataclasses.dataclass(frozen=True)
class Group:
    """One array of rows: the memory layers whose rows have the same width."""

    name: str  # "w<W>"; the array is rows/<name>, its checksums checksums/<name>
    layers: tuple[int, ...]  # model layer (0 is nearest the input) of each place on the array's layer axis
    width: int  # W
    bundle_bytes: int  # one token's rows of all layers
    shards: int  # files of the array
    bytes: int  # of rows, all tokens, without shard indexes
    scales: None = None  # for quantised dtypes of later versions


@dataclasses.dataclass(frozen=True)
class BackboneFile:
    name: str  # relative to the store
    bytes: int
    crc32: int  # of the whole file


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    fingerprint: str
    eos_id: int
    vocab_size: int  # may be below the model's V


@dataclasses.dataclass(frozen=True)
class Source:
    """What was exported. Equal sources give equal bytes."""

    run: str  # name of the run folder, without its place on the machine
    step: int
    config_hash: str
    params_crc32: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """tkv.json. ``groups`` and all byte counts follow from ``model``, ``dtype`` and ``shard_rows`` and are checked against them."""

    model: ModelConfig
    dtype: str
    shard_rows: int  # tokens in one shard of every group, a power of two
    fold_rows: int  # addresses in one call of the fold: a fold of the same size gives the same bits
    tokenizer: TokenizerInfo
    source: Source
    backbone: tuple[BackboneFile, ...] = ()
    flexmemory: str = dataclasses.field(default_factory=lambda: importlib.metadata.version("flexmemory"))

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def numpy_dtype(self) -> np.dtype:
        return jnp.dtype(self.dtype)

    @property
    def groups(self) -> tuple[Group, ...]:
        return model_groups(self.model, self.dtype, self.shard_rows)

    @property
    def bundle_bytes(self) -> int:
        """Bytes of one token over all groups."""
        return sum(group.bundle_bytes for group in self.groups)

    @property
    def table_bytes(self) -> int:
        return sum(group.bytes for group in self.groups)

    @property
    def blocks(self) -> int:
        """Shards of each group: the unit of writing and of resuming."""
        return math.ceil(self.vocab_size / self.shard_rows) if self.groups else 0


def model_groups(model: ModelConfig, dtype: str, shard_rows: int) -> tuple[Group, ...]:
    specs, made, v = layer_specs(model), [], model.vocab_size
    for name, layers in row_groups(specs).items():
        width = specs[layers[0]].row_width
        bundle = len(layers) * width * jnp.dtype(dtype).itemsize
        made.append(Group(name, tuple(layers), width, bundle, math.ceil(v / shard_rows), v * bundle))
    return tuple(made)


def model_layers(model: ModelConfig) -> list[dict]:
    """The resolved layers from input to output, so that a reader needs neither the pattern's grammar nor the rules for widths.

    kind: of the block; d_ffn: width of the FFN that the block keeps, 0 without; square: number of D x D matrices of a flex
    layer's FFN-C, 0 for a SwiGLU; group, place: where its rows are, rows/<group>[token, place], None without memory.
    """
    specs = layer_specs(model)
    place = {layer: (name, k) for name, layers in row_groups(specs).items() for k, layer in enumerate(layers)}
    made = []
    for i, spec in enumerate(specs):
        group, k = place.get(i, (None, None))
        made.append({"kind": spec.kind, "d_ffn": spec.d_ffn, "square": spec.square, "group": group, "place": k})
    return made


def default_shard_rows(model: ModelConfig, dtype: str) -> int:
    """The largest power of two whose shard of the widest group stays within 32 MiB, at most the first that holds all V."""
    bundle = max((group.bundle_bytes for group in model_groups(model, dtype, 1)), default=1)
    return min(1 << max(0, int(math.log2(SHARD_BYTES / bundle))), next_power(model.vocab_size))


def next_power(n: int) -> int:
    """The first power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def shard_file(group: str, block: int) -> str:
    return f"rows/{group}/c/{block}/0/0"


def checksum_file(group: str, block: int) -> str:
    return f"checksums/{group}/c/{block}"


def shard_bytes(manifest: Manifest, group: Group, block: int) -> int:
    """Size of a whole shard file: its bundles, then an index with an entry for every place, used or not, then the index's crc32c."""
    tokens = min(manifest.shard_rows, manifest.vocab_size - block * manifest.shard_rows)
    return tokens * group.bundle_bytes + INDEX_ENTRY_BYTES * manifest.shard_rows + INDEX_CRC_BYTES


def expected_files(manifest: Manifest) -> dict[str, int]:
    """Every data file of rows/ and checksums/ with its size in bytes, by name relative to the store."""
    files = {}
    for group in manifest.groups:
        for block in range(group.shards):
            files[shard_file(group.name, block)] = shard_bytes(manifest, group, block)
            files[checksum_file(group.name, block)] = 4 * manifest.shard_rows
    return files


def rows_spec(store: Path, manifest: Manifest, group: Group, context: dict | None = None) -> dict:
    """TensorStore spec of rows/<group>. Opening with it checks the stored metadata against the manifest."""
    length, width = len(group.layers), group.width
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [1, length, width],
        "codecs": [little],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return _spec(store / "rows" / group.name, context, {
        "shape": [manifest.vocab_size, length, width],
        "data_type": manifest.dtype,
        "dimension_names": ["token", "layer", "width"],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [manifest.shard_rows, length, width]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    })


def checksums_spec(store: Path, manifest: Manifest, group: Group, context: dict | None = None) -> dict:
    return _spec(store / "checksums" / group.name, context, {
        "shape": [manifest.vocab_size],
        "data_type": "uint32",
        "dimension_names": ["token"],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [manifest.shard_rows]}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    })


def _spec(path: Path, context: dict | None, metadata: dict) -> dict:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path.absolute()}{os.sep}"},
        "metadata": {"fill_value": 0, "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}, **metadata},
        "store_data_equal_to_fill_value": True,  # else bundles of zeros vanish and the others move up
        "fill_missing_data_reads": False,  # a lost shard is an error, not zeros
        "recheck_cached_data": False,
        **({"context": context} if context else {}),
    }


def to_json(manifest: Manifest) -> dict:
    """The manifest as it is written, checksum included."""
    m = manifest
    body = {
        "format": FORMAT,
        "version": VERSION,
        "flexmemory": m.flexmemory,
        "pattern": m.model.pattern,
        "model": dataclasses.asdict(m.model),
        "vocab_size": m.vocab_size,
        "dtype": m.dtype,
        "byte_order": "little",
        "shard_rows": m.shard_rows,
        "fold_rows": m.fold_rows,
        "layers": model_layers(m.model),
        "groups": [dataclasses.asdict(group) for group in m.groups],
        "table_bytes": m.table_bytes,
        "backbone": {"dtype": "float32", "files": [dataclasses.asdict(file) for file in m.backbone]},
        "tokenizer": {"file": TOKENIZER, **dataclasses.asdict(m.tokenizer)},
        "source": dataclasses.asdict(m.source),
    }
    body = json.loads(json.dumps(body))  # tuples become lists, as a reader sees them
    return {**body, "crc32": json_crc32(body)}


def from_json(content: object, origin: Path) -> Manifest:
    """Checks a decoded tkv.json. Raises UserError naming the field and what to do."""
    mend = "export the run again"
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{origin}: not the manifest of a TKV store (format {_get(content, 'format')!r}); {mend}")
    if content.get("version") != VERSION:
        raise UserError(f"{origin}: version {content.get('version')!r}, this flexmemory reads {VERSION}; {mend} or use the flexmemory "
                        f"that wrote it ({content.get('flexmemory')})")
    body = {name: value for name, value in content.items() if name != "crc32"}
    if content.get("crc32") != json_crc32(body):
        raise UserError(f"{origin}: crc32 {content.get('crc32')!r} does not fit the content, it was changed or damaged; {mend}")
    try:
        manifest = Manifest(
            model=from_dict({"model": content["model"]}).model,
            dtype=content["dtype"],
            shard_rows=content["shard_rows"],
            fold_rows=content["fold_rows"],
            tokenizer=TokenizerInfo(**{k: v for k, v in content["tokenizer"].items() if k != "file"}),
            source=Source(**content["source"]),
            backbone=tuple(BackboneFile(**file) for file in content["backbone"]["files"]),
            flexmemory=content["flexmemory"],
        )
        if manifest.dtype not in DTYPES:
            raise UserError(f"{origin}: dtype {manifest.dtype!r} is not one of {', '.join(DTYPES)}; {mend}")
        if manifest.vocab_size < 1 or manifest.shard_rows < 1 or manifest.shard_rows & (manifest.shard_rows - 1):
            raise UserError(f"{origin}: shard_rows {manifest.shard_rows} is not a power of two; {mend}")
        if not all(BACKBONE_NAME.fullmatch(file.name) for file in manifest.backbone):
            raise UserError(f"{origin}: backbone file names must be like backbone/model-00001-of-00001.safetensors; {mend}")
        written = to_json(manifest)
        # a field that the config has gained since then takes its default, which must mean what was done before
        written["model"] = {name: value for name, value in written["model"].items() if name in body["model"]}
        if unknown := body.keys() - written.keys():
            raise UserError(f"{origin}: unknown field {', '.join(sorted(unknown))}; {mend} or use the flexmemory that wrote it")
        if wrong := [name for name in written if name != "crc32" and written[name] != body[name]]:
            raise UserError(f"{origin}: {', '.join(wrong)} not as the model, dtype and shard_rows say; {mend}")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{origin}: missing or malformed field ({error}); {mend}") from None
    return manifest


def read_manifest(store: Path) -> Manifest:
    """The manifest of a complete store. Raises UserError where there is none, a partial export, or another version."""
    path = Path(store) / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if (Path(store) / PARTIAL).exists():
            raise UserError(f"{store}: an unfinished export, not a store; run the same `flexmemory export` again to finish it") from None
        raise UserError(f"{store}: no TKV store here (no {MANIFEST}); write one with `flexmemory export --workdir=RUN --out={store}`") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}); export the run again") from None
    return from_json(content, path)


def bundle_crc32(rows_RLW: np.ndarray) -> np.ndarray:
    """CRC-32 (zlib) of each token's bundle as stored: C order, little-endian like every machine JAX runs on. uint32 [R]."""
    bundles = np.ascontiguousarray(rows_RLW).view(np.uint8).reshape(len(rows_RLW), math.prod(rows_RLW.shape[1:]) * rows_RLW.itemsize)
    return np.fromiter((zlib.crc32(bundle) for bundle in bundles), np.uint32, len(bundles))


def json_crc32(body: dict) -> int:
    """CRC-32 of the JSON with sorted keys, no white space, non-ASCII escaped."""
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def config_hash(config: Config) -> str:
    """First 16 hex digits of a sha256 over the whole configuration."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode()).hexdigest()[:16]


def _get(content, name):
    return content.get(name) if isinstance(content, dict) else None
