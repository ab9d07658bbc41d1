"""The TKV store's layout: what a manifest says, names and sizes of files, zarr3 metadata.
docs/formats.md describes the same bytes for other readers.

    STORE/tkv.json                  manifest, written last: a directory without it is not a store
    STORE/tkv.partial.<host>.json   only while an export is unfinished
    STORE/rows/<group>/             zarr3, one token's rows of all layers contiguous: [V, L, W],
                                    or encoded uint8 [V, B]
    STORE/checksums/<group>/        zarr3 uint32 [V], CRC-32 of each token's bundle
    STORE/basis.safetensors         of low-rank rows
    STORE/counts.npy                optional, how often each id occurs in the training data
    STORE/backbone/*.safetensors    every parameter that is not folded away
    STORE/tokenizer.json"""

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version

import numpy as np

from flexmemory.models.blocks import layer_specs
from flexmemory.models.config import ModelConfig
from flexmemory.models.memory import row_groups
from flexmemory.tkv.encoding import Layout, Ranks, host_view
from flexmemory.tkv.storage.crc import crc32
from flexmemory.tkv.storage.location import File
from flexmemory.tkv.storage.reader import INDEX_CRC_BYTES, INDEX_ENTRY_BYTES, Records

VERSION = 2
TOKENIZER, BASIS, COUNTS = "tokenizer.json", "basis.safetensors", "counts.npy"
SHARD_BYTES = 32 << 20  # of the widest group; up to 64 MiB: it hardly matters, indexes are cached
FOLD_ROWS = 1024  # largest number of addresses in one call of the fold
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}  # zarr's codec
INDEX_CODECS = [LITTLE, {"name": "crc32c"}]
BACKBONE_NAME = re.compile(r"backbone/model-\d{5}-of-\d{5}\.safetensors")


@dataclasses.dataclass(frozen=True)
class Group:
    """One array of rows: the memory layers whose rows have the same width."""

    name: str  # "w<W>"; the array is rows/<name>, its checksums checksums/<name>
    layers: tuple[int, ...]  # model layer (0 is nearest the input) of each place on the layer axis
    layout: Layout
    shards: int  # files of the array
    bytes: int  # of rows, all tokens, without shard indexes

    @property
    def width(self) -> int:
        """W"""
        return self.layout.width

    @property
    def ranks(self) -> Ranks:
        return self.layout.ranks

    @property
    def bundle_bytes(self) -> int:
        """B: one token's rows of all layers, as stored."""
        return self.layout.bundle_bytes


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
class Provenance:
    """What was exported. Equal ones give equal bytes."""

    run: str  # name of the run folder, without its place on the machine
    step: int
    config_hash: str
    params_crc32: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What tkv.json says (:mod:`flexmemory.tkv.manifest` writes and reads it). ``groups`` and all
    byte counts follow from the fields before ``files`` and are checked against them."""

    model: ModelConfig
    dtype: str  # one of encoding.DTYPES
    shard_rows: int  # tokens in one shard of every group, a power of two
    fold_rows: int  # addresses in one call of the fold: a fold of the same size gives the same bits
    tokenizer: TokenizerInfo
    source: Provenance
    scale_group: int = 0
    ranks: Ranks = None  # by memory layer in model order
    rank_error: float | None = None  # the error budget that chose the ranks
    files: tuple[File, ...] = ()  # every file but the manifest, by name
    # by memory layer in model order; None where nothing is lost: plain float32
    errors: tuple[LayerError, ...] | None = None
    flexmemory: str = dataclasses.field(default_factory=partial(version, "flexmemory"))

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
    def shards(self) -> int:
        """Of each group: the unit of writing and of resuming is one of every group."""
        return math.ceil(self.vocab_size / self.shard_rows) if self.groups else 0

    def span(self, shard: int) -> tuple[int, int]:
        """First token of a shard, and the one after its last."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.vocab_size)

    def file(self, name: str) -> File | None:
        return next((file for file in self.files if file.name == name), None)


def model_groups(
    model: ModelConfig, dtype: str, shard_rows: int, scale_group: int = 0, ranks: Ranks = None
) -> tuple[Group, ...]:
    """The groups of a store of ``model``. ``ranks``: by memory layer in model order."""
    specs, groups, v = layer_specs(model), [], model.vocab_size
    rank_of = dict(zip(memory_layers(model), ranks, strict=True)) if ranks else {}
    for name, layers in row_groups(specs).items():
        own = tuple(rank_of[i] for i in layers) if ranks else None
        layout = Layout(len(layers), specs[layers[0]].row_width, dtype, scale_group, own)
        shards, size = math.ceil(v / shard_rows), v * layout.bundle_bytes
        groups.append(Group(name, tuple(layers), layout, shards, size))
    return tuple(groups)


def memory_layers(model: ModelConfig) -> list[int]:
    """Model layers that have rows, from input to output."""
    return [i for i, spec in enumerate(layer_specs(model)) if spec.row_width]


def model_layers(model: ModelConfig) -> list[dict]:
    """The resolved layers from input to output: kind of the block; d_ffn: width of the FFN that the
    block keeps, 0 without; square: number of D x D matrices of a flex layer's FFN-C, 0 for a
    SwiGLU; group, place: where its rows are, rows/<group>[token, place], None without memory."""
    specs = layer_specs(model)
    places = {i: (g, k) for g, layers in row_groups(specs).items() for k, i in enumerate(layers)}
    layers = []
    for i, spec in enumerate(specs):
        group, place = places.get(i, (None, None))
        own = {"kind": spec.kind, "d_ffn": spec.d_ffn, "square": spec.square}
        layers.append(own | {"group": group, "place": place})
    return layers


