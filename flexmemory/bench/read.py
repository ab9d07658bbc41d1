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
from flexmemory.tkv.storage.reader import open_reader
from flexmemory.tkv.storage.uring import CacheStat, Ring

SIZES = (1, 8, 64, 512)  # ids per call
RAM_BYTES = (
    1 << 30
)  # of the table's beginning that is kept in memory: the truth, and the source of memory copies
DEPTHS, THREADS = (16, 64, 256), (16, 32)  # of the raw reads that give the disk's ceiling

WAYS = (
    "page cache",
    "preadv",
    "uring",
    "threads",
    "read ahead",
    "tensorstore",
)  # of reader.stats()

Timed = Callable[
    [np.ndarray], Callable[[], object]
]  # of sorted ids; does all that need not be timed and returns the rest


@dataclasses.dataclass(frozen=True)
class Table:
    """What a reader needs of a manifest, for rows without a model."""

    vocab_size: int
    shard_rows: int


SCALES = {
    "cpu": Table(32768, 1024),
    "gpu": Table(32768, 1024),
    "smoke": Table(512, 64),
}  # of bundles of 32 KiB: 1 GiB, 16 MiB
LAYOUT = Layout(32, 512, "bfloat16")
FEW = 8  # ids whose reads are timed more often, as microseconds vary most; so are all steps in RAM
MORE = 10  # times as often


