"""Reading records of one size that an array's shards hold: local files as fast as the disk gives
them, anything else through TensorStore. A store's record is a bundle, one token's rows.

A local batch goes one of these ways (`flexmemory bench read` says what each is worth):

    page cache   preadv of each bundle that the page cache holds: next to a memory copy
    preadv       one O_DIRECT preadv, for a single bundle: no hand-over to wait for
    uring        all O_DIRECT reads at once through io_uring
    threads      the same from 16 threads, where the kernel refuses io_uring
    read ahead   WILLNEED for every bundle, then preadv, where the file system refuses O_DIRECT
    tensorstore  where the shards are laid out in another order"""

import contextlib
import dataclasses
import errno
import math
import mmap
import os
import resource
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from flexmemory.errors import UserError
from flexmemory.files import PAGE, allocate
from flexmemory.tkv.storage.location import MEND, LocalLocation, Location, refuse
from flexmemory.tkv.storage.uring import CacheStat, Ring

METHODS = ("auto", "uring", "threads", "buffered", "tensorstore")
THREADS = 16  # measured: 8 are too few, 32 gain nothing
STAGING_BYTES = 8 << 20
PROBES = 4  # bundles of a batch that are looked up in the page cache to judge the batch
# bundles, reached by doubling from 1: asking before each single read costs more than a late answer
PROBE_EVERY = 8
# TensorStore's, beside the shard indexes: an evicted index costs a read per call
CHUNK_CACHE_BYTES = 16 << 20
INDEX_ENTRY_BYTES, INDEX_CRC_BYTES = 16, 4  # of a zarr shard's index, which ends its file


@dataclasses.dataclass(frozen=True)
class Records:
    """What a reader knows of an array."""

    name: str  # relative to the store
    count: int
    per_shard: int  # records in a file
    size: int  # bytes of a record
    files: tuple[str, ...]  # in order
    spec: Callable[[dict], dict]  # of TensorStore, for the array in a kvstore
    view: Callable[[np.ndarray], np.ndarray]  # bytes [R, size] as that array has them


def shard_index(used: int, places: int, size: int) -> np.ndarray:
    """uint64 [places, 2], (offset, length) of each record where the first ``used`` are taken."""
    index_S2 = np.full((places, 2), 2**64 - 1, np.uint64)
    index_S2[:used, 0], index_S2[:used, 1] = np.arange(used) * size, size
    return index_S2


def open_reader(
    location: Location, records: Records, *, method: str = "auto"
) -> "LocalReader | TensorStoreReader":
    """A reader of ``records``. ``method``: one of METHODS; "auto" chooses per batch, the others are
    for measuring and for trouble. Raises UserError for a missing shard, an unknown method, and
    "uring" where the kernel refuses it."""
    if method not in METHODS:
        raise UserError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    if location.local is None or method == "tensorstore" or not sys.platform.startswith("linux"):
        return TensorStoreReader(location, records)
    return LocalReader(location, records, method)


class TensorStoreReader:
    """Records through TensorStore: remote stores, and shards in another order."""

    def __init__(self, location: Location, records: Records):
        self._location, self._records = location, records
        self._reads = self._bundles = 0
        index_bytes = len(records.files) * records.per_shard * INDEX_ENTRY_BYTES
        pool = {"total_bytes_limit": CHUNK_CACHE_BYTES + 2 * index_bytes}
        context = ts.Context({"cache_pool": pool, "file_io_concurrency": {"limit": 32}})
        spec = records.spec(location.spec(records.name))
        self._array = self._result(ts.open(spec, open=True, read=True, context=context))

    def read(self, ids_U: np.ndarray, out_UB: np.ndarray) -> None:
        """As :meth:`LocalReader.read`. Thread-safe."""
        if not len(ids_U):
            return
        # a remote read that is given up may still write: not to memory that the caller still uses
        target_UB = out_UB if self._location.timeout_s is None else np.empty_like(out_UB)
        rows_U = self._records.view(target_UB)
        # a plain index takes TensorStore less time than an array of one
        one = len(ids_U) == 1
        here, there = (rows_U[0], int(ids_U[0])) if one else (rows_U, ids_U)
        self._result(ts.array(here, copy=False).write(self._array[there]))
        if target_UB is not out_UB:
            out_UB[:] = target_UB
        self._reads += 1
        self._bundles += len(ids_U)

    def stats(self) -> dict:
        """As :meth:`LocalReader.stats`."""
        count = self._bundles
        sums = {"reads": self._reads, "bundles": count, "bytes": count * self._records.size}
        return {"method": "tensorstore", **sums, "tensorstore": count}

    def close(self) -> None:
        self._array = None

    def _result(self, future: ts.Future | ts.WriteFutures) -> Any:
        try:
            return self._location.wait(future)
        except (TimeoutError, RuntimeError) as error:
            local = self._location.local is not None
            mend = MEND if local else f"check the network and the server, or {MEND}"
            what = f"cannot be read ({error})"
            raise refuse(self._location, self._records.name, what, mend) from error


