"""Opening and reading a TKV store. Every row that leaves here was checked against its checksum unless checking is off."""

import dataclasses
from pathlib import Path

import numpy as np
import tensorstore as ts

from flexmemory.config import ModelConfig
from flexmemory.data.tokenizer import Tokenizer
from flexmemory.data.tokenizer import load as load_tokenizer
from flexmemory.errors import UserError
from flexmemory.tkv import backbone, format
from flexmemory.tkv.format import Group, Manifest

CHUNK_CACHE_BYTES = 16 << 20  # beside the shard indexes; the pool keeps both, and an evicted index costs a read per call


@dataclasses.dataclass(frozen=True)
class Store:
    """An open store. Made by :func:`open_store`."""

    path: Path
    manifest: Manifest
    check: bool
    _arrays: dict[str, ts.TensorStore]
    _crc32_V: dict[str, np.ndarray]  # by group; empty without checking

    @property
    def model(self) -> ModelConfig:
        return self.manifest.model

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.manifest.groups

    def read_rows(self, ids_R: np.ndarray) -> dict[str, np.ndarray]:
        """{group: rows_RLW in the store's dtype} of token ids, any order, repeats allowed; one read per group.

        Raises UserError for an id outside the vocabulary, a chunk that is missing or damaged, a bundle that fails its checksum.
        """
        ids_R = np.asarray(ids_R, np.int64)
        v = self.manifest.vocab_size
        if ids_R.size and not (0 <= ids_R.min() and ids_R.max() < v):
            bad = next(int(i) for i in ids_R if not 0 <= i < v)
            raise UserError(f"token id {bad} is outside the store's vocabulary of {v}; use the store's tokenizer")
        unique_U, inverse_R = np.unique(ids_R, return_inverse=True)
        ordered = len(unique_U) == len(ids_R) and bool((unique_U == ids_R).all())
        reads = {name: array[unique_U].read() for name, array in self._arrays.items()} if ids_R.size else {}
        rows = {}
        for group in self.groups:
            shape = (0, len(group.layers), group.width)
            rows_ULW = self._result(group, reads[group.name]) if reads else np.empty(shape, self.manifest.numpy_dtype)
            if self.check:
                self._verify(group, unique_U, rows_ULW)
            rows[group.name] = rows_ULW if ordered else rows_ULW[inverse_R]
        return rows

    def _result(self, group: Group, read) -> np.ndarray:
        try:
            return read.result()
        except ValueError as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise UserError(f"{self.path}/rows/{group.name}: cannot be read ({reason}); copy the store again or export the run again") from error

    def _verify(self, group: Group, ids_U: np.ndarray, rows_ULW: np.ndarray) -> None:
        wrong = np.flatnonzero(format.bundle_crc32(rows_ULW) != self._crc32_V[group.name][ids_U])
        if len(wrong):
            raise UserError(f"{self.path}/rows/{group.name}: the rows of token {ids_U[wrong[0]]} fail their checksum"
                            f"{f', and {len(wrong) - 1} more tokens' if len(wrong) > 1 else ''}; copy the store again or export the run again")

    def backbone(self) -> dict:
        """Parameters without ``memory``, as ``build(cfg, with_memory=False)`` takes them. Raises UserError on a damaged file."""
        return backbone.load(self.path, self.manifest.backbone, self.model)

    def tokenizer(self) -> Tokenizer:
        """The store's tokenizer. Raises UserError when tokenizer.json is not the one that was exported."""
        return load_tokenizer(self.path)


def open_store(path: str | Path, *, check: bool = True) -> Store:
    """Opens a TKV store and checks all that can be checked without reading rows: manifest, sizes of files, zarr metadata, tokenizer.

    check: verify the checksum of every bundle that is read. Raises UserError: no store, an unfinished export, another
    version, a missing or truncated file, another tokenizer.
    """
    path = Path(path)
    manifest = format.read_manifest(path)
    sizes = format.expected_files(manifest) | {file.name: file.bytes for file in manifest.backbone}
    for name, size in sizes.items():
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            raise UserError(f"{path / name}: missing ({error.strerror}); copy the store again or export the run again") from None
        if found != size:
            raise UserError(f"{path / name}: {found} bytes, {size} expected; copy the store again or export the run again")
    _check_tokenizer(path, manifest)
    index_bytes = sum(group.shards for group in manifest.groups) * manifest.shard_rows * format.INDEX_ENTRY_BYTES
    context = ts.Context({
        "cache_pool": {"total_bytes_limit": CHUNK_CACHE_BYTES + 2 * index_bytes},
        "file_io_concurrency": {"limit": 32},
    })
    arrays = {group.name: _open(format.rows_spec(path, manifest, group), context) for group in manifest.groups}
    checksums = {group.name: _open(format.checksums_spec(path, manifest, group), context).read().result() for group in manifest.groups if check}
    return Store(path, manifest, check, arrays, checksums)


def _open(spec: dict, context: ts.Context) -> ts.TensorStore:
    try:
        return ts.open(spec, open=True, read=True, context=context).result()
    except ValueError as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"{spec['kvstore']['path']}zarr.json: missing or not as the manifest says ({reason}); "
                        "copy the store again or export the run again") from None


def _check_tokenizer(path: Path, manifest: Manifest) -> None:
    file = path / format.TOKENIZER
    if not file.exists():
        raise UserError(f"{file}: missing; copy the tokenizer.json of the run there")
    fingerprint = load_tokenizer(file).fingerprint
    if fingerprint != manifest.tokenizer.fingerprint:
        raise UserError(f"{file}: fingerprint {fingerprint}, the store was exported with {manifest.tokenizer.fingerprint}; "
                        "copy the tokenizer.json of the run there")
