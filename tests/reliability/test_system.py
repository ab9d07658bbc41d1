"""What the operating system refuses: descriptors, permissions, space, direct reads; and signals in
the middle of reads.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from tkv.making import tree_bytes

from flexmemory.errors import UserError
from flexmemory.tkv import format
from flexmemory.tkv.storage import reader
from flexmemory.tkv.store import open_store

from . import child, toy
from .flips import everything

NOBODY = 65534


def run_child(environment, *words, namespace=False) -> dict:
    prefix = ["unshare", "--mount"] if namespace else []
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "reliability.child", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def can_mount() -> bool:
    with contextlib.suppress(OSError):
        return (
            subprocess.run(
                ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
            ).returncode
            == 0
        )
    return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "s"
    toy.export_to(out, **child.SHARDS)
    return out


# ---- space


@pytest.mark.skipif(
    not can_mount(), reason="needs the right to mount a tmpfs in a namespace of its own"
)
@pytest.mark.parametrize("action", ["export", "copy"])
def test_a_disk_that_is_really_full(action, whole, tmp_path, child_environment):
    """A tmpfs of 64 KiB and of a page more each time: full at another write each time. After it
    grows, the same command finishes.
    """
    found = run_child(child_environment, "full", action, whole, tmp_path, 24, namespace=True)
    failed = [said for said in found["said"] if said is not None]
    assert all(
        "(No space left on device); free some space and run the same command again" in said
        for said in failed
    ), failed
    assert len(failed) >= 5 and len(set(failed)) >= 5 and found["said"][-1] is None
    assert found["finished"] == 24


@pytest.mark.parametrize("action", ["export", "copy"])
def test_a_full_disk_at_many_writes(action, whole, tmp_path, monkeypatch):
    """The same without mounting: every 13th fsync fails in turn, of a file or of its directory."""
    fsync, tried, number = os.fsync, 0, 0
    while True:
        left, out = [number], tmp_path / str(number)

        def full(descriptor, left=left):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                child.act(action, whole, out)
            except UserError as error:
                assert "(No space left on device)" in str(
                    error
                ) and "run the same command again" in str(error), error
                tried += 1
        if left[0] >= 0:
            break
        child.act(action, whole, out)
        assert tree_bytes(out) == tree_bytes(whole), number
        shutil.rmtree(out)
        number += 13
    assert tried >= 6


# ---- descriptors, signals, direct reads


def test_few_file_descriptors(whole, child_environment):
    """From 23 free descriptors to none: everything is read, or one line says that there are too
    many open files.
    """
    found = run_child(child_environment, "few", "-", whole, "-")
    assert len(found) == 48
    for what in ("open", "read"):
        said = [text for name, text in found.items() if name.startswith(what)]
        refused = [text for text in said if text != "right"]
        assert all(
            str(whole) in text and "Too many open files" in text and "\n" not in text
            for text in refused
        ), refused
        assert 8 <= len(refused) <= 24


def test_signals_in_the_middle_of_reads(whole, monkeypatch):
    """A timer interrupts the process every 200 microseconds, which ends system calls early (EINTR),
    while rows are read by every method.
    """
    want, came = everything(whole, backbone=False), []
    ids = np.arange(257)
    before = signal.signal(signal.SIGALRM, lambda *_: came.append(1))
    signal.setitimer(signal.ITIMER_REAL, 2e-4, 2e-4)
    try:
        for method in ("auto", "uring", "threads", "buffered", "tensorstore"):
            opened = open_store(whole)
            for group in opened.groups:
                opened._readers[group.name].close()
                opened._readers[group.name] = reader.open_reader(
                    opened.location, format.records(opened.manifest, group), method=method
                )
            for _ in range(20):
                got = {
                    f"rows {name}": rows.tobytes() for name, rows in opened.read_rows(ids).items()
                }
                assert got == {name: want[name] for name in got}
            opened.close()
        assert everything(whole, backbone=False) == want
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(came) > 50


@pytest.mark.skipif(
    not can_mount(),
    reason=(
        "needs the right to mount a ramfs in a namespace of its own; test_reader.py refuses by a"
        " patch"
    ),
)
def test_a_file_system_without_direct_reads(whole, tmp_path, child_environment):
    assert run_child(child_environment, "ramfs", "-", whole, tmp_path, namespace=True) == {
        "refused": True,
        "method": "buffered",
    }


# ---- permissions


@contextlib.contextmanager
def as_nobody():
    """Without root's rights, to which no file is closed."""
    root = os.geteuid() == 0
    if root:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
            os.setegid(0)


@pytest.fixture
def shared():
    """A folder that anyone may pass through, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize(
    "part",
    [
        "tkv.json",
        "tokenizer.json",
        "counts.npy",
        "basis.safetensors",
        "backbone",
        "rows/w4/zarr.json",
        "rows/w8/c/1/0",
        "rows/w4",
        "rows",
        "checksums/w8/c/0",
        "checksums/w4/zarr.json",
        "checksums",
    ],
)
def test_a_file_or_folder_that_may_not_be_read(part, stores, shared, command):
    path, kind = shared / "s", "int4 rank"
    shutil.copytree(stores[kind], path)
    want = everything(path)
    os.chmod(path / part, 0)
    with as_nobody():
        with pytest.raises(UserError, match=r"(?i)permission.denied") as caught:
            everything(path)
        assert str(path / part) in str(caught.value) and "\n" not in str(caught.value)
        code, line = command("verify", f"--tkv={path}", "--deep")
        assert code in (1, 2)
    os.chmod(path / part, 0o755)
    with as_nobody():
        assert everything(path) == want


def test_a_folder_that_may_not_be_written(whole, shared):
    source = shutil.copytree(whole, shared / "source")
    (shared / "closed").mkdir(mode=0o755)
    with as_nobody():
        for action in ("export", "copy"):
            for out in (shared / "closed", shared / "closed" / "s"):
                with pytest.raises(UserError, match=r"(?i)permission denied") as caught:
                    child.act(action, source, out)
                assert str(shared / "closed") in str(caught.value) and "\n" not in str(caught.value)
    assert not list((shared / "closed").iterdir())


@pytest.mark.parametrize("action", ["export", "copy"])
def test_rights_lost_in_the_middle(action, whole, shared, monkeypatch):
    """An interrupted export or copy meets a folder that it may not write; with the rights back, the
    same command finishes.
    """
    source, out = shutil.copytree(whole, shared / "source"), shared / "s"
    fsync, left = os.fsync, [24]

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            child.act(action, source, out)
    for path in [out, *out.rglob("*")]:
        shutil.chown(path, NOBODY) if os.geteuid() == 0 else None
    folder = next(path for path in out.rglob("c") if len(os.listdir(path)) < 5)
    os.chmod(folder, 0o555)
    with as_nobody():
        with pytest.raises(UserError, match=f"{folder}/.*[Pp]ermission denied") as caught:
            child.act(action, source, out)
        assert "\n" not in str(caught.value)
        with pytest.raises(
            UserError, match="an unfinished (export|copy), not a store|no TKV store"
        ):
            open_store(out)
        os.chmod(folder, 0o755)
        child.act(action, source, out)
    assert tree_bytes(out) == tree_bytes(whole)
