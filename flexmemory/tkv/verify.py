"""Does a store hold the bytes that its manifest promises?"""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from flexmemory.errors import UserError
from flexmemory.progress import ProgressLine
from flexmemory.tkv import format
from flexmemory.tkv.format import Group, Manifest
from flexmemory.tkv.manifest import read_manifest
from flexmemory.tkv.storage.crc import crc32
from flexmemory.tkv.storage.location import File, Location, open_location
from flexmemory.tkv.store import read_tokenizer

PART_BYTES, READERS = 8 << 20, 4


def verify_deep(path: str | Path, *, progress: bool = True) -> dict:
    """Reads every file of a store again: its size and CRC-32 against the manifest, every bundle's
    CRC-32 against checksums/. Returns {files, bytes, bundles: counts of what was read, damaged:
    [{name, what}], ok}. Raises UserError where there is no readable manifest."""
    location = open_location(path)
    manifest = read_manifest(location)
    shards = {format.shard_file(*shard): shard for shard in format.all_shards(manifest)}
    files = {file.name: file for file in manifest.files}
    total, bundles, done = sum(file.bytes for file in manifest.files), 0, 0
    damaged: dict[str, str] = {}

    def check(file: File) -> tuple[str | None, int]:
        """(what is wrong, bundles read)"""
        try:
            size = location.sizes([file.name]).get(file.name)
            if size not in (None, file.bytes):
                return wrong(file, size, 0), 0
            if file.name in shards:
                sums = files[format.checksum_file(*shards[file.name])]
                return _check_shard(location, manifest, file, sums, *shards[file.name])
            parts = parts_of(location, file)
            try:
                while True:
                    next(parts)
            except StopIteration as end:
                return end.value, 0
        except OSError as error:
            return f"cannot be read ({error.strerror or 'missing'})", 0
        except UserError as error:  # a remote location's own words
            return str(error), 0

    line = ProgressLine("verify", total / 1e6, "MB", enabled=progress)
    with line, ThreadPoolExecutor(READERS) as pool:
        for file, (what, read) in zip(manifest.files, pool.map(check, manifest.files)):
            bundles, done = bundles + read, done + file.bytes
            if what:
                damaged[file.name] = what
            line.update(done / 1e6)
    if format.TOKENIZER not in damaged:
        try:
            read_tokenizer(location, manifest)
        except UserError as error:
            damaged[format.TOKENIZER] = str(error)
    faults = [{"name": name, "what": what} for name, what in damaged.items()]
    counts = {"files": len(manifest.files), "bytes": total, "bundles": bundles}
    return counts | {"damaged": faults, "ok": not damaged}


def parts_of(
    location: Location, file: File, count: Callable[[int], None] | None = None
) -> Generator[bytes, None, str | None]:
    """A file's parts; ``count`` is told the bytes of each. Returns what is wrong with the whole."""
    size, crc, last = 0, 0, False
    while not last:
        last = file.bytes - size <= PART_BYTES
        # the last to the end, wherever that is
        part = location.read(file.name, size, None if last else size + PART_BYTES)
        size, crc = size + len(part), crc32(part, crc)
        if count:
            count(len(part))
        yield part
    return wrong(file, size, crc)


def wrong(file: File, size: int, crc: int) -> str | None:
    """How the size and CRC-32 of a file's bytes differ from the manifest's, or None."""
    if size != file.bytes:
        return f"{size} bytes, {file.bytes} expected"
    return None if crc == file.crc32 else "its checksum is wrong"


def _check_shard(
    location: Location, manifest: Manifest, file: File, sums_file: File, group: Group, shard: int
) -> tuple[str | None, int]:
    data = location.read(file.name)
    if what := wrong(file, len(data), crc32(data)):
        return what, 0
    sums = location.read(sums_file.name)
    if wrong(sums_file, len(sums), crc32(sums)):
        return None, 0  # damaged itself, and named as such
    start, stop = manifest.span(shard)
    shape = stop - start, group.bundle_bytes
    bundles_RB = np.frombuffer(data, np.uint8, shape[0] * shape[1]).reshape(shape)
    crc32_R = np.frombuffer(sums, "<u4", len(bundles_RB))
    bad = np.flatnonzero(format.bundle_crc32(bundles_RB) != crc32_R)
    if not len(bad):
        return None, len(bundles_RB)
    first = f"the first of token {start + bad[0]}"
    return f"{len(bad)} bundles, {first}, fail their checksum", len(bundles_RB)
