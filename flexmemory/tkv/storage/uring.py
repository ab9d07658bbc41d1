"""Many reads with two system calls: io_uring, and the question what the page cache holds. Linux,
from Python alone.

Requests and results pass through memory shared with the kernel, which NumPy fills and reads a batch
at a time."""

import ctypes
import errno
import mmap
import os
import platform
import sys
import threading
from collections.abc import Callable

import numpy as np

ENTRIES = 256  # requests in flight: disks want 64 or more
MACHINES = ("x86_64", "aarch64")  # on both, system calls have these numbers
_SETUP, _ENTER, _CACHESTAT = 425, 426, 451
_GETEVENTS, _READ, _SINGLE_MMAP, _SQES = 1, 22, 1, 0x10000000
_BLOCK = 4096  # a read that stopped short goes on from a multiple of this, as O_DIRECT demands
_AGAIN = (errno.EAGAIN, errno.EINTR, errno.EBUSY)

# struct io_uring_params is 30 words; of it: entries and features, then offsets of the parts of both
# queues in their common map
_PARAMS_WORDS, _SQ_ENTRIES, _CQ_ENTRIES, _FEATURES = 30, 0, 1, 5
_SQ_HEAD, _SQ_TAIL, _SQ_ARRAY, _CQ_HEAD, _CQES = 10, 11, 16, 20, 25


def linux_call() -> Callable:
    """libc's ``syscall`` with six long arguments. Raises OSError (ENOSYS) on other machines."""
    if not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, "not Linux")
    if platform.machine() not in MACHINES:
        raise OSError(errno.ENOSYS, f"no system calls known for {platform.machine()}")
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.argtypes = [ctypes.c_long] * 7
    call.restype = ctypes.c_long
    return call


class CacheStat:
    """How many pages of a file's part the page cache holds (Linux 6.5, for the file's owner)."""

    def __init__(self) -> None:
        self._call = linux_call()
        self._range, self._found = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)()
        self._addresses = ctypes.addressof(self._range), ctypes.addressof(self._found)

    def pages(self, fd: int, offset: int, length: int) -> int:
        """Cached pages of bytes offset to offset + length of ``fd``; one thread at a time. Raises
        OSError where the kernel does not tell."""
        self._range[0], self._range[1] = offset, length
        if self._call(_CACHESTAT, fd, *self._addresses, 0, 0, 0):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return self._found[0]


