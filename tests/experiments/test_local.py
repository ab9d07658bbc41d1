"""The local launcher, with workers that do what their runs' names say."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import local
from flexmemory.errors import UserError

ROOT = Path(__file__).parents[2]

# experiments.worker in small: NAME is ACTION-ANYTHING; every run writes where and in which process
# it ran
FAKE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from experiments.local import runs_from_launcher

def log(text):
    with open(folder / "log.txt", "a") as file: file.write(text + "\\n")

def stop(number, frame):
    log(f"checkpoint after signal {number}")
    if action != "deaf":
        sys.exit(130)

signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
out = Path(sys.argv[1])
for name in runs_from_launcher():
    folder, action = out / name, name.split("-")[0]
    folder.mkdir(parents=True, exist_ok=True)
    print("start", name, flush=True)
    log("begins")
    (folder / "where.json").write_text(json.dumps({"pid": os.getpid(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "began": time.time(),
                                                   "cores": sorted(os.sched_getaffinity(0))}))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "loss": 2.5, "tokens": 400, "tokens_per_s": 50.0}) + "\\n")
    if action == "dies":
        log("a last word"); os._exit(3)
    if action == "killed":
        subprocess.Popen(["sleep", "60"])  # which holds this process's stdout
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "fails":
        log("ValueError: no"); (folder / "failed.json").write_text(json.dumps({"name": name, "exit": 1, "error": "no"}))
        print("failed", name, "ValueError: no", flush=True)
        continue
    while action in ("waits", "deaf"):
        time.sleep(0.05)
    if action == "meets":  # its partner, which must be running at the same time
        end = time.time() + 10
        while len(list(out.glob("meets-*/where.json"))) < 2 and time.time() < end: time.sleep(0.02)
    (folder / "done.json").write_text(json.dumps({"name": name}))
    print("done", name, "0.1", flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    return (sys.executable, str(tmp_path / "fake.py"))


@pytest.fixture
def launch(tmp_path, worker, monkeypatch):
    monkeypatch.setattr(local, "accelerators", list)
    return lambda names, devices=1, **more: local.run_local(
        tmp_path / "out", names, dict.fromkeys(names, 10), devices, **{"worker": worker} | more
    )


def where(out, name):
    return json.loads((out / name / "where.json").read_text())


def test_one_warm_worker_does_all_runs_of_its_device(launch, tmp_path, capfd):
    assert launch(["ok-a", "fails-b", "ok-c"]) == ["fails-b"]
    out = tmp_path / "out"
    assert where(out, "ok-a")["pid"] == where(out, "fails-b")["pid"] == where(out, "ok-c")["pid"]
    said = capfd.readouterr().err.splitlines()
    assert said[:3] == ["start ok-a", "done ok-a after 0:00", "start fails-b"]
    assert "failed fails-b: ValueError: no" in said[3] and said[4:6] == [
        "    begins",
        "    ValueError: no",
    ]
    assert json.loads((out / "fails-b" / "failed.json").read_text())["error"] == "no", (
        "what the worker wrote stays"
    )


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores that can be pinned",
)
def test_workers_run_side_by_side_each_on_its_cores(launch, tmp_path):
    assert launch(["meets-a", "meets-b"], devices=2) == []
    a, b = (where(tmp_path / "out", name) for name in ("meets-a", "meets-b"))
    assert (
        a["pid"] != b["pid"] and a["cores"] and b["cores"] and not set(a["cores"]) & set(b["cores"])
    )
    assert launch(["ok-alone"], devices=2) == []
    assert where(tmp_path / "out", "ok-alone")["cores"] in (a["cores"], b["cores"]), (
        "a run alone has no more cores than one among others"
    )


def test_a_worker_that_dies_takes_one_run_with_it(launch, tmp_path, capfd):
    assert launch(["ok-a", "dies-b", "ok-c", "killed-d", "ok-e"]) == ["dies-b", "killed-d"]
    out = tmp_path / "out"
    assert all((out / name / "done.json").exists() for name in ("ok-a", "ok-c", "ok-e"))
    assert where(out, "ok-c")["pid"] == where(out, "killed-d")["pid"] != where(out, "ok-a")["pid"]
    assert json.loads((out / "dies-b" / "failed.json").read_text()) == {
        "name": "dies-b",
        "exit": 3,
        "error": "worker ended with exit code 3\nbegins\na last word",
    }
    assert (
        json.loads((out / "killed-d" / "failed.json").read_text())["error"]
        == "worker killed by SIGKILL\nbegins"
    )
    assert "    a last word\n" in capfd.readouterr().err


def test_a_worker_that_never_starts_says_why_and_blames_no_run(launch, tmp_path):
    with pytest.raises(
        UserError, match="CPU 0, ended with exit code 1: .*No module named experiments.wroker"
    ):
        launch(["ok-a", "ok-b"], worker=(sys.executable, "-m", "experiments.wroker"))
    assert not list((tmp_path / "out").glob("*/failed.json"))


def test_a_bad_device_leaves_the_runs_to_the_good_one(launch, tmp_path, worker, monkeypatch):
    monkeypatch.setattr(
        local,
        "accelerators",
        lambda: [
            local.Place("GPU 0", {"CUDA_VISIBLE_DEVICES": "0"}),
            local.Place("GPU 1", {"CUDA_VISIBLE_DEVICES": "1"}),
        ],
    )
    (tmp_path / "picky.sh").write_text(
        '[ "$CUDA_VISIBLE_DEVICES" = 1 ] && exec "$@"; echo "no such device" >&2; exit 1\n'
    )
    assert (
        launch(
            ["ok-a", "ok-b", "ok-c"], devices=2, worker=("sh", str(tmp_path / "picky.sh"), *worker)
        )
        == []
    )
    assert {where(tmp_path / "out", name)["gpu"] for name in ("ok-a", "ok-b", "ok-c")} == {"1"}


def launcher(tmp_path, worker, names, devices=1):
    code = (
        "import sys; from pathlib import Path; from experiments import local; names ="
        " sys.argv[2].split(',')\nlocal.accelerators = lambda:"
        f" []\nlocal.run_local(Path(sys.argv[1]), names, dict.fromkeys(names, 10), {devices},"
        f" worker={worker!r})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out"), ",".join(names)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path):
    end = time.time() + 20
    while not path.exists():
        assert time.time() < end, f"{path.name} did not come"
        time.sleep(0.02)


def gone(pid):
    end = time.time() + 10
    while time.time() < end:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_workers_stop_at_a_checkpoint(tmp_path, worker, number):
    process = launcher(tmp_path, worker, ["waits-a", "ok-b"])
    wait_for(tmp_path / "out" / "waits-a" / "where.json")
    process.send_signal(number)
    said = process.communicate(timeout=20)[1]
    assert (
        process.returncode != 0
        and "KeyboardInterrupt" in said
        and "stopping at a checkpoint" in said
    )
    assert gone(where(tmp_path / "out", "waits-a")["pid"])
    assert (
        tmp_path / "out" / "waits-a" / "log.txt"
    ).read_text() == f"begins\ncheckpoint after signal {signal.SIGINT}\n"
    assert (
        not (tmp_path / "out" / "waits-a" / "failed.json").exists()
        and not (tmp_path / "out" / "ok-b").exists()
    )


def test_a_second_signal_ends_a_worker_that_does_not_listen(tmp_path, worker):
    process = launcher(tmp_path, worker, ["deaf-a"])
    wait_for(tmp_path / "out" / "deaf-a" / "where.json")
    process.send_signal(signal.SIGINT)
    end = time.time() + 20
    while (
        "checkpoint" not in (tmp_path / "out" / "deaf-a" / "log.txt").read_text()
        and time.time() < end
    ):
        time.sleep(0.02)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert (
        gone(where(tmp_path / "out", "deaf-a")["pid"])
        and not (tmp_path / "out" / "deaf-a" / "failed.json").exists()
    )


def test_no_worker_outlives_a_killed_launcher(tmp_path, worker):
    process = launcher(tmp_path, worker, ["waits-a"])
    wait_for(tmp_path / "out" / "waits-a" / "where.json")
    process.kill()
    process.communicate()
    assert gone(where(tmp_path / "out", "waits-a")["pid"])
    assert (
        tmp_path / "out" / "waits-a" / "log.txt"
    ).read_text() == f"begins\ncheckpoint after signal {signal.SIGINT}\n"


def test_the_table_has_the_running_runs_and_the_time_left_of_the_steps_made_since(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 50, "loss": 3.5}\n')
    made = local.Board(tmp_path, ["a", "b", "c"], {"a": 100, "b": 100, "c": 10})
    made.states["a"] = "done"
    made.event("start", "b", "")
    whole = made.table.tasks[made.whole]
    assert whole.time_remaining is None, (
        "the 100 steps of an earlier start say nothing of the time a step takes"
    )
    for step in (60, 75):
        (tmp_path / "b" / "metrics.jsonl").write_text(
            f'{{"step": {step}, "loss": 3.25, "tokens_per_s": 200.0}}\n{{"st'
        )
        made.tick()
        time.sleep(0.01)
    assert [task.description for task in made.table.tasks if task.visible] == [
        "b",
        "3 runs: 1 done, 1 running, 1 waiting",
    ]
    b = made.table.tasks[made.tasks["b"]]
    assert (b.completed, b.fields["note"]) == (75, "loss 3.2500  200 tokens/s")
    assert (whole.completed, whole.total) == (125, 210) and whole.time_remaining >= 0


def test_a_terminal_gets_a_live_table(tmp_path, worker):
    pty = pytest.importorskip("pty")
    host, terminal = pty.openpty()
    code = (
        "import sys; from pathlib import Path; from experiments import local; local.accelerators ="
        " lambda: []\nlocal.run_local(Path(sys.argv[1]), ['ok-a', 'dies-b'], {'ok-a': 10,"
        f" 'dies-b': 10}}, 1, worker={worker!r})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        cwd=ROOT,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "20"},
    )
    os.close(terminal)
    said = b""
    with contextlib.suppress(OSError):  # the end, on Linux
        while more := os.read(host, 4096):
            said += more
    os.close(host)
    assert process.wait(20) == 0
    assert "2 runs: 1 done, 1 failed" in said.decode().replace("\x1b[0m", "")
    assert "    a last word" in said.decode()


@pytest.mark.parametrize(
    ("env", "listed", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "2, 5"}, "", ["2", "5"]),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "GPU 0: A\n", []),
        (
            {},
            (
                "GPU 0: NVIDIA A (UUID: GPU-1)\n  MIG 1g.5gb Device 0: (UUID: MIG-1)\nGPU 1: NVIDIA"
                " B (UUID: GPU-2)\n"
            ),
            ["0", "1"],
        ),
    ],
)
def test_gpus_are_those_visible_or_those_listed(env, listed, expected, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '%s' '{listed}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert local.gpus() == expected


def test_places_of_gpus_of_cores_and_too_many(monkeypatch):
    monkeypatch.setattr(local, "gpus", lambda: ["0", "3"])
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert [place.env for place in local.places()] == [
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "3"},
    ]
    assert len(local.places(1)) == 1
    with pytest.raises(UserError, match=r"--devices: 3 is outside 1\.\.2"):
        local.places(3)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 8}, raising=False)
    assert [place.cores for place in local.places()] == [(0,), (1,), (2,), (3,), (8,)]
    assert [place.cores for place in local.places(2)] == [(0, 1), (2, 3, 8)]
    assert [place.cores for place in local.places(1)] == [(0, 1, 2, 3, 8)]
    with pytest.raises(UserError, match=r"--devices: 6 is outside 1\.\.5"):
        local.places(6)
