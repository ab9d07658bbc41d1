"""Every way of reading gives the bytes that were written."""

import errno
import gc
import os
import threading

import numpy as np
import pytest

from flexmemory.errors import UserError
from flexmemory.files import allocate
from flexmemory.tkv import format
from flexmemory.tkv.storage import reader
from flexmemory.tkv.storage.reader import METHODS

from ..tables import LAYOUTS, SHARD_ROWS, VOCAB, drop, fail, make, read


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_method_reads_every_token(tmp_path, layout, method, opened):
    location, group, rows_VB = table = make(tmp_path, layout)
    r = opened(table, method)
    for cold in (True, False):
        for ids in (range(VOCAB), range(0, VOCAB, 3), [0, 15, 16, 31, 32, 39], [39], [15], [3], []):
            if cold:
                drop(location, group)
            np.testing.assert_array_equal(read(r, ids, layout.bundle_bytes), rows_VB[list(ids)])
    assert r.stats()["bundles"] == 2 * (VOCAB + 14 + 6 + 3)
    r.close()


@pytest.mark.parametrize("shift", [4, 7 * 4, 512])
def test_output_need_not_be_aligned(table, shift, opened):
    location, group, rows_VB = table
    out = allocate(VOCAB + 1, 4096).reshape(-1)[shift : shift + VOCAB * 4096].reshape(VOCAB, 4096)
    for method in METHODS:
        drop(location, group)
        out[:] = 0
        r = opened(table, method)
        r.read(np.arange(VOCAB), out)
        np.testing.assert_array_equal(out, rows_VB)
        drop(location, group)
        r._warm = False
        r.read(np.array([7]), out[9:10])
        np.testing.assert_array_equal(out[9], rows_VB[7])
        assert r.stats()["method"] == (
            "uring" if method == "auto" else method
        )  # no read was refused


@pytest.mark.parametrize("ids", [[7], range(VOCAB)])
def test_a_disk_that_wants_aligned_memory_gets_it(table, opened, monkeypatch, ids):
    location, group, rows_VB = table
    real = os.preadv

    def preadv(fd, buffers, offset, *flags):
        if fd in r._direct.values() and buffers[0].ctypes.data % 4096:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffers, offset, *flags)

    r = opened(table, "threads")
    monkeypatch.setattr(os, "preadv", preadv)
    out = (
        allocate(len(ids) + 1, 4096)
        .reshape(-1)[512 : 512 + len(ids) * 4096]
        .reshape(len(ids), 4096)
    )
    r.read(np.array(ids), out)
    np.testing.assert_array_equal(out, rows_VB[list(ids)])
    assert r.stats()["method"] == "threads" and r.stats()["read ahead"] == 0