class _OtherLayout(Exception):
    """A shard whose bundles do not lie in order of tokens."""


class LocalReader:
    """Records from shard files: t is in file t div S at (t mod S) * B, else TensorStore reads."""

    def __init__(self, location: LocalLocation, records: Records, method: str):
        self._origin = location, records
        self._count, self._shard_rows = records.count, records.per_shard
        self._bundle = records.size
        self._paths = [location.local / name for name in records.files]
        self._identities = [self._call(k, os.stat, path) for k, path in enumerate(self._paths)]
        self._buffered: dict[int, int] = {}  # shard -> descriptor, opened when first needed
        self._direct: dict[int, int] = {}  # the same with O_DIRECT
        self._lock = threading.Lock()
        ways = ("page cache", "preadv", "uring", "threads", "read ahead")
        self._counts = dict.fromkeys(("reads", "bundles", "bytes", *ways), 0)
        self._probe, self._o_direct = method in ("auto", "buffered"), method != "buffered"
        self._warm = False  # the page cache held all of the last batch
        self._unprobed = PROBE_EVERY  # bundles read since the page cache was last asked
        self._probe_every = 1  # so many, where it did not hold all: one miss is forgotten at once
        self._nowait = os.RWF_NOWAIT
        self._ring: Ring | None = None
        self._cachestat: CacheStat | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._staging: np.ndarray | None = None
        self._fallback: TensorStoreReader | None = None
        with contextlib.suppress(OSError):
            self._cachestat = CacheStat()
        if method in ("auto", "uring"):
            try:
                self._ring = Ring()
            except OSError as error:
                if method == "uring":
                    what = f"'uring' does not work here ({error.strerror})"
                    raise UserError(f"method: {what}; use 'auto'") from None

    def read(self, ids_U: np.ndarray, out_UB: np.ndarray) -> None:
        """Fills out[u] (C-contiguous uint8 [U, B]) with the bundle of token ids[u] (int64 [U],
        ascending, no repeats). Thread-safe. Raises UserError naming the file when a shard is
        missing, cut short, replaced or unreadable; out is then undefined."""
        shape = (len(ids_U), self._bundle)
        if out_UB.shape != shape or out_UB.itemsize != 1 or not out_UB.flags.carray:
            got = f"{out_UB.dtype} {out_UB.shape}"
            raise ValueError(f"out must be a writable C-contiguous uint8 {shape}, got {got}")
        tokens = ids_U.tolist()
        if not tokens:
            return
        if tokens[0] < 0 or tokens[-1] >= self._count:
            got = f"{tokens[0]}..{tokens[-1]}"
            raise ValueError(f"ids must be within 0..{self._count - 1}, got {got}")
        with self._lock:
            if self._fallback is None:
                try:
                    return self._read(tokens, out_UB)
                except _OtherLayout:
                    self._fallback = TensorStoreReader(*self._origin)
        self._fallback.read(ids_U, out_UB)

    def stats(self) -> dict:
        """``method``: how large cold batches are read; ``reads``, ``bundles``, ``bytes``; bundles
        by the way they came, see the top."""
        if self._fallback:
            return self._fallback.stats()
        method = "buffered" if not self._o_direct else "uring" if self._ring else "threads"
        return {"method": method, **self._counts}

    def close(self) -> None:
        """Waits for a read in progress, then gives everything back."""
        with self._lock:
            for descriptors in (self._buffered, self._direct):
                while descriptors:
                    os.close(descriptors.popitem()[1])
            for owned in (self._ring, self._fallback):
                if owned:
                    owned.close()
            if self._pool:
                self._pool.shutdown()

    def __del__(self) -> None:
        # a store that was dropped without closing must not keep hundreds of descriptors
        with contextlib.suppress(Exception):  # half made, or the interpreter is going
            self.close()

    # A single cached bundle is a copy of microseconds: what runs for one token is kept short.

    def _read(self, tokens: list[int], out_UB: np.ndarray) -> None:
        missed: Sequence[int] = range(len(tokens))
        self._unprobed += len(tokens)
        due = self._warm or self._unprobed >= self._probe_every or not self._o_direct
        if self._probe and due:
            missed = self._from_cache(tokens, out_UB)
        if missed and self._o_direct:
            try:
                missed = self._from_disk(missed, tokens, out_UB)
            except OSError as error:
                # no O_DIRECT here; other errors may pass, or have their file named below
                if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                    self._o_direct, self._probe = False, True
        if missed:
            self._read_ahead(missed, tokens, out_UB)
        counts = self._counts
        counts["reads"] += 1
        counts["bundles"] += len(tokens)
        counts["bytes"] += out_UB.nbytes

    # the page cache

    def _from_cache(self, tokens: list[int], out_UB: np.ndarray) -> list[int]:
        """Copies the bundles that the page cache holds; returns the indexes of the others."""
        sure = self._warm and self._nowait  # a wrong guess costs little, once
        likely = range(len(tokens)) if sure else self._cached(tokens)
        missed: list[int] = []
        rows, size, nowait = self._shard_rows, self._bundle, self._nowait
        buffered, preadv = self._buffered, os.preadv
        for i in likely:
            shard, place = divmod(tokens[i], rows)
            try:
                if preadv(buffered[shard], (out_UB[i],), place * size, nowait) == size:
                    continue
            except KeyError:  # not open yet
                pass
            except OSError as error:  # EAGAIN: not cached; errors of the disk will come again
                if error.errno == errno.EOPNOTSUPP:
                    self._nowait = 0
            missed.append(i)
        self._counts["page cache"] += len(likely) - len(missed)
        if len(likely) < len(tokens):
            missed = sorted({*range(len(tokens))} - {*likely} | {*missed})
        cold = missed and not self._warm
        self._probe_every = min(2 * self._probe_every, PROBE_EVERY) if cold else 1
        self._warm, self._unprobed = not missed, 0
        return missed

    def _cached(self, tokens: list[int]) -> Sequence[int]:
        """Indexes of the bundles that the page cache seems to hold: all where a few agree."""
        everything = range(len(tokens))
        probes = {self._is_cached(token) for token in tokens[:: math.ceil(len(tokens) / PROBES)]}
        if len(probes) == 1:
            return everything if probes.pop() else everything[:0]
        return [i for i in everything if self._is_cached(tokens[i])]

    def _is_cached(self, token: int) -> bool:
        shard, place = divmod(token, self._shard_rows)
        fd, offset, size = self._open(shard), place * self._bundle, self._bundle
        if self._cachestat:
            pages = (offset + size - 1) // mmap.PAGESIZE - offset // mmap.PAGESIZE + 1
            try:
                return self._cachestat.pages(fd, offset, size) == pages
            except OSError:  # an older kernel, or another user's file
                self._cachestat = None
        if not self._nowait:
            return False
        try:  # one byte without waiting; a miss makes the kernel read its page, and no more
            return os.preadv(fd, (bytearray(1),), offset + size // 2, self._nowait) == 1
        except OSError:
            return False

    def _read_ahead(self, which: Sequence[int], tokens: list[int], out_UB: np.ndarray) -> None:
        """Through the page cache, which takes any alignment. Names the file that fails."""
        size, places = self._bundle, [divmod(tokens[i], self._shard_rows) for i in which]
        for shard, place in places:
            os.posix_fadvise(self._open(shard), place * size, size, os.POSIX_FADV_WILLNEED)
        for i, (shard, place) in zip(which, places):
            what = self._open(shard), out_UB[i], place * size, size, 1
            if self._call(shard, _preadv, *what) < size:
                fault = f"ends inside the bundle of token {tokens[i]}"
                raise UserError(f"{self._paths[shard]}: {fault}; {MEND}")
        self._counts["read ahead"] += len(which)

    # the disk

    def _from_disk(self, which: Sequence[int], tokens: list[int], out_UB: np.ndarray) -> list[int]:
        """O_DIRECT reads; returns the indexes of bundles that are not whole. Raises OSError."""
        size = self._bundle
        if len(which) == 1 and size % PAGE == 0:
            shard, place = divmod(tokens[which[0]], self._shard_rows)
            self._counts["preadv"] += 1
            what = self._open_direct(shard), out_UB[which[0]], place * size, size, PAGE
            try:
                return [] if _preadv(*what) == size else list(which)
            except OSError as error:  # asking for the address takes as long as a tenth of the read
                if error.errno != errno.EINVAL or out_UB.ctypes.data % PAGE == 0:
                    raise
        places = [divmod(tokens[i], self._shard_rows) for i in which]
        fds_N = np.array([self._open_direct(shard) for shard, _ in places])
        offsets_N, which_N = np.array([place for _, place in places]) * size, np.array(which)
        if size % PAGE == 0 and out_UB.ctypes.data % PAGE == 0:
            got_N = self._transfer(fds_N, offsets_N, out_UB, which_N, np.full(len(which), size))
            return which_N[got_N < size].tolist()
        if self._staging is None:
            span = (size // PAGE + 2) * PAGE  # the most that pages around a bundle can take
            self._staging = allocate(max(1, STAGING_BYTES // span), span)
        unread, lead_N = [], offsets_N % PAGE
        for n in range(0, len(which), len(self._staging)):
            part = slice(n, n + len(self._staging))
            lead_M, rows_M = lead_N[part], which_N[part].tolist()
            starts_M, places_M = offsets_N[part] - lead_M, np.arange(len(rows_M))
            got_M = self._transfer(fds_N[part], starts_M, self._staging, places_M, lead_M + size)
            for m, (row, lead) in enumerate(zip(rows_M, lead_M.tolist())):
                out_UB[row] = self._staging[m, lead : lead + size]
                if got_M[m] < lead + size:
                    unread.append(row)
        return unread

    def _transfer(
        self,
        fds_N: np.ndarray,
        offsets_N: np.ndarray,
        target: np.ndarray,
        rows_N: np.ndarray,
        wanted_N: np.ndarray,
    ) -> np.ndarray:
        """Reads wanted bytes, rounded up to pages, at aligned offsets into rows of ``target``;
        returns the bytes got, int64 [N]."""
        lengths_N = -(-wanted_N // PAGE) * PAGE

        def one_by_one(part: slice) -> list[int]:
            arrays = (fds_N, rows_N, lengths_N, offsets_N, wanted_N)
            return [
                _preadv(fd, target[row, :length], offset, wanted, PAGE)
                for fd, row, length, offset, wanted in zip(*(a[part].tolist() for a in arrays))
            ]

        if self._ring:
            self._counts["uring"] += len(fds_N)
            addresses_N = target.ctypes.data + rows_N * target.shape[1]
            return self._ring.read(fds_N, offsets_N, addresses_N, lengths_N, wanted_N)
        self._counts["threads"] += len(fds_N)
        self._pool = self._pool or ThreadPoolExecutor(THREADS)
        cuts = np.linspace(0, len(fds_N), min(THREADS, len(fds_N)) + 1).astype(int).tolist()
        parts = [self._pool.submit(one_by_one, slice(*cut)) for cut in zip(cuts, cuts[1:])]
        try:
            return np.array([got for part in parts for got in part.result()])
        finally:
            wait(parts)  # they write into the caller's memory

    # files

    def _open(self, shard: int) -> int:
        """The shard's descriptor for the page cache; its index is compared once."""
        fd = self._buffered.get(shard)
        if fd is None:
            fd = self._call(shard, self._open_same, shard, os.O_RDONLY)
            try:
                self._call(shard, self._check_index, fd, shard)
            except BaseException:
                os.close(fd)
                raise
            self._buffered[shard] = fd
        return fd

    def _open_direct(self, shard: int) -> int:
        fd = self._direct.get(shard)
        if fd is None:
            self._open(shard)
            fd = self._direct[shard] = self._open_same(shard, os.O_RDONLY | os.O_DIRECT)
        return fd

    def _open_same(self, shard: int, flags: int) -> int:
        """Opens a shard that is still what it was when the reader was made."""
        fd = _open_file(self._paths[shard], flags)
        if _identity(os.fstat(fd)) != _identity(self._identities[shard]):
            os.close(fd)
            what = "changed since the store was opened"
            raise UserError(f"{self._paths[shard]}: {what}; open the store again")
        return fd

    def _check_index(self, fd: int, shard: int) -> None:
        # else each bundle brings its neighbours into the page cache
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        used = min(self._shard_rows, self._count - shard * self._shard_rows)
        expected = shard_index(used, self._shard_rows, self._bundle).tobytes()
        start = self._identities[shard].st_size - len(expected) - INDEX_CRC_BYTES
        if start != used * self._bundle or os.pread(fd, len(expected), start) != expected:
            raise _OtherLayout

    def _call(self, shard: int, function: Callable, *args: Any) -> Any:
        """``function(*args)``, its OSError as a UserError that names the shard's file."""
        try:
            return function(*args)
        except OSError as error:
            more = "allow more open files (ulimit -n)"
            mends = {errno.EACCES: "let this user read it", errno.EMFILE: more}
            what, mend = f"cannot be read ({error.strerror})", mends.get(error.errno or 0, MEND)
            raise UserError(f"{self._paths[shard]}: {what}; {mend}") from error


def _identity(stat: os.stat_result) -> tuple:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _open_file(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    # a large table has more shards than the soft limit lets us open
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return os.open(path, flags)


def _preadv(fd: int, memory: np.ndarray, offset: int, wanted: int, block: int) -> int:
    """Reads at ``offset`` into ``memory`` (uint8 [length]) until ``wanted`` bytes are there or no
    more come; returns the bytes got. A read that stopped short goes on from a multiple of
    ``block``: PAGE where O_DIRECT demands it, else 1."""
    got = os.preadv(fd, (memory,), offset)
    while got < wanted:
        done = got // block * block
        more = done + os.preadv(fd, (memory[done:],), offset + done)
        if more <= got:
            break
        got = more
    return got
