"""Verify, and the commands export, verify and generate."""

import json
import zlib

import jax
import numpy as np
import pytest

from flexmemory.cli import eval as eval_cli
from flexmemory.cli import export as export_cli
from flexmemory.cli import generate as generate_cli
from flexmemory.cli import verify as verify_cli
from flexmemory.config import to_json
from flexmemory.errors import UserError
from flexmemory.runtime.engine import Engine
from flexmemory.runtime.rows import Budgets
from flexmemory.runtime.verify import verify_params
from flexmemory.tkv.export import export
from flexmemory.tkv.manifest import json_crc32
from flexmemory.tkv.store import open_store
from flexmemory.tkv.verify import verify_deep
from flexmemory.train.loop import train

from .making import byte_tokenizer, config, make_store, params

FIGURES = ("rows_max_abs_diff", "rows_max_rel_diff", "logits_max_abs_diff", "logits_max_rel_diff")


@pytest.fixture(scope="module")
def small():
    cfg = config("dense flex stem")
    return cfg, params(cfg)


@pytest.fixture
def workdir(small, tmp_path, monkeypatch):
    """A run folder whose checkpoint is ``small``."""
    cfg, weights = small
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.json").write_text(to_json(cfg))
    byte_tokenizer().save(path)

    def load_params(workdir, step=None, **_):
        assert workdir == path and step in (None, 3)
        return cfg, weights, 3

    for module in ("runtime.engine", "runtime.verify", "tkv.export"):
        monkeypatch.setattr(f"flexmemory.{module}.load_params", load_params)
    return path


@pytest.mark.parametrize(
    "rows", [dict(dtype="float32"), dict(dtype="bfloat16"), dict(dtype="int4", rank=0.75)], ids=str
)
def test_a_fresh_store_is_exactly_its_run(rows, small, tmp_path):
    cfg, weights = small
    make_store(tmp_path / "s", cfg, weights, **rows)
    found = verify_params(open_store(tmp_path / "s"), cfg.model, weights, tokens=12)
    assert found["ok"] and found["greedy_equal"] and [found[name] for name in FIGURES] == [0.0] * 4
    assert found["rows"]["ram"]["misses"] > 12
    exact = rows["dtype"] == "float32"
    assert (
        (found["rounding_rows_max_abs_diff"] == 0)
        == exact
        == (found["rounding_logits_max_rel_diff"] == 0)
    )
    assert json.loads(json.dumps(found)) == found


def test_other_weights_do_not_verify(small, tmp_path):
    cfg, weights = small
    make_store(tmp_path / "s", cfg, weights)
    other = jax.tree.map(np.copy, weights)
    other["memory"]["stacks"]["stack1"]["table"][0, 77] += 0.5  # one row of one token
    found = verify_params(open_store(tmp_path / "s"), cfg.model, other, tokens=12)
    assert not found["ok"] and found["rows_max_abs_diff"] == pytest.approx(0.5, abs=1e-6)
    other = dict(weights, embed=weights["embed"] * 1.01)
    found = verify_params(open_store(tmp_path / "s"), cfg.model, other, tokens=12)
    assert not found["ok"] and found["logits_max_rel_diff"] > 1e-4
    broken = dict(weights, norm={"scale": weights["norm"]["scale"] * np.nan})
    assert not verify_params(open_store(tmp_path / "s"), cfg.model, broken, tokens=12)["ok"]
    with pytest.raises(UserError, match="its model is not the run's"):
        verify_params(open_store(tmp_path / "s"), config("dense flex").model, weights)


