"""Learned rows that are copied are the rows of the fold, bit for bit, and so are the bytes around
them those of the libraries.
"""

import contextlib
import gc
import math
import os
import re
import threading
import time

import jax
import numpy as np
import pytest
import tensorstore as ts
from safetensors import numpy as safetensors

from flexmemory import files
from flexmemory.errors import UserError
from flexmemory.files import PAGE
from flexmemory.models.blocks import KINDS
from flexmemory.run_folder import load_params
from flexmemory.tkv import arrays, backbone, fold, format
from flexmemory.tkv import export as export_module
from flexmemory.tkv.encoding import Layout
from flexmemory.tkv.export import RowFormat, Writer, export
from flexmemory.tkv.format import TokenizerInfo
from flexmemory.tkv.manifest import read_manifest
from flexmemory.tkv.storage.location import open_location
from flexmemory.train.loop import train

from .making import MIXED, SHARD, VOCAB, config, make_store, params, tree_bytes

TABLES = " ".join(  # kinds whose learned rows have one width, in one group
    kind
    for kind, block in KINDS.items()
    if (spec := block.spec(config(kind).model, 0)).learned and spec.row_width == 48
)
FOLD_ROWS = 32


def copied_groups(pattern, dtype="float32", **settings):
    """(names of the groups that are copied, of all groups)"""
    cfg = config(pattern, **settings).model
    groups = format.model_groups(cfg, dtype, SHARD)
    return sorted(fold.learned_tables(params(config(pattern, **settings)), cfg, groups)), sorted(
        group.name for group in groups
    )


@pytest.mark.parametrize("copy_bytes", [1, 3000, 1 << 20])  # a row, some rows, all of a call
@pytest.mark.parametrize("pattern", [*TABLES.split(), f"{TABLES} stem memoryllm {TABLES}", MIXED])
def test_copied_bundles_are_those_of_the_fold(pattern, copy_bytes, monkeypatch):
    monkeypatch.setattr(fold, "COPY_BYTES", copy_bytes)
    cfg, weights = config(pattern), params(config(pattern))
    odd = np.asarray([-0.0, 1e-45, -1e-40, np.finfo(np.float32).max], np.float32)
    for stack in weights["memory"]["stacks"].values():
        if "table" in stack:
            stack["table"][:, 7, :4] = odd
    groups = format.model_groups(cfg.model, "float32", SHARD)
    tables = fold.learned_tables(weights, cfg.model, groups)
    assert list(tables) == ["w48"]
    (group,) = (group for group in groups if group.name in tables)
    bases, (memory_N,) = {group.name: () for group in groups}, fold.copy_memory(groups, 1)
    for start, want in fold.fold_table(
        weights, bases, cfg=cfg.model, groups=groups, fold_rows=FOLD_ROWS, shard_rows=SHARD
    ):
        stop = min(start + SHARD, VOCAB)
        copied = [
            bundles_RB.copy()
            for bundles_RB in fold.copy_shard(
                tables[group.name], group, start, stop, FOLD_ROWS, memory_N
            )
        ]
        np.testing.assert_array_equal(np.concatenate(copied), want[group.name])


def test_only_rows_that_are_stored_as_they_are_learned_are_copied():
    assert copied_groups("stem*2 flex") == (["w48"], ["w32", "w48"])
    assert copied_groups("memoryllm flex") == ([], ["w32"])
    assert copied_groups("stem flex", d_ff=32, beta="4") == (
        [],
        ["w32"],
    )  # tables and FFNs of one width
    assert (
        copied_groups("stem*2", dtype="bfloat16")[0]
        == copied_groups("stem*2", dtype="int8")[0]
        == []
    )
    assert copied_groups("stem*2", compute_dtype="bfloat16")[0] == []  # which rounds a row
    cfg = config("stem*2").model
    assert not fold.learned_tables(
        params(config("stem*2")), cfg, format.model_groups(cfg, "float32", SHARD, ranks=(8, 8))
    )
    assert Layout(2, 48, "float32").exact and not Layout(2, 48, "float32", 0, (8, 8)).exact


