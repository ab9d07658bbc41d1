"""Copying stores on one machine; test_remote.py does it over s3 and http."""

import os
import shutil
from pathlib import Path

import jax
import pytest

from flexmemory.cli import copy as command
from flexmemory.errors import UserError
from flexmemory.tkv import copy as copying
from flexmemory.tkv import verify
from flexmemory.tkv.copy import copy
from flexmemory.tkv.storage.location import LocalLocation
from flexmemory.tkv.storage.target import COPY_MARK
from flexmemory.tkv.store import open_store

from .making import make_store, tree_bytes

STORES = Path(__file__).parent / "stores"


@pytest.fixture
def source(mixed_store, tmp_path):
    shutil.copytree(mixed_store, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def other_store(mixed, tmp_path):
    cfg, params = mixed
    make_store(tmp_path / "other", cfg, params, dtype="bfloat16", shard_rows=128)
    return tmp_path / "other"


def flip(path, place=7):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def run(*args, **options):
    return copy(*args, progress=False, **options)


class Killed(BaseException):
    """In place of kill -9."""


def interrupted(source, out, writes, **options):
    rename, left = os.replace, [writes]

    def count(scratch, path):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        rename(scratch, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", count)
        with pytest.raises(Killed):
            run(source, out, **options)


@pytest.mark.parametrize("store", [path.name for path in sorted(STORES.iterdir()) if path.is_dir()])
def test_copy_is_equal(store, out):
    source = STORES / store
    made = run(source, out)
    bytes_of = tree_bytes(source)
    assert tree_bytes(out) == bytes_of
    assert made["files"] == len(bytes_of) == made["copied_files"] + 1
    assert (
        made["bytes"]
        == sum(map(len, bytes_of.values()))
        == made["copied_bytes"] + len(bytes_of["tkv.json"])
    )
    open_store(out)


def test_parts_of_large_files(source, out, monkeypatch):
    for size in (1000, 4096):  # the second divides some files' sizes
        monkeypatch.setattr(verify, "PART_BYTES", size)
        run(source, out / str(size), deep=True)
        assert tree_bytes(out / str(size)) == tree_bytes(source)


def test_every_damaged_file_is_refused(source, out):
    """One flipped bit in one file of each kind."""
    for name in (
        "backbone/model-00001-of-00001.safetensors",
        "checksums/w32/c/0",
        "checksums/w32/zarr.json",
        "rows/w48/c/4/0/0",
        "rows/w48/zarr.json",
        "tokenizer.json",
        "tkv.json",
    ):
        shutil.rmtree(out, ignore_errors=True)  # else what the last call has copied is trusted
        flip(source / name)
        with pytest.raises(
            UserError,
            match="tkv.json" if name == "tkv.json" else f"source/{name}: its checksum is wrong",
        ):
            run(source, out)
        assert not (out / "tkv.json").exists()
        flip(source / name)
    run(source, out)
    assert tree_bytes(out) == tree_bytes(source)


@pytest.mark.parametrize("name", ["rows/w48/c/1/0/0", "checksums/w48/zarr.json", "tokenizer.json"])
def test_missing_and_truncated_files_are_refused_before_anything_is_written(source, out, name):
    data = (source / name).read_bytes()
    (source / name).write_bytes(data[:-1])
    with pytest.raises(
        UserError, match=f"source/{name}: {len(data) - 1} bytes, {len(data)} expected"
    ):
        run(source, out)
    (source / name).unlink()
    with pytest.raises(UserError, match=f"source/{name}: missing"):
        run(source, out)
    assert not out.exists()


def test_no_store_at_the_source(tmp_path, out):
    with pytest.raises(UserError, match="no TKV store here"):
        run(tmp_path / "nowhere", out)
    assert not out.exists()


def test_again(source, out):
    run(source, out)
    made = run(source, out)
    assert (made["copied_files"], made["read_back"]) == (0, False)
    (out / "tokenizer.json").unlink()
    os.truncate(out / "rows/w48/c/0/0/0", 100)
    flip(out / "checksums/w48/c/0")
    made = run(source, out)
    assert made["copied_files"] == 2  # the flipped file has its size; that takes --deep
    made = run(source, out, deep=True)
    assert (made["copied_files"], made["read_back"]) == (1, True)
    assert tree_bytes(out) == tree_bytes(source)


def test_interrupted_anywhere(source, out):
    """Killed before its n-th rename: never taken for a store, and finished by the same call."""
    files = len(tree_bytes(source))
    for writes in (
        0,
        1,
        2,
        11,
        files,
        files + 1,
    ):  # the marker comes before them, and again before tkv.json
        shutil.rmtree(out, ignore_errors=True)
        interrupted(source, out, writes)
        assert not (out / "tkv.json").exists()
        with pytest.raises(UserError):
            open_store(out)
        made = run(source, out)
        assert made["copied_files"] == files - 1 - max(0, min(writes - 1, files - 1))
        assert tree_bytes(out) == tree_bytes(source)


def test_another_store_at_the_destination(source, other_store, out):
    run(other_store, out)
    before = tree_bytes(out)
    with pytest.raises(
        UserError,
        match="holds another store; give overwrite=True to replace it, or another destination",
    ):
        run(source, out)
    assert tree_bytes(out) == before
    run(source, out, overwrite=True)
    assert tree_bytes(out) == tree_bytes(source)  # and nothing of the other is left
    run(source, out, overwrite=True)
    assert tree_bytes(out) == tree_bytes(source)


def test_overwriting_is_interrupted(mixed, source, out, tmp_path):
    """Two stores whose files have the same names and sizes: none of the other's may be trusted,
    whenever the first copy was killed.
    """
    cfg, params = mixed
    make_store(tmp_path / "twin", cfg, jax.tree.map(lambda leaf: leaf * 1.5, params))
    ours, twins = tree_bytes(source), tree_bytes(tmp_path / "twin")
    assert {name: len(data) for name, data in ours.items() if name != "tkv.json"} == {
        name: len(data) for name, data in twins.items() if name != "tkv.json"
    }
    unlink = Path.unlink
    for deletions in (0, 1, 2, 12, len(ours) - 1):
        shutil.rmtree(out, ignore_errors=True)
        run(tmp_path / "twin", out)
        left = [deletions]

        def count(path, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            unlink(path, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                LocalLocation,
                "delete",
                lambda location, name: count(location.local / name, missing_ok=True),
            )
            with pytest.raises(Killed):
                run(source, out, overwrite=True)
        if (out / "tkv.json").exists():
            assert {name: data for name, data in tree_bytes(out).items() if name != COPY_MARK} in (
                twins,
                ours,
            )
        run(source, out, overwrite=True)
        assert tree_bytes(out) == ours


def replaced_only_with_overwrite(source, out, what):
    with pytest.raises(UserError, match=f"holds {what}; give overwrite=True"):
        run(source, out)
    run(source, out, overwrite=True)
    assert tree_bytes(out) == tree_bytes(source)


def test_unfinished_copy_of_another_store(source, other_store, out):
    interrupted(other_store, out, 6)
    replaced_only_with_overwrite(source, out, "an unfinished copy of another store")


def test_unfinished_export_at_the_destination(source, out):
    out.mkdir()
    (out / "tkv.partial.0.json").write_text("{}")
    replaced_only_with_overwrite(source, out, "an unfinished export")


def test_foreign_directory_is_left_alone(source, out):
    out.mkdir()
    (out / "thesis.tex").write_text("text")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds thesis\.tex and is no TKV store"):
            run(source, out, overwrite=overwrite)
    assert os.listdir(out) == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        run(source, out / "thesis.tex")


def test_onto_itself(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UserError, match="source and destination are the same place"):
        run(source, tmp_path / "link")


def test_two_copies_at_once(source, out, monkeypatch):
    def second(*_):
        with pytest.raises(UserError, match="another process"):
            run(source, out)
        raise Killed

    monkeypatch.setattr(copying, "_prepare", second)
    with pytest.raises(Killed):
        run(source, out)


def test_source_replaced_meanwhile(source, out, monkeypatch):
    copy_files = copying._copy_files

    def slowly(*args):
        (source / "tkv.json").write_bytes((source / "tkv.json").read_bytes() + b" ")
        return copy_files(*args)

    monkeypatch.setattr(copying, "_copy_files", slowly)
    with pytest.raises(UserError, match="source: was replaced while it was copied"):
        run(source, out)
    assert not (out / "tkv.json").exists() and (out / COPY_MARK).exists()
    with pytest.raises(
        UserError, match="an unfinished copy, not a store; run the same `flexmemory copy` again"
    ):
        open_store(out)


def test_disk_full(source, out, monkeypatch):
    usage = shutil.disk_usage
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
        with pytest.raises(
            UserError, match=r"bytes are to be written and the disk has 1,000 free; free some space"
        ):
            run(source, out)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            UserError,
            match=(
                r"cannot be written \(No space left on device\); free some space and run the same"
                r" command again"
            ),
        ):
            run(source, out)
    run(source, out)
    assert tree_bytes(out) == tree_bytes(source)


def test_written_wrong(source, out, monkeypatch):
    """A disk that changes what it is given: found by ``deep`` alone."""
    rename = os.replace

    def change(scratch, path):
        if Path(path).name == "tokenizer.json":
            flip(Path(scratch))
        rename(scratch, path)

    monkeypatch.setattr(os, "replace", change)
    with pytest.raises(
        UserError,
        match=(
            r"tokenizer\.json: reads back other than it was written; check the disk and copy again"
        ),
    ):
        run(source, out, deep=True)
    assert not (out / "tkv.json").exists()


def test_command(source, out, capsys):
    assert command.run([str(source), str(out)]) == 0
    files = len(tree_bytes(source))
    assert (
        f"{out}: {files} files, " in (first := capsys.readouterr().out)
        and f"{files - 1} copied and verified (" in first
    )
    assert command.run([str(source), str(out)]) == 0
    assert (
        f"{files - 1} were there already, by size; --deep reads them; " in capsys.readouterr().out
    )
    assert command.run([str(source), str(out), "--deep"]) == 0
    assert f"{files - 1} were there already, read and verified; " in capsys.readouterr().out
