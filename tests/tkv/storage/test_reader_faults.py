"""A reader that cannot read says so and names the file, or finds another way; it never gives other
bytes.
"""

import errno
import os

import numpy as np
import pytest

from flexmemory.errors import UserError
from flexmemory.tkv import format
from flexmemory.tkv.storage import reader
from flexmemory.tkv.storage.reader import METHODS

from ..tables import SHARD_ROWS, VOCAB, drop, fail, read


@pytest.mark.parametrize("method", ["auto", "uring", "threads", "buffered"])
def test_an_io_error_names_the_file(table, monkeypatch, method, opened):
    location, group, _ = table
    r = opened(table, method)
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
    with pytest.raises(
        UserError, match=r"c/1/0/0: cannot be read \(Input/output error\); copy the store again"
    ):
        read(r, range(VOCAB))
    drop(location, group)
    read(r, range(SHARD_ROWS))  # the other shards are served


def test_one_failed_direct_read_is_recovered(table, monkeypatch, opened):
    location, group, rows_VB = table
    r = opened(table, "uring")
    monkeypatch.setattr(r._ring, "read", fail(errno.EIO))
    np.testing.assert_array_equal(read(r, range(VOCAB)), rows_VB)
    assert r.stats()["read ahead"] == VOCAB and r.stats()["method"] == "uring"


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_shard_is_named(table, method, opened):
    location, group, _ = table
    (location.local / format.shard_file(group, 1)).unlink()
    with pytest.raises(UserError, match="w/c/1/0/0.*copy the store again"):
        read(opened(table, method), range(VOCAB))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [100, 5 * 4096, 16 * 4096 + 40])
def test_a_shard_cut_before_opening_is_named(table, method, keep, opened):
    location, group, _ = table
    os.truncate(location.local / format.shard_file(group, 1), keep)
    with pytest.raises(UserError, match="w/c/1/0/0.*copy the store again"):
        read(opened(table, method), range(VOCAB))


@pytest.mark.parametrize("method", ["auto", "uring", "threads", "buffered"])
@pytest.mark.parametrize("keep", [0, 100, 5 * 4096, 5 * 4096 + 100])
def test_a_shard_cut_while_open_is_named(table, method, keep, opened):
    location, group, _ = table
    r = opened(table, method)
    read(r, range(VOCAB))
    os.truncate(location.local / format.shard_file(group, 1), keep)
    for ids in (range(VOCAB), [31]):
        with pytest.raises(
            UserError, match="c/1/0/0: (ends inside the bundle of token|changed since)"
        ):
            read(r, ids)


@pytest.mark.parametrize("change", ["other file", "other bytes"])
def test_a_shard_replaced_since_opening_is_refused(table, change, opened):
    location, group, _ = table
    r = opened(table)
    file = location.local / format.shard_file(group, 1)
    content = file.read_bytes()
    if change == "other file":
        file.with_name("new").write_bytes(content)
        os.replace(file.with_name("new"), file)
    else:
        file.write_bytes(content[:5] + b"x" + content[6:])
        os.utime(file, ns=(1, 1))
    read(r, range(SHARD_ROWS))
    with pytest.raises(
        UserError, match="c/1/0/0: changed since the store was opened; open the store again"
    ):
        read(r, [SHARD_ROWS])


def test_permission_denied_is_said(table, monkeypatch, opened):
    location, group, _ = table
    r = opened(table)
    real = os.open

    def denied(path, flags, *args, **kwargs):
        if str(path).endswith("c/1/0/0"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(
        UserError, match=r"c/1/0/0: cannot be read \(Permission denied\); let this user read it"
    ):
        read(r, range(VOCAB))


def test_a_flipped_index_is_an_error(table, opened):
    location, group, _ = table
    file = location.local / format.shard_file(group, 1)
    content = bytearray(file.read_bytes())
    content[16 * 4096 + 16 * 3 + 1] ^= 16  # the offset of its fourth bundle
    file.write_bytes(content)
    with pytest.raises(UserError, match="w/c/1/0/0"):
        read(opened(table), range(VOCAB))


def test_more_shards_than_open_files_allowed(table, monkeypatch, opened):
    location, group, rows_VB = table
    real, raised, limits = os.open, [], []

    def full_once(path, flags, *args, **kwargs):
        if not raised:
            raised.append(path)
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", full_once)
    monkeypatch.setattr(reader.resource, "setrlimit", lambda which, limit: limits.append(limit))
    np.testing.assert_array_equal(read(opened(table), range(VOCAB)), rows_VB)
    assert limits and limits[0][0] == limits[0][1]
