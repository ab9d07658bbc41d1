"""The TKV store's layout: manifest, names, zarr3 metadata. docs/formats.md describes the same bytes for other readers.

    STORE/tkv.json                  manifest, written last: a directory without it is not a store
    STORE/tkv.partial.<host>.json   only while an export is unfinished
    STORE/rows/<group>/             zarr3, one token's rows of all layers contiguous: [V, L, W], or encoded uint8 [V, B]
    STORE/checksums/<group>/        zarr3 uint32 [V], CRC-32 of each token's bundle
    STORE/basis.safetensors         of low-rank rows
    STORE/counts.npy                optional, how often each id occurs in the training data
    STORE/backbone/*.safetensors    every parameter that is not folded away
    STORE/tokenizer.json

Version 1, still read, has plain rows only, and a CRC-32 of whole files for the backbone alone.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import re
import zlib

import numpy as np

from flexmemory.config import Config, ModelConfig, from_dict
from flexmemory.errors import UserError
from flexmemory.models.blocks import layer_specs
from flexmemory.models.memory import row_groups
from flexmemory.tkv.encoding import DTYPES, FLOATS, Layout
from flexmemory.tkv.location import Location

FORMAT, VERSION, READABLE = "tkv", 2, (1, 2)
MANIFEST, TOKENIZER, BASIS, COUNTS = "tkv.json", "tokenizer.json", "basis.safetensors", "counts.npy"
COPY_MARK = "tkv.partial.copy.json"  # of an unfinished copy
SHARD_BYTES = 32 << 20  # of the widest group; papers/offload.md 3.3: 32-64 MiB, size hardly matters once indexes are cached
FOLD_ROWS = 1024  # largest number of addresses in one call of the fold
INDEX_ENTRY_BYTES, INDEX_CRC_BYTES = 16, 4
BACKBONE_NAME = re.compile(r"backbone/model-\d{5}-of-\d{5}\.safetensors")
MEND = "copy the store again or export the run again"


@dataclasses.dataclass(frozen=True)
class Group:
    """One array of rows: the memory layers whose rows have the same width."""

    name: str  # "w<W>"; the array is rows/<name>, its checksums checksums/<name>
    layers: tuple[int, ...]  # model layer (0 is nearest the input) of each place on the array's layer axis
    layout: Layout
    shards: int  # files of the array
    bytes: int  # of rows, all tokens, without shard indexes

    @property
    def width(self) -> int:
        """W"""
        return self.layout.width

    @property
    def bundle_bytes(self) -> int:
        """B: one token's rows of all layers, as stored."""
        return self.layout.bundle_bytes


@dataclasses.dataclass(frozen=True)
class File:
    name: str  # relative to the store
    bytes: int
    crc32: int  # of the whole file


@dataclasses.dataclass(frozen=True)
class LayerError:
    """Stored rows of one memory layer against the float32 fold."""

    layer: int  # of the model
    relative_rms: float  # root of (sum of squared errors / sum of squares)
    max_abs: float


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
    """tkv.json. ``groups`` and all byte counts follow from the fields before ``files`` and are checked against them."""

    model: ModelConfig
    dtype: str  # one of encoding.DTYPES
    shard_rows: int  # tokens in one shard of every group, a power of two
    fold_rows: int  # addresses in one call of the fold: a fold of the same size gives the same bits
    tokenizer: TokenizerInfo
    source: Source
    scale_group: int = 0
    ranks: tuple[int, ...] | None = None  # by memory layer in model order; None: full rows
    rank_error: float | None = None  # the error budget that chose the ranks
    files: tuple[File, ...] = ()  # every file but the manifest, by name; version 1: the backbone's
    errors: tuple[LayerError, ...] | None = None  # by memory layer in model order; None: plain float32, or version 1
    version: int = VERSION
    flexmemory: str = dataclasses.field(default_factory=lambda: importlib.metadata.version("flexmemory"))

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def groups(self) -> tuple[Group, ...]:
        return model_groups(self.model, self.dtype, self.shard_rows, self.scale_group, self.ranks)

    @property
    def backbone(self) -> tuple[File, ...]:
        return tuple(file for file in self.files if BACKBONE_NAME.fullmatch(file.name))

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

    def file(self, name: str) -> File | None:
        return next((file for file in self.files if file.name == name), None)