@pytest.mark.parametrize("pattern", ["stem*3", "stem stem-gate stem-dagger"])
def test_a_copied_row_that_is_not_finite_is_named_as_the_fold_names_it(
    pattern, tmp_path, monkeypatch
):
    """The first layer of the call, though its bad row is in a later piece."""
    monkeypatch.setattr(fold, "COPY_BYTES", 1)
    cfg, weights = config(pattern), params(config(pattern))
    tables = fold.learned_tables(
        weights, cfg.model, groups := format.model_groups(cfg.model, "float32", SHARD)
    )["w48"]
    tables[2][64 + 3, 5], tables[1][64 + 9, 0] = np.nan, -np.inf
    bases, call = (
        {"w48": ()},
        dict(cfg=cfg.model, layouts=fold.layouts_of(groups), fold_rows=FOLD_ROWS),
    )
    with pytest.raises(UserError) as folded:
        fold.fetch_shard(fold.start_shard(weights, bases, 64, 128, **call), groups)
    with pytest.raises(UserError) as copied:
        list(fold.copy_shard(tables, groups[0], 64, 128, FOLD_ROWS, *fold.copy_memory(groups, 1)))
    assert str(copied.value) == str(
        folded.value
    ) and "layer 1: its rows of tokens 64 to 95 are not all finite" in str(copied.value)
    with pytest.raises(
        UserError, match="layer 1: its rows of tokens 64 to 127 are not all finite in dtype float32"
    ):
        make_store(tmp_path / "s", cfg, weights)
    assert not (tmp_path / "s" / "rows/w48/c/1").is_dir() or not any(
        (tmp_path / "s" / "rows/w48/c/1").rglob("*.tmp")
    )


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_shard_is_what_tensorstore_writes(dtype, mixed, tmp_path):
    make_store(tmp_path / "s", *mixed, dtype=dtype)
    manifest = read_manifest(open_location(tmp_path / "s"))
    for group in manifest.groups:
        spec = format.rows_spec(
            open_location(tmp_path / "s").spec(f"rows/{group.name}"), manifest, group
        )
        rows = ts.open(spec, open=True, read=True).result().read().result()
        again = ts.open(
            format.rows_spec(arrays.MEMORY, manifest, group), create=True, context=ts.Context()
        ).result()
        again.write(rows).result()
        for block in (0, group.shards - 1):
            found = (tmp_path / "s" / format.shard_file(group, block)).read_bytes()
            assert found == again.kvstore.read(format.shard_key(group, block)).result().value


def test_a_safetensors_file_is_what_its_library_writes(mixed, tmp_path):
    content = backbone.tensors(mixed[1], mixed[0].model) | {
        "layers.10.x": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float32),
    }
    file = backbone.save_tensors(open_location(tmp_path), "f.safetensors", content)
    want = safetensors.save(
        {name: np.ascontiguousarray(array, np.float32) for name, array in content.items()}
    )
    assert (tmp_path / "f.safetensors").read_bytes() == want and file.bytes == len(want)


@pytest.mark.parametrize("fails", [False, True])
def test_a_piece_of_memory_is_one_shards_until_it_is_written_or_has_failed(fails, monkeypatch):
    cfg = config("stem stem-gate")
    weights, manifest = (
        params(cfg),
        export_module.draft(cfg, RowFormat(shard_rows=SHARD), TokenizerInfo("", 0, 1), "", 0, 0),
    )
    (group,) = manifest.groups
    tables = fold.learned_tables(weights, cfg.model, manifest.groups)
    monkeypatch.setattr(export_module, "COPYING", 1)
    writer = Writer(open_location("nowhere"), manifest, tables)
    memory_N = writer._free.get()
    writer._free.put(memory_N)

    def write(*args):
        *_, parts = args
        assert all(np.shares_memory(part, memory_N) and writer._free.empty() for part in parts)
        if fails:
            raise OSError(28, "No space left on device")
        return ["file"]

    monkeypatch.setattr(writer, "write", write)
    with pytest.raises(OSError, match="No space left") if fails else contextlib.nullcontext():
        assert writer.copy(group, 1) == ["file"]
    assert writer._free.qsize() == 1


