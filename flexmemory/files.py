"""Files that are there whole or not at all."""

import contextlib
import errno
import fcntl
import json
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

SCRATCH = ".tmp"  # what follows a file's name while it is being written
PIECE_BYTES = 1 << 20  # written at a time
PAGE = 4096  # bytes; direct reads and writes begin and end at multiples of it
DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


def write_bytes(path: Path, content: bytes) -> None:
    """:func:`write_parts` of one part."""
    write_parts(path, [content])


def write_parts(path: Path, parts: Iterable) -> None:
    """Writes the parts (bytes or other buffers) one after another under another name, syncs,
    renames, syncs the directory: on the disk when it returns. Where something raises before the
    file has its name, nothing is left.

    None of the parts is kept, and whole pieces go past the page cache where the file system lets
    them: a table is not read again soon, and the copies into the cache cost more of the processor
    than the disk takes time.
    """
    scratch = path.with_name(path.name + SCRATCH)
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _write(descriptor, parts)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(scratch, path)
        sync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # on a full disk its bytes are wanted elsewhere
            scratch.unlink()
        raise


def _write(descriptor: int, parts: Iterable) -> None:
    memory = mmap.mmap(-1, PIECE_BYTES)  # page-aligned, as direct writes demand
    piece, held, direct = np.frombuffer(memory, np.uint8), 0, DIRECT
    for part in parts:
        data = np.frombuffer(part, np.uint8)
        if (
            not held
            and len(data) >= len(piece) // 2
            and (data.ctypes.data | len(data)) % mmap.PAGESIZE == 0
        ):  # can be written as it lies
            direct, data = _write_whole(descriptor, data, direct), data[:0]
        while len(data):
            count = min(len(data), len(piece) - held)
            piece[held : held + count] = data[:count]
            data, held = data[count:], held + count
            if held == len(piece):
                direct, held = _write_whole(descriptor, piece, direct), 0
    _write_whole(descriptor, piece[:held], 0)


def _write_whole(descriptor: int, data: np.ndarray, direct: int) -> int:
    """Writes all of ``data``, past the page cache with ``direct``. Returns ``direct``, or 0 where
    the file system refuses that.
    """
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~DIRECT
    while len(data):
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct)
            data = data[os.write(descriptor, data) :]
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP) or not direct:
                raise
            direct = 0  # no such writes here, or what a short one left begins inside a block
    return direct


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode("utf-8", "surrogateescape"))


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Is this ENOSPC or EDQUOT, from the system or as TensorStore and Orbax word it?"""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(
        f"[os_error_code='{code}']" in str(error) for code in (errno.ENOSPC, errno.EDQUOT)
    ) or "No space left on device" in str(error)


def allocate(rows: int, bundle_bytes: int, huge: bool = True) -> np.ndarray:
    """Zeros uint8 [rows, bundle_bytes], page-aligned. huge: in huge pages where the kernel has
    them, into which bundles are read fastest; they are for memory that is used again and again, as
    their first touch can be slow where a virtual machine has given free memory back.
    """
    size = rows * bundle_bytes
    memory = mmap.mmap(
        -1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # shared memory, the default, gets no huge pages
    if huge:
        with contextlib.suppress(AttributeError, OSError):  # not Linux; a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, size).reshape(rows, bundle_bytes)
