"""Small files that are there whole or not at all."""

import errno
import json
import os
from pathlib import Path

SCRATCH = ".tmp"  # what follows a file's name while it is being written


def write_bytes(path: Path, content: bytes) -> None:
    """Writes under another name, syncs, renames, syncs the directory: on the disk when it returns."""
    scratch = path.with_name(path.name + SCRATCH)
    with open(scratch, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    sync_directory(path.parent)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode("utf-8", "surrogateescape"))


def write_json(path: Path, content) -> None:
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
    return any(f"[os_error_code='{code}']" in str(error) for code in (errno.ENOSPC, errno.EDQUOT)) or "No space left on device" in str(error)