def test_learned_rows_of_many_shards_at_once(tmp_path, monkeypatch):
    """Pieces that go to the disk from where they lie, while other threads fill theirs."""
    cfg = config("stem stem-gate")
    weights = params(cfg)
    make_store(tmp_path / "usual", cfg, weights, shard_rows=64)
    write, running, most = os.write, set(), []

    def slowly(descriptor, data):
        running.add(threading.get_ident())
        most.append(len(running))
        time.sleep(0.002)
        running.discard(threading.get_ident())
        return write(descriptor, data)

    monkeypatch.setattr(fold, "COPY_BYTES", 3 * PAGE)  # 32 bundles
    monkeypatch.setattr(files, "PIECE_BYTES", 2 * PAGE)
    monkeypatch.setattr(os, "write", slowly)
    make_store(tmp_path / "slowly", cfg, weights, shard_rows=64)
    assert 3 <= max(most) and tree_bytes(tmp_path / "slowly") == tree_bytes(tmp_path / "usual")


@pytest.fixture(scope="module")
def stem_run(tiny_config, tmp_path_factory):
    """A run of one step; learned rows have width 40."""
    cfg = tiny_config("memoryllm stem*3 stem-gate", **{"train.steps": 1, "model.d_ff": 40})
    train(cfg, path := tmp_path_factory.mktemp("stem") / "run", progress=False)
    return path


@pytest.mark.parametrize(
    "rows",
    [
        dict(dtype="float32"),
        dict(dtype="bfloat16", rank=0.5),
        dict(dtype="int4", scale_group=7),
    ],
    ids=str,
)
def test_no_learned_table_lies_on_a_device(rows, stem_run, tmp_path, monkeypatch, caplog):
    """From the checkpoint to the store: neither an array of JAX nor an argument of a program is as
    large as a table, so one that is larger than the device is exported. A checkpoint's parameters
    of the same model, on the device, give the same bytes.
    """
    config, params, _ = load_params(stem_run)
    tables = [
        stack["table"].size for stack in params["memory"]["stacks"].values() if "table" in stack
    ]
    largest = config.model.vocab_size * 40  # of one layer
    assert sum(tables) == 4 * largest and SHARD * 4 * 40 < largest
    counts_V = export_module.read_counts(config)
    make_store(tmp_path / "device", config, params, counts_V=counts_V, **rows)
    del params
    gc.collect()
    before, seen = {id(array) for array in jax.live_arrays()}, []
    write = Writer.write

    def watch(*args):
        seen.extend(array.shape for array in jax.live_arrays() if id(array) not in before)
        return write(*args)

    monkeypatch.setattr(Writer, "write", watch)
    jax.clear_caches()  # so that every program is compiled, and logs the shapes of its arguments
    with jax.log_compiles(), caplog.at_level("WARNING"):
        export(stem_run, tmp_path / "host", progress=False, shard_rows=SHARD, **rows)
    shapes = re.findall(r"float32\[([\d,]+)\]", caplog.text)
    seen += [tuple(map(int, shape.split(","))) for shape in shapes]
    own = [shape for shape in seen if shape[-1:] == (40,)]  # as wide as rows of a table
    assert max(map(math.prod, own), default=0) < largest
    assert shapes or rows == dict(dtype="float32")
    bytes_of = [tree_bytes(tmp_path / name) for name in ("device", "host")]
    assert bytes_of[0].keys() == bytes_of[1].keys()
    for name in bytes_of[0].keys() - {"tkv.json", "tokenizer.json"}:  # the run has its own
        assert bytes_of[0][name] == bytes_of[1][name], name
