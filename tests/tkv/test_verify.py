"""Verify, and the commands export, verify and generate."""

import json

import jax
import numpy as np
import pytest

from flexmemory.cli import export as export_cli
from flexmemory.cli import generate as generate_cli
from flexmemory.cli import verify as verify_cli
from flexmemory.cli.generate import TextStream, parse_bytes
from flexmemory.config import to_json
from flexmemory.errors import UserError
from flexmemory.runtime.engine import Engine
from flexmemory.tkv.store import open_store
from flexmemory.tkv.verify import verify_params

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

    def load_params(workdir, step=None):
        assert workdir == path and step in (None, 3)
        return cfg, weights, 3

    monkeypatch.setattr("flexmemory.train.checkpoint.load_params", load_params)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_store_is_exactly_its_run(dtype, small, tmp_path):
    cfg, weights = small
    make_store(tmp_path / "s", cfg, weights, dtype=dtype)
    found = verify_params(open_store(tmp_path / "s"), cfg.model, weights, tokens=12)
    assert found["ok"] and found["greedy_equal"] and [found[name] for name in FIGURES] == [0.0] * 4
    assert found["rows"]["slots"] == 3 and found["rows"]["misses"] > 12
    exact = dtype == "float32"
    assert (found["rounding_rows_max_abs_diff"] == 0) == exact == (found["rounding_logits_max_rel_diff"] == 0)
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
    assert export_cli.run([f"--workdir={workdir}", f"--out={out}", "--block_rows=64"]) == 0
    assert "rows/s" in capsys.readouterr().out
    assert export_cli.run([f"--workdir={workdir}", f"--out={out}", "--block_rows=64"]) == 0
    assert "already complete" in capsys.readouterr().out
    assert open_store(out).manifest.source.run == "run"

    assert verify_cli.run([f"--tkv={out}", f"--workdir={workdir}", "--tokens=8"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert verify_cli.run([f"--tkv={out}", f"--workdir={workdir}", "--tokens=8", "--tolerance=-1"]) == 1
    capsys.readouterr()

    sides = [Engine.from_store(out, 1000), Engine.from_store(out, None), Engine.from_run(workdir)]
    made = [engine.generate(["some text"], 6) for engine in sides]
    assert made[0] == made[1] == made[2]

    options = [f"--tkv={out}", "--max_tokens=6", "--ram_budget=2KiB"]
    assert generate_cli.run([*options, "--prompt=some text", "--stats"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("some text") and json.loads(captured.err)["rows"]["slots"] == 6
    assert generate_cli.run([*options, "--prompt=some text", "--prompt=more"]) == 0
    both = capsys.readouterr().out
    assert both.startswith(f"--- 1\n{captured.out}--- 2\nmore")
    with pytest.raises(UserError, match="--ram_budget: 3 bytes is below one token's rows"):
        generate_cli.run([f"--tkv={out}", "--prompt=a", "--ram_budget=3"])


def test_commands_on_bad_input(workdir, tmp_path):
    with pytest.raises(UserError, match="--dtype: 'int8' is not one of"):
        export_cli.run([f"--workdir={workdir}", f"--out={tmp_path}/x", "--dtype=int8"])
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="no TKV store here"):
        verify_cli.run([f"--tkv={tmp_path}/x", f"--workdir={workdir}"])
    with pytest.raises(UserError, match="no TKV store here"):
        generate_cli.run([f"--tkv={tmp_path}/x", "--prompt=a"])


def test_parse_bytes():
    assert [parse_bytes(text) for text in ("0", "4096", "64MiB", "1.5GiB", "2 kB")] == [0, 4096, 64 << 20, 3 << 29, 2000]
    for text in ("", "64mib", "-1", "lots", "64MiBs"):
        with pytest.raises(UserError, match="--ram_budget"):
            parse_bytes(text)


@pytest.mark.parametrize("text", ["plain", "naïve café ☕ 漢字 🎉", ""])
def test_streamed_text_is_the_text(text):
    tokenizer = byte_tokenizer()
    for ids in (tokenizer.encode(text), [256, *tokenizer.encode(text), 256]):
        stream = TextStream(tokenizer.decode)
        parts = [stream.add(i) for i in ids]
        assert "".join(parts) + tokenizer.decode(ids)[stream.shown :] == text
        assert not any("\ufffd" in part for part in parts)


def test_streamed_text_of_bytes_that_are_no_text():
    rng = np.random.default_rng(0)
    tokenizer = byte_tokenizer()
    for _ in range(200):
        ids = rng.choice([0x41, 0xC3, 0xA9, 0xE2, 0x98, 0x95, 0xF0, 0x9F, 0xFF, 256], 12).tolist()
        stream = TextStream(tokenizer.decode)
        streamed = "".join(stream.add(i) for i in ids)
        assert streamed + tokenizer.decode(ids)[stream.shown :] == tokenizer.decode(ids), ids
