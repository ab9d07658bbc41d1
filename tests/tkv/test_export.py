"""Export: interrupted at any point it is no store, and the same call again ends in the same bytes,
on one host or several.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from flexmemory.bench.export import measure
from flexmemory.errors import UserError
from flexmemory.tkv import export as export_module
from flexmemory.tkv import fold, format
from flexmemory.tkv.export import RowFormat, Writer, check_options, read_counts
from flexmemory.tkv.storage import target
from flexmemory.tkv.storage.location import LocalLocation, open_location
from flexmemory.tkv.store import open_store

from .making import MIXED, SHARD, VOCAB, config, make_store, params, tree_bytes

SMALL = dict(dtype="int8", rank=0.5)  # has a basis, which is written before the rows
SCRIPT = textwrap.dedent("""
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from tkv.making import config, make_store, params
    from flexmemory.tkv import backbone, export, format, lowrank
    from flexmemory.tkv.storage import target

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    point = {point!r}
    target.RECORD_SECONDS = 0  # every block at once
    if point == "bases":
        lowrank.find_bases = die
    elif point == "first block":
        format.bundle_crc32 = die  # the rows of one group are being written
    elif point == "third block":
        add = target.Record.add
        target.Record.add = lambda record, k, *a: die() if k == 2 else add(record, k, *a)
    elif point == "backbone":
        backbone.save = die
    elif point == "before the rename":
        replace = os.replace
        os.replace = lambda a, b: die() if str(b).endswith("tkv.json") else replace(a, b)
    elif point == "after the rename":
        target.sweep = die
    cfg = config("flex stem")
    make_store(Path({out!r}), cfg, params(cfg), **{options!r})
""")


def script(out, point="", **options) -> str:
    return SCRIPT.format(
        tests=os.path.dirname(os.path.dirname(__file__)),
        point=point,
        out=str(out),
        options=SMALL | options,
    )


def run_script(text) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(Config, params, the bytes of its store) of what the other processes export."""
    cfg = config("flex stem")
    make_store(out := tmp_path_factory.mktemp("small") / "s", cfg, weights := params(cfg), **SMALL)
    return cfg, weights, tree_bytes(out)


@pytest.mark.parametrize(
    "point,done",
    [
        ("bases", 0),
        ("first block", 0),
        ("third block", 2),
        ("backbone", 0),
        ("before the rename", 5),
        ("after the rename", None),
    ],
)
def test_killed_export_is_no_store_and_is_finished_by_the_same_call(point, done, small, tmp_path):
    out = tmp_path / "s"
    process = run_script(script(out, point))
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    if point == "after the rename":
        open_store(out)
    else:
        record = json.loads((out / "tkv.partial.0.json").read_text())
        assert len(record["shards"]) == done and record["ready"] == (point != "bases")
        with pytest.raises(UserError, match="unfinished export.*again to finish"):
            open_store(out)
    made = make_store(out, *small[:2], **SMALL)
    assert made["complete_before"] == (point == "after the rename")
    assert made["resumed_rows"] == min(VOCAB, (5 if done is None else done) * SHARD)
    assert tree_bytes(out) == small[2]


def test_export_killed_at_any_time_is_finished_by_the_same_call(small, tmp_path):
    out = tmp_path / "s"
    text = script(out, overwrite=True).replace(
        "make_store(Path", "print('go', flush=True)\nfor _ in range(200): make_store(Path", 1
    )
    process = run_script(text)
    process.stdout.readline()
    time.sleep(1.3)
    process.kill()
    process.wait()
    try:
        open_store(out)
        whole = True
    except UserError as error:
        assert (
            "unfinished export" in str(error) or "no TKV store" in str(error) and not out.exists()
        )
        whole = False
    assert make_store(out, *small[:2], **SMALL)["complete_before"] == whole
    assert tree_bytes(out) == small[2]


