"""Reading the bundles of one group: local shard files as fast as the disk gives them, anything else
through TensorStore.

A local batch goes one of these ways (`flexmemory bench read` says what each is worth):

    page cache   preadv of each bundle that the page cache holds; nothing else comes near a memory
    copy
    preadv       one O_DIRECT preadv, for a single bundle: no hand-over to wait for
    uring        all O_DIRECT reads at once through io_uring
    threads      the same from 16 threads, where the kernel refuses io_uring
    read ahead   WILLNEED for every bundle, then preadv, where the file system refuses O_DIRECT
    tensorstore  where the shards are laid out in another order
"""

import errno
import math
import mmap
import os
import resource
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import tensorstore as ts

from flexmemory.errors import UserError
from flexmemory.files import PAGE, allocate
from flexmemory.tkv import format
from flexmemory.tkv.encoding import host_view
from flexmemory.tkv.format import Group, Manifest
from flexmemory.tkv.storage.location import Location
from flexmemory.tkv.storage.uring import CacheStat, Ring

METHODS = ("auto", "uring", "threads", "buffered", "tensorstore")
THREADS = 16  # measured: 8 are too few, 32 gain nothing
STAGING_BYTES = 8 << 20
PROBES = 4  # bundles of a batch that are looked up in the page cache to judge the batch
# bundles, reached by doubling from 1: a question of 5 us before each single read of 100 us would
# cost more than a late answer
PROBE_EVERY = 8
CHUNK_CACHE_BYTES = (
    16 << 20
    # TensorStore's, beside the shard indexes: the pool keeps both, and an evicted index costs a
    # read per call
)


def open_reader(
    location: Location, manifest: Manifest, group: Group, *, method: str = "auto"
) -> "LocalReader | TensorStoreReader":
    """A reader of ``group``. ``method``: one of METHODS; "auto" chooses per batch, the others are
    for measuring and for trouble.

    Raises UserError for a missing shard, an unknown method, and "uring" where the kernel refuses
    it.
    """
    if method not in METHODS:
        raise UserError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    if location.local is None or method == "tensorstore" or not sys.platform.startswith("linux"):
        return TensorStoreReader(location, manifest, group)
    return LocalReader(location, manifest, group, method)


class TensorStoreReader:
    """Bundles of one group through TensorStore: remote stores, and shards that another zarr
    implementation laid out.
    """

    def __init__(self, location: Location, manifest: Manifest, group: Group):
        self._location, self._group = location, group
        self._reads = self._bundles = 0
        index_bytes = group.shards * manifest.shard_rows * format.INDEX_ENTRY_BYTES
        context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": CHUNK_CACHE_BYTES + 2 * index_bytes},
                "file_io_concurrency": {"limit": 32},
            }
        )
        spec = format.rows_spec(location.spec(f"rows/{group.name}"), manifest, group)
        self._array = self._result(ts.open(spec, open=True, read=True, context=context))

    def read(self, ids_U: np.ndarray, out_UB: np.ndarray) -> None:
        """As :meth:`LocalReader.read`. Thread-safe."""
        if not len(ids_U):
            return
        # a remote read that is given up may still write: not to memory that the caller goes on
        # using
        target_UB = out_UB if self._location.timeout_s is None else np.empty_like(out_UB)
        rows_U = host_view(self._group.layout, target_UB)
        # a plain index takes TensorStore less time than an array of one
        here, there = (
            (rows_U, self._array[ids_U])
            if len(ids_U) > 1
            else (rows_U[0], self._array[int(ids_U[0])])
        )
        self._result(ts.array(here, copy=False).write(there))
        if target_UB is not out_UB:
            out_UB[:] = target_UB
        self._reads += 1
        self._bundles += len(ids_U)

    def stats(self) -> dict:
        """As :meth:`LocalReader.stats`."""
        count, size = self._bundles, self._group.bundle_bytes
        return {
            "method": "tensorstore",
            "reads": self._reads,
            "bundles": count,
            "bytes": count * size,
            "tensorstore": count,
        }

    def close(self) -> None:
        self._array = None

    def _result(self, future: ts.Future):
        try:
            return self._location.wait(future)
        except (TimeoutError, RuntimeError) as error:
            mend = (
                format.MEND
                if self._location.local is not None
                else f"check the network and the server, or {format.MEND}"
            )
            raise UserError(
                f"{self._location.url}/rows/{self._group.name}: cannot be read ({error}); {mend}"
            ) from error


