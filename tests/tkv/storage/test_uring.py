"""The ring reads what was asked for, however the kernel cuts, delays or refuses it."""

import errno
import os

import numpy as np
import pytest

from flexmemory.files import allocate
from flexmemory.tkv.storage import uring
from flexmemory.tkv.storage.uring import CacheStat, Ring

SIZE = 64 * 4096 + 100


@pytest.fixture(scope="module")
def content():
    return np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)


@pytest.fixture
def fd(tmp_path, content):
    (tmp_path / "file").write_bytes(content.tobytes())
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def ring(request):
    ring = Ring(getattr(request, "param", 8))
    yield ring
    ring.close()


def read(ring, fd, offsets, lengths, wanted=None):
    """(bytes got [N], what each read brought)"""
    offsets, lengths = np.asarray(offsets), np.asarray(lengths)
    memory = np.zeros((len(offsets), max(lengths, default=1)), np.uint8)
    addresses = memory.ctypes.data + np.arange(len(offsets)) * memory.shape[1]
    got = ring.read(
        np.full(len(offsets), fd),
        offsets,
        addresses,
        lengths,
        lengths if wanted is None else np.asarray(wanted),
    )
    return got, memory


@pytest.mark.parametrize("ring", [1, 8, 256], indirect=True)
def test_more_reads_than_places(ring, fd, content):
    rng = np.random.default_rng(1)
    for count in (
        0,
        1,
        3,
        7,
        8,
        9,
        50,
        200,
    ):  # odd numbers, so that batches begin anywhere in the ring
        offsets, lengths = rng.integers(0, SIZE - 5000, count), rng.integers(1, 5000, count)
        got, memory = read(ring, fd, offsets, lengths)
        np.testing.assert_array_equal(got, lengths)
        for row, offset, length in zip(memory, offsets, lengths):
            np.testing.assert_array_equal(row[:length], content[offset : offset + length])


def test_end_of_file_is_told_by_the_bytes_got(ring, fd, content):
    got, memory = read(
        ring, fd, [SIZE - 10, SIZE, SIZE + 5, 0, SIZE - 8292], [20, 20, 20, 20, 9000]
    )
    np.testing.assert_array_equal(got, [10, 0, 0, 20, 8292])
    np.testing.assert_array_equal(memory[0, :10], content[-10:])
    np.testing.assert_array_equal(memory[4, :8292], content[-8292:])


def test_a_wanted_part_is_enough(ring, fd):
    got, _ = read(ring, fd, [SIZE - 100], [4096], wanted=[100])
    np.testing.assert_array_equal(got, [100])


def change_results(monkeypatch, ring, change):
    """Lets ``change(request numbers, results)`` see every batch of results before the ring does."""
    real = ring._reap

    def reap(count):
        which, results = real(count)
        return which, change(which, results.copy())

    monkeypatch.setattr(ring, "_reap", reap)


def test_short_reads_go_on(ring, fd, content, monkeypatch):
    seen = []

    def cut(which, results):
        seen.extend(which.tolist())
        short = results > 8192
        results[short] = (
            8192 - 100
        )  # inside a page: the next attempt starts at the page's beginning
        return results

    change_results(monkeypatch, ring, cut)
    offsets, lengths = np.arange(10) * 4096, np.full(10, 5 * 4096)
    got, memory = read(ring, fd, offsets, lengths)
    np.testing.assert_array_equal(got, lengths)
    for row, offset in zip(memory, offsets):
        np.testing.assert_array_equal(row, content[offset : offset + 5 * 4096])
    assert len(seen) > 10


def test_short_direct_reads_go_on_at_a_page(tmp_path, ring, content, monkeypatch):
    (tmp_path / "file").write_bytes(content.tobytes())
    try:
        fd = os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("no O_DIRECT here")
    change_results(monkeypatch, ring, lambda which, results: np.minimum(results, 5000))
    memory = allocate(2, 5 * 4096)
    lengths = np.full(2, 5 * 4096)
    got = ring.read(
        np.full(2, fd),
        np.array([0, 8192]),
        memory.ctypes.data + np.arange(2) * 5 * 4096,
        lengths,
        lengths,
    )
    os.close(fd)
    assert (got == lengths).all()
    np.testing.assert_array_equal(memory[1], content[8192 : 8192 + 5 * 4096])