@pytest.mark.parametrize(
    "leftover",
    ["tkv.partial.0.json", "tkv.partial.1.json", "tkv.partial.0.json.tmp", "rows/w32/c/0/0.tmp"],
)
def test_what_a_kill_left_beside_a_whole_store_is_swept_up(leftover, small, tmp_path):
    make_store(tmp_path / "s", *small[:2], **SMALL)
    (tmp_path / "s" / leftover).write_text("{")
    assert make_store(tmp_path / "s", *small[:2], **SMALL)["complete_before"]
    assert tree_bytes(tmp_path / "s") == small[2]


def test_two_processes_write_the_bytes_of_one(small, tmp_path):
    out = tmp_path / "s"
    processes = [
        run_script(script(out, host=host, hosts=2)) for host in (1, 0)
    ]  # whoever comes first waits
    try:
        for process in processes:
            assert process.wait(60) == 0, process.stderr.read()
    finally:
        for process in processes:
            process.kill()
    assert tree_bytes(out) == small[2]


def test_a_host_writes_its_own_blocks_and_any_number_of_hosts_goes_on(small, tmp_path, monkeypatch):
    """Host 1 of 2 finishes and host 0 dies; then one host alone does what is missing."""
    monkeypatch.setattr(target, "POLL_SECONDS", 0.01)
    written, stop = [], RuntimeError("stopped")
    write = Writer.write
    monkeypatch.setattr(Writer, "write", lambda *a: (written.append(a[2]), write(*a))[1])
    first = {}
    other = threading.Thread(
        target=lambda: first.update(
            make_store(tmp_path / "s", *small[:2], host=1, hosts=2, **SMALL)
        )
    )
    other.start()
    with monkeypatch.context() as patch:
        patch.setattr(target, "wait_for_hosts", _raise(stop))
        with pytest.raises(RuntimeError):
            make_store(tmp_path / "s", *small[:2], host=0, hosts=2, **SMALL)
    other.join()
    assert sorted(written) == sorted([0, 1, 2, 3, 4] * 2)  # two groups
    assert first["resumed_rows"] == 0 and not first["complete_before"]
    assert {
        name: set(json.loads((tmp_path / "s" / name).read_text())["shards"])
        for name in ("tkv.partial.0.json", "tkv.partial.1.json")
    } == {"tkv.partial.0.json": {"0", "2", "4"}, "tkv.partial.1.json": {"1", "3"}}
    (tmp_path / "s" / "rows/w32/c/1/0").unlink()  # and a block has lost a file
    written.clear()
    assert make_store(tmp_path / "s", *small[:2], **SMALL)["resumed_rows"] == VOCAB - SHARD
    assert written == [1, 1] and tree_bytes(tmp_path / "s") == small[2]


def test_a_host_refuses_to_join_another_export(small, tmp_path, monkeypatch):
    cfg, weights, _ = small
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "_publish", _raise(RuntimeError("stopped")))
        with pytest.raises(RuntimeError):
            make_store(tmp_path / "s", cfg, weights)
    with pytest.raises(
        UserError,
        match="host 0 exports another run, step or dtype there; give every host the same options",
    ):
        make_store(tmp_path / "s", cfg, weights, host=1, hosts=2, **SMALL)


def test_a_second_exporter_is_sent_away(small, tmp_path):
    with target.held(open_location(tmp_path / "s"), 0):
        with pytest.raises(UserError, match="another process writes there; wait for it"):
            make_store(tmp_path / "s", *small[:2], **SMALL)
    make_store(tmp_path / "s", *small[:2], **SMALL)  # a lock that nobody holds means nothing
    assert tree_bytes(tmp_path / "s") == small[2]


def test_a_second_export_does_nothing(mixed, tmp_path):
    first = make_store(tmp_path / "s", *mixed, dtype="int8")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*")}
    second = make_store(tmp_path / "s", *mixed, dtype="int8")
    assert (
        second["complete_before"]
        and second["layers"] == first["layers"]
        and second["layers"][0]["relative_rms"] > 0
    )
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*")} == before


def test_another_source_needs_overwrite(mixed, tmp_path):
    cfg, weights = mixed
    make_store(tmp_path / "s", cfg, weights)
    for options in (
        dict(dtype="bfloat16"),
        dict(shard_rows=32),
        dict(rank=0.5),
        dict(rank_error=0.5),
        dict(dtype="int8", scale_group=4),
    ):
        with pytest.raises(UserError, match="another run, step or dtype; give overwrite=True"):
            make_store(tmp_path / "s", cfg, weights, **options)
    with pytest.raises(UserError, match="give overwrite=True"):
        make_store(tmp_path / "s", cfg, params(cfg, seed=1))


