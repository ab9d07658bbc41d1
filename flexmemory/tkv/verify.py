"""Verify: does a store hold what the run's weights fold to, and does the model run from disk as it
does from the weights?
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from flexmemory.errors import UserError
from flexmemory.progress import ProgressLine
from flexmemory.tkv import format
from flexmemory.tkv.format import Group, Manifest
from flexmemory.tkv.manifest import read_manifest
from flexmemory.tkv.storage.crc import crc32
from flexmemory.tkv.storage.location import Location, open_location
from flexmemory.tkv.store import read_tokenizer

READ_BYTES, READERS = 16 << 20, 4


def verify_deep(path: str | Path, *, progress: bool = True) -> dict:
    """Reads every file of a store again: its size and CRC-32 against the manifest, every bundle's
    CRC-32 against checksums/.

    Returns {files, bytes, bundles: counts of what was read, damaged: [{name, what}], ok}. Raises
    UserError where there is no readable manifest.
    """
    location = open_location(path)
    manifest = read_manifest(location)
    shards = {
        format.shard_file(group, block): (group, block)
        for group in manifest.groups
        for block in range(group.shards)
    }
    known = {file.name: (file.bytes, file.crc32) for file in manifest.files}
    total, damaged, done = sum(size for size, _ in known.values()), [], 0

    def check(name: str) -> tuple[str | None, int]:
        """(what is wrong, bundles read)"""
        size, wanted = known[name]
        try:
            if name in shards:
                return _check_shard(
                    location,
                    manifest,
                    *shards[name],
                    wanted,
                    *known[format.checksum_file(*shards[name])],
                )
            found, crc = location.sizes([name]).get(name, 0), 0
            for start in range(0, size if found in (None, size) else 0, READ_BYTES):
                crc = crc32(location.read(name, start, min(start + READ_BYTES, size)), crc)
            return _wrong(size if found is None else found, size, crc, wanted), 0
        except OSError as error:
            return f"cannot be read ({error.strerror or 'missing'})", 0
        except UserError as error:  # a remote location's own words
            return str(error), 0

    bundles = 0
    with (
        ProgressLine("verify", total / 1e6, "MB", enabled=progress) as line,
        ThreadPoolExecutor(READERS) as pool,
    ):
        for name, (what, read) in zip(known, pool.map(check, known), strict=True):
            bundles, done = bundles + read, done + known[name][0]
            if what:
                damaged.append({"name": name, "what": what})
            line.update(done / 1e6)
    if not any(entry["name"] == format.TOKENIZER for entry in damaged):
        try:
            read_tokenizer(location, manifest)
        except UserError as error:
            damaged.append({"name": format.TOKENIZER, "what": str(error)})
    return {
        "files": len(known),
        "bytes": total,
        "bundles": bundles,
        "damaged": damaged,
        "ok": not damaged,
    }


def _check_shard(
    location: Location,
    manifest: Manifest,
    group: Group,
    block: int,
    wanted: int,
    sums_bytes: int,
    sums_wanted: int,
) -> tuple[str | None, int]:
    data = location.read(format.shard_file(group, block))
    if wrong := _wrong(len(data), format.shard_bytes(manifest, group, block), crc32(data), wanted):
        return wrong, 0
    start = block * manifest.shard_rows
    rows = min(manifest.shard_rows, manifest.vocab_size - start)
    bundles_RB = np.frombuffer(data, np.uint8, rows * group.bundle_bytes).reshape(
        rows, group.bundle_bytes
    )
    sums = location.read(format.checksum_file(group, block))
    if _wrong(len(sums), sums_bytes, crc32(sums), sums_wanted):
        return None, 0  # damaged itself, and named as such
    bad = np.flatnonzero(format.bundle_crc32(bundles_RB) != np.frombuffer(sums, "<u4", rows))
    return (
        f"{len(bad)} bundles, the first of token {start + bad[0]}, fail their checksum"
        if len(bad)
        else None
    ), rows


def _wrong(size: int, wanted_size: int, crc: int, wanted_crc: int) -> str | None:
    if size != wanted_size:
        return f"{size} bytes, {wanted_size} expected"
    return None if crc == wanted_crc else "its checksum is wrong"
