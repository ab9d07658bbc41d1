"""Every way of reading gives the bytes that were written, and says so when it cannot."""

import dataclasses
import errno
import gc
import os
import threading

import numpy as np
import pytest
import tensorstore as ts

from flexmemory.errors import UserError
from flexmemory.tkv import format, reader
from flexmemory.tkv.encoding import Layout
from flexmemory.tkv.format import Group
from flexmemory.tkv.location import open_location
from flexmemory.tkv.reader import METHODS, allocate, open_reader
from flexmemory.tkv.uring import CacheStat

SHARD_ROWS, VOCAB = 16, 40  # the last of three shards is half full


@dataclasses.dataclass(frozen=True)
class Table:
    """What a reader needs of a manifest."""

    vocab_size: int = VOCAB
    shard_rows: int = SHARD_ROWS


LAYOUTS = {
    "4096": Layout(2, 512, "float32"),  # a multiple of the page
    "8192": Layout(4, 1024, "bfloat16"),
    "5000": Layout(5, 500, "float16"),  # bundles begin anywhere
    "100": Layout(1, 25, "float32"),
    "99": Layout(1, 95, "int8"),  # encoded: [V, B] of bytes
}


def make(path, layout, order=slice(None)):
    """Writes the shard files by hand; returns (location, group, rows uint8 [V, B]). ``order``: of the bundles in each file."""
    group = Group("w", tuple(range(layout.layers)), layout, -(-VOCAB // SHARD_ROWS), VOCAB * layout.bundle_bytes)
    rows_VB = np.random.default_rng(0).integers(0, 256, (VOCAB, layout.bundle_bytes), np.uint8)
    rows_VB[3] = 0  # a bundle of zeros is stored like any other
    location = open_location(path)
    spec = format.rows_spec(location.spec("rows/w"), Table(), group)
    ts.open({**spec, "create": True}).result()
    for shard in range(group.shards):
        part = rows_VB[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]
        places = np.arange(len(part))[order]
        index = np.full((SHARD_ROWS, 2), 2**64 - 1, np.uint64)
        index[places, 0], index[places, 1] = np.arange(len(part)) * layout.bundle_bytes, layout.bundle_bytes
        file = path / format.shard_file(group, shard)
        file.parent.mkdir(parents=True)
        file.write_bytes(part[order].tobytes() + index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little"))
    return location, group, rows_VB


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 & -(crc & 1))
    return crc ^ 0xFFFFFFFF


@pytest.fixture
def store(tmp_path):
    return make(tmp_path, LAYOUTS["4096"])


@pytest.fixture
def disk_store(store):
    """A store whose bundles can be cold: not on tmpfs."""
    location, group, _ = store
    drop(location, group)
    fd = os.open(location.local / format.shard_file(group, 0), os.O_RDONLY)
    try:
        cached = CacheStat().pages(fd, 0, 4096)
    except OSError as error:
        pytest.skip(f"cachestat: {error}")
    finally:
        os.close(fd)
    if cached:
        pytest.skip("this file system lives in the page cache")
    return store


@pytest.fixture
def opened():
    """open_reader whose readers are closed after the test."""
    made = []

    def opened(store, method="auto"):
        made.append(open_reader(store[0], Table(), store[1], method=method))
        return made[-1]

    yield opened
    for r in made:
        r.close()


def read(r, ids, size=4096):
    ids = np.asarray(ids, np.int64)
    out = allocate(len(ids), size)
    out[:] = 0xEE
    r.read(ids, out)
    return out


def fail(code):
    """A function that raises this OSError whatever it is called with."""

    def failing(*args):
        raise OSError(code, os.strerror(code))

    return failing


def drop(location, group):
    """Empties the page cache of the table."""
    for shard in range(group.shards):
        fd = os.open(location.local / format.shard_file(group, shard), os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_method_reads_every_token(tmp_path, layout, method, opened):
    location, group, rows_VB = store = make(tmp_path, layout)
    r = opened(store, method)
    for cold in (True, False):
        for ids in (range(VOCAB), range(0, VOCAB, 3), [0, 15, 16, 31, 32, 39], [39], [15], [3], []):
            if cold:
                drop(location, group)
            np.testing.assert_array_equal(read(r, ids, layout.bundle_bytes), rows_VB[list(ids)])
    assert r.stats()["bundles"] == 2 * (VOCAB + 14 + 6 + 3)
    r.close()


@pytest.mark.parametrize("shift", [4, 7 * 4, 512])
def test_output_need_not_be_aligned(store, shift, opened):
    location, group, rows_VB = store
    out = allocate(VOCAB + 1, 4096).reshape(-1)[shift : shift + VOCAB * 4096].reshape(VOCAB, 4096)
    for method in METHODS:
        drop(location, group)
        out[:] = 0
        r = opened(store, method)
        r.read(np.arange(VOCAB), out)
        np.testing.assert_array_equal(out, rows_VB)
        drop(location, group)
        r._warm = False
        r.read(np.array([7]), out[9:10])
        np.testing.assert_array_equal(out[9], rows_VB[7])
        assert r.stats()["method"] == ("uring" if method == "auto" else method)  # no read was refused


@pytest.mark.parametrize("ids", [[7], range(VOCAB)])
def test_a_disk_that_wants_aligned_memory_gets_it(store, opened, monkeypatch, ids):
    location, group, rows_VB = store
    real = os.preadv

    def preadv(fd, buffers, offset, *flags):
        if fd in r._direct.values() and buffers[0].ctypes.data % 4096:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffers, offset, *flags)

    r = opened(store, "threads")
    monkeypatch.setattr(os, "preadv", preadv)
    out = allocate(len(ids) + 1, 4096).reshape(-1)[512 : 512 + len(ids) * 4096].reshape(len(ids), 4096)
    r.read(np.array(ids), out)
    np.testing.assert_array_equal(out, rows_VB[list(ids)])
    assert r.stats()["method"] == "threads" and r.stats()["read ahead"] == 0


def test_staging_is_reused_in_waves(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(reader, "STAGING_BYTES", 3 * 12288)
    location, group, rows_VB = store = make(tmp_path, LAYOUTS["5000"])
    drop(location, group)
    np.testing.assert_array_equal(read(opened(store, "uring"), range(VOCAB), 5000), rows_VB)


def test_cached_bundles_come_from_the_page_cache_and_the_rest_from_the_disk(disk_store, opened):
    location, group, rows_VB = store = disk_store
    r = opened(store)
    read(r, [0, 16, 32])  # opens the shards, which brings in their indexes
    drop(location, group)
    for token in range(0, VOCAB, 2):
        os.pread(r._buffered[token // SHARD_ROWS], 4096, token % SHARD_ROWS * 4096)
    before = r.stats()
    np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
    assert r.stats()["page cache"] - before.get("page cache", 0) == VOCAB // 2
    assert r.stats()["uring"] - before.get("uring", 0) == VOCAB // 2


def test_bundles_that_left_the_page_cache_meanwhile_come_from_the_disk(disk_store, opened, monkeypatch):
    location, group, rows_VB = store = disk_store
    r = opened(store)
    real, lost = os.preadv, {5, 17, 38}
    for shard in range(group.shards):
        (location.local / format.shard_file(group, shard)).read_bytes()
        r._open(shard)
    monkeypatch.setattr(r, "_is_cached", lambda token: token % 10 != 0)

    def preadv(fd, buffers, offset, flags=0):
        if flags and any(r._buffered.get(t // SHARD_ROWS) == fd and t % SHARD_ROWS * 4096 == offset for t in lost):
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    np.testing.assert_array_equal(read(r, range(1, VOCAB)), rows_VB[1:])  # probes 1, 11, 21, 31: all cached
    np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)  # 0, 10, 20, 30: none
    np.testing.assert_array_equal(read(r, range(3, VOCAB, 2)), rows_VB[3::2])
    monkeypatch.setattr(r, "_is_cached", lambda token: token < 20)  # these disagree
    np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
    assert r.stats()["uring"] == 3 + 40 + 2 + 22 and r.stats()["page cache"] == 36 + 17 + 18


@pytest.mark.parametrize("wrong", [
    {"ids": [0, 1], "shape": (3, 4096)}, {"ids": [0], "shape": (1, 4095)}, {"ids": [VOCAB], "shape": (1, 4096)}, {"ids": [-1], "shape": (1, 4096)},
])
def test_a_call_that_would_write_elsewhere_is_refused(store, wrong, opened):
    location, group, _ = store
    with pytest.raises(ValueError, match="must be"):
        opened(store).read(np.array(wrong["ids"]), np.zeros(wrong["shape"], np.uint8))


def test_strided_output_is_refused(store, opened):
    location, group, _ = store
    with pytest.raises(ValueError, match="C-contiguous"):
        opened(store).read(np.arange(2), np.zeros((4, 4096), np.uint8)[::2])


def test_threads_read_where_io_uring_is_refused(disk_store, monkeypatch, opened):
    location, group, rows_VB = store = disk_store

    monkeypatch.setattr(reader, "Ring", fail(errno.EPERM))
    drop(location, group)
    r = opened(store)
    read(r, [0, 16, 32])
    drop(location, group)
    np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
    assert r.stats()["method"] == "threads" and r.stats()["threads"] >= VOCAB
    with pytest.raises(UserError, match="'uring' does not work here"):
        opened(store, "uring")


@pytest.mark.parametrize("where", ["open", "preadv", "ring"])
def test_page_cache_serves_where_direct_reads_are_refused(store, monkeypatch, where, opened):
    location, group, rows_VB = store
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
    r = opened(store, "threads" if where == "preadv" else "auto")
    if where == "ring":
        monkeypatch.setattr(r._ring, "read", fail(errno.EINVAL))
    for ids in (range(VOCAB), [7], range(5, 30)):
        drop(location, group)
        np.testing.assert_array_equal(read(r, ids), rows_VB[list(ids)])
    assert r.stats()["method"] == "buffered" and r.stats()["read ahead"]


def test_without_cachestat_the_page_cache_is_still_found(disk_store, opened, monkeypatch):
    location, group, rows_VB = store = disk_store
    r = opened(store)
    monkeypatch.setattr(r._cachestat, "pages", fail(errno.ENOSYS))
    drop(location, group)
    np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
    assert r.stats()["uring"] == VOCAB
    for shard in range(group.shards):
        (location.local / format.shard_file(group, shard)).read_bytes()
    np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
    assert r.stats()["page cache"] == VOCAB


def test_single_reads_find_out_that_the_page_cache_holds_the_table(disk_store, opened):
    location, group, rows_VB = store = disk_store
    r = opened(store)
    drop(location, group)
    for token in range(20):
        np.testing.assert_array_equal(read(r, [token]), rows_VB[[token]])
    assert r.stats()["preadv"] == 20
    for shard in range(group.shards):
        (location.local / format.shard_file(group, shard)).read_bytes()
    for token in range(20):
        np.testing.assert_array_equal(read(r, [token]), rows_VB[[token]])
    assert r.stats()["page cache"] > 20 - reader.PROBE_EVERY


def test_a_file_system_without_nowait_reads_cold_bundles_directly(store, monkeypatch, opened):
    location, group, rows_VB = store
    real = os.preadv

    def preadv(fd, buffers, offset, flags=0):
        if flags:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    r = opened(store)
    for _ in range(3):
        np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
    assert r.stats()["page cache"]
    drop(location, group)
    np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
    assert r.stats()["uring"] >= VOCAB


@pytest.mark.parametrize("method", ["threads", "buffered", "auto"])
def test_short_reads_are_continued(store, monkeypatch, method, opened):
    location, group, rows_VB = store
    real, calls = os.preadv, []

    def preadv(fd, buffers, offset, *flags):
        calls.append(offset)
        return real(fd, (buffers[0][: max(512, len(buffers[0]) // 512 // 2 * 512)],), offset, *flags)

    r = opened(store, method)
    monkeypatch.setattr(os, "preadv", preadv)
    for ids in (range(VOCAB), [39]):
        drop(location, group)
        np.testing.assert_array_equal(read(r, ids), rows_VB[list(ids)])
    assert calls


@pytest.mark.parametrize("method", ["auto", "uring", "threads", "buffered"])
def test_an_io_error_names_the_file(store, monkeypatch, method, opened):
    location, group, _ = store
    r = opened(store, method)
    read(r, range(VOCAB))
    drop(location, group)
    real, bad = os.preadv, {r._buffered[1], r._direct.get(1)}

    def preadv(fd, *args):
        if fd in bad:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, *args)

    monkeypatch.setattr(os, "preadv", preadv)
    if r._ring:
        monkeypatch.setattr(r._ring, "read", fail(errno.EIO))
    with pytest.raises(UserError, match=r"c/1/0/0: cannot be read \(Input/output error\); copy the store again"):
        read(r, range(VOCAB))
    drop(location, group)
    read(r, range(SHARD_ROWS))  # the other shards are served


def test_one_failed_direct_read_is_recovered(store, monkeypatch, opened):
    location, group, rows_VB = store
    r = opened(store, "uring")
    monkeypatch.setattr(r._ring, "read", fail(errno.EIO))
    np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
    assert r.stats()["read ahead"] == VOCAB and r.stats()["method"] == "uring"


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_shard_is_named(store, method, opened):
    location, group, _ = store
    (location.local / format.shard_file(group, 1)).unlink()
    with pytest.raises(UserError, match="w/c/1/0/0.*copy the store again"):
        read(opened(store, method), range(VOCAB))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [100, 5 * 4096, 16 * 4096 + 40])
def test_a_shard_cut_before_opening_is_named(store, method, keep, opened):
    location, group, _ = store
    os.truncate(location.local / format.shard_file(group, 1), keep)
    with pytest.raises(UserError, match="w/c/1/0/0.*copy the store again"):
        read(opened(store, method), range(VOCAB))


@pytest.mark.parametrize("method", ["auto", "uring", "threads", "buffered"])
@pytest.mark.parametrize("keep", [0, 100, 5 * 4096, 5 * 4096 + 100])
def test_a_shard_cut_while_open_is_named(store, method, keep, opened):
    location, group, _ = store
    r = opened(store, method)
    read(r, range(VOCAB))
    os.truncate(location.local / format.shard_file(group, 1), keep)
    for ids in (range(VOCAB), [31]):
        with pytest.raises(UserError, match="c/1/0/0: (ends inside the bundle of token|changed since)"):
            read(r, ids)


@pytest.mark.parametrize("change", ["other file", "other bytes"])
def test_a_shard_replaced_since_opening_is_refused(store, change, opened):
    location, group, _ = store
    r = opened(store)
    file = location.local / format.shard_file(group, 1)
    content = file.read_bytes()
    if change == "other file":
        file.with_name("new").write_bytes(content)
        os.replace(file.with_name("new"), file)
    else:
        file.write_bytes(content[:5] + b"x" + content[6:])
        os.utime(file, ns=(1, 1))
    read(r, range(SHARD_ROWS))
    with pytest.raises(UserError, match="c/1/0/0: changed since the store was opened; open the store again"):
        read(r, [SHARD_ROWS])


def test_permission_denied_is_said(store, monkeypatch, opened):
    location, group, _ = store
    r = opened(store)
    real = os.open

    def denied(path, flags, *args, **kwargs):
        if str(path).endswith("c/1/0/0"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(UserError, match=r"c/1/0/0: cannot be read \(Permission denied\); let this user read it"):
        read(r, range(VOCAB))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["4096", "99"])
def test_shards_in_another_order_are_read_through_tensorstore(tmp_path, layout, method, opened):
    location, group, rows_VB = store = make(tmp_path, LAYOUTS[layout], order=slice(None, None, -1))
    r, size = opened(store, method), LAYOUTS[layout].bundle_bytes
    np.testing.assert_array_equal(read(r, range(VOCAB), size), rows_VB)
    np.testing.assert_array_equal(read(r, [17], size), rows_VB[[17]])
    assert r.stats()["method"] == "tensorstore"


def test_a_flipped_index_is_an_error(store, opened):
    location, group, _ = store
    file = location.local / format.shard_file(group, 1)
    content = bytearray(file.read_bytes())
    content[16 * 4096 + 16 * 3 + 1] ^= 16  # the offset of its fourth bundle
    file.write_bytes(content)
    with pytest.raises(UserError, match="w/c/1/0/0"):
        read(opened(store), range(VOCAB))


def test_more_shards_than_open_files_allowed(store, monkeypatch, opened):
    location, group, rows_VB = store
    real, raised, limits = os.open, [], []

    def full_once(path, flags, *args, **kwargs):
        if not raised:
            raised.append(path)
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", full_once)
    monkeypatch.setattr(reader.resource, "setrlimit", lambda which, limit: limits.append(limit))
    np.testing.assert_array_equal(read(opened(store), range(VOCAB)), rows_VB)
    assert limits and limits[0][0] == limits[0][1]


def test_one_reader_serves_threads(store, opened):
    location, group, rows_VB = store
    r, wrong = opened(store), []

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
def test_close_gives_every_descriptor_back(store, opened, method):
    location, group, _ = store
    gc.collect()  # of other tests' TensorStores
    before, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    r = opened(store, method)
    drop(location, group)
    read(r, range(VOCAB))
    assert set(os.listdir("/proc/self/fd")) - before
    r.close()
    assert not set(os.listdir("/proc/self/fd")) - before and threading.active_count() == threads


def test_unknown_method(store, opened):
    location, group, _ = store
    with pytest.raises(UserError, match="method: 'mmap' is not one of auto"):
        opened(store, "mmap")


def test_allocate_is_aligned_and_private():
    for rows, width in ((0, 4096), (3, 100), (1000, 8192)):
        memory = allocate(rows, width)
        assert memory.shape == (rows, width) and memory.dtype == np.uint8 and memory.ctypes.data % 4096 == 0 and not memory.any()
        memory[:] = 1
