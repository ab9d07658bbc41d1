"""Files that are there whole or not at all, past the page cache or through it."""

import errno
import fcntl
import mmap
import os

import numpy as np
import pytest

from flexmemory import files


@pytest.fixture(params=["as it is", "refused", "refused when written", "short"])
def disk(request, monkeypatch):
    """What a file system may do with direct writes. Returns the calls of os.write: (bytes given,
    direct).
    """
    calls, write, control = [], os.write, fcntl.fcntl

    def direct(descriptor):
        return bool(control(descriptor, fcntl.F_GETFL) & files.DIRECT)

    def refusing_write(descriptor, data):
        calls.append((len(data), direct(descriptor)))
        if request.param == "refused when written" and direct(descriptor):
            raise OSError(errno.EINVAL, "not here")
        return write(
            descriptor, data[: 1000 + len(data) // 2] if request.param == "short" else data
        )

    def refusing_control(descriptor, command, flags=0):
        if request.param == "refused" and command == fcntl.F_SETFL and flags & files.DIRECT:
            raise OSError(errno.EINVAL, "not here")
        return control(descriptor, command, flags)

    monkeypatch.setattr(os, "write", refusing_write)
    monkeypatch.setattr(fcntl, "fcntl", refusing_control)
    return request.param, calls


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [0],
        [5],
        [files.PIECE_BYTES],
        [3, files.PIECE_BYTES - 3],
        [3 * files.PIECE_BYTES + 7, 0, 100_000, files.PIECE_BYTES],
    ],
)
def test_any_parts_on_any_disk(sizes, disk, tmp_path):
    parts = [
        np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8)
        for i, size in enumerate(sizes)
    ]
    files.write_parts(
        tmp_path / "f", (part.data if i % 2 else part.tobytes() for i, part in enumerate(parts))
    )
    assert (tmp_path / "f").read_bytes() == b"".join(part.tobytes() for part in parts)
    assert os.listdir(tmp_path) == ["f"]
    kind, calls = disk
    if kind == "refused":
        assert not any(direct for _, direct in calls)


def test_the_rest_goes_through_the_page_cache(tmp_path, monkeypatch):
    calls, write = [], os.write
    monkeypatch.setattr(
        os,
        "write",
        lambda descriptor, data: (
            calls.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & files.DIRECT))
            or write(descriptor, data)
        ),
    )
    files.write_parts(tmp_path / "f", [bytes(2 * files.PIECE_BYTES + 5)])
    # file systems of temporary folders may refuse direct writes, at once or when they are tried
    assert calls in ([True, True, False], [False, False, False], [True, False, False, False])


@pytest.mark.parametrize("before", [0, 3])
def test_aligned_memory_is_written_as_it_lies_and_may_be_used_again(before, disk, tmp_path):
    size = files.PIECE_BYTES // 2
    memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)

    def parts():
        yield bytes(before)  # after which every part begins inside a page
        for value in range(5):
            memory[:] = value
            yield memory

    files.write_parts(tmp_path / "f", parts())
    assert (tmp_path / "f").read_bytes() == bytes(before) + b"".join(
        bytes([value]) * size for value in range(5)
    )
    kind, calls = disk
    if kind == "as it is":
        assert all((count == size) != bool(before) for count, _ in calls[:2])


def test_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "f").write_bytes(b"before")

    def parts():
        yield bytes(2 * files.PIECE_BYTES)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_parts(tmp_path / "f", parts())
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == b"before"


def test_another_error_is_told(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="full"):
        files.write_parts(tmp_path / "f", [bytes(2 * files.PIECE_BYTES)])
    assert os.listdir(tmp_path) == []