def test_bytes_got_are_not_lost_by_a_later_attempt_that_brings_none(ring, fd, content, monkeypatch):
    attempts = iter([6000, 0])
    change_results(monkeypatch, ring, lambda which, results: np.array([next(attempts)]))
    got, _ = read(ring, fd, [0], [8192])
    np.testing.assert_array_equal(got, [6000])


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EINTR])
def test_reads_put_off_are_sent_again(ring, fd, content, monkeypatch, code):
    refused = set()

    def refuse_once(which, results):
        for i, request in enumerate(which.tolist()):
            if request % 2 and request not in refused:
                refused.add(request)
                results[i] = -code
        return results

    change_results(monkeypatch, ring, refuse_once)
    got, memory = read(ring, fd, np.arange(30) * 4096, np.full(30, 4096))
    assert (got == 4096).all() and len(refused) == 15
    np.testing.assert_array_equal(memory.reshape(-1), content[: 30 * 4096])


def test_a_failed_read_raises_when_nothing_is_in_flight_any_more(ring, fd, content):
    fds = np.full(30, fd)
    fds[3] = 2**31 - 1  # no such descriptor
    memory = np.zeros((30, 4096), np.uint8)
    lengths = np.full(30, 4096)
    with pytest.raises(OSError) as error:
        ring.read(
            fds, np.arange(30) * 4096, memory.ctypes.data + np.arange(30) * 4096, lengths, lengths
        )
    assert error.value.errno == errno.EBADF
    got, memory = read(ring, fd, np.arange(5) * 4096, lengths[:5])  # the ring is as good as new
    assert (got == 4096).all()
    np.testing.assert_array_equal(memory.reshape(-1), content[: 5 * 4096])


@pytest.mark.parametrize("before", [True, False])
def test_an_interrupt_leaves_no_request_behind(ring, fd, content, monkeypatch, before):
    real, calls = ring._enter, []

    def enter(submit, wait):
        calls.append(submit)
        if len(calls) == 1:
            if not before:
                real(submit, wait)
            raise KeyboardInterrupt
        return real(submit, wait)

    monkeypatch.setattr(ring, "_enter", enter)
    with pytest.raises(KeyboardInterrupt):
        read(ring, fd, [8192, 4096], [4096, 4096])
    assert not ring._flying()
    got, memory = read(ring, fd, np.arange(20) * 4096, np.full(20, 4096))
    assert (got == 4096).all()
    np.testing.assert_array_equal(memory.reshape(-1), content[: 20 * 4096])


def test_the_kernel_may_take_fewer_requests_than_offered(ring, fd, content, monkeypatch):
    real, calls = ring._enter, []

    def enter(submit, wait):
        calls.append(submit)
        if len(calls) == 2:
            return False  # interrupted before anything was taken
        return real(min(submit, 3), wait)

    monkeypatch.setattr(ring, "_enter", enter)
    got, memory = read(ring, fd, np.arange(20) * 4096, np.full(20, 4096))
    assert (got == 4096).all() and len(calls) > 7
    np.testing.assert_array_equal(memory.reshape(-1), content[: 20 * 4096])


def test_counters_of_the_ring_may_wrap(fd, content):
    ring = Ring(4)
    for _ in range(200):  # 50 rounds of the ring of requests
        got, memory = read(ring, fd, [4096, 0, 8192], [4096] * 3)
        np.testing.assert_array_equal(
            memory.reshape(-1)[:8192], np.concatenate([content[4096:8192], content[:4096]])
        )
    ring.close()


def test_refusal_is_an_os_error(monkeypatch):
    monkeypatch.setattr(uring.sys, "platform", "darwin")
    for made in (Ring, CacheStat):
        with pytest.raises(OSError, match="not Linux"):
            made()


def test_close_gives_everything_back():
    before = len(os.listdir("/proc/self/fd"))
    ring = Ring()
    assert len(os.listdir("/proc/self/fd")) > before
    ring.close()
    ring.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_cachestat_counts_cached_pages(fd):
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    stat = CacheStat()
    try:
        cached = stat.pages(fd, 0, SIZE)
    except OSError as error:
        pytest.skip(f"cachestat: {error}")
    if cached:
        pytest.skip("this file system lives in the page cache")
    os.pread(fd, 8192, 4096)
    assert stat.pages(fd, 4096, 8192) == 2
    assert stat.pages(fd, 0, 4096) == 0
    assert stat.pages(fd, 5000, 4096) == 2