def model_groups(model: ModelConfig, dtype: str, shard_rows: int, scale_group: int = 0, ranks: tuple[int, ...] | None = None) -> tuple[Group, ...]:
    """The groups of a store of ``model``. ``ranks``: by memory layer in model order."""
    specs, made, v = layer_specs(model), [], model.vocab_size
    rank_of = dict(zip(memory_layers(model), ranks, strict=True)) if ranks else {}
    for name, layers in row_groups(specs).items():
        layout = Layout(len(layers), specs[layers[0]].row_width, dtype, scale_group, tuple(rank_of[i] for i in layers) if ranks else None)
        made.append(Group(name, tuple(layers), layout, math.ceil(v / shard_rows), v * layout.bundle_bytes))
    return tuple(made)


def memory_layers(model: ModelConfig) -> list[int]:
    """Model layers that have rows, from input to output."""
    return [i for i, spec in enumerate(layer_specs(model)) if spec.row_width]


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
    """The largest power of two whose shard of the widest group at full rank stays within 32 MiB, at most the first that holds all V."""
    bundle = max((group.bundle_bytes for group in model_groups(model, dtype, 1)), default=1)
    return min(1 << max(0, int(math.log2(SHARD_BYTES / bundle))), next_power(model.vocab_size))


def next_power(n: int) -> int:
    """The first power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def partial_file(host: int) -> str:
    return f"tkv.partial.{host}.json"


def shard_file(group: Group, block: int) -> str:
    return f"rows/{group.name}/{shard_key(group, block)}"


def shard_key(group: Group, block: int) -> str:
    """Name of a shard inside its array."""
    return f"c/{block}/0/0" if group.layout.plain else f"c/{block}/0"


def checksum_file(group: Group, block: int) -> str:
    return f"checksums/{group.name}/c/{block}"


def shard_bytes(manifest: Manifest, group: Group, block: int) -> int:
    """Size of a whole shard file: its bundles, then an index with an entry for every place, used or not, then the index's crc32c."""
    tokens = min(manifest.shard_rows, manifest.vocab_size - block * manifest.shard_rows)
    return tokens * group.bundle_bytes + INDEX_ENTRY_BYTES * manifest.shard_rows + INDEX_CRC_BYTES


def expected_files(manifest: Manifest) -> dict[str, int]:
    """Every shard of rows/ and checksums/ with its size in bytes, by name relative to the store."""
    files = {}
    for group in manifest.groups:
        for block in range(group.shards):
            files[shard_file(group, block)] = shard_bytes(manifest, group, block)
            files[checksum_file(group, block)] = 4 * manifest.shard_rows
    return files


def fixed_names(manifest: Manifest) -> list[str]:
    """Files that every store like this has, besides the shards and the backbone."""
    arrays = [f"{kind}/{group.name}/zarr.json" for group in manifest.groups for kind in ("rows", "checksums")]
    return [*arrays, TOKENIZER, *([BASIS] if manifest.ranks else [])]


def rows_spec(kvstore: dict, manifest: Manifest, group: Group) -> dict:
    """TensorStore spec of rows/<group> in a kvstore (``location.spec(f"rows/{group.name}")``). Opening with it checks the stored metadata
    against the manifest."""
    layout = group.layout
    inner, names = ((layout.layers, layout.width), ("layer", "width")) if layout.plain else ((layout.bundle_bytes,), ("byte",))
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [1, *inner],
        "codecs": [little if layout.plain else {"name": "bytes"}],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return _spec(kvstore, {
        "shape": [manifest.vocab_size, *inner],
        "data_type": layout.dtype if layout.plain else "uint8",
        "dimension_names": ["token", *names],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [manifest.shard_rows, *inner]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    })


def checksums_spec(kvstore: dict, manifest: Manifest) -> dict:
    return _spec(kvstore, {
        "shape": [manifest.vocab_size],
        "data_type": "uint32",
        "dimension_names": ["token"],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [manifest.shard_rows]}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    })


