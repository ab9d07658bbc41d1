"""What a benchmark says of the machine, and the page cache made cold."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import jax

from flexmemory.tkv.storage.uring import CacheStat


def facts(directory: Path) -> dict:
    """Kernel, file system and versions; nothing that names the machine."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    inside = [
        (len(point), kind) for point, kind in mounts if directory.resolve().is_relative_to(point)
    ]
    return {
        "device": jax.devices()[0].device_kind,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "filesystem": max(inside)[1],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "numpy", "tensorstore")},
    }


def drop_cache(paths: Sequence[Path]) -> None:
    """Asks the kernel to forget the files' pages; written back first, as a dirty page stays."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached_pages(paths: Sequence[Path]) -> int | None:
    """Pages of the files that the page cache holds; None where the kernel does not tell."""
    count, found = CacheStat(), 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            found += count.pages(fd, 0, os.fstat(fd).st_size)
        except OSError:
            return None
        finally:
            os.close(fd)
    return found