def test_staging_is_reused_in_waves(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(reader, "STAGING_BYTES", 3 * 12288)
    location, group, rows_VB = table = make(tmp_path, LAYOUTS["5000"])
    drop(location, group)
    np.testing.assert_array_equal(read(opened(table, "uring"), range(VOCAB), 5000), rows_VB)


def test_cached_bundles_come_from_the_page_cache_and_the_rest_from_the_disk(disk_table, opened):
    location, group, rows_VB = table = disk_table
    r = opened(table)
    read(r, [0, 16, 32])  # opens the shards, which brings in their indexes
    for _ in range(
        5
        # until the kernel, which may take pages away or read ahead at any time, leaves every other
        # bundle in the cache
    ):
        drop(location, group)
        for token in range(0, VOCAB, 2):
            os.pread(r._buffered[token // SHARD_ROWS], 4096, token % SHARD_ROWS * 4096)
        before = r.stats()
        np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
        reads = {name: r.stats()[name] - before.get(name, 0) for name in ("page cache", "uring")}
        if reads["page cache"] == VOCAB // 2:
            break
    assert reads == {"page cache": VOCAB // 2, "uring": VOCAB // 2}


def test_bundles_that_left_the_page_cache_meanwhile_come_from_the_disk(
    disk_table, opened, monkeypatch
):
    location, group, rows_VB = table = disk_table
    r = opened(table)
    real, lost = os.preadv, {5, 17, 38}
    for shard in range(group.shards):
        (location.local / format.shard_file(group, shard)).read_bytes()
        r._open(shard)
    monkeypatch.setattr(r, "_is_cached", lambda token: token % 10 != 0)

    def preadv(fd, buffers, offset, flags=0):
        if flags and any(
            r._buffered.get(t // SHARD_ROWS) == fd and t % SHARD_ROWS * 4096 == offset for t in lost
        ):
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    np.testing.assert_array_equal(
        read(r, range(1, VOCAB)), rows_VB[1:]
    )  # probes 1, 11, 21, 31: all cached
    np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)  # 0, 10, 20, 30: none
    np.testing.assert_array_equal(read(r, range(3, VOCAB, 2)), rows_VB[3::2])
    monkeypatch.setattr(r, "_is_cached", lambda token: token < 20)  # these disagree
    np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
    assert r.stats()["uring"] == 3 + 40 + 2 + 22 and r.stats()["page cache"] == 36 + 17 + 18


@pytest.mark.parametrize(
    "wrong",
    [
        {"ids": [0, 1], "shape": (3, 4096)},
        {"ids": [0], "shape": (1, 4095)},
        {"ids": [VOCAB], "shape": (1, 4096)},
        {"ids": [-1], "shape": (1, 4096)},
    ],
)
def test_a_call_that_would_write_elsewhere_is_refused(table, wrong, opened):
    location, group, _ = table
    with pytest.raises(ValueError, match="must be"):
        opened(table).read(np.array(wrong["ids"]), np.zeros(wrong["shape"], np.uint8))


def test_strided_output_is_refused(table, opened):
    location, group, _ = table
    with pytest.raises(ValueError, match="C-contiguous"):
        opened(table).read(np.arange(2), np.zeros((4, 4096), np.uint8)[::2])


def test_threads_read_where_io_uring_is_refused(disk_table, monkeypatch, opened):
    location, group, rows_VB = table = disk_table

    monkeypatch.setattr(reader, "Ring", fail(errno.EPERM))
    drop(location, group)
    r = opened(table)
    read(r, [0, 16, 32])
    drop(location, group)
    np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
    assert r.stats()["method"] == "threads" and r.stats()["threads"] >= VOCAB
    with pytest.raises(UserError, match="'uring' does not work here"):
        opened(table, "uring")


@pytest.mark.parametrize("where", ["open", "preadv", "ring"])
def test_page_cache_serves_where_direct_reads_are_refused(table, monkeypatch, where, opened):
    location, group, rows_VB = table
    real_open, real_preadv, direct = os.open, os.preadv, set()

    def open_file(path, flags, *args, **kwargs):
        if flags & os.O_DIRECT and where == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        fd = real_open(path, flags, *args, **kwargs)
        if flags & os.O_DIRECT:
            direct.add(fd)
        return fd

    def preadv(fd, *args):
        if fd in direct and where == "preadv":
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(fd, *args)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "preadv", preadv)
    r = opened(table, "threads" if where == "preadv" else "auto")
    if where == "ring":
        monkeypatch.setattr(r._ring, "read", fail(errno.EINVAL))
    for ids in (range(VOCAB), [7], range(5, 30)):
        drop(location, group)
        np.testing.assert_array_equal(read(r, ids), rows_VB[list(ids)])
    assert r.stats()["method"] == "buffered" and r.stats()["read ahead"]


def test_without_cachestat_the_page_cache_is_still_found(disk_table, opened, monkeypatch):
    location, group, rows_VB = table = disk_table
    r = opened(table)
    monkeypatch.setattr(r._cachestat, "pages", fail(errno.ENOSYS))
    drop(location, group)
    np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
    assert r.stats()["uring"] == VOCAB
    for shard in range(group.shards):
        (location.local / format.shard_file(group, shard)).read_bytes()
    np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
    assert r.stats()["page cache"] == VOCAB


def test_single_reads_find_out_that_the_page_cache_holds_the_table(disk_table, opened):
    location, group, rows_VB = table = disk_table
    r = opened(table)
    drop(location, group)
    for token in range(20):
        np.testing.assert_array_equal(read(r, [token]), rows_VB[[token]])
    assert r.stats()["preadv"] == 20
    for shard in range(group.shards):
        (location.local / format.shard_file(group, shard)).read_bytes()
    for token in range(20):
        np.testing.assert_array_equal(read(r, [token]), rows_VB[[token]])
    assert r.stats()["page cache"] > 20 - reader.PROBE_EVERY
    found = r.stats()["page cache"]
    drop(location, group)
    (location.local / format.shard_file(group, 1)).read_bytes()
    for token in (
        0,
        SHARD_ROWS,
        SHARD_ROWS + 1,
    ):  # one that is not there, and two that are: asked for at once
        np.testing.assert_array_equal(read(r, [token]), rows_VB[[token]])
    assert r.stats()["page cache"] == found + 2 and r.stats()["preadv"] > 20


def test_a_file_system_without_nowait_reads_cold_bundles_directly(table, monkeypatch, opened):
    location, group, rows_VB = table
    real = os.preadv

    def preadv(fd, buffers, offset, flags=0):
        if flags:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    r = opened(table)
    for _ in range(3):
        np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
    assert r.stats()["page cache"]
    drop(location, group)
    np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
    assert r.stats()["uring"] >= VOCAB


@pytest.mark.parametrize("method", ["threads", "buffered", "auto"])
def test_short_reads_are_continued(table, monkeypatch, method, opened):
    location, group, rows_VB = table
    real, calls = os.preadv, []

    def preadv(fd, buffers, offset, *flags):
        calls.append(offset)
        return real(
            fd, (buffers[0][: max(512, len(buffers[0]) // 512 // 2 * 512)],), offset, *flags
        )

    r = opened(table, method)
    monkeypatch.setattr(os, "preadv", preadv)
    for ids in (range(VOCAB), [39]):
        drop(location, group)
        np.testing.assert_array_equal(read(r, ids), rows_VB[list(ids)])
    assert calls


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["4096", "99"])
def test_shards_in_another_order_are_read_through_tensorstore(tmp_path, layout, method, opened):
    location, group, rows_VB = table = make(tmp_path, LAYOUTS[layout], order=slice(None, None, -1))
    r, size = opened(table, method), LAYOUTS[layout].bundle_bytes
    np.testing.assert_array_equal(read(r, range(VOCAB), size), rows_VB)
    np.testing.assert_array_equal(read(r, [17], size), rows_VB[[17]])
    assert r.stats()["method"] == "tensorstore"


def test_one_reader_serves_threads(table, opened):
    location, group, rows_VB = table
    r, wrong = opened(table), []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            ids = np.sort(rng.permutation(VOCAB)[: rng.integers(1, VOCAB)])
            if not np.array_equal(read(r, ids), rows_VB[ids]):
                wrong.append(ids)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong and r.stats()["reads"] == 80


@pytest.mark.parametrize("method", ["auto", "threads", "buffered"])
def test_close_gives_every_descriptor_back(table, opened, method):
    location, group, _ = table
    gc.collect()  # of other tests' TensorStores
    before, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    r = opened(table, method)
    drop(location, group)
    read(r, range(VOCAB))
    assert set(os.listdir("/proc/self/fd")) - before
    r.close()
    assert not set(os.listdir("/proc/self/fd")) - before and threading.active_count() == threads


def test_unknown_method(table, opened):
    location, group, _ = table
    with pytest.raises(UserError, match="method: 'mmap' is not one of auto"):
        opened(table, "mmap")


def test_allocate_is_aligned_and_private():
    for rows, width in ((0, 4096), (3, 100), (1000, 8192)):
        memory = allocate(rows, width)
        assert (
            memory.shape == (rows, width)
            and memory.dtype == np.uint8
            and memory.ctypes.data % 4096 == 0
            and not memory.any()
        )
        memory[:] = 1