def test_overwrite_by_another_layout(small, tmp_path):
    """Plain and encoded rows give one name to a directory and to a file."""
    cfg, weights, encoded = small
    make_store(tmp_path / "plain", cfg, weights)
    for options, want in ((SMALL, encoded), ({}, tree_bytes(tmp_path / "plain")), (SMALL, encoded)):
        assert not make_store(tmp_path / "s", cfg, weights, **options, overwrite=True)[
            "complete_before"
        ]
        assert make_store(tmp_path / "s", cfg, weights, **options)["complete_before"]
        assert tree_bytes(tmp_path / "s") == want


def test_unfinished_export_of_another_source_needs_overwrite(
    mixed, mixed_store, tmp_path, monkeypatch
):
    cfg, weights = mixed
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "_publish", _raise(RuntimeError("stopped")))
        with pytest.raises(RuntimeError):
            make_store(tmp_path / "s", cfg, params(cfg, seed=1))
    with pytest.raises(UserError, match="unfinished export of another run.*overwrite=True"):
        make_store(tmp_path / "s", cfg, weights)
    make_store(tmp_path / "s", cfg, weights, overwrite=True)
    assert tree_bytes(tmp_path / "s") == tree_bytes(mixed_store)


def test_overwrite_mends_a_damaged_store(small, tmp_path):
    make_store(tmp_path / "s", *small[:2], **SMALL)
    (tmp_path / "s" / "tkv.json").write_text("{")
    (tmp_path / "s" / "rows/w32/c/1/0").write_bytes(b"")
    with pytest.raises(UserError, match="tkv.json: not a readable JSON file"):
        make_store(tmp_path / "s", *small[:2], **SMALL)
    make_store(tmp_path / "s", *small[:2], **SMALL, overwrite=True)
    assert tree_bytes(tmp_path / "s") == small[2]


