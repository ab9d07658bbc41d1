"""Copying a store from one location to another, checked on the way.

tkv.json is written last. Until then the copy of it in tkv.partial.copy.json says which store the
files belong to, so that the same copy goes on after a kill and no other one mixes its files in.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from flexmemory.errors import UserError
from flexmemory.files import SCRATCH
from flexmemory.progress import ProgressLine
from flexmemory.tkv.format import COPY_MARK, MANIFEST, File, Manifest
from flexmemory.tkv.manifest import from_json, read_manifest
from flexmemory.tkv.storage import target
from flexmemory.tkv.storage.crc import crc32
from flexmemory.tkv.storage.location import DamagedFile, LocalLocation, Location, open_location

PART_BYTES = 8 << 20  # of a file, read at a time
LARGE_BYTES = (
    64 << 20
    # larger files go to an object store one by one: it takes an object whole, so it is in memory
    # whole
)
MEND = "copy from another place or export the run again"
THREADS = 8


def copy(
    source: str | Path,
    destination: str | Path,
    *,
    overwrite: bool = False,
    deep: bool = False,
    progress: bool = True,
) -> dict:
    """Copies a store; every byte is checked against the manifest's CRC-32 while it passes. The same
    call finishes an interrupted copy.

    overwrite: replace another store, or an unfinished export or copy, at ``destination``. deep:
    read every file back from ``destination`` and check it, those that were there before (else
    trusted when their size is right) as well as those just written. Returns {files, bytes: of the
    whole store; copied_files, copied_bytes: by this call; read_back: with ``deep``; seconds}.
    Raises UserError: no store or a damaged one at ``source``, something else at ``destination``,
    disk full, no permission, no network.
    """
    began, source, destination = (
        time.perf_counter(),
        open_location(source),
        open_location(destination),
    )
    if _place(source) == _place(destination):
        raise UserError(
            f"{destination.url}: source and destination are the same place; give another"
            " destination"
        )
    if not destination.writable:
        raise UserError(
            f"{destination.url}: http locations are read only; copy to a local path, s3:// or gs://"
        )
    manifest, content = _read_manifest(source)
    entries = _entries(source, manifest)
    with _alone(destination):
        kept = _prepare(destination, content, overwrite)
        there = destination.sizes([entry.name for entry in entries]) if kept else {}
        trusted = {
            entry.name
            for entry in entries
            if entry.name in there and there[entry.name] in (None, entry.bytes)
        }
        _check_space(
            destination, sum(entry.bytes for entry in entries if entry.name not in trusted)
        )
        copied = _copy_files(source, destination, entries, trusted, deep, progress)
        if _read(source, MANIFEST) != content:
            raise UserError(
                f"{source.url}: was replaced while it was copied; run the same command again with"
                " --overwrite"
            )
        _publish(destination, content)
    return {
        "files": len(entries) + 1,
        "bytes": sum(entry.bytes for entry in entries) + len(content),
        "copied_files": len(copied),
        "copied_bytes": sum(entry.bytes for entry in copied),
        "read_back": deep,
        "seconds": time.perf_counter() - began,
    }


def _place(location: Location) -> object:
    return location.local.resolve() if location.local is not None else location.url


def _read_manifest(source: Location) -> tuple[Manifest, bytes]:
    """The manifest, and the same as bytes."""
    manifest = read_manifest(source)
    content = _read(source, MANIFEST)
    if content is None or from_json(json.loads(content), f"{source.url}/{MANIFEST}") != manifest:
        raise UserError(
            f"{source.url}: was replaced while it was opened; run the same command again"
        )
    return manifest, content


def _entries(source: Location, manifest: Manifest) -> list[File]:
    """Every file but the manifest, the small ones first. Raises DamagedFile for one that is missing
    or has another size.
    """
    entries = manifest.files
    found = source.sizes([entry.name for entry in entries])
    for entry in entries:
        if entry.name not in found:
            raise DamagedFile(f"{source.url}/{entry.name}: missing; {MEND}")
        if found[entry.name] not in (None, entry.bytes):
            raise DamagedFile(
                f"{source.url}/{entry.name}: {found[entry.name]} bytes, {entry.bytes} expected;"
                f" {MEND}"
            )
    return sorted(entries, key=lambda entry: entry.bytes)


@contextlib.contextmanager
def _alone(destination: Location) -> Iterator[None]:
    """Keeps exports and other copies away from a local destination. On a remote one the later copy
    wins, see :func:`_claim`.
    """
    try:
        with target.held(destination, 0):
            yield
    except OSError as error:
        raise UserError(
            f"{destination.url}: cannot be written ({error.strerror}); mend that and run the same"
            " command again, or give another destination"
        ) from error


def _prepare(destination: Location, content: bytes, overwrite: bool) -> bool:
    """Marks the destination for this store. Are files that are there already this store's?"""
    there = _read(destination, MANIFEST)
    if there == content:
        return True
    if there is None and _read(destination, COPY_MARK) == content:
        _claim(destination, content)
        return True
    names = [
        name
        for name in destination.names()
        if not name.startswith(target.LOCK) and not name.endswith(SCRATCH)
    ]
    unfinished = [name for name in names if name.startswith(target.PARTIAL)]
    if names and there is None and not unfinished:
        raise UserError(
            f"{destination.url}: holds {names[0]} and is no TKV store; give a new or empty"
            " directory"
        )
    if names and not overwrite:
        what = (
            "another store"
            if there is not None
            else f"an unfinished {'copy of another store' if COPY_MARK in names else 'export'}"
        )
        raise UserError(
            f"{destination.url}: holds {what}; give --overwrite to replace it, or another"
            " destination"
        )
    if names:
        _claim(
            destination,
            b"{}",
            # of no store: a kill in what follows must not leave files of the other store to be
            # trusted
        )
        destination.delete(MANIFEST)
        for name in names:
            if name in unfinished and name != COPY_MARK or name.split("/")[0] in target.CONTENTS:
                destination.delete(name)
    _claim(destination, content)
    return False


