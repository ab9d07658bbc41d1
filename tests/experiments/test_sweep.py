"""The sweep: equal totals, strict overrides, and make demo's pipeline at smoke size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cm_ratio, run
from experiments.variant import config_with
from flexmemory.errors import UserError
from flexmemory.models.accounting import account

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("scale", cm_ratio.SCALES)
def test_totals_are_equal_and_seeds_paired(scale):
    runs = cm_ratio.sweep(scale)["runs"]
    totals, by_seed = {}, {}
    for row in runs:
        cfg = cm_ratio.fit(config_with(row["sets"] | {"model.vocab_size": 4096}), row["axis"])
        assert cfg.train.seed == row["seed"]
        by_seed.setdefault(row["seed"], []).append(row["name"].rpartition("-s")[0])
        if not row["pattern"].startswith("attn_only"):  # the control without FFN is smaller by what it lacks
            totals[row["name"]] = account(cfg.model)["total"]
    assert len(set(map(tuple, by_seed.values()))) == 1
    assert len({row["name"] for row in runs}) == len(runs)
    dense = totals["dense-s0"]
    for name, total in totals.items():
        assert total == pytest.approx(dense, rel=0.005 if scale != "smoke" else 0.2), name


def test_an_unknown_override_raises():
    with pytest.raises(UserError, match="model.betta"):
        config_with({"model.betta": "3"})


def test_dry_run_prints_one_command_per_run(capsys, tmp_path):
    assert run.main(["cm_ratio", "--scale=gpu", f"--out={tmp_path / 'x'}", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(cm_ratio.sweep("gpu")["runs"])
    assert lines[1].startswith("python -m experiments.run cm_ratio --scale=gpu") and lines[1].endswith("--only=dense-s0")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("argv", "says"), [
    (["cm_ratoi"], "did you mean 'cm_ratio'?"),
    (["cm_ratio", "--scale=cpuu"], "did you mean 'cpu'?"),
    (["cm_ratio", "--scale=smoke", "--only=flex-b9-s0"], "--only 'flex-b9-s0'"),
    (["cm_ratio", "--scale=cpu", "--seeds=0,7"], "--seeds '7': this scale has 0, 1, 2"),
])
def test_mistakes(argv, says, capsys, tmp_path):
    assert run.main([*argv, f"--out={tmp_path / 'x'}"]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_demo_pipeline_at_smoke_size(tmp_path):
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "experiments.run", "cm_ratio", "--scale=smoke", f"--out={out}"]

    # one run cannot work: its folder is taken by a file that is not a run's
    (out / "stem-s0").mkdir(parents=True)
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2 and "not empty and not a sweep" in made.stderr
    (out / "stem-s0").rmdir()
    out.rmdir()

    made = subprocess.run([*command, "--only=dense-s0"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (out / "stem-s0").mkdir()
    (out / "stem-s0" / "foreign.txt").write_text("not a run")
    first = (out / "dense-s0" / "variant.json").stat().st_mtime_ns
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 1, made.stderr
    assert (out / "dense-s0" / "variant.json").stat().st_mtime_ns == first, "a finished run must be skipped"
    assert "stem-s0 failed" in made.stderr and "not empty and not a run folder" in made.stderr
    names = [row["name"] for row in cm_ratio.sweep("smoke")["runs"]]
    results = json.loads((out / "results.json").read_text())
    assert {entry["name"] for entry in results["variants"]} == set(names) - {"stem-s0"}
    for entry in results["variants"]:
        assert entry["rows_max_abs_diff"] == 0 and entry["logits_max_abs_diff"] == 0 and entry["greedy_equal"] is True
        assert entry["val_loss"] > 0 and entry["decode_tps_offloaded"] > 0 and entry["decode_tps_resident"] > 0

    (out / "stem-s0" / "foreign.txt").unlink()
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    results = json.loads((out / "results.json").read_text())
    assert {entry["name"] for entry in results["variants"]} == set(names)
    assert "report.html" in made.stdout and (out / "report.html").stat().st_size > 10_000
    assert str(tmp_path) not in (out / "report.html").read_text()
