"""Export: interrupted at any point it is no store, and the same call again ends in the same bytes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest

from flexmemory.errors import UserError
from flexmemory.tkv import export as export_module
from flexmemory.tkv import format
from flexmemory.files import is_disk_full
from flexmemory.tkv.export import check_options
from flexmemory.tkv.store import open_store

from .making import MIXED, SHARD, VOCAB, config, make_store, params, tree_bytes

EXPORT_AND_STOP = textwrap.dedent("""
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from tkv.making import config, make_store, params
    from flexmemory.tkv import backbone, export, format

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    point = {point!r}
    if point == "first block":
        format.bundle_crc32 = die  # the rows of one group are being written
    elif point == "second block":
        record, calls = export._record, []
        export._record = lambda *a: (calls.append(a), die() if a[2] == 2 else record(*a))
    elif point == "backbone":
        backbone.safetensors.save = die
    elif point == "before the rename":
        replace = os.replace
        os.replace = lambda a, b: die() if str(b).endswith("tkv.json") else replace(a, b)
    elif point == "after the rename":
        unlink = Path.unlink
        Path.unlink = lambda path, **k: die() if path.name == "tkv.partial.json" else unlink(path, **k)
    cfg = config("flex stem")
    make_store(Path({out!r}), cfg, params(cfg))
""")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(Config, params, the bytes of its store) of what the killed processes export."""
    cfg = config("flex stem")
    make_store(out := tmp_path_factory.mktemp("small") / "s", cfg, weights := params(cfg))
    return cfg, weights, tree_bytes(out)


@pytest.mark.parametrize("point,done", [
    ("first block", 0), ("second block", 1), ("backbone", 5), ("before the rename", 5), ("after the rename", None)])
def test_killed_export_is_no_store_and_is_finished_by_the_same_call(point, done, small, tmp_path):
    out = tmp_path / "s"
    script = EXPORT_AND_STOP.format(tests=os.path.dirname(os.path.dirname(__file__)), point=point, out=str(out))
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert found.returncode == -signal.SIGKILL, found.stderr
    if point == "after the rename":
        open_store(out)
    else:
        assert json.loads((out / "tkv.partial.json").read_text())["blocks_done"] == done
        with pytest.raises(UserError, match="unfinished export.*again to finish"):
            open_store(out)
    made = make_store(out, *small[:2])
    assert made["complete_before"] == (point == "after the rename")
    assert made["resumed_rows"] == min(VOCAB, (5 if done is None else done) * SHARD)
    assert tree_bytes(out) == small[2]


@pytest.mark.parametrize("leftover", ["tkv.partial.json", "tkv.partial.json.tmp"])
def test_what_a_kill_left_beside_a_whole_store_is_swept_up(small, tmp_path, leftover):
    make_store(tmp_path / "s", *small[:2])
    (tmp_path / "s" / leftover).write_text("{")
    assert make_store(tmp_path / "s", *small[:2])["complete_before"]
    assert tree_bytes(tmp_path / "s") == small[2]


def test_export_killed_at_any_time_is_finished_by_the_same_call(small, tmp_path):
    out = tmp_path / "s"
    script = EXPORT_AND_STOP.format(tests=os.path.dirname(os.path.dirname(__file__)), point="", out=str(out)).replace(
        "make_store(Path", "print('go', flush=True)\nfor _ in range(200): make_store(Path", 1).replace(
        "params(cfg))\n", "params(cfg), overwrite=True)\n")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    process.stdout.readline()
    time.sleep(1.3)
    process.kill()
    process.wait()
    try:
        open_store(out)
        whole = True
    except UserError as error:
        assert "unfinished export" in str(error) or not out.exists()
        whole = False
    assert make_store(out, *small[:2])["complete_before"] == whole
    assert tree_bytes(out) == small[2]


def test_a_second_export_does_nothing(mixed, tmp_path):
    make_store(tmp_path / "s", *mixed)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*")}
    assert make_store(tmp_path / "s", *mixed)["complete_before"]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*")} == before


def test_another_source_needs_overwrite(mixed, tmp_path):
    cfg, weights = mixed
    make_store(tmp_path / "s", cfg, weights)
    for options in (dict(dtype="bfloat16"), dict(block_rows=32)):
        with pytest.raises(UserError, match="another run, step or dtype; give --overwrite"):
            make_store(tmp_path / "s", cfg, weights, **options)
    with pytest.raises(UserError, match="give --overwrite"):
        make_store(tmp_path / "s", cfg, params(cfg, seed=1))
    assert not make_store(tmp_path / "s", cfg, weights, dtype="bfloat16", overwrite=True)["complete_before"]
    assert open_store(tmp_path / "s").manifest.dtype == "bfloat16"
    assert make_store(tmp_path / "s", cfg, weights, dtype="bfloat16", overwrite=True)["rows_per_s"] > 0


