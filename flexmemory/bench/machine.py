"""What benchmarks share: facts of the machine, clocks, Zipf ids, and the page cache made cold."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

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


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, until its arrays are there."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def median_seconds(call: Callable[[], object], rounds: int = 5) -> float:
    """The median of ``rounds`` calls after one that compiles or pages memory in."""
    return statistics.median([timed(call) for _ in range(rounds + 1)][1:])


def zipf(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    """int64 [count] ranks 0..n-1 with probability proportional to 1 / (rank + 1)."""
    weight = 1 / np.arange(1, n + 1)
    return rng.choice(n, count, p=weight / weight.sum())


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
    cachestat, pages = CacheStat(), 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            pages += cachestat.pages(fd, 0, os.fstat(fd).st_size)
        except OSError:
            return None
        finally:
            os.close(fd)
    return pages