def test_commands_end_to_end(workdir, tmp_path, capsys):
    out = str(tmp_path / "tkv")
    assert export_cli.run([f"--workdir={workdir}", f"--out={out}", "--shard_rows=64"]) == 0
    assert "rows/s" in capsys.readouterr().out
    assert export_cli.run([f"--workdir={workdir}", f"--out={out}", "--shard_rows=64"]) == 0
    assert "already complete" in capsys.readouterr().out
    assert open_store(out).manifest.source.run == "run"

    assert verify_cli.run([f"--tkv={out}", f"--workdir={workdir}", "--tokens=8"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert (
        verify_cli.run([f"--tkv={out}", f"--workdir={workdir}", "--tokens=8", "--tolerance=-1"])
        == 1
    )
    capsys.readouterr()

    sides = [
        Engine(out, Budgets(ram=4000)),
        Engine(out, Budgets(ram=None)),
        Engine.from_run(workdir),
    ]
    made = [engine.generate(["some text"], 6) for engine in sides]
    assert made[0] == made[1] == made[2]

    options = [f"--tkv={out}", "--max_tokens=6", "--ram_budget=2KiB"]
    assert generate_cli.run([*options, "--prompt=some text", "--stats"]) == 0
    captured = capsys.readouterr()
    assert (
        captured.out.startswith("some text")
        and json.loads(captured.err)["rows"]["ram"]["misses"] > 0
    )
    assert generate_cli.run([*options, "--prompt=some text", "--prompt=more"]) == 0
    both = capsys.readouterr().out
    assert both.startswith(f"--- 1\n{captured.out}--- 2\nmore")
    with pytest.raises(UserError, match="ram: 3 bytes is below one token's rows"):
        generate_cli.run([f"--tkv={out}", "--prompt=a", "--ram_budget=3"])


def test_commands_on_bad_input(workdir, tmp_path):
    for option, message in (
        ("--dtype=int3", "dtype: 'int3' is not one of"),
        ("--rank=half", "--rank: 'half' is not a number"),
        ("--host=1", "host, hosts: 1 of None"),
        ("--scale_group=8", "scale_group: 8 needs dtype=int8 or int4"),
    ):
        with pytest.raises(UserError, match=message):
            export_cli.run([f"--workdir={workdir}", f"--out={tmp_path}/x", option])
    assert not (tmp_path / "x").exists()
    for option in (f"--workdir={workdir}", "--deep"):
        with pytest.raises(UserError, match="no TKV store here"):
            verify_cli.run([f"--tkv={tmp_path}/x", option])
    with pytest.raises(UserError, match="--workdir: missing; give the run folder"):
        verify_cli.run([f"--tkv={tmp_path}/x"])
    with pytest.raises(UserError, match="no TKV store here"):
        generate_cli.run([f"--tkv={tmp_path}/x", "--prompt=a"])


DAMAGE = [
    ("rows/w32/c/1/0", "its checksum is wrong"),
    ("checksums/w48/c/2", "its checksum is wrong"),
    ("basis.safetensors", "its checksum is wrong"),
    ("backbone/model-00001-of-00001.safetensors", "its checksum is wrong"),
    ("rows/w48/zarr.json", "its checksum is wrong"),
    ("tokenizer.json", "its checksum is wrong"),
]


def flip(path, place=-9):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_deep_names_every_damaged_file(small, tmp_path, capsys):
    make_store(tmp_path / "s", *small, dtype="int8", rank=0.5)
    found = verify_deep(tmp_path / "s", progress=False)
    assert found == {
        "files": 27,
        "bytes": found["bytes"],
        "bundles": 2 * 260,
        "damaged": [],
        "ok": True,
    }
    assert (
        verify_cli.run([f"--tkv={tmp_path}/s", "--deep"]) == 0
        and json.loads(capsys.readouterr().out)["deep"] == found
    )
    for name, _ in DAMAGE:
        flip(tmp_path / "s" / name)
    (tmp_path / "s/rows/w32/c/4/0").unlink()
    (tmp_path / "s/checksums/w32/c/3").write_bytes(b"abc")
    found = verify_deep(tmp_path / "s", progress=False)
    assert not found["ok"]
    what = {entry["name"]: entry["what"] for entry in found["damaged"]}
    assert what.keys() == {*dict(DAMAGE), "rows/w32/c/4/0", "checksums/w32/c/3"}
    assert all(what[name] == message for name, message in DAMAGE)
    assert (
        what["rows/w32/c/4/0"] == "cannot be read (No such file or directory)"
        and what["checksums/w32/c/3"] == "3 bytes, 256 expected"
    )
    assert (
        found["bundles"] == 2 * 260 - 3 * 64 - 4
    )  # of shards that are whole and whose checksums are
    assert verify_cli.run([f"--tkv={tmp_path}/s", f"--workdir={tmp_path}", "--deep"]) == 1
    assert json.loads(capsys.readouterr().out) == {"deep": found, "ok": False}


def test_deep_finds_a_bundle_whose_file_is_said_to_be_whole(small, tmp_path):
    """The checksum of every token is looked at besides that of the whole shard."""
    make_store(tmp_path / "s", *small)
    flip(shard := tmp_path / "s/rows/w32/c/0/0/0", 50 * 32 * 4 + 5)
    path = tmp_path / "s/tkv.json"
    content = json.loads(path.read_text())
    (file,) = (file for file in content["files"] if file["name"] == "rows/w32/c/0/0/0")
    file["crc32"] = zlib.crc32(shard.read_bytes())
    del content["crc32"]
    path.write_text(json.dumps({**content, "crc32": json_crc32(content)}))
    assert verify_deep(tmp_path / "s", progress=False)["damaged"] == [
        {"name": file["name"], "what": "1 bundles, the first of token 50, fail their checksum"}
    ]


def test_eval_with_the_rows_of_a_store(tiny_config, tmp_path, capsys):
    final = train(
        tiny_config("memoryllm stem", **{"train.steps": 2}), tmp_path / "run", progress=False
    )
    export(tmp_path / "run", tmp_path / "exact", progress=False)
    export(tmp_path / "run", tmp_path / "coarse", dtype="int4", rank=4, progress=False)
    results = {}
    for name in ("exact", "coarse"):
        assert (
            eval_cli.run(
                [f"--tkv={tmp_path / name}", f"--workdir={tmp_path / 'run'}", "--max_tokens=512"]
            )
            == 0
        )
        results[name] = json.loads(capsys.readouterr().out)
    assert results["exact"]["loss"] == pytest.approx(final["val_loss"], rel=1e-6)
    assert results["exact"]["recall_acc"] == final["recall_acc"] and results["exact"]["step"] == 2
    assert abs(results["coarse"]["loss"] - final["val_loss"]) > 1e-6
    assert results["coarse"]["ranks"] == [4, 4] and results["coarse"]["dtype"] == "int4"
    assert (
        results["coarse"]["table_bytes"] == 400 * 2 * (2 + 4) and results["exact"]["ranks"] is None
    )
    counts = open_store(tmp_path / "exact").counts()
    assert counts.sum() > 0 and counts.shape == (400,)
    data = tiny_config().data
    assert (
        eval_cli.run(
            [
                f"--tkv={tmp_path / 'exact'}",
                f"--data={data.path}",
                f"--seq_len={data.seq_len}",
                "--max_tokens=512",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(final["val_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "options,message",
    [
        (["--max_tokens=5"], "--workdir: missing"),
        (["--tkv=x"], "--data: missing"),
        (["--tkv=x", "--data=y", "--step=1"], "--step: 1 does not go"),
        (["--workdir=x", "--seq_len=0"], "--seq_len: 0 must be above 0"),
        (["--tkv=/nowhere", "--data=y"], "no TKV store here"),
    ],
)
def test_eval_on_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        eval_cli.run(options)


def test_the_table_of_an_export(small, tmp_path):
    made = make_store(tmp_path / "s", *small, dtype="int4", rank=32)
    text = export_cli.table(made)
    assert (
        "rows, int4, rank 32" in text
        and "basis" in text
        and f"{made['table_bytes']:,} bytes" in text
    )
    assert (
        "note: rank 32 of layer 1 saves nothing: numbers and basis are as large as the rows above"
        " rank 28" in text
    )
    assert text.count("relative RMS ") == 1 + 2
    assert "error" not in export_cli.table(make_store(tmp_path / "t", *small))
