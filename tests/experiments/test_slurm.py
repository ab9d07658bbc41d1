"""The SLURM launcher against a real SLURM of one node, which slurm_node.sh starts below a folder of
its own.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from experiments import slurm
from experiments.slurm import Options
from flexmemory.errors import UserError

pytest.importorskip("submitit", reason="needs submitit: pip install 'flexmemory[slurm]'")
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("slurm_node.sh")

# experiments.worker in small: NAME is ACTION-ANYTHING; every start of a run leaves a line in its
# log
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
from experiments.local import runs_from_launcher

class Stopped(Exception): pass

def stop(number, frame): raise Stopped

signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
out = Path(sys.argv[1])
for name in runs_from_launcher():
    folder, action = out / name, name.split("-")[0]
    folder.mkdir(parents=True, exist_ok=True)
    print("start", name, flush=True)
    (folder / "failed.json").unlink(missing_ok=True)
    try:
        with open(folder / "log.txt", "a") as file: file.write(f"begins in {os.environ.get('SLURM_JOB_ID')} restart {os.environ.get('SLURM_RESTART_COUNT', 0)}\\n")
        if action == "dies":
            os._exit(3)
        while action == "waits" and not (folder / "checkpoint").exists() and not (out / "go").exists():
            time.sleep(0.05)
    except Stopped:
        with open(folder / "checkpoint", "a") as file: file.write("stopped\\n")
        print("stopped", name, flush=True)
        sys.exit(130)
    (folder / "done.json").write_text(json.dumps({"name": name}))
    print("done", name, "0.1", flush=True)
"""