def _claim(destination: Location, content: bytes) -> None:
    if isinstance(destination, LocalLocation):
        destination.write(COPY_MARK, content)
    elif not destination.claim(COPY_MARK, content):
        raise UserError(
            f"{destination.url}: another process copies there; wait for it or give another"
            " destination"
        )


def _publish(destination: Location, content: bytes) -> None:
    if _read(destination, MANIFEST) != content:
        _claim(destination, content)
        destination.write(MANIFEST, content)
    target.sweep(destination)


def _copy_files(
    source: Location,
    destination: Location,
    entries: list[File],
    trusted: set[str],
    deep: bool,
    progress: bool,
) -> list[File]:
    """Copies what is not there yet, or with ``deep`` not as it should be. Returns the entries that
    were copied.
    """
    total = sum(entry.bytes for entry in entries if deep or entry.name not in trusted) / 1e6
    lock, one_large, done = threading.Lock(), threading.Lock(), 0

    def count(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            line.update(done / 1e6)

    def copy_one(entry: File) -> bool:
        with (
            one_large
            if destination.local is None and entry.bytes > LARGE_BYTES
            else contextlib.nullcontext()
        ):
            if entry.name in trusted and (not deep or _is_whole(destination, entry, count)):
                return False
            destination.write_parts(entry.name, _checked(source, entry, count))
            if deep and not _is_whole(destination, entry, lambda size: None):
                raise UserError(
                    f"{destination.url}/{entry.name}: reads back other than it was written; check"
                    " the disk and copy again"
                )
            return True

    copied = []
    with (
        ProgressLine("copy", total, "MB", enabled=progress) as line,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        futures = {pool.submit(copy_one, entry): entry for entry in entries}
        try:
            for future in as_completed(futures):
                if future.result():
                    copied.append(futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return copied


def _is_whole(location: Location, entry: File, count) -> bool:
    """Reads the file. False where it is missing or differs."""
    try:
        for _ in _checked(location, entry, count):
            pass
    except DamagedFile:
        return False
    return True


def _checked(location: Location, entry: File, count) -> Iterator[bytes]:
    """The file's parts; ``count`` hears of the bytes of each. Raises DamagedFile at the end when
    size or CRC-32 are not the manifest's.
    """
    size = crc = 0
    try:
        while True:
            last = entry.bytes - size <= PART_BYTES
            part = location.read(
                entry.name, size, None if last else size + PART_BYTES
            )  # the last to the end, wherever that is
            size, crc = size + len(part), crc32(part, crc)
            count(len(part))
            yield part
            if last:
                break
    except FileNotFoundError:
        raise DamagedFile(f"{location.url}/{entry.name}: missing; {MEND}") from None
    if size != entry.bytes or crc != entry.crc32:
        what = (
            f"{size} bytes, {entry.bytes} expected"
            if size != entry.bytes
            else "its checksum is wrong"
        )
        raise DamagedFile(f"{location.url}/{entry.name}: {what}, it was changed or damaged; {MEND}")


def _read(location: Location, name: str) -> bytes | None:
    try:
        return location.read(name)
    except FileNotFoundError:
        return None


def _check_space(destination: Location, needed: int) -> None:
    if (
        destination.local is not None
        and (free := shutil.disk_usage(destination.local).free) < needed
    ):
        raise UserError(
            f"{destination.url}: {needed:,} bytes are to be written and the disk has {free:,} free;"
            " free some space and run the same command again"
        )