class _OtherLayout(Exception):
    """A shard whose bundles do not lie in order of tokens."""


class LocalReader:
    """Bundles of one group from shard files: token t is in file t div S at (t mod S) * B. Shards
    laid out otherwise go to TensorStore.
    """

    def __init__(self, location: Location, manifest: Manifest, group: Group, method: str):
        self._origin = location, manifest, group
        self._vocab_size, self._shard_rows, self._bundle = (
            manifest.vocab_size,
            manifest.shard_rows,
            group.bundle_bytes,
        )
        self._paths = [location.local / format.shard_file(group, k) for k in range(group.shards)]
        self._identities = [self._call(k, os.stat, path) for k, path in enumerate(self._paths)]
        self._buffered: dict[int, int] = {}  # shard -> descriptor, opened when first needed
        self._direct: dict[int, int] = {}  # the same with O_DIRECT
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(
            ("reads", "bundles", "bytes", "page cache", "preadv", "uring", "threads", "read ahead"),
            0,
        )
        self._probe, self._o_direct = method in ("auto", "buffered"), method != "buffered"
        self._warm, self._unprobed = (
            False,
            PROBE_EVERY,
        )  # the page cache held all of the last batch; bundles read since it was last asked
        self._probe_every = (
            1  # so many, where it did not: one miss in a warm file is forgotten at once
        )
        self._nowait, self._cachestat = os.RWF_NOWAIT, CacheStat()
        self._ring = self._pool = self._staging = self._fallback = None
        if method in ("auto", "uring"):
            try:
                self._ring = Ring()
            except OSError as error:
                if method == "uring":
                    raise UserError(
                        f"method: 'uring' does not work here ({error.strerror}); use 'auto'"
                    ) from None

    def read(self, ids_U: np.ndarray, out_UB: np.ndarray) -> None:
        """Fills out[u] (C-contiguous uint8 [U, B]) with the bundle of token ids[u] (int64 [U],
        ascending, no repeats). Thread-safe.

        Raises UserError naming the file when a shard is missing, cut short, replaced or unreadable;
        out is then undefined.
        """
        if (
            out_UB.shape != (len(ids_U), self._bundle)
            or out_UB.itemsize != 1
            or not out_UB.flags.carray
        ):
            raise ValueError(
                f"out must be a writable C-contiguous uint8 [{len(ids_U)}, {self._bundle}], got"
                f" {out_UB.dtype} {out_UB.shape}"
            )
        tokens = ids_U.tolist()
        if not tokens:
            return
        if tokens[0] < 0 or tokens[-1] >= self._vocab_size:
            raise ValueError(
                f"ids must be within 0..{self._vocab_size - 1}, got {tokens[0]}..{tokens[-1]}"
            )
        with self._lock:
            if self._fallback is None:
                try:
                    return self._read(tokens, out_UB)
                except _OtherLayout:
                    self._fallback = TensorStoreReader(*self._origin)
        self._fallback.read(ids_U, out_UB)

    def stats(self) -> dict:
        """``method``: how large cold batches are read; ``reads``, ``bundles``, ``bytes``; bundles
        by the way they came, see the top.
        """
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

    def __del__(
        self,
    ):  # a store that was dropped without closing must not keep hundreds of descriptors
        try:
            self.close()
        except Exception:  # half made, or the interpreter is going
            pass

    # A single cached bundle is a copy of microseconds: what runs for one token is kept short.

    def _read(self, tokens: list[int], out_UB: np.ndarray) -> None:
        missed = range(len(tokens))
        self._unprobed += len(tokens)
        if self._probe and (
            self._warm or self._unprobed >= self._probe_every or not self._o_direct
        ):
            missed = self._from_cache(tokens, out_UB)
        if missed and self._o_direct:
            try:
                missed = self._from_disk(missed, tokens, out_UB)
            except OSError as error:
                if error.errno in (
                    errno.EINVAL,
                    errno.EOPNOTSUPP,
                ):  # no O_DIRECT here; other errors may pass, or have their file named below
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
        likely = (
            range(len(tokens)) if self._warm and self._nowait else self._cached(tokens)
        )  # a wrong guess costs little, once
        missed, rows, size, nowait, buffered, preadv = (
            [],
            self._shard_rows,
            self._bundle,
            self._nowait,
            self._buffered,
            os.preadv,
        )
        for i in likely:
            shard, place = divmod(tokens[i], rows)
            try:
                if preadv(buffered[shard], (out_UB[i],), place * size, nowait) == size:
                    continue
            except KeyError:  # not open yet
                pass
            except (
                OSError
            ) as error:  # EAGAIN where it is not cached; errors of the disk will come again
                if error.errno == errno.EOPNOTSUPP:
                    self._nowait = 0
            missed.append(i)
        self._counts["page cache"] += len(likely) - len(missed)
        if len(likely) < len(tokens):
            missed = sorted({*range(len(tokens))} - {*likely} | {*missed})
        self._probe_every = (
            min(2 * self._probe_every, PROBE_EVERY) if missed and not self._warm else 1
        )
        self._warm, self._unprobed = not missed, 0
        return missed

    def _cached(self, tokens: list[int]) -> list[int]:
        """Indexes of the bundles that the page cache seems to hold: a few are looked up, and all
        only where these disagree.
        """
        everything = range(len(tokens))
        probes = {self._is_cached(token) for token in tokens[:: math.ceil(len(tokens) / PROBES)]}
        if len(probes) == 1:
            return everything if probes.pop() else everything[:0]
        return [i for i in everything if self._is_cached(tokens[i])]

    def _is_cached(self, token: int) -> bool:
        shard, place = divmod(token, self._shard_rows)
        fd, offset, size = self._open(shard), place * self._bundle, self._bundle
        if self._cachestat:
            try:
                return (
                    self._cachestat.pages(fd, offset, size)
                    == (offset + size - 1) // mmap.PAGESIZE - offset // mmap.PAGESIZE + 1
                )
            except OSError:  # an older kernel, or another user's file
                self._cachestat = None
        try:  # one byte without waiting; a miss makes the kernel read its page, and no more
            return (
                self._nowait != 0
                and os.preadv(fd, (bytearray(1),), offset + size // 2, self._nowait) == 1
            )
        except OSError:
            return False

    def _read_ahead(self, which: list[int], tokens: list[int], out_UB: np.ndarray) -> None:
        """Through the page cache, which takes any alignment. Names the file that fails."""
        places = [divmod(tokens[i], self._shard_rows) for i in which]
        for shard, place in places:
            os.posix_fadvise(
                self._open(shard), place * self._bundle, self._bundle, os.POSIX_FADV_WILLNEED
            )
        for i, (shard, place) in zip(which, places):
            got = self._call(
                shard, _preadv, self._open(shard), out_UB[i], place * self._bundle, self._bundle, 1
            )
            if got < self._bundle:
                raise UserError(
                    f"{self._paths[shard]}: ends inside the bundle of token {tokens[i]};"
                    f" {format.MEND}"
                )
        self._counts["read ahead"] += len(which)

    # the disk

    def _from_disk(self, which: list[int], tokens: list[int], out_UB: np.ndarray) -> list[int]:
        """O_DIRECT reads; returns the indexes of bundles that did not come whole. Raises OSError."""
        size = self._bundle
        if len(which) == 1 and size % PAGE == 0:
            shard, place = divmod(tokens[which[0]], self._shard_rows)
            self._counts["preadv"] += 1
            try:
                return (
                    []
                    if _preadv(self._open_direct(shard), out_UB[which[0]], place * size, size, PAGE)
                    == size
                    else list(which)
                )
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
        unread, lead_N, wave = [], offsets_N % PAGE, len(self._staging)
        for n in range(0, len(which), wave):
            lead_M, rows_M = lead_N[n : n + wave], which_N[n : n + wave]
            got_M = self._transfer(
                fds_N[n : n + wave],
                offsets_N[n : n + wave] - lead_M,
                self._staging,
                np.arange(len(rows_M)),
                lead_M + size,
            )
            for m, (row, lead, got) in enumerate(
                zip(rows_M.tolist(), lead_M.tolist(), got_M.tolist())
            ):
                out_UB[row] = self._staging[m, lead : lead + size]
                if got < lead + size:
                    unread.append(row)
        return unread

    def _transfer(self, fds_N, offsets_N, target: np.ndarray, rows_N, wanted_N) -> np.ndarray:
        """Reads wanted bytes, rounded up to pages, at aligned offsets into rows of ``target``;
        returns the bytes got, int64 [N].
        """
        lengths_N = -(-wanted_N // PAGE) * PAGE

        def one_by_one(part: slice) -> list[int]:
            requests = zip(
                *(array[part].tolist() for array in (fds_N, offsets_N, rows_N, lengths_N, wanted_N))
            )
            return [
                _preadv(fd, target[row, :length], offset, wanted, PAGE)
                for fd, offset, row, length, wanted in requests
            ]

        if self._ring:
            self._counts["uring"] += len(fds_N)
            return self._ring.read(
                fds_N, offsets_N, target.ctypes.data + rows_N * target.shape[1], lengths_N, wanted_N
            )
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
        """The shard's descriptor for the page cache. The first time its index is compared with the
        layout.
        """
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
            raise UserError(
                f"{self._paths[shard]}: changed since the store was opened; open the store again"
            )
        return fd

    def _check_index(self, fd: int, shard: int) -> None:
        os.posix_fadvise(
            fd, 0, 0, os.POSIX_FADV_RANDOM
        )  # else each bundle brings its neighbours into the page cache
        tokens, entry = (
            min(self._shard_rows, self._vocab_size - shard * self._shard_rows),
            format.INDEX_ENTRY_BYTES,
        )
        expected_S2 = np.full((self._shard_rows, 2), 2**64 - 1, np.uint64)
        expected_S2[:tokens, 0], expected_S2[:tokens, 1] = (
            np.arange(tokens) * self._bundle,
            self._bundle,
        )
        start = self._identities[shard].st_size - self._shard_rows * entry - format.INDEX_CRC_BYTES
        if (
            start != tokens * self._bundle
            or os.pread(fd, self._shard_rows * entry, start) != expected_S2.tobytes()
        ):
            raise _OtherLayout

    def _call(self, shard: int, function, *args):
        """``function(*args)``, its OSError as a UserError that names the shard's file."""
        try:
            return function(*args)
        except OSError as error:
            mend = {
                errno.EACCES: "let this user read it",
                errno.EMFILE: "allow more open files (ulimit -n)",
            }.get(error.errno, format.MEND)
            raise UserError(
                f"{self._paths[shard]}: cannot be read ({error.strerror}); {mend}"
            ) from error


def _identity(stat: os.stat_result) -> tuple:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _open_file(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[
        1
    ]  # a large table has more shards than the soft limit lets us open
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return os.open(path, flags)


def _preadv(fd: int, memory: np.ndarray, offset: int, wanted: int, block: int) -> int:
    """Reads at ``offset`` into ``memory`` (uint8 [length]) until ``wanted`` bytes are there or no
    more come; returns the bytes got.

    A read that stopped short goes on from a multiple of ``block``: PAGE where O_DIRECT demands it,
    else 1.
    """
    got = os.preadv(fd, (memory,), offset)
    while got < wanted:
        done = got // block * block
        more = done + os.preadv(fd, (memory[done:],), offset + done)
        if more <= got:
            break
        got = more
    return got
