"""Copying a store from one location to another, checked on the way.

tkv.json is written last. Until then the copy of it in tkv.partial.copy.json says which store the
files belong to, so that the same copy goes on after a kill and no other one mixes its files in."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from flexmemory.errors import UserError
from flexmemory.files import SCRATCH
from flexmemory.progress import ProgressLine
from flexmemory.tkv.manifest import from_json, read_manifest
from flexmemory.tkv.storage import target
from flexmemory.tkv.storage.location import (
    DamagedFile,
    File,
    Location,
    misfits,
    open_location,
    refuse,
)
from flexmemory.tkv.storage.target import COPY_MARK, MANIFEST
from flexmemory.tkv.verify import parts_of

# larger files go to an object store one by one: it takes an object whole, so it is in memory whole
LARGE_BYTES = 64 << 20
MEND = "copy from another place or export the run again"
AGAIN, ELSEWHERE = "run the same command again", "give another destination"
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
    read every file back from ``destination`` and check it, also those that were there before (else
    trusted when their size is right). Returns {files, bytes: of the
    whole store; copied_files, copied_bytes: by this call; read_back: with ``deep``; seconds}.
    Raises UserError: no store or a damaged one at ``source``, something else at ``destination``,
    disk full, no permission, no network."""
    began, origin, place = time.perf_counter(), open_location(source), open_location(destination)
    if _identity(origin) == _identity(place):
        raise _refuse(place, "source and destination are the same place", ELSEWHERE)
    if not place.writable:
        raise _refuse(place, "http locations are read only", "copy to a local path, s3:// or gs://")
    files, content = _open(origin)
    # a later copy to a remote destination wins, see _claim
    with (
        target.one_line_errors(place.url, f"mend that and {AGAIN}, or {ELSEWHERE}"),
        target.held(place, 0),
    ):
        goes_on = _prepare(place, content, overwrite)
        absent = [file for file, _ in misfits(place, files)] if goes_on else files
        target.check_space(place, sum(f.bytes for f in absent), f"free some space and {AGAIN}")
        kept = {file.name for file in files} - {file.name for file in absent}
        copied = _copy_files(origin, place, files, kept, deep, progress)
        if _read(origin, MANIFEST) != content:
            mend = f"{AGAIN} with overwrite=True"
            raise _refuse(origin, "was replaced while it was copied", mend)
        if _read(place, MANIFEST) != content:
            _claim(place, content)
            place.write(MANIFEST, content)
        target.sweep(place)
    return {
        "files": len(files) + 1,
        "bytes": sum(file.bytes for file in files) + len(content),
        "copied_files": len(copied),
        "copied_bytes": sum(file.bytes for file in copied),
        "read_back": deep,
        "seconds": time.perf_counter() - began,
    }


def _refuse(place: Location, what: str, mend: str) -> UserError:
    return UserError(f"{place.url}: {what}; {mend}")


def _identity(location: Location) -> object:
    return location.local.resolve() if location.local is not None else location.url


def _open(source: Location) -> tuple[list[File], bytes]:
    """(every file but the manifest, the small ones first; the manifest's bytes). Raises
    DamagedFile for one that is missing or has another size."""
    manifest, content = read_manifest(source), _read(source, MANIFEST)
    if content is None or from_json(json.loads(content), f"{source.url}/{MANIFEST}") != manifest:
        raise _refuse(source, "was replaced while it was opened", AGAIN)
    for file, what in misfits(source, manifest.files):
        raise DamagedFile(f"{source.url}/{file.name}: {what}; {MEND}")
    return sorted(manifest.files, key=lambda file: file.bytes), content


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
    unfinished = any(name.startswith(target.PARTIAL) for name in names)
    if names and there is None and not unfinished:
        what = f"holds {names[0]} and is no TKV store"
        raise _refuse(destination, what, "give a new or empty directory")
    if names and not overwrite:
        what = "copy of another store" if COPY_MARK in names else "export"
        what = f"an unfinished {what}" if there is None else "another store"
        mend = "give overwrite=True to replace it, or another destination"
        raise _refuse(destination, f"holds {what}", mend)
    if names:
        # of no store: a kill in what follows must not leave files of the other one to be trusted
        _claim(destination, b"{}")
        target.clear(destination, [name for name in names if name != COPY_MARK])
    _claim(destination, content)
    return False


def _claim(destination: Location, content: bytes) -> None:
    if not target.claim(destination, COPY_MARK, content):
        mend = "wait for it or give another destination"
        raise _refuse(destination, "another process copies there", mend)


def _copy_files(
    origin: Location, place: Location, files: list[File], kept: set[str], deep: bool, progress: bool
) -> list[File]:
    """Copies files that are not ``kept``, or with ``deep`` are wrong there; returns these."""
    total = sum(file.bytes for file in files if deep or file.name not in kept) / 1e6
    lock, one_large, done = threading.Lock(), threading.Lock(), 0

    def count(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            line.update(done / 1e6)

    def copy_one(file: File) -> bool:
        if file.name in kept and (not deep or _is_whole(place, file, count)):
            return False
        place.write_parts(file.name, _checked(origin, file, count))
        if deep and not _is_whole(place, file):
            what, mend = "reads back other than it was written", "check the disk and copy again"
            raise refuse(place, file.name, what, mend)
        return True

    def in_turn(file: File) -> bool:
        large = place.local is None and file.bytes > LARGE_BYTES
        with one_large if large else contextlib.nullcontext():
            return copy_one(file)

    copied, line = [], ProgressLine("copy", total, "MB", enabled=progress)
    with line, ThreadPoolExecutor(THREADS) as pool:
        futures = {pool.submit(in_turn, file): file for file in files}
        try:
            for future in as_completed(futures):
                if future.result():
                    copied.append(futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return copied


def _is_whole(location: Location, file: File, count: Callable[[int], None] | None = None) -> bool:
    """Reads the file. False where it is missing or differs."""
    try:
        for _ in _checked(location, file, count):
            pass
    except DamagedFile:
        return False
    return True


def _checked(
    location: Location, file: File, count: Callable[[int], None] | None
) -> Iterator[bytes]:
    """The file's parts. Raises DamagedFile at the end unless they are the manifest's."""
    try:
        what = yield from parts_of(location, file, count)
    except FileNotFoundError:
        raise DamagedFile(f"{location.url}/{file.name}: missing; {MEND}") from None
    if what:
        raise DamagedFile(f"{location.url}/{file.name}: {what}, it was changed or damaged; {MEND}")


def _read(location: Location, name: str) -> bytes | None:
    try:
        return location.read(name)
    except FileNotFoundError:
        return None
