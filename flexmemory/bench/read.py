"""How fast bundles are read, beside what the disk and the memory of this machine can do at most,
measured in the same run.
"""

import contextlib
import dataclasses
import functools
import mmap
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorstore as ts

from flexmemory.bench.machine import facts
from flexmemory.errors import UserError
from flexmemory.files import PAGE, allocate
from flexmemory.runtime.rows import Budgets
from flexmemory.runtime.tiers import TieredRows
from flexmemory.tkv import format
from flexmemory.tkv.encoding import Layout
from flexmemory.tkv.format import Group, Manifest
from flexmemory.tkv.storage.location import Location, open_location
from flexmemory.tkv.storage.reader import LocalReader, TensorStoreReader, open_reader
from flexmemory.tkv.storage.uring import CacheStat, Ring

SIZES = (1, 8, 64, 512)  # ids per call
# of the table's beginning that is kept in memory: the truth, and the source of memory copies
RAM_BYTES = 1 << 30
DEPTHS, THREADS = (16, 64, 256), (16, 32)  # of the raw reads that give the disk's ceiling
WAYS = ("page cache", "preadv", "uring", "threads", "read ahead", "tensorstore")  # reader.stats()
# ids whose reads are timed MORE times as often, as microseconds vary most; so are steps in RAM
FEW, MORE = 8, 10

Reader = LocalReader | TensorStoreReader
# takes sorted ids, does all that need not be timed, and returns the rest
Timed = Callable[[np.ndarray], Callable[[], object]]


@dataclasses.dataclass(frozen=True)
class Table:
    """What a reader needs of a manifest, for rows without a model."""

    vocab_size: int
    shard_rows: int


# of bundles of 32 KiB: 1 GiB, 16 MiB
SCALES = {"cpu": Table(32768, 1024), "gpu": Table(32768, 1024), "smoke": Table(512, 64)}
LAYOUT = Layout(32, 512, "bfloat16")
HOW = {
    "ids": (
        "uniform, ascending, none twice in a round; methods take turns; share = the ceiling's"
        " median over the method's"
    ),
    "cold": (
        "posix_fadvise(DONTNEED) on every shard file before each timed call; its ceiling is the"
        " best O_DIRECT method for that size"
    ),
    "warm": (
        "every shard file and the table in memory read once before each size; its ceiling is"
        " np.take from that table"
    ),
    "ram": (
        "a step's rows from the RAM tier (look-up, copy, hand-over) over np.take of the same number"
        " of bundles from the tier's memory, which is read once before each size"
    ),
    "rounds": f"{MORE} times as many from RAM and of up to {FEW} ids",
    "cache": (
        "cachestat of the wanted bundles before each timed call: pages found, of pages wanted; null"
        " where the kernel does not tell"
    ),
}


