"""Opening and reading a TKV store. Every row that leaves here was checked against its checksum
unless checking is off."""

import dataclasses
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from flexmemory.data.tokenizer import Tokenizer
from flexmemory.data.tokenizer import parse as parse_tokenizer
from flexmemory.errors import UserError
from flexmemory.files import allocate
from flexmemory.models.config import ModelConfig
from flexmemory.tkv import backbone, encoding, format
from flexmemory.tkv.encoding import Basis
from flexmemory.tkv.format import BASIS, COUNTS, TOKENIZER, Group, Manifest
from flexmemory.tkv.manifest import read_manifest
from flexmemory.tkv.storage.crc import crc32
from flexmemory.tkv.storage.location import NETWORK, File, Location, misfits, open_location, refuse
from flexmemory.tkv.storage.reader import LocalReader, TensorStoreReader, open_reader


@dataclasses.dataclass(frozen=True)
class Store:
    """An open store. Made by :func:`open_store`."""

    location: Location
    manifest: Manifest
    check: bool
    _readers: dict[str, LocalReader | TensorStoreReader]  # by group
    _crc32_V: dict[str, np.ndarray]  # by group; empty without checking

    @property
    def model(self) -> ModelConfig:
        return self.manifest.model

    @functools.cached_property
    def groups(self) -> tuple[Group, ...]:
        return self.manifest.groups

    def read_bundles(self, ids_U: np.ndarray, out: dict[str, np.ndarray]) -> None:
        """Fills ``out``, {group: uint8 [U, B] C-contiguous}, with the bundles of ascending
        different token ids int64.

        Raises UserError for an id outside the vocabulary, a shard that is missing or damaged, a
        bundle that fails its checksum; what ``out`` then holds must not be used."""
        if not len(ids_U):
            return
        if ids_U[0] < 0 or ids_U[-1] >= self.manifest.vocab_size:
            raise UserError(
                f"token id {ids_U[0 if ids_U[0] < 0 else -1]} is outside the store's vocabulary of"
                f" {self.manifest.vocab_size}; use the store's tokenizer"
            )
        for group in self.groups:
            self._readers[group.name].read(ids_U, out[group.name])
            if self.check:
                self._verify(group, ids_U, out[group.name])

    def _verify(self, group: Group, ids_U: np.ndarray, bundles_UB: np.ndarray) -> None:
        wrong = np.flatnonzero(format.bundle_crc32(bundles_UB) != self._crc32_V[group.name][ids_U])
        if len(wrong):
            more = f", and {len(wrong) - 1} more tokens" if len(wrong) > 1 else ""
            what = f"the rows of token {ids_U[wrong[0]]} fail their checksum{more}"
            raise refuse(self.location, f"rows/{group.name}", what)

    def read_rows(self, ids_R: np.ndarray) -> dict[str, np.ndarray]:
        """{group: rows_RLW, decoded} of token ids, any order, repeats allowed; in the store's
        dtype, float32 where rows are encoded."""
        unique_U, inverse_R = np.unique(np.asarray(ids_R, np.int64), return_inverse=True)
        ordered = len(unique_U) == len(inverse_R) and bool((np.diff(inverse_R) > 0).all())
        stored = {group.name: allocate(len(unique_U), group.bundle_bytes) for group in self.groups}
        self.read_bundles(unique_U, stored)
        rows = {}
        for group in self.groups:
            rows_ULW = decoded(group, stored[group.name], self.bases()[group.name])
            rows[group.name] = rows_ULW if ordered else rows_ULW[inverse_R]
        return rows

    def bases(self) -> dict[str, Basis]:
        """See :func:`load_bases`."""
        return self._bases

    @functools.cached_property
    def _bases(self) -> dict[str, Basis]:
        return load_bases(self.location, self.groups, self.manifest.file(BASIS))

    def backbone(self, *, stacked: bool = True, dtype: str = "float32") -> dict:
        """Parameters without ``memory`` on the device, see :func:`backbone.load`."""
        files = self.manifest.backbone
        return backbone.load(self.location, files, self.model, stacked=stacked, dtype=dtype)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was exported. Raises UserError when tokenizer.json is another."""
        return read_tokenizer(self.location, self.manifest)

    def counts(self) -> np.ndarray | None:
        """How often each id occurs in the training data, uint64 [V], if the export had counts."""
        file = self.manifest.file(COUNTS)
        if file is None:
            return None
        counts_V = np.load(io.BytesIO(_read_checked(self.location, file)))
        if counts_V.shape != (self.manifest.vocab_size,) or counts_V.dtype != np.uint64:
            what = f"{counts_V.dtype} {counts_V.shape}, not uint64 [V]"
            raise refuse(self.location, COUNTS, what, "export the run again")
        return counts_V

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()


def open_store(path: str | Path, *, check: bool = True) -> Store:
    """Opens a TKV store at a path or URL and checks all that can be checked without reading rows:
    manifest, sizes of files, zarr metadata, tokenizer.

    check: verify the checksum of every bundle that is read. Raises UserError: no store, an
    unfinished export, another version, a missing or truncated file, another tokenizer."""
    location = open_location(path)
    manifest = read_manifest(location)
    for file, what in misfits(location, manifest.files):
        raise refuse(location, file.name, what)
    read_tokenizer(location, manifest)
    groups, records = manifest.groups, [format.records(manifest, g) for g in manifest.groups]
    for array in records:
        _open_array(location, array.name, array.spec)
    crc32_V = {g.name: read_checksums(location, manifest, g) for g in groups if check}
    readers = {g.name: open_reader(location, array) for g, array in zip(groups, records)}
    return Store(location, manifest, check, readers, crc32_V)


def decoded(group: Group, bundles_RB: np.ndarray, basis: Basis) -> np.ndarray:
    """rows_RLW of bundles uint8 [R, B]: a view in the stored dtype where they are plain, else
    float32."""
    stored = encoding.host_view(group.layout, bundles_RB)
    if group.layout.plain:
        return stored
    shape = format.next_power(len(stored)), group.bundle_bytes  # few are compiled
    padded = np.zeros(shape, np.uint8)
    padded[: len(stored)] = stored
    rows_LRW = np.asarray(encoding.jitted_decode(group.layout, padded, basis, "float32"))
    return np.swapaxes(rows_LRW, 0, 1)[: len(stored)]


def read_checksums(location: Location, manifest: Manifest, group: Group) -> np.ndarray:
    """uint32 [V], the CRC-32 of each token's bundle, from the files that the manifest knows."""
    name = f"checksums/{group.name}"
    array = _open_array(location, name, lambda kvstore: format.checksums_spec(kvstore, manifest))
    crc32_V = _result(location, name, "cannot be read", array.read())
    # as in the files: unused places of the last are 0
    whole = np.zeros((group.shards, manifest.shard_rows), "<u4")
    whole.reshape(-1)[: len(crc32_V)] = crc32_V
    files = {file.name: file for file in manifest.files}
    for shard in range(group.shards):
        if crc32(whole[shard]) != (file := files[format.checksum_file(group, shard)]).crc32:
            raise backbone.damaged(location, file)
    return crc32_V