def test_overwrite_spares_foreign_files(mixed, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not empty and no TKV store .it has thesis.tex."):
            make_store(tmp_path / "s", *mixed, overwrite=overwrite)
    assert tree_bytes(tmp_path / "s") == {"thesis.tex": b"years of work"}
    with pytest.raises(UserError, match="is a file"):
        make_store(tmp_path / "s" / "thesis.tex", *mixed)
    with pytest.raises(UserError, match="cannot be written"):
        make_store(tmp_path / "s" / "thesis.tex" / "s", *mixed)


def test_too_little_space_is_said_before_the_work(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        UserError,
        match=(
            r"^out: .*: \d\d\d,\d\d\d bytes are to be written and the disk has 1,000 free;"
            r" free some and run the same command again"
        ),
    ):
        make_store(tmp_path / "s", *mixed)


@pytest.mark.parametrize(
    "number,message",
    [
        (28, "free some space and run the same command again"),
        (13, "check the permissions"),
        (5, "check the disk and run the same command again"),
    ],
)
def test_an_error_of_the_disk_is_one_line_and_the_export_goes_on_later(
    number, message, mixed, mixed_store, tmp_path, monkeypatch
):
    replace = os.replace

    def fail(scratch, path):
        if str(path).endswith("rows/w48/c/3/0/0"):
            raise OSError(number, os.strerror(number))
        replace(scratch, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(UserError, match=f"rows/w48/c/3/0/0: cannot be written .*{message}"):
            make_store(tmp_path / "s", *mixed)
    assert (
        make_store(tmp_path / "s", *mixed)["resumed_rows"] == VOCAB - SHARD
    )  # what was in flight has arrived
    assert tree_bytes(tmp_path / "s") == tree_bytes(mixed_store)


def test_other_errors_are_not_disguised(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_publish", _raise(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        make_store(tmp_path / "s", *mixed)


def test_a_lost_shard_stops_publication(mixed, mixed_store, tmp_path, monkeypatch):
    publish = export_module._publish
    with monkeypatch.context() as patch:
        patch.setattr(
            export_module,
            "_publish",
            lambda *a: ((tmp_path / "s/rows/w32/c/1/0/0").unlink(), publish(*a)),
        )
        with pytest.raises(
            UserError,
            match="rows/w32/c/1/0/0: missing although it was written; run the same command again",
        ):
            make_store(tmp_path / "s", *mixed)
    assert not (tmp_path / "s" / "tkv.json").exists()
    make_store(tmp_path / "s", *mixed)
    assert tree_bytes(tmp_path / "s") == tree_bytes(mixed_store)


def test_a_record_that_cannot_be_read_is_said(mixed, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "tkv.partial.0.json").write_text('{"identity": 3')
    with pytest.raises(UserError, match="tkv.partial.0.json: not readable .*delete it"):
        make_store(tmp_path / "s", *mixed)


def test_records_are_not_written_for_every_block(mixed, tmp_path, monkeypatch):
    writes, write_parts = [], LocalLocation.write_parts
    monkeypatch.setattr(
        LocalLocation,
        "write_parts",
        lambda self, name, parts: (writes.append(name), write_parts(self, name, parts)),
    )
    make_store(tmp_path / "s", *mixed, shard_rows=1)
    assert len([name for name in writes if "/c/" in name and name.startswith("rows/")]) == 2 * VOCAB
    assert len([name for name in writes if name.startswith("tkv.partial")]) < VOCAB / 4
    assert writes[-1] == "tkv.json"


def test_bad_options():
    with pytest.raises(UserError, match="^dtype: 'int3'"):
        check_options(RowFormat(dtype="int3"))
    for rows in (0, 3, -4):
        with pytest.raises(UserError, match=f"^shard_rows: {rows}"):
            check_options(RowFormat(shard_rows=rows))
    for host, hosts in ((0, None), (None, 2), (2, 2), (-1, 2)):
        with pytest.raises(UserError, match="^host, hosts"):
            check_options(RowFormat(), host, hosts)


def test_vocabulary_below_the_tokenizers(tmp_path):
    cfg = config(MIXED, vocab_size=100)
    with pytest.raises(UserError, match="tokenizer: 257 ids, the model has 100"):
        make_store(tmp_path / "s", cfg, params(cfg))
    assert not (tmp_path / "s").exists()


def test_memory_is_some_blocks_whatever_the_vocabulary(mixed, tmp_path, monkeypatch):
    """Blocks that are started and not yet on the disk: one computed, one fetched, those that are
    written.
    """
    started, written, most = [], [], []
    start_shard, write_shard = fold.start_shard, Writer.write

    def start(params, bases, start, stop, **options):
        started.append(stop - start)
        most.append(len(started) - len(written) // 2)
        return start_shard(params, bases, start, stop, **options)

    def write(*args):
        time.sleep(0.01)  # the disk is slower than the fold
        made = write_shard(*args)
        written.append(args[2])
        return made

    monkeypatch.setattr(fold, "start_shard", start)
    monkeypatch.setattr(Writer, "write", write)
    make_store(tmp_path / "s", *mixed, shard_rows=16)
    assert started == [16] * 16 + [4] and len(written) == 2 * 17
    assert 1 < max(most) <= export_module.WRITING + 2


def test_blocks_that_arrive_after_another_has_failed_are_recorded(tmp_path, monkeypatch):
    cfg = config("stem stem-gate")
    weights, write_shard = params(cfg), Writer.write

    def write(*args):
        if args[2] == 1:
            raise UserError("no")
        time.sleep(0.1)
        return write_shard(*args)

    monkeypatch.setattr(Writer, "write", write)
    with pytest.raises(UserError, match="^no$"):
        make_store(tmp_path / "s", cfg, weights, shard_rows=64)
    known = json.loads((tmp_path / "s" / target.partial_file(0)).read_text())
    assert set(known["shards"]) == {"0", "2", "3", "4"}
    monkeypatch.undo()
    assert make_store(tmp_path / "s", cfg, weights, shard_rows=64)["resumed_rows"] == VOCAB - 64


@pytest.mark.parametrize(
    "value,dtype",
    [
        (np.nan, "float32"),
        (np.inf, "int8"),
        (7e4, "float16"),
        (-np.inf, "bfloat16"),
        (1e25, "int4"),
    ],
)
def test_rows_that_are_not_finite(value, dtype, tmp_path):
    cfg = config("dense stem flex stem")
    weights = params(cfg)
    weights["memory"]["stacks"]["stack0"]["table"][1, 130, 5] = value
    with pytest.raises(
        UserError,
        match=f"layer 3: its rows of tokens 128 to 191 are not all finite in dtype {dtype}",
    ):
        make_store(tmp_path / "s", cfg, weights, dtype=dtype)
    with pytest.raises(UserError, match="unfinished export"):
        open_store(tmp_path / "s")


@pytest.mark.parametrize(
    "rows",
    [dict(dtype="bfloat16"), dict(dtype="int4", scale_group=8), dict(dtype="int8", rank=0.5)],
    ids=str,
)
def test_the_errors_of_the_manifest_are_those_of_the_rows(rows, mixed, mixed_store, tmp_path):
    make_store(tmp_path / "s", *mixed, **rows)
    store, exact = open_store(tmp_path / "s"), open_store(mixed_store).read_rows(np.arange(VOCAB))
    found = store.read_rows(np.arange(VOCAB))
    errors = {error.layer: error for error in store.manifest.errors}
    assert sorted(errors) == [2, 3, 4, 5, 6, 7, 9]
    for group in store.groups:
        for place, layer in enumerate(group.layers):
            want = exact[group.name][:, place].astype(np.float64)
            off = found[group.name][:, place].astype(np.float64) - want
            assert errors[layer].relative_rms == pytest.approx(
                np.linalg.norm(off) / np.linalg.norm(want), rel=1e-4
            )
            assert errors[layer].max_abs == pytest.approx(np.abs(off).max(), rel=1e-5)


def test_sizes_say_what_the_table_costs(mixed, tmp_path):
    made = make_store(tmp_path / "s", *mixed, dtype="int4", rank=0.5)
    assert (
        made["table_bytes"]
        == VOCAB * (3 * (8 + 4) + 4 * (12 + 4))
        == sum(layer["bytes"] for layer in made["layers"])
    )
    assert made["float32_bytes"] == VOCAB * (3 * 32 + 4 * 48) * 4 == 2 * made["bfloat16_bytes"]
    assert made["basis_bytes"] == 4 * (3 * 16 * 32 + 4 * 24 * 48)
    assert json.loads(json.dumps(made))["layers"] == made["layers"]
    store = open_store(tmp_path / "s")
    assert format.expected_files(store.manifest)["rows/w32/c/0/0"] == SHARD * 36 + 16 * SHARD + 4


def test_the_benchmark_of_an_export(tmp_path):
    report = measure(tmp_path, "smoke", rounds=1)
    made = report["models"]["computed"]
    assert made["table_bytes"] == 1024 * 2 * 64 * 4 and set(made["seconds"]) == {
        "fold",
        "write",
        "direct",
        "export",
    }
    seconds = made["seconds"]
    assert (
        made["share"]
        == max(seconds["fold"][0], min(seconds["write"] + seconds["direct"])) / seconds["export"][0]
    )
    assert json.loads(json.dumps(report)) == report and not list(tmp_path.iterdir())


def test_counts_that_do_not_fit_are_left_out(mixed, tmp_path):
    cfg = dataclasses.replace(mixed[0], data=dataclasses.replace(mixed[0].data, path=str(tmp_path)))
    assert read_counts(cfg) is None
    for content, found in ((np.ones(VOCAB, np.uint64), VOCAB), (np.ones(9, np.uint64), None)):
        np.save(tmp_path / "train_counts.npy", content)
        counts_V = read_counts(cfg)
        assert (counts_V is None) if found is None else counts_V.sum() == found
    (tmp_path / "train_counts.npy").write_bytes(b"no")
    with pytest.raises(UserError, match="train_counts.npy: not readable"):
        read_counts(cfg)


def _raise(error):
    def call(*args, **kwargs):
        raise error

    return call
