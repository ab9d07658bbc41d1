"""`flexmemory plan`: its bytes are those of arithmetic, its collectives those of the compiled step,
its refusals one line.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexmemory.cli.main import main
from flexmemory.cli.plan import text

ROOT = Path(__file__).parent.parent.parent
STEM = (
    "--config=configs/stem.py:smoke",
    "--config.model.vocab_size=1000",
    "--config.data.batch_size=16",
    "--config.model.d_ff=96",
)


def plan(*arguments) -> subprocess.CompletedProcess:
    """A process of its own: it makes up devices, which must be known before JAX starts."""
    return subprocess.run(
        [sys.executable, "-m", "flexmemory.cli.main", "plan", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


@pytest.fixture(scope="module")
def sixteen() -> dict:
    done = plan(
        *STEM,
        "--mesh=data=2,fsdp=4,tensor=2",
        "--config.optimizer.table_optimizer=lazy_adam",
        "--rows=40",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_bytes_of_sixteen_devices_that_are_not_there_are_arithmetic(sixteen):
    assert (
        sixteen["devices"] == 16
        and sixteen["plan"] == "fsdp_tp"
        and sixteen["changed"] == ["parallel.plan=fsdp_tp"]
    )
    parts, d, ff, v = sixteen["bytes"], 32, 96, 1000
    assert parts["tables"] == v * ff * 4 // 16 and parts["table moments"] == 2 * parts["tables"]
    cut = (
        4 * (4 * d * d + 3 * d * ff) - d * ff + d * v
    )  # four layers' projections and FFNs, one without its up projection, and the head
    norms = (4 * 2 + 1) * d
    assert parts["weights"] == 4 * (
        cut // 8 + v * d // 4 + norms
    )  # the embedding lies over fsdp alone
    assert parts["batch"] == 4 * (
        3 * 2 * 32 + 2 * 40 + 240
    )  # 240: ids of all 512 tokens by Zipf's law, padded
    assert parts["peak"] > sum(
        parts[name] for name in ("weights", "weight moments", "tables", "table moments")
    )


def test_what_is_sent_is_what_the_compiled_step_sends(sixteen):
    sent = {(row["kind"], row["shape"].count("[")) for row in sixteen["collectives"]}
    assert {kind for kind, _ in sent} >= {"all-to-all", "all-gather", "all-reduce"}
    assert sixteen["sent"] == sum(row["bytes"] * row["count"] for row in sixteen["collectives"])
    # a weight's gradient is never summed whole: each device gets the sum of its part alone
    whole = {
        "f32[32,500]",
        "f32[32,48]",
        "f32[48,32]",
        "f32[32,16]",
        "f32[16,32]",
    }  # of the head, the FFN and attention, cut over tensor
    assert not [
        row
        for row in sixteen["collectives"]
        if row["kind"] == "all-reduce" and whole & set(row["shape"].split())
    ]
    page = text(sixteen)
    assert (
        "16 devices, data 2, fsdp 4, tensor 2, plan fsdp_tp" in page
        and "all-reduce" in page
        and "  fits " in page
    )


def test_what_does_not_fit_is_marked(sixteen):
    page = text(sixteen | {"device_memory": 5000})
    assert "DOES NOT FIT" in page and "does not fit alone" in page


@pytest.mark.slow
def test_tables_in_the_hosts_memory_are_not_the_devices():
    done = plan(
        *STEM,
        "--mesh=fsdp=4",
        "--config.optimizer.table_optimizer=lazy_adam",
        "--config.parallel.table_memory=host",
        "--rows=40",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (
        made["bytes"]["tables"] == 3 * 160 * 96 * 4 // 4
        and made["bytes"]["table moments"] == 2 * made["bytes"]["tables"]
    )
    assert made["bytes"]["tables in the host's memory"] == 3 * 1000 * 96 * 4 // 4
    assert "tables in the host's memory" in text(made)


def test_thousands_of_devices_need_no_compiler(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ("--config=configs/memoryllm.py:1b", "--mesh=data=128,fsdp=64")
    assert main(["plan", *arguments, "--config.data.batch_size=8192", "--nocompile", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (
        made["devices"] == 8192
        and made["changed"] == ["parallel.plan=fsdp", "train.accum_steps=1"]
        and made["collectives"] is None
    )
    assert 0.9 < made["bytes"]["weights"] / (1.74e9 * 4 / 64) < 1.1 and made["bytes"][
        "weight moments"
    ] == pytest.approx(2 * made["bytes"]["weights"], rel=1e-3)


@pytest.mark.parametrize(
    "arguments, line",
    [
        (
            (*STEM, "--mesh=data=5"),
            (
                "config data.batch_size: 16 in 1 micro-batches makes 16 sequences, which"
                " data*fsdp=5 does not divide; set data.batch_size=20"
            ),
        ),
        ((*STEM, "--mesh=data=2,fsdp=7"), "which data*fsdp=14 does not divide"),
        ((*STEM, "--mesh=tensor=3"), "tensor=3 does not divide N=4 of blocks.s0.u0.attn.k"),
        (
            (*STEM, "--mesh=nodes=3"),
            "config parallel.mesh: 'nodes=3' in 'nodes=3' is not AXIS=SIZE",
        ),
        (STEM, "--mesh: missing; give the sizes of the axes"),
        (
            ("--config=configs/quickstart.py", "--mesh=data=2"),
            "config model.vocab_size: 0; give the vocabulary",
        ),
    ],
)
def test_a_bad_plan_is_one_line(arguments, line, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["plan", *arguments, "--nocompile"]) == 2
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1, said


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU's compiler"
)
def test_the_tpus_compiler_plans_too():
    done = plan(
        *STEM,
        "--mesh=fsdp=8",
        "--topology=v5e:2x4",
        "--config.optimizer.table_optimizer=lazy_adam",
        "--config.parallel.table_memory=host",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (
        made["compiler"] == "v5e:2x4"
        and 0 < made["bytes"]["tables"] < made["bytes"]["tables in the host's memory"]
        and made["bytes"]["temporaries"] > 0
    )
    wrong = plan(*STEM, "--mesh=fsdp=4", "--topology=v5e:2x4")
    assert (
        wrong.returncode == 2
        and "--topology: v5e:2x4 has 8 devices, --mesh has 4; give a mesh of 8" in wrong.stderr
    )
    wrong = plan(*STEM, "--mesh=fsdp=4", "--topology=v9z:2x2")
    assert (
        wrong.returncode == 2
        and "error: --topology: 'v9z:2x2': INVALID_ARGUMENT: Invalid TPU external name"
        in wrong.stderr
    )
    large = plan(
        *STEM,
        "--mesh=fsdp=8",
        "--topology=v5e:2x4",
        "--config.model.vocab_size=40000000",
        "--config.optimizer.table_optimizer=lazy_adam",
        "--rows=64",
    )
    assert (
        large.returncode == 2
        and "error: --mesh fsdp=8: does not fit a device of v5e:2x4 (RESOURCE_EXHAUSTED"
        in large.stderr
    )


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_tpus_compiler_its_plan_is_refused():
    done = plan(*STEM, "--mesh=fsdp=8", "--topology=v5e:2x4")
    assert (
        done.returncode == 2
        and done.stderr.strip()
        == "error: --topology: needs the TPU compiler; 'pip install jax[tpu]', a TPU is not needed"
    )