def _spec(kvstore: dict, metadata: dict) -> dict:
    return {
        "driver": "zarr3",
        "kvstore": kvstore,
        "metadata": {"fill_value": 0, "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}, **metadata},
        "store_data_equal_to_fill_value": True,  # else bundles of zeros vanish and the others move up
        "fill_missing_data_reads": False,  # a lost shard is an error, not zeros
        "recheck_cached_data": False,
    }


def to_json(manifest: Manifest) -> dict:
    """The manifest as it is written, checksum included, in the manifest's version."""
    m, first = manifest, manifest.version == 1
    groups = []
    for g in m.groups:
        ranks = {} if first else {"ranks": g.layout.ranks}
        scales = {"scales": None} if first else {}
        groups.append({"name": g.name, "layers": g.layers, "width": g.width, **ranks, "bundle_bytes": g.bundle_bytes, "shards": g.shards,
                       "bytes": g.bytes, **scales})
    files = [dataclasses.asdict(file) for file in m.files]
    body = {
        "format": FORMAT,
        "version": m.version,
        "flexmemory": m.flexmemory,
        "pattern": m.model.pattern,
        "model": dataclasses.asdict(m.model),
        "vocab_size": m.vocab_size,
        "dtype": m.dtype,
        **({} if first else {"scale_group": m.scale_group, "rank_error": m.rank_error}),
        "byte_order": "little",
        "shard_rows": m.shard_rows,
        "fold_rows": m.fold_rows,
        "layers": model_layers(m.model),
        "groups": groups,
        "table_bytes": m.table_bytes,
        "backbone": {"dtype": "float32", **({"files": files} if first else {})},
        "tokenizer": {"file": TOKENIZER, **dataclasses.asdict(m.tokenizer)},
        "source": dataclasses.asdict(m.source),
        **({} if first else {"errors": m.errors and [dataclasses.asdict(error) for error in m.errors], "files": files}),
    }
    body = json.loads(json.dumps(body))  # tuples become lists, as a reader sees them
    return {**body, "crc32": json_crc32(body)}


def from_json(content: object, origin: str) -> Manifest:
    """Checks a decoded tkv.json. Raises UserError naming the field and what to do."""
    mend = "export the run again"
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{origin}: not the manifest of a TKV store (format {_get(content, 'format')!r}); {mend}")
    if content.get("version") not in READABLE:
        raise UserError(f"{origin}: version {content.get('version')!r}, this flexmemory reads {' and '.join(map(str, READABLE))}; {mend} or use "
                        f"the flexmemory that wrote it ({content.get('flexmemory')})")
    body = {name: value for name, value in content.items() if name != "crc32"}
    if content.get("crc32") != json_crc32(body):
        raise UserError(f"{origin}: crc32 {content.get('crc32')!r} does not fit the content, it was changed or damaged; {mend}")
    try:
        manifest = _parse(body)
        _check(manifest, origin, mend)
        written = to_json(manifest)
        # a field that the config has gained since then takes its default, which must mean what was done before
        written["model"] = {name: value for name, value in written["model"].items() if name in body["model"]}
        if unknown := body.keys() - written.keys():
            raise UserError(f"{origin}: unknown field {', '.join(sorted(unknown))}; {mend} or use the flexmemory that wrote it")
        if wrong := [name for name in written if name != "crc32" and written[name] != body[name]]:
            raise UserError(f"{origin}: {', '.join(wrong)} not as the model, dtype and shard_rows say; {mend}")
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{origin}: missing or malformed field ({error}); {mend}") from None
    return manifest


def _parse(body: dict) -> Manifest:
    model, more = from_dict({"model": body["model"]}).model, {}
    if body["version"] > 1:
        rank_of = {layer: rank for group in body["groups"] if group["ranks"] for layer, rank in zip(group["layers"], group["ranks"], strict=True)}
        errors = body["errors"]
        more = {"scale_group": body["scale_group"], "rank_error": body["rank_error"],
                "ranks": tuple(rank_of[layer] for layer in memory_layers(model)) if rank_of else None,
                "errors": None if errors is None else tuple(LayerError(**error) for error in errors)}
    return Manifest(
        model=model,
        dtype=body["dtype"],
        shard_rows=body["shard_rows"],
        fold_rows=body["fold_rows"],
        tokenizer=TokenizerInfo(**{k: v for k, v in body["tokenizer"].items() if k != "file"}),
        source=Source(**body["source"]),
        files=tuple(File(**file) for file in (body["backbone"] if body["version"] == 1 else body)["files"]),
        version=body["version"],
        flexmemory=body["flexmemory"],
        **more,
    )


def _check(m: Manifest, origin: str, mend: str) -> None:
    known = FLOATS if m.version == 1 else DTYPES
    if m.dtype not in known:
        raise UserError(f"{origin}: dtype {m.dtype!r} is not one of {', '.join(known)}; {mend}")
    if m.vocab_size < 1 or m.shard_rows < 1 or m.shard_rows & (m.shard_rows - 1):
        raise UserError(f"{origin}: shard_rows {m.shard_rows} is not a power of two; {mend}")
    if m.scale_group < 0 or (m.scale_group and m.dtype in FLOATS):
        raise UserError(f"{origin}: scale_group {m.scale_group} does not go with dtype {m.dtype}; {mend}")
    if bad := [rank for g in m.groups for rank in g.layout.ranks or () if not 1 <= rank <= g.width]:
        raise UserError(f"{origin}: groups: rank {bad[0]} is not between 1 and the rows' width; {mend}")
    names = {file.name: file.bytes for file in m.files}
    if m.version == 1:
        if not all(BACKBONE_NAME.fullmatch(name) for name in names):
            raise UserError(f"{origin}: backbone file names must be like backbone/model-00001-of-00001.safetensors; {mend}")
        return
    if list(names) != sorted(names) or len(names) != len(m.files):
        raise UserError(f"{origin}: files: not sorted by name, or a name twice; {mend}")
    shards, rest = expected_files(m), {*fixed_names(m), COUNTS}
    for name in (*shards, *fixed_names(m)):
        if name not in names or names[name] != shards.get(name, names[name]):
            raise UserError(f"{origin}: files: {name} is {'missing' if name not in names else f'{names[name]} bytes'}, "
                            f"not as the model, dtype and shard_rows say; {mend}")
    for name in names:
        if name not in shards and name not in rest and not BACKBONE_NAME.fullmatch(name):
            raise UserError(f"{origin}: files: {name!r} is no file of a store; {mend}")


def read_manifest(location: Location) -> Manifest:
    """The manifest of a complete store. Raises UserError where there is none, a partial export, or another version."""
    try:
        content = json.loads(location.read(MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        if what := unfinished(location):
            raise UserError(f"{location.url}: an unfinished {what}, not a store; run the same `flexmemory {what}` again to finish it") from None
        raise UserError(f"{location.url}: no TKV store here (no {MANIFEST}); write one with `flexmemory export --workdir=RUN "
                        f"--out={location.url}`") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{location.url}/{MANIFEST}: not a readable JSON file ({error}); export the run again") from None
    return from_json(content, f"{location.url}/{MANIFEST}")


def unfinished(location: Location) -> str | None:
    """"export" or "copy" where the mark of one that has not ended is. Host 0 of an export always has one; version 1 had tkv.partial.json."""
    for name, what in ((partial_file(0), "export"), (COPY_MARK, "copy"), ("tkv.partial.json", "export")):
        try:
            location.read(name, 0, 1)
            return what
        except FileNotFoundError:
            continue
        except NotADirectoryError:
            return None
    return None


def bundle_crc32(bundles_RB: np.ndarray) -> np.ndarray:
    """CRC-32 (zlib) of each token's bundle as stored. bundles: uint8 [R, B], C order. uint32 [R]."""
    return np.fromiter((zlib.crc32(bundle) for bundle in bundles_RB), np.uint32, len(bundles_RB))


def json_crc32(body: dict) -> int:
    """CRC-32 of the JSON with sorted keys, no white space, non-ASCII escaped."""
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def config_hash(config: Config) -> str:
    """First 16 hex digits of a sha256 over the whole configuration."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode()).hexdigest()[:16]


def _get(content, name):
    return content.get(name) if isinstance(content, dict) else None