def measure(scratch: Path, scale: str, *, sizes: tuple[int, ...] = SIZES, rounds: int = 40) -> dict:
    """:func:`measure_group` of a table of random rows made for it in a temporary folder of
    ``scratch``. ``scale``: one of SCALES.
    """
    table = SCALES[scale]
    group = Group(
        "w512",
        tuple(range(LAYOUT.layers)),
        LAYOUT,
        table.vocab_size // table.shard_rows,
        table.vocab_size * LAYOUT.bundle_bytes,
    )
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        location = open_location(folder)
        array = ts.open(
            {**format.rows_spec(location.spec("rows/w512"), table, group), "create": True}
        ).result()
        numbers = np.random.default_rng(0).standard_normal(
            (table.shard_rows, LAYOUT.layers, LAYOUT.width), np.float32
        )
        for start in range(0, table.vocab_size, table.shard_rows):
            numbers[:, 0, 0] = np.arange(
                start, start + table.shard_rows
            )  # no two bundles are equal
            array[start : start + table.shard_rows].write(
                numbers.astype(array.dtype.numpy_dtype)
            ).result()
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
        raise UserError(f"--sizes: {max(sizes)} ids, the table has {rows}; give smaller ones")
    files = _Files(
        [location.local / format.shard_file(group, k) for k in range(group.shards)],
        manifest.shard_rows,
        group.bundle_bytes,
    )
    readers = {
        name: open_reader(location, format.records(manifest, group), method=name)
        for name in ("auto", "tensorstore")
    }
    buffer, load = allocate(max(sizes), group.bundle_bytes), os.getloadavg()[0]
    try:
        ram_VB = files.head(rows)
        through = {name: _through(reader, buffer) for name, reader in readers.items()}
        raw = {size: files.raw_reads(buffer, size) for size in sizes}
        deal, deal_warm = _dealer(manifest.vocab_size, seed=0), _dealer(rows, seed=1)
        for name, method in {**raw[max(sizes)], **through}.items():
            _check_bytes(name, method, buffer, ram_VB, deal_warm(max(sizes)))
        cold, warm, auto = {}, {}, readers["auto"]
        for size in sizes:
            cold[size] = _phase(
                raw[size],
                through,
                auto,
                lambda size=size: deal(size),
                _rounds(rounds, size),
                files,
                files.drop,
            )
        for size in sizes:
            files.warm()
            ram_VB[
                :,
                ::PAGE,
                # memory left idle can be slow at its next touch, in virtual machines above all: not
                # what a ceiling should show
            ].max()
            warm[size] = _phase(
                {"memcpy": _memory_copy(ram_VB, buffer)},
                through,
                auto,
                lambda size=size: deal_warm(size),
                _rounds(rounds, size),
                files,
                None,
            )
        ram = _ram_tier(readers["auto"], group, ram_VB, buffer, sizes, rounds)
    finally:
        files.close()
        for reader in readers.values():
            reader.close()
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
        "how": {
            "ids": (
                "uniform, ascending, none twice in a round; methods take turns; share = the"
                " ceiling's median over the method's"
            ),
            "cold": (
                "posix_fadvise(DONTNEED) on every shard file before each timed call; its ceiling is"
                " the best O_DIRECT method for that size"
            ),
            "warm": (
                "every shard file and the table in memory read once before each size; its ceiling"
                " is np.take from that table"
            ),
            "ram": (
                "a step's rows from the RAM tier (look-up, copy, hand-over) over np.take of the"
                " same number of bundles from the tier's memory, which is read once before each"
                " size"
            ),
            "rounds": f"{MORE} times as many from RAM and of up to {FEW} ids",
            "cache": (
                "cachestat of the wanted bundles before each timed call: pages found, of pages"
                " wanted; null where the kernel does not tell"
            ),
        },
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

    def head(self, rows: int) -> np.ndarray:
        """The first bundles, uint8 [rows, B]."""
        ram_VB = allocate(rows, self._bundle)
        for token in range(rows):
            os.preadv(
                self._buffered[token // self._shard_rows],
                (ram_VB[token],),
                token % self._shard_rows * self._bundle,
            )
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
        places = [
            (self._buffered[token // self._shard_rows], token % self._shard_rows * self._bundle)
            for token in ids_U.tolist()
        ]
        found = sum(self._cachestat.pages(fd, offset, self._bundle) for fd, offset in places)
        return found, sum(
            (offset + self._bundle - 1) // mmap.PAGESIZE - offset // mmap.PAGESIZE + 1
            for _, offset in places
        )

    def raw_reads(self, buffer: np.ndarray, size: int) -> dict[str, Timed]:
        """O_DIRECT reads of ``size`` bundles in every way that may be the fastest, all arguments
        made beforehand.
        """
        if self._bundle % PAGE:
            raise UserError(
                f"bundles of {self._bundle} bytes: the disk's ceiling needs a multiple of {PAGE};"
                " measure another store"
            )

        def places(ids_U):
            return [
                (
                    self._direct[t // self._shard_rows],
                    (buffer[i],),
                    t % self._shard_rows * self._bundle,
                )
                for i, t in enumerate(ids_U.tolist())
            ]

        def in_turn(requests):
            for request in requests:
                os.preadv(*request)

        def threads(count):
            def prepare(ids_U):
                requests = places(ids_U)
                parts = [requests[k::count] for k in range(min(count, size))]
                return lambda: wait([self._pool.submit(in_turn, part) for part in parts])

            return prepare

        def ring(owner):
            def prepare(ids_U):
                fds, offsets = np.array([(fd, offset) for fd, _, offset in places(ids_U)]).T
                lengths = np.full(size, self._bundle)
                arguments = (
                    fds,
                    offsets,
                    buffer.ctypes.data + np.arange(size) * self._bundle,
                    lengths,
                    lengths,
                )
                return lambda: owner.read(*arguments)

            return prepare

        def one_thread(ids_U):
            requests = places(ids_U)
            return lambda: in_turn(requests)

        if size == 1:
            return {"preadv": one_thread}
        useful = [
            (depth, owner)
            for depth, owner in zip(DEPTHS, self._rings)
            if depth == min(DEPTHS) or depth <= size
        ]
        return {
            **{f"io_uring, depth {depth}": ring(owner) for depth, owner in useful},
            **{f"{count} threads": threads(count) for count in THREADS},
        }


def _rounds(rounds: int, size: int) -> int:
    return MORE * rounds if size <= FEW else rounds


def _through(reader, buffer: np.ndarray) -> Timed:
    return lambda ids_U: functools.partial(reader.read, ids_U, buffer[: len(ids_U)])


def _memory_copy(ram_VB: np.ndarray, buffer: np.ndarray) -> Timed:
    return lambda ids_U: functools.partial(
        np.take, ram_VB, ids_U, axis=0, out=buffer[: len(ids_U)], mode="clip"
    )  # other modes copy twice


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
    ceilings: dict[str, Timed],
    methods: dict[str, Timed],
    auto,
    deal: Callable[[], np.ndarray],
    rounds: int,
    files: _Files,
    prepare: Callable[[], None] | None,
) -> dict:
    """Figures of one size, cold or warm: ``rounds`` calls of each method in turn, the order turning
    too.
    """
    timed, found = ceilings | methods, []
    names, times = list(timed), {name: [] for name in timed}
    before, faults = auto.stats(), _major_faults()
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            ids_U = deal()
            if prepare:
                prepare()
            with contextlib.suppress(OSError):
                found.append(files.pages(ids_U))
            call = timed[name](ids_U)
            start = time.perf_counter()
            call()
            times[name].append(1e6 * (time.perf_counter() - start))
    best = min(ceilings, key=lambda name: np.median(times[name]))
    ways = {
        way: count - before[way]
        for way, count in auto.stats().items()
        if way in WAYS and count > before[way]
    }
    shares = {
        name: {
            **_figures(times[name]),
            "share": round(float(np.median(times[best]) / np.median(times[name])), 3),
        }
        for name in methods
    }
    shares["auto"]["bundles_by"] = ways
    return {
        "ceiling": {**_figures(times[best]), "method": best},
        **shares,
        "others": {name: _figures(times[name]) for name in ceilings if name != best},
        "cached_pages": sum(pages for pages, _ in found) if found else None,
        "wanted_pages": sum(pages for _, pages in found) if found else None,
        "major_faults": _major_faults() - faults,
    }


class _RamOnly:
    """A store for :class:`TieredRows` whose rows are read once and then all in RAM."""

    def __init__(self, reader, group: Group, rows: int):
        self.groups, self.manifest = (
            (group,),
            SimpleNamespace(bundle_bytes=group.bundle_bytes, vocab_size=rows),
        )
        self._read = reader.read

    def bases(self) -> dict:
        return {self.groups[0].name: ()}

    def counts(self) -> None:
        return None

    def read_bundles(self, ids_U: np.ndarray, out: dict) -> None:
        self._read(ids_U, out[self.groups[0].name])


def _ram_tier(
    reader,
    group: Group,
    ram_VB: np.ndarray,
    buffer: np.ndarray,
    sizes: tuple[int, ...],
    rounds: int,
) -> dict:
    """{size: microseconds of both, and their ratio}; the two take turns."""
    source = TieredRows(
        _RamOnly(reader, group, len(ram_VB)), Budgets(ram=ram_VB.nbytes, ram_policy="lru")
    )
    for start in range(0, len(ram_VB), max(sizes)):
        ticket = source.request(np.arange(start, min(start + max(sizes), len(ram_VB))), max(sizes))
        ticket.collect()
        ticket.release()
    slab_KB, deal, made = source.slab(group.name), _dealer(len(ram_VB), 2), {}
    for size in sizes:
        tier_us, take_us = [], []
        slab_KB[:, ::PAGE].max()  # as before the warm gathers
        for _ in range(MORE * rounds):
            ids_U, start = deal(size), time.perf_counter()
            ticket = source.request(ids_U, size)
            ticket.collect()
            ticket.release()
            tier_us.append(1e6 * (time.perf_counter() - start))
            ids_U, start = deal(size), time.perf_counter()
            np.take(slab_KB, ids_U, axis=0, out=buffer[:size], mode="clip")
            take_us.append(1e6 * (time.perf_counter() - start))
        made[size] = {
            "tier": _figures(tier_us),
            "take": _figures(take_us),
            "over_take": round(float(np.median(tier_us) / np.median(take_us)), 3),
        }
    source.close()
    return made


def _dealer(vocab_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """deal(size) -> ascending ids int64 [size], from one shuffled vocabulary after another: none
    comes twice before the vocabulary is used up.

    One dealer for all sizes, so that no method finds ids of an earlier size in a cache of its own.
    """
    rng, left = np.random.default_rng(seed), np.empty(0, np.int64)

    def deal(size):
        nonlocal left
        if len(left) < size:
            left = rng.permutation(vocab_size)
        taken, left = left[:size], left[size:]
        return np.sort(taken)

    return deal


def _figures(times_us: list[float]) -> dict:
    return {
        "us": round(float(np.median(times_us)), 1),
        "p99_us": round(float(np.percentile(times_us, 99)), 1),
    }


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