def test_unfinished_export_of_another_source_needs_overwrite(mixed, mixed_store, tmp_path, monkeypatch):
    cfg, weights = mixed
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "publish", _raise(RuntimeError("stopped")))
        with pytest.raises(RuntimeError):
            make_store(tmp_path / "s", cfg, params(cfg, seed=1))
    with pytest.raises(UserError, match="unfinished export of another run.*--overwrite"):
        make_store(tmp_path / "s", cfg, weights)
    make_store(tmp_path / "s", cfg, weights, overwrite=True)
    assert tree_bytes(tmp_path / "s") == tree_bytes(mixed_store)


def test_overwrite_spares_foreign_files(mixed, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not empty and no TKV store"):
            make_store(tmp_path / "s", *mixed, overwrite=overwrite)
    assert (tmp_path / "s" / "thesis.tex").read_text() == "years of work"
    with pytest.raises(UserError, match="is a file"):
        make_store(tmp_path / "s" / "thesis.tex", *mixed)
    with pytest.raises(UserError, match="cannot be written"):
        make_store(tmp_path / "s" / "thesis.tex" / "s", *mixed)


def test_too_little_space_is_said_before_the_work(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs \d\d\d,\d\d\d bytes and its disk has 1,000; free some and run the same command again"):
        make_store(tmp_path / "s", *mixed)


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    ValueError('RESOURCE_EXHAUSTED: Error writing local file "x": Failed to write 9 bytes to file 6: No space left on device [os_error_code=\'28\']')])
def test_disk_full_in_the_middle_is_resumable(error, mixed, mixed_store, tmp_path, monkeypatch):
    assert is_disk_full(error)
    record = export_module._record
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "_record", lambda *a: _raise(error)() if a[2] == 3 else record(*a))
        with pytest.raises(UserError, match="bytes and its disk has.*run the same command again"):
            make_store(tmp_path / "s", *mixed)
    assert make_store(tmp_path / "s", *mixed)["resumed_rows"] == 2 * SHARD
    assert tree_bytes(tmp_path / "s") == tree_bytes(mixed_store)


def test_other_errors_are_not_disguised(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "publish", _raise(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        make_store(tmp_path / "s", *mixed)


def test_a_lost_shard_stops_publication(mixed, tmp_path, monkeypatch):
    publish = export_module.publish
    monkeypatch.setattr(export_module, "publish", lambda out, *a: ((out / "rows/w32/c/1/0/0").unlink(), publish(out, *a)))
    with pytest.raises(UserError, match="rows/w32/c/1/0/0: missing"):
        make_store(tmp_path / "s", *mixed)
    assert not (tmp_path / "s" / "tkv.json").exists()


def test_leftovers_of_killed_writes_do_not_reach_the_store(mixed, mixed_store, tmp_path, monkeypatch):
    publish = export_module.publish

    def leave_one(out, *rest):
        (out / "rows/w32/c/1/0/0.__lock").write_bytes(b"half")
        publish(out, *rest)

    monkeypatch.setattr(export_module, "publish", leave_one)
    make_store(tmp_path / "s", *mixed)
    assert tree_bytes(tmp_path / "s") == tree_bytes(mixed_store)


def test_bad_options():
    with pytest.raises(UserError, match="--dtype: 'int3'"):
        check_options("int3", None)
    for rows in (0, 3, -4):
        with pytest.raises(UserError, match=f"--block_rows: {rows}"):
            check_options("float32", rows)


def test_vocabulary_below_the_tokenizers(tmp_path):
    cfg = config(MIXED, vocab_size=100)
    with pytest.raises(UserError, match="tokenizer: 257 ids, the model has 100"):
        make_store(tmp_path / "s", cfg, params(cfg))
    assert not (tmp_path / "s").exists()


def test_memory_is_a_block_whatever_the_vocabulary(mixed, tmp_path, monkeypatch):
    seen = []
    fold_range = export_module.fold_range

    def watch(params, start, stop, **options):
        seen.append(stop - start)
        return fold_range(params, start, stop, **options)

    monkeypatch.setattr(export_module, "fold_range", watch)
    make_store(tmp_path / "s", *mixed)
    assert seen == [SHARD] * 4 + [VOCAB - 4 * SHARD]
    assert format.read_manifest(tmp_path / "s").blocks == 5


def _raise(error):
    def call(*args, **kwargs):
        raise error

    return call