def load_bases(
    location: Location, groups: tuple[Group, ...], file: File | None
) -> dict[str, Basis]:
    """{group: basis float32 [r, W] of each layer}, () for a group without. Raises UserError."""
    if file is None:
        return {group.name: () for group in groups}
    named, bases = backbone.load_tensors(location, file), {}
    for group in groups:
        shapes = {f"layers.{i}": (r, group.width) for i, r in zip(group.layers, group.ranks or ())}
        for name, shape in shapes.items():
            if name not in named or named[name].shape != shape:
                raise refuse(location, BASIS, f"{name} is missing or not as the manifest says")
        bases[group.name] = tuple(named[name] for name in shapes)
    return bases


def _open_array(location: Location, name: str, spec: Callable[[dict], dict]) -> ts.TensorStore:
    opened = ts.open(spec(location.spec(name)), open=True, read=True)
    return _result(location, f"{name}/zarr.json", "missing or not as the manifest says", opened)


def _result(location: Location, name: str, failure: str, future: ts.Future) -> Any:
    """``failure``: what it means that TensorStore cannot give the result."""
    try:
        return location.wait(future)
    except TimeoutError as error:
        raise refuse(location, name, f"cannot be read ({error})", NETWORK) from None
    except RuntimeError as error:
        raise refuse(location, name, f"{failure} ({error})") from None


def _read_checked(location: Location, file: File) -> bytes:
    data = backbone.read_exactly(location, file, 0, file.bytes)
    if crc32(data) != file.crc32:
        raise backbone.damaged(location, file)
    return data


def read_tokenizer(location: Location, manifest: Manifest) -> Tokenizer:
    """The tokenizer of a store. Raises UserError when it is missing or not the manifest's."""
    mend, wanted = "copy the tokenizer.json of the run there", manifest.tokenizer.fingerprint
    try:
        data = location.read(TOKENIZER)
    except FileNotFoundError:
        raise refuse(location, TOKENIZER, "missing", mend) from None
    tokenizer = parse_tokenizer(data, origin=f"{location.url}/{TOKENIZER}")
    if tokenizer.fingerprint != wanted:
        what = f"fingerprint {tokenizer.fingerprint}, the store was exported with {wanted}"
        raise refuse(location, TOKENIZER, what, mend)
    return tokenizer