def measure(scratch: Path, scale: str, *, sizes: tuple[int, ...] = SIZES, rounds: int = 40) -> dict:
    """:func:`measure_group` of a table of random rows made for it in a temporary folder of
    ``scratch``. ``scale``: one of SCALES.
    """
    table = SCALES[scale]
    vocab, step = table.vocab_size, table.shard_rows
    layers = tuple(range(LAYOUT.layers))
    group = Group("w512", layers, LAYOUT, vocab // step, vocab * LAYOUT.bundle_bytes)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        location = open_location(folder)
        spec = format.rows_spec(location.spec("rows/w512"), table, group)  # type: ignore[arg-type]
        array = ts.open({**spec, "create": True}).result()
        shape = (step, LAYOUT.layers, LAYOUT.width)
        numbers = np.random.default_rng(0).standard_normal(shape, np.float32)
        for start in range(0, vocab, step):
            numbers[:, 0, 0] = np.arange(start, start + step)  # no two bundles are equal
            part = numbers.astype(array.dtype.numpy_dtype)
            array[start : start + step].write(part).result()
        return measure_group(location, table, group, sizes=sizes, rounds=rounds)


def measure_group(
    location: Location,
    manifest: Manifest | Table,
    group: Group,
    *,
    sizes: tuple[int, ...] = SIZES,
    rounds: int = 40,
) -> dict:
    """Times reads of uniform ids from the local rows of ``group``, cold and warm, each method in
    turn, ``rounds`` times for each of ``sizes``, MORE times as often up to FEW.

    Returns what `flexmemory bench read` prints: microseconds (median, p99) and shares of the
    ceilings by number of ids. Raises UserError for a store that is not local, or when a method
    reads other bytes than the files hold.
    """
    if location.local is None:
        raise UserError(
            f"{location.url}: bench read is about a local disk; copy the store to one first"
        )
    rows = min(manifest.vocab_size, RAM_BYTES // group.bundle_bytes)
    if max(sizes) > rows:
        raise UserError(f"sizes: {max(sizes)} ids, the table has {rows}; give smaller ones")
    paths = [location.local / format.shard_file(group, k) for k in range(group.shards)]
    buffer, load = allocate(max(sizes), group.bundle_bytes), os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        files = _Files(paths, manifest.shard_rows, group.bundle_bytes)
        stack.callback(files.close)
        readers = {}
        for name in ("auto", "tensorstore"):
            readers[name] = open_reader(location, format.records(manifest, group), method=name)  # type: ignore[arg-type]
            stack.callback(readers[name].close)
        through = {name: _through(reader, buffer) for name, reader in readers.items()}
        ram_VB = files.head(rows)
        raw = {size: files.raw_reads(buffer, size) for size in sizes}
        deal, deal_warm = _dealer(manifest.vocab_size, seed=0), _dealer(rows, seed=1)
        for name, method in {**raw[max(sizes)], **through}.items():
            _check_bytes(name, method, buffer, ram_VB, deal_warm(max(sizes)))
        phase = functools.partial(_phase, through, readers["auto"], files, rounds)
        cold, warm = {}, {}
        for size in sizes:
            cold[size] = phase(size, raw[size], deal, files.drop)
        for size in sizes:
            files.warm()
            _touch(ram_VB)
            warm[size] = phase(size, {"memcpy": _memory_copy(ram_VB, buffer)}, deal_warm)
        ram = _ram_tier(readers["auto"], group, ram_VB, buffer, sizes, rounds)
    return {
        "bench": "read",
        "table": {
            "vocab_size": manifest.vocab_size,
            "bundle_bytes": group.bundle_bytes,
            "shards": group.shards,
            "bytes": group.bytes,
            "ram_rows": rows,
        },
        "machine": facts(location.local),
        "rounds": rounds,
        "load": [load, os.getloadavg()[0]],
        "how": HOW,
        "sizes": {
            str(size): {"cold": cold[size], "warm": warm[size], "ram": ram[size]} for size in sizes
        },
    }


class _Files:
    """The shard files, read without the reader's code."""

    def __init__(self, paths: list[Path], shard_rows: int, bundle_bytes: int):
        self._shard_rows, self._bundle = shard_rows, bundle_bytes
        self._buffered = [os.open(path, os.O_RDONLY) for path in paths]
        self._direct = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]
        self._rings = [Ring(depth) for depth in DEPTHS]
        self._pool, self._cachestat = ThreadPoolExecutor(max(THREADS)), CacheStat()

    def close(self) -> None:
        for fd in (*self._buffered, *self._direct):
            os.close(fd)
        for ring in self._rings:
            ring.close()
        self._pool.shutdown()

    def _at(self, token: int) -> tuple[int, int]:
        """(number of the shard file, offset in it)"""
        return token // self._shard_rows, token % self._shard_rows * self._bundle

    def head(self, rows: int) -> np.ndarray:
        """The first bundles, uint8 [rows, B]."""
        ram_VB = allocate(rows, self._bundle)
        for token in range(rows):
            file, offset = self._at(token)
            os.preadv(self._buffered[file], (ram_VB[token],), offset)
        return ram_VB

    def drop(self) -> None:
        for fd in self._buffered:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def warm(self) -> None:
        for fd in self._buffered:
            offset = 0
            while part := len(os.pread(fd, 4 << 20, offset)):
                offset += part

    def pages(self, ids_U: np.ndarray) -> tuple[int, int]:
        """(pages of these bundles that the page cache holds, all their pages). Raises OSError where
        the kernel does not tell.
        """
        held = wanted = 0
        for file, offset in map(self._at, ids_U.tolist()):
            held += self._cachestat.pages(self._buffered[file], offset, self._bundle)
            last = (offset + self._bundle - 1) // mmap.PAGESIZE
            wanted += last - offset // mmap.PAGESIZE + 1
        return held, wanted

    def raw_reads(self, buffer: np.ndarray, size: int) -> dict[str, Timed]:
        """O_DIRECT reads of ``size`` bundles in every way that may be the fastest, all arguments
        made beforehand.
        """
        if self._bundle % PAGE:
            raise UserError(
                f"bundles of {self._bundle} bytes: the disk's ceiling needs a multiple of {PAGE};"
                " measure another store"
            )

        def requests(ids_U: np.ndarray) -> list[tuple]:
            places = map(self._at, ids_U.tolist())
            return [(self._direct[k], (buffer[i],), at) for i, (k, at) in enumerate(places)]

        def in_turn(parts: list[tuple]) -> None:
            for part in parts:
                os.preadv(*part)

        def one_thread(ids_U: np.ndarray) -> Callable[[], object]:
            return functools.partial(in_turn, requests(ids_U))

        def threads(count: int, ids_U: np.ndarray) -> Callable[[], object]:
            reads = requests(ids_U)
            parts = [reads[k::count] for k in range(min(count, size))]
            return lambda: wait([self._pool.submit(in_turn, part) for part in parts])

        def ring(owner: Ring, ids_U: np.ndarray) -> Callable[[], object]:
            fds, offsets = np.array([(fd, offset) for fd, _, offset in requests(ids_U)]).T
            lengths = np.full(size, self._bundle)
            into = buffer.ctypes.data + np.arange(size) * self._bundle
            return functools.partial(owner.read, fds, offsets, into, lengths, lengths)

        if size == 1:
            return {"preadv": one_thread}
        useful = [n for n in range(len(DEPTHS)) if n == 0 or DEPTHS[n] <= size]
        return {
            **{
                f"io_uring, depth {DEPTHS[n]}": functools.partial(ring, self._rings[n])
                for n in useful
            },
            **{f"{count} threads": functools.partial(threads, count) for count in THREADS},
        }


def _touch(memory: np.ndarray) -> None:
    """Memory left idle can be slow at its next touch, in virtual machines above all: not what a
    ceiling should show.
    """
    memory[:, ::PAGE].max()


def _through(reader: Reader, buffer: np.ndarray) -> Timed:
    return lambda ids_U: functools.partial(reader.read, ids_U, buffer[: len(ids_U)])


def _memory_copy(ram_VB: np.ndarray, buffer: np.ndarray) -> Timed:
    take = functools.partial(np.take, ram_VB, axis=0, mode="clip")  # other modes copy twice
    return lambda ids_U: functools.partial(take, ids_U, out=buffer[: len(ids_U)])


def _check_bytes(
    name: str, method: Timed, buffer: np.ndarray, ram_VB: np.ndarray, ids_U: np.ndarray
) -> None:
    buffer[:] = 0
    method(ids_U)()
    if not np.array_equal(buffer[: len(ids_U)], ram_VB[ids_U]):
        raise UserError(
            f"bench read: {name} reads other bytes than the files hold; run `flexmemory verify"
            " --deep`"
        )


def _phase(
    methods: dict[str, Timed],
    auto: Reader,
    files: _Files,
    rounds: int,
    size: int,
    ceilings: dict[str, Timed],
    deal: Callable[[int], np.ndarray],
    prepare: Callable[[], None] = lambda: None,
) -> dict:
    """Figures of one size, cold or warm: each method in turn, the order turning too."""
    calls, pages = ceilings | methods, []
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    before, faults = auto.stats(), _major_faults()
    for k in range(MORE * rounds if size <= FEW else rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            ids_U = deal(size)
            prepare()
            with contextlib.suppress(OSError):
                pages.append(files.pages(ids_U))
            times[name].append(_us(calls[name](ids_U)))
    median = {name: float(np.median(times[name])) for name in names}
    best = min(ceilings, key=median.__getitem__)
    shares: dict[str, dict] = {
        name: {**_figures(times[name]), "share": round(median[best] / median[name], 3)}
        for name in methods
    }
    counts = {way: count - before[way] for way, count in auto.stats().items() if way in WAYS}
    shares["auto"]["bundles_by"] = {way: count for way, count in counts.items() if count}
    return {
        "ceiling": {**_figures(times[best]), "method": best},
        **shares,
        "others": {name: _figures(times[name]) for name in ceilings if name != best},
        "cached_pages": sum(cached for cached, _ in pages) if pages else None,
        "wanted_pages": sum(wanted for _, wanted in pages) if pages else None,
        "major_faults": _major_faults() - faults,
    }


class _RamOnly:
    """A store for :class:`TieredRows` whose rows are read once and then all in RAM."""

    def __init__(self, reader: Reader, group: Group, rows: int):
        self.groups = (group,)
        self.manifest = SimpleNamespace(bundle_bytes=group.bundle_bytes, vocab_size=rows)
        self._read = reader.read

    def bases(self) -> dict:
        return {self.groups[0].name: ()}

    def counts(self) -> None:
        return None

    def read_bundles(self, ids_U: np.ndarray, out: dict) -> None:
        self._read(ids_U, out[self.groups[0].name])


def _ram_tier(
    reader: Reader,
    group: Group,
    ram_VB: np.ndarray,
    buffer: np.ndarray,
    sizes: tuple[int, ...],
    rounds: int,
) -> dict:
    """{size: microseconds of both, and their ratio}; the two take turns."""
    v, most = len(ram_VB), max(sizes)
    store: Any = _RamOnly(reader, group, v)
    source = TieredRows(store, Budgets(ram=ram_VB.nbytes, ram_policy="lru"))

    def step(ids_U: np.ndarray, size: int) -> None:
        ticket = source.request(ids_U, size)
        ticket.collect()
        ticket.release()

    for start in range(0, v, most):
        step(np.arange(start, min(start + most, v)), most)
    slab_KB, deal, result = source.slab(group.name), _dealer(v, 2), {}

    def take(ids_U: np.ndarray, size: int) -> None:
        np.take(slab_KB, ids_U, axis=0, out=buffer[:size], mode="clip")

    for size in sizes:
        tier_us, take_us = [], []
        _touch(slab_KB)
        for _ in range(MORE * rounds):
            tier_us.append(_us(functools.partial(step, deal(size), size)))
            take_us.append(_us(functools.partial(take, deal(size), size)))
        ratio = round(float(np.median(tier_us) / np.median(take_us)), 3)
        figures = {"tier": _figures(tier_us), "take": _figures(take_us)}
        result[size] = figures | {"over_take": ratio}
    source.close()
    return result


def _dealer(vocab_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """deal(size) -> ascending ids int64 [size], from one shuffled vocabulary after another: none
    comes twice before the vocabulary is used up.

    One dealer for all sizes, so that no method finds ids of an earlier size in a cache of its own.
    """
    rng, left = np.random.default_rng(seed), np.empty(0, np.int64)

    def deal(size: int) -> np.ndarray:
        nonlocal left
        if len(left) < size:
            left = rng.permutation(vocab_size)
        taken, left = left[:size], left[size:]
        return np.sort(taken)

    return deal


def _us(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def _figures(times_us: list[float]) -> dict:
    median, p99 = np.percentile(times_us, (50, 99))
    return {"us": round(float(median), 1), "p99_us": round(float(p99), 1)}


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
