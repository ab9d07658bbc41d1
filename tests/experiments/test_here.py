"""Several processes as one run, as on every host of a slice: here two on this machine, which
believe that Open MPI started them.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import runs as run_list
from experiments import worker
from flexmemory.config import Config
from flexmemory.train import loop

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """One of the ports that JAX derives from Open MPI's job number."""
    while True:
        port = random.randrange(65536 - 4096, 65536)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


@pytest.mark.slow
def test_two_processes_train_every_run_together_and_one_measures(tmp_path):
    out = tmp_path / "slice"
    command = [
        sys.executable,
        "-m",
        "experiments.run",
        "e4",
        "--scale=smoke",
        f"--out={out}",
        "--launcher=here",
    ]
    job = (free_port() - (65536 - 4096)) * 4096
    processes = []
    for rank in range(2):
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:1",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        }
        processes.append(
            subprocess.Popen(
                [*command, "--distributed"],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for name in ("memoryllm-s0", "memoryllm-shared-norm-s0"):
        assert json.loads((out / name / "run.json").read_text())["processes"] == 2
        assert (out / name / "final_result.json").exists() and not (
            out / name / "done.json"
        ).exists()
    assert "without --distributed" in said[0]
    kept = (out / "memoryllm-s0" / "final_result.json").stat().st_mtime_ns
    made = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert made.returncode == 0 and "2 of 2 runs finished" in made.stdout, made.stdout + made.stderr
    assert (out / "memoryllm-s0" / "final_result.json").stat().st_mtime_ns == kept, (
        "what was trained is not trained again"
    )


def test_processes_that_share_a_run_leave_sigterm_to_jax_which_stops_them_together(
    tmp_path, monkeypatch
):
    heard = []

    def train(cfg, workdir, stop):
        heard.append(signal.getsignal(signal.SIGTERM))
        return {"seconds": {"total": 0.0}}

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(worker, "config_of", lambda out, run: (Config(), None))
    made = run_list.claim(tmp_path / "x", run_list.make(["e4"], "smoke"))
    before = signal.getsignal(signal.SIGTERM)
    for shared in ("fsdp", None):
        worker.trained_run(tmp_path / "x", run_list.run_of(made, "memoryllm-s0"), plan=shared)
    assert heard[0] is before and heard[1] is not before