@pytest.fixture(scope="module")
def node(request):
    """SLURM_CONF leads to a node of our own while the tests of this module run; it ends with this
    process, however that ends.
    """
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [
        name
        for name in ("slurmctld", "slurmd", "munged", "sbatch", "srun")
        if not shutil.which(name, path=path)
    ]
    if os.name != "posix" or os.geteuid() != 0 or absent:
        why = f"no {', '.join(absent)} here" if absent else "not root"
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\ntests of the SLURM launcher are skipped: {why}", file=sys.stderr)
        pytest.skip(f"a SLURM node needs root and Debian's slurmctld, slurmd and munge: {why}")
    folder = tempfile.mkdtemp(prefix="slurm-")  # short: it has a socket, whose path must be
    try:
        # its daemons keep no pipe of ours open
        made = subprocess.run(
            ["sh", str(SCRIPT), "start", folder, str(os.getpid())],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stderr
        os.environ["SLURM_CONF"] = f"{folder}/slurm.conf"
        yield folder
    finally:
        os.environ.pop("SLURM_CONF", None)
        subprocess.run(["sh", str(SCRIPT), "stop", folder], check=True)
        shutil.rmtree(folder)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    return (sys.executable, str(tmp_path / "fake.py"))


def submit(out, names, worker, **more):
    return slurm.submit(
        out,
        names,
        dict.fromkeys(names, 10),
        Options(**{"sbatch": {"partition": "main", "time": "5"}} | more),
        worker,
    )


def wait_until(out, names, wanted, seconds=180):
    """Waits until the states of the runs are ``wanted``, one for all or one each."""
    wanted, end = (
        [wanted] * len(names) if isinstance(wanted, str) else wanted,
        time.time() + seconds,
    )
    while True:
        made = slurm.states(out, names)
        if [state for state, _ in made.values()] == wanted:
            return made
        assert time.time() < end, (made, [path.read_text() for path in out.glob("slurm/*.err")])
        time.sleep(0.1)


def control(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_an_array_of_runs_where_one_dies_and_the_others_finish(node, out, worker):
    names = ["ok-a", "dies-b", "ok-c", "ok-d"]
    assert slurm.states(out, names) == dict.fromkeys(names, ("not submitted", ""))
    job = submit(out, names, worker, runs_per_job=2, max_parallel=1)
    made = wait_until(out, names, ["finished", "failed", "finished", "finished"])
    assert made["dies-b"][1].startswith("worker ended with exit code 3\nbegins in ")
    file = (out / "slurm" / f"{job}_submission.sh").read_text()
    assert "#SBATCH --array=0-1%1\n" in file and "#SBATCH --requeue\n" in file
    assert (
        control("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%P").split()
        == ["main"] * 2
    )
    # what failed goes again, what is done does not unless it is asked for
    assert submit(out, ["dies-b"], worker) not in (None, job)
    wait_until(out, names, ["finished", "failed", "finished", "finished"])
    assert len((out / "dies-b" / "log.txt").read_text().splitlines()) == 2


def test_requeued_preempted_and_timed_out_runs_go_on_and_finish(node, out, worker):
    """SLURM requeues the first, as at a preemption without a grace time; the second gets the signal
    of the time limit; the third is asked to end while its job goes on, as at the start of a grace
    time.
    """
    names = ["waits-requeued", "waits-timeout", "waits-asked"]
    job = submit(out, names, worker)
    wait_until(out, names, "running")
    end = time.time() + 40
    while not all((out / name / "log.txt").exists() for name in names):
        assert time.time() < end, "the runs do not begin"
        time.sleep(0.05)
    assert slurm.missing(out, names) == [] and submit(out, names, worker) is None, (
        "what is running is not submitted again"
    )
    control("scontrol", "requeue", f"{job}_0")
    control("scancel", "--signal=USR2", f"{job}_1")
    control("scancel", "--signal=TERM", f"{job}_2")
    wait_until(out, names, "queued")
    assert slurm.missing(out, names) == [] and not list(out.glob("*/failed.json"))
    wait_until(out, names, "finished")
    for name in names:
        assert (out / name / "checkpoint").read_text() == "stopped\n"
        assert [
            line.rpartition(" ")[2] for line in (out / name / "log.txt").read_text().splitlines()
        ] == ["0", "1"], "one start and one restart"
    assert slurm.submitted(out) == {name: f"{job}_{i}" for i, name in enumerate(names)}


def test_only_what_is_missing_is_submitted(node, out, worker):
    first = submit(out, ["waits-a", "waits-b"], worker, sbatch={"begin": "now+1hour", "time": "5"})
    wait_until(out, ["waits-a", "waits-b"], "queued")
    control("scancel", f"{first}_1")
    wait_until(out, ["waits-a", "waits-b"], ["queued", "unknown"])
    (out / "go").touch()
    names = ["waits-a", "waits-b", "ok-c"]
    options = Options({"partition": "main", "time": "5"})
    said = slurm.launch(out, names, dict.fromkeys(names, 3), options, worker).splitlines()
    second = said[0].removeprefix("job ").partition(":")[0]
    assert said[0] == f"job {second}: 2 runs submitted; its logs are in {out / 'slurm'}" and said[
        1
    ].startswith("3 unfinished runs: ")
    assert {name: task.partition("_")[0] for name, task in slurm.submitted(out).items()} == {
        "waits-a": first,
        "waits-b": second,
        "ok-c": second,
    }
    wait_until(out, ["waits-a", "waits-b", "ok-c"], ["queued", "finished", "finished"])
    control("scancel", first)


def test_the_words_of_sbatch_are_told(node, out, worker):
    with pytest.raises(
        UserError,
        match=(
            "^sbatch: invalid partition specified: nope; Batch job submission failed: Invalid"
            " partition name specified$"
        ),
    ):
        submit(out, ["ok-a", "ok-b"], worker, sbatch={"partition": "nope"})
    with pytest.raises(UserError, match="^sbatch: .*unrecognized option '--partiton=main'"):
        submit(out, ["ok-a"], worker, sbatch={"partiton": "main"})
    assert slurm.submitted(out) == {}


def test_a_task_that_left_no_trace_is_unknown(node, out):
    out.mkdir()
    (out / "slurm").mkdir()
    (out / "slurm" / "999.json").write_text('{"job": "999", "tasks": [["a"]]}')
    assert slurm.states(out, ["a"]) == {
        "a": ("unknown", "task 999 is no longer in the queue, and SLURM keeps no account of it")
    }
    assert slurm.missing(out, ["a"]) == ["a"]


def scripts(folder, monkeypatch, **said):
    """SLURM's commands in small: each prints what is given and ends with its exit code."""
    folder.mkdir(exist_ok=True)
    for name, (code, text) in said.items():
        (folder / name).write_text(
            f"#!/bin/sh\nprintf '%s' '{text}' >&{1 if code == 0 else 2}\nexit {code}\n"
        )
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_states_by_queue_accounts_and_folder(out, tmp_path, monkeypatch):
    (out / "slurm").mkdir(parents=True)
    (out / "slurm" / "9.json").write_text('{"job": "9", "tasks": [["old"], ["oom"]]}')
    (out / "slurm" / "10.json").write_text(
        '{"job": "10", "tasks": [["a", "b", "c"], ["old"], ["d"]]}'
    )
    scripts(
        tmp_path / "bin",
        monkeypatch,
        squeue=(0, "10_0|RUNNING\n10_1|PENDING\n10_2|COMPLETING\n"),
        sacct=(0, "9_0|FAILED\n9_1|OUT_OF_MEMORY\n"),
    )
    for name in ("a", "b", "old", "oom"):
        (out / name).mkdir()
    (out / "b" / "log.txt").touch()
    (out / "a" / "done.json").write_text("{}")
    (out / "old" / "failed.json").write_text(
        '{"name": "old", "exit": 1, "error": "of an earlier job"}'
    )
    (out / "oom" / "log.txt").write_text("its last line\n")
    assert slurm.states(out, ["a", "b", "c", "old", "oom", "d", "never"]) == {
        "a": ("finished", ""),
        "b": ("running", "10_0"),
        "c": ("queued", "10_0"),
        "old": ("queued", "10_1"),
        "oom": ("failed", "task 9_1: OUT_OF_MEMORY\nits last line"),
        "d": ("queued", "10_2"),
        "never": ("not submitted", ""),
    }
    (out / "b" / "failed.json").write_text('{"name": "b", "exit": 1, "error": "no\\nvalue"}')
    assert slurm.states(out, ["b", "c"]) == {"b": ("failed", "no\nvalue"), "c": ("queued", "10_0")}
    assert slurm.missing(out, ["b", "c", "old", "oom", "never"]) == ["oom", "never"], (
        "a task that runs has its failed run still"
    )

    scripts(
        tmp_path / "bin",
        monkeypatch,
        squeue=(1, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"),
    )
    assert slurm.states(out, ["a", "b", "c"]) == {
        "a": ("finished", ""),
        "b": ("failed", "no\nvalue"),
        "c": ("unknown", "squeue: Unable to contact slurm controller (connect failure)"),
    }
    with pytest.raises(UserError, match="Unable to contact slurm controller"):
        slurm.missing(out, ["c"])


def test_without_slurm_or_submitit(out, worker, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(
        UserError,
        match=(
            "^--launcher=slurm: no sbatch on this machine; run on a login node, or use"
            " --launcher=local$"
        ),
    ):
        submit(out, ["ok-a"], worker)
    dry = slurm.dry(out, ["ok-a", "ok-b"], Options({"partition": "main"}), worker).splitlines()
    assert "--partition=main" in dry[0] and "--array=0-1%2" in dry[0], "a dry run needs no SLURM"
    assert dry[1:] == [f"# task {i}: {' '.join(worker)} {out} ok-{x}" for i, x in enumerate("ab")]
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"needs submitit; pip install 'flexmemory\[slurm\]'"):
        submit(out, ["ok-a"], worker)
    assert not out.exists()


def test_the_sbatch_file_has_the_options_given(out, worker, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/a b")
    words = "partition=gpu account=me gres=gpu:1 cpus-per-task=8 mem=32G time=1-02:30:00 exclusive"
    flags = [f"--slurm.{word}" for word in words.split()]
    options = slurm.options_of([*flags, "--runs_per_job=2", "--max_parallel=3"])
    said = (0, "Submitted batch job 7")
    scripts(tmp_path / "bin", monkeypatch, sbatch=said, srun=(0, ""), squeue=(0, ""))
    names = [f"r{i}" for i in range(9)]
    assert slurm.submit(out, names, dict.fromkeys(names, 10), options, worker) == "7"
    assert slurm.submitted(out)["r8"] == "7_4"
    lines = (out / "slurm" / "7_submission.sh").read_text().splitlines()
    given = words + " requeue array=0-4%3 job-name=out"
    for word in [*given.split(), f"signal={signal.SIGUSR2.name[3:]}@90"]:
        assert f"#SBATCH --{word}" in lines
    assert any(line.startswith("srun ") and "--cpus-per-task=8" in line for line in lines)
    assert f"export PYTHONPATH='{ROOT}:/a b'" in lines
    dry = slurm.dry(out, names, options, worker).splitlines()
    assert all(f" --{word}" in dry[0] for word in given.split()) and len(dry) == 6


class Environment:
    job_id = "7_0"


def test_a_task_that_is_told_to_stop_requeues_itself_where_slurm_does_not(
    out, worker, tmp_path, monkeypatch
):
    """Signals and requeueing as submitit does them, without SLURM."""
    task, requeued = slurm.Task(out, {"waits-a": 10}, worker), []
    monkeypatch.setattr(slurm.load_submitit(), "JobEnvironment", Environment)
    before = signal.signal(signal.SIGUSR2, lambda *_: requeued.append(task.checkpoint(["waits-a"])))
    try:
        for state, number in (("RUNNING", signal.SIGTERM), ("COMPLETING", signal.SIGUSR2)):
            scripts(tmp_path / "bin", monkeypatch, squeue=(0, state))
            shutil.rmtree(out, ignore_errors=True)
            threading.Thread(target=signal_once_it_runs, args=(out / "waits-a", number)).start()
            with pytest.raises(SystemExit):
                task(["waits-a"])
            assert (out / "waits-a" / "checkpoint").read_text() == "stopped\n" and len(
                requeued
            ) == 1
        assert requeued[0].function is task and requeued[0].args == (["waits-a"],)
    finally:
        signal.signal(signal.SIGUSR2, before)


def signal_once_it_runs(folder, number):
    end = time.time() + 60
    while not (folder / "log.txt").exists() and time.time() < end:
        time.sleep(0.05)
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("--slurm.array=0-3", "--slurm.array: the launcher sets it"),
        ("--partition=gpu", "options of sbatch as --slurm.KEY=VALUE"),
        ("--runs_per_job=0", "--runs_per_job: '0' is not a positive number"),
        ("--max_parallel=", "--max_parallel: '' is not a positive number"),
    ],
)
def test_mistakes(word, says):
    with pytest.raises(UserError, match=says):
        slurm.options_of([word])


def test_an_option_is_kept_as_it_is_given():
    assert slurm.options_of(["--slurm.mail-user=a=b", "--slurm.exclusive"]) == Options(
        {"mail_user": "a=b", "exclusive": ""}
    )
    assert slurm.options_of([]) == Options()


def test_an_experiment_through_the_command_with_real_runs(node, out):
    command = [
        sys.executable,
        "-m",
        "experiments.run",
        "e4",
        "--scale=smoke",
        f"--out={out}",
        "--launcher=slurm",
        "--slurm.partition=main",
        "--slurm.time=10",
    ]
    made = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert made.returncode == 0, made.stderr
    missing = " ".join(
        line for line in made.stdout.splitlines() if line.startswith("missing")
    )  # waiting, or begun already
    assert "2 runs submitted" in made.stdout and "0 of 2 runs finished" in made.stdout
    assert "memoryllm-s0" in missing and "memoryllm-shared-norm-s0" in missing
    wait_until(out, ["memoryllm-s0", "memoryllm-shared-norm-s0"], "finished", seconds=180)
    made = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert (
        made.returncode == 0
        and "2 of 2 runs finished" in made.stdout
        and "submitted" not in made.stdout
    ), made.stdout + made.stderr
