"""The command line, and one experiment at smoke scale from text to verdicts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import catalogue, run
from experiments import list as listing
from experiments import runs as run_list
from experiments.verdicts import VERDICTS

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "experiments.run", "--scale=smoke"]
KNOWN = (
    "not implemented",
    "no such block",
    "flexmemory bench decode",
    "well above chance",
    "the text is too short",
    "a person must read",
    "of its active parameters",
)  # why a claim is not run at smoke scale


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["e1x", "--scale=cpu"], "experiment 'e1x': did you mean 'e1"),
        (["e1", "--scale=cpuu"], "--scale 'cpuu' of e1_base_vs_memoryllm: did you mean 'cpu'?"),
        (["--all", "--scale=cpuu"], "--scale 'cpuu': did you mean 'cpu'?"),
        (["--scale=cpu"], "give names of experiments or --all"),
        (["e1", "--all", "--scale=cpu"], "give names of experiments or --all"),
        (["e1", "--scale=cpu", "--seeds=one"], "--seeds 'one': give whole numbers"),
        (["e1", "--scale=cpu", "--budget=activ"], "--budget 'activ': did you mean 'active'?"),
        (["e1", "--scale=cpu", "--launcher=slrm"], "--launcher: invalid choice: 'slrm'"),
        (
            ["e1", "--scale=cpu", "--distributed"],
            "--distributed: several processes share one run only with --launcher=here",
        ),
        (
            ["e1", "--scale=cpu", "--slurm.partition=gpu"],
            "argument '--slurm.partition=gpu': not understood",
        ),
        (["e1"], "--scale"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(argv, says, capsys, tmp_path):
    assert run.main([*argv, f"--out={tmp_path / 'x'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_dry_run_prints_what_would_start_and_nothing_else(capsys, tmp_path):
    out = tmp_path / "x"
    assert run.main(["e1", "s25", "--scale=cpu", f"--out={out}", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    made = run_list.make(["e1", "s25"], "cpu")
    assert sum("prepare" in line for line in lines) == 2, "two vocabularies, so two texts"
    assert [line.split()[-1] for line in lines if "experiments.worker" in line] == list(made.runs)
    assert not out.exists()


def test_status_says_where_every_run_stands(capsys, tmp_path):
    out = tmp_path / "x"
    made = run_list.claim(out, run_list.make(["e4"], "smoke"))
    assert list(made.runs) == ["memoryllm-s0", "memoryllm-shared-norm-s0"]
    for name in made.runs:
        (out / name).mkdir()
    (out / "memoryllm-s0" / "failed.json").write_text(
        json.dumps({"name": "memoryllm-s0", "exit": 1, "error": "first\nlast line"})
    )
    (out / "memoryllm-shared-norm-s0" / "metrics.jsonl").write_text('{"step": 3, "loss": 2.0}\n')
    assert run.main(["e4", "--scale=smoke", f"--out={out}", "--status"]) == 0
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert said == [
        ["memoryllm-s0", "failed", "last", "line"],
        ["memoryllm-shared-norm-s0", "step", "3", "of", "4"],
        ["0", "of", "2", "finished"],
    ]


def test_the_list_shows_every_experiment_and_its_last_verdicts(capsys, tmp_path):
    (tmp_path / "results.json").write_text(
        json.dumps(
            {
                "experiments": [
                    {
                        "name": "e1_base_vs_memoryllm",
                        "scale": "cpu",
                        "claims": [{"verdict": "reproduced"}, {"verdict": "within noise"}],
                    }
                ]
            }
        )
    )
    assert listing.main([f"--runs={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in catalogue.names())
    assert "cpu: 1 reproduced, 1 within noise" in " ".join(text.split())
    (tmp_path / "results.json").write_text('{"variants": []}')
    assert listing.main([f"--runs={tmp_path}"]) == 2
    assert "not the results of experiments" in capsys.readouterr().err


def test_an_experiment_at_smoke_scale(tmp_path):
    """From text to verdicts: one run cannot work and is shown while the other goes on; what is
    deleted is made again and gives the same report.
    """
    out = tmp_path / "smoke"
    command = [sys.executable, "-m", "experiments.run", "e4", "--scale=smoke", f"--out={out}"]
    foreign = out / "memoryllm-shared-norm-s0" / "foreign"
    foreign.parent.mkdir(parents=True)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "not empty and not a folder of runs" in result.stderr
    foreign.parent.rmdir()
    run_list.claim(
        out, run_list.make(["e10"], "smoke")
    )  # a folder of runs, to which e4's are added
    foreign.parent.mkdir()
    foreign.write_text("not a run's")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    assert foreign.parent.name in result.stderr and "not a run folder" in result.stderr
    results = json.loads((out / "results.json").read_text())
    assert [entry["name"] for entry in results["failed"]] == [foreign.parent.name]
    assert results["finished"] == results["expected"] - 1 == 1 and not results["missing"]
    before = entries(results)["e10_outlier_keys"]["claims"]

    foreign.unlink()
    kept = (out / "memoryllm-s0" / "done.json").stat().st_mtime_ns
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (out / "memoryllm-s0" / "done.json").stat().st_mtime_ns == kept, "it is finished"
    results = json.loads((out / "results.json").read_text())
    assert results["finished"] == results["expected"] == 2 and not results["failed"]
    for name, entry in entries(results).items():
        assert not entry.get("error") and entry["rows"] and entry["claims"], name
        assert all(claim["verdict"] in VERDICTS for claim in entry["claims"])
    claims = {name: entry["claims"] for name, entry in entries(results).items()}
    shutil.rmtree(out / "memoryllm-s0")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    again = entries(json.loads((out / "results.json").read_text()))
    assert {name: entry["claims"] for name, entry in again.items()} == claims
    assert again["e10_outlier_keys"]["claims"] == before, "a run made again gives the same numbers"
    page = (out / "report.html").read_text()
    assert len(page) > 5_000 and str(tmp_path) not in page


def entries(results):
    return {entry["name"]: entry for entry in results["experiments"]}


@pytest.mark.slow
def test_every_experiment_at_smoke_scale(tmp_path):
    """All from real runs; one run cannot work and is shown while the others go on; what is deleted
    is made again and gives the same report.
    """
    out = tmp_path / "smoke"
    command = [*COMMAND, "--all", f"--out={out}"]

    (out / "stem-full-s0").mkdir(parents=True)
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2 and "not empty and not a folder of runs" in made.stderr
    (out / "stem-full-s0").rmdir()
    run_list.claim(
        out, run_list.make(["e4"], "smoke")
    )  # a folder of runs, to which the others are added
    (out / "stem-full-s0").mkdir()
    (out / "stem-full-s0" / "foreign").write_text("not a run's")
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 1, made.stdout + made.stderr
    assert "stem-full-s0" in made.stderr and "not empty and not a run folder" in made.stderr
    results = json.loads((out / "results.json").read_text())
    assert [entry["name"] for entry in results["failed"]] == ["stem-full-s0"] and not results[
        "missing"
    ]
    assert results["finished"] == results["expected"] - 1

    (out / "stem-full-s0" / "foreign").unlink()
    shutil.rmtree(out / "memoryllm-s0")
    kept = (out / "dense-s0" / "done.json").stat().st_mtime_ns
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    assert (out / "dense-s0" / "done.json").stat().st_mtime_ns == kept, "a finished run is kept"
    again = json.loads((out / "results.json").read_text())
    assert again["finished"] == again["expected"] and not again["failed"]
    sections = {entry["name"]: entry for entry in again["experiments"]}
    assert set(sections) == {
        name for name in catalogue.names() if "smoke" in catalogue.scales_of(catalogue.load(name))
    }
    for name, section in sections.items():
        assert not section.get("error"), section
        assert section["rows"] and section["claims"], name
        assert all(claim["verdict"] in VERDICTS for claim in section["claims"])
        missing = [claim["detail"] for claim in section["claims"] if claim["verdict"] == "not run"]
        assert all(any(reason in why for reason in KNOWN) for why in missing), (name, missing)
    before = {
        entry["name"]: entry["claims"] for entry in results["experiments"] if not entry["failed"]
    }
    assert {name: sections[name]["claims"] for name in before} == before, (
        "the run that was made again gives the same numbers"
    )
    assert (out / "report.html").stat().st_size > 50_000 and str(tmp_path) not in (
        out / "report.html"
    ).read_text()