class Ring:
    """One io_uring of ``entries`` places. Raises OSError where the kernel refuses one."""

    def __init__(self, entries: int = ENTRIES):
        self._call = linux_call()
        words = np.zeros(_PARAMS_WORDS, np.uint32)
        self._fd = self._call(_SETUP, entries, words.ctypes.data, 0, 0, 0, 0)
        if self._fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"io_uring refused ({os.strerror(code)})")
        params = words.tolist()
        if not params[_FEATURES] & _SINGLE_MMAP:
            os.close(self._fd)
            raise OSError(errno.ENOSYS, "io_uring of Linux 5.4 or later is needed")
        self._entries = params[_SQ_ENTRIES]
        ends = params[_SQ_ARRAY] + 4 * self._entries, params[_CQES] + 16 * params[_CQ_ENTRIES]
        rings = mmap.mmap(self._fd, max(ends))
        requests = mmap.mmap(self._fd, 64 * self._entries, offset=_SQES)
        self._maps = rings, requests
        places = np.frombuffer(rings, np.uint32, self._entries, params[_SQ_ARRAY])
        places[:] = np.arange(self._entries)  # place k always holds request k
        self._sq_head, self._sq_tail, self._cq_head = (
            np.frombuffer(rings, np.uint32, 1, params[at]) for at in (_SQ_HEAD, _SQ_TAIL, _CQ_HEAD)
        )
        self._sqes = np.frombuffer(requests, np.int64).reshape(self._entries, 8)
        results = np.frombuffer(rings, np.int64, 2 * params[_CQ_ENTRIES], params[_CQES])
        self._cqes = results.reshape(-1, 2)
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            if self._fd < 0:
                return
            # views keep the maps open
            del self._sq_head, self._sq_tail, self._cq_head, self._sqes, self._cqes
            for shared in self._maps:
                shared.close()
            os.close(self._fd)
            self._fd = -1

    def read(
        self,
        fds_N: np.ndarray,
        offsets_N: np.ndarray,
        addresses_N: np.ndarray,
        lengths_N: np.ndarray,
        wanted_N: np.ndarray,
    ) -> np.ndarray:
        """Reads lengths[n] bytes at offsets[n] of fds[n] to memory at addresses[n], all int64 [N];
        returns the bytes got, int64 [N].

        A read that brings less than wanted[n] (at least 1) is sent again for the rest until its
        file ends. Raises OSError for a read that fails; no request is in flight when this returns
        or raises."""
        count = len(fds_N)
        got_N, done_N = np.zeros((2, count), np.int64)  # done: where the last attempt started
        requests = np.empty((count, 5), np.int64)  # the five words of a request that are not 0
        words = (fds_N << 32 | _READ, offsets_N, addresses_N, lengths_N, np.arange(count))
        for k, word_N in enumerate(words):
            requests[:, k] = word_N
        waiting = requests
        with self._lock:
            self._settle()
            try:
                while len(waiting) or self._flying():
                    while len(waiting) and (room := self._entries - self._flying()):
                        waiting = waiting[self._submit(waiting[:room]) :]
                    flying = self._flying()
                    which, result = self._reap(max(1, flying // 2) if len(waiting) else flying)
                    arrived = done_N[which] + result
                    if (unmet := arrived < wanted_N[which]).any():
                        again = np.isin(-result, _AGAIN)
                        if (failed := (result < 0) & ~again).any():
                            code = -int(result[failed][0])
                            raise OSError(code, os.strerror(code))
                        again |= unmet & (arrived > got_N[which])  # no progress: the file ends here
                        arrived = np.maximum(arrived, got_N[which])
                        more = which[again]
                        done_N[more] = arrived[again] // _BLOCK * _BLOCK
                        waiting = np.concatenate(
                            [waiting, requests[more] + done_N[more, None] * [0, 1, 1, -1, 0]]
                        )
                    got_N[which] = arrived
            finally:
                self._settle()
        return got_N

    def _flying(self) -> int:
        """Requests that the kernel took and whose results we did not, by the shared counters."""
        return (int(self._sq_head[0]) - int(self._cq_head[0])) % 2**32

    def _settle(self) -> None:
        """Waits until the kernel writes no more into the memory of an interrupted read."""
        while flying := self._flying():
            self._reap(flying)

    def _submit(self, requests: np.ndarray) -> int:
        """Offers the requests that fit before the ring wraps; returns how many the kernel took."""
        head = int(self._sq_head[0])
        place = head % self._entries
        requests = requests[: self._entries - place]
        self._sqes[place : place + len(requests), :5] = requests
        self._sq_tail[0] = (head + len(requests)) % 2**32
        self._enter(len(requests), 0)  # a system call of this thread: the kernel sees the stores
        return (int(self._sq_head[0]) - head) % 2**32

    def _reap(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Waits for up to ``count`` results and takes these: later ones may not be readable yet."""
        head = int(self._cq_head[0])
        place = head % len(self._cqes)
        count = min(count, len(self._cqes) - place)
        while not self._enter(0, count):
            pass
        cqes = self._cqes[place : place + count].copy()
        self._cq_head[0] = (head + count) % 2**32
        return cqes[:, 0], cqes.view(np.int32)[:, 2]

    def _enter(self, submit: int, wait: int) -> bool:
        """One io_uring_enter; False when it must be repeated."""
        if self._call(_ENTER, self._fd, submit, wait, _GETEVENTS if wait else 0, 0, 0) >= 0:
            return True
        if (code := ctypes.get_errno()) not in _AGAIN:
            raise OSError(code, os.strerror(code))
        return False