def default_shard_rows(model: ModelConfig, dtype: str) -> int:
    """The largest power of two whose shard of the widest group stays within 32 MiB; or all V."""
    bundle = max((group.bundle_bytes for group in model_groups(model, dtype, 1)), default=1)
    return min(floor_power(SHARD_BYTES // bundle), next_power(model.vocab_size))


def floor_power(n: int) -> int:
    """The last power of two that is at most n; 1 for 0."""
    return 1 << max(0, n.bit_length() - 1)


def next_power(n: int) -> int:
    """The first power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def shard_file(group: Group, shard: int) -> str:
    return f"rows/{group.name}/{shard_key(group, shard)}"


def shard_key(group: Group, shard: int) -> str:
    """Name of a shard inside its array."""
    return f"c/{shard}/0/0" if group.layout.plain else f"c/{shard}/0"


def checksum_file(group: Group, shard: int) -> str:
    return f"checksums/{group.name}/c/{shard}"


def shard_bytes(manifest: Manifest, group: Group, shard: int) -> int:
    """Size of a shard's file: bundles, an index entry for every place, the index's crc32c."""
    start, stop = manifest.span(shard)
    index = INDEX_ENTRY_BYTES * manifest.shard_rows + INDEX_CRC_BYTES
    return (stop - start) * group.bundle_bytes + index


def all_shards(manifest: Manifest) -> Iterator[tuple[Group, int]]:
    return ((group, shard) for group in manifest.groups for shard in range(group.shards))


def expected_files(manifest: Manifest) -> dict[str, int]:
    """Every shard of rows/ and checksums/ with its size in bytes, by name relative to the store."""
    sizes = {}
    for group, shard in all_shards(manifest):
        sizes[shard_file(group, shard)] = shard_bytes(manifest, group, shard)
        sizes[checksum_file(group, shard)] = 4 * manifest.shard_rows
    return sizes


def fixed_names(manifest: Manifest) -> list[str]:
    """Files that every store like this has, besides the shards and the backbone."""
    arrays = [
        f"{kind}/{g.name}/zarr.json" for g in manifest.groups for kind in ("rows", "checksums")
    ]
    return [*arrays, TOKENIZER, *([BASIS] if manifest.ranks else [])]


def records(manifest: Manifest, group: Group) -> Records:
    """The bundles of a group, for :func:`storage.reader.open_reader`."""
    return Records(
        name=f"rows/{group.name}",
        count=manifest.vocab_size,
        per_shard=manifest.shard_rows,
        size=group.bundle_bytes,
        files=tuple(shard_file(group, shard) for shard in range(group.shards)),
        spec=lambda kvstore: rows_spec(kvstore, manifest, group),
        view=lambda bundles_RB: host_view(group.layout, bundles_RB),
    )


def rows_spec(kvstore: dict, manifest: Manifest, group: Group) -> dict:
    """TensorStore spec of rows/<group> in a kvstore (``location.spec(f"rows/{group.name}")``).
    Opening with it checks the stored metadata against the manifest."""
    layout = group.layout
    inner, names = [layout.bundle_bytes], ["byte"]
    if layout.plain:
        inner, names = [layout.layers, layout.width], ["layer", "width"]
    sharding = {
        "chunk_shape": [1, *inner],
        "codecs": [LITTLE if layout.plain else {"name": "bytes"}],
        "index_codecs": INDEX_CODECS,
        "index_location": "end",
    }
    shape, chunk = [manifest.vocab_size, *inner], [manifest.shard_rows, *inner]
    dtype = layout.dtype if layout.plain else "uint8"
    codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return _spec(kvstore, shape, chunk, dtype, codecs, dimension_names=["token", *names])


def checksums_spec(kvstore: dict, manifest: Manifest) -> dict:
    shape, chunk = [manifest.vocab_size], [manifest.shard_rows]
    return _spec(kvstore, shape, chunk, "uint32", [LITTLE], dimension_names=["token"])


def index_spec(kvstore: dict, manifest: Manifest) -> dict:
    """A shard's index as an array of its own, encoded as it is in the shard."""
    shape = [manifest.shard_rows, 2]
    return _spec(kvstore, shape, shape, "uint64", INDEX_CODECS)


def _spec(
    kvstore: dict, shape: list, chunk: list, dtype: str, codecs: list, **metadata: object
) -> dict:
    return {
        "driver": "zarr3",
        "kvstore": kvstore,
        "metadata": {
            "shape": shape,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "data_type": dtype,
            "codecs": codecs,
            "fill_value": 0,
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            **metadata,
        },
        # else bundles of zeros vanish and the others move up
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,  # a lost shard is an error, not zeros
        "recheck_cached_data": False,
    }


def bundle_crc32(bundles_RB: np.ndarray) -> np.ndarray:
    """CRC-32 of each token's bundle as stored. bundles: uint8 [R, B], C order. uint32 [R]."""
    return np.fromiter(map(crc32, bundles_RB), np.uint32, len(bundles_RB))
