"""Several processes are one: two of four devices on loopback, killed, asked to stop, restarted in
other numbers, started wrongly.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs import stem
from flexmemory.cli.main import main
from flexmemory.cluster import meet
from flexmemory.config import from_dict, load_json
from flexmemory.data import tokenizer as tokenizers
from flexmemory.errors import UserError
from flexmemory.run_folder import claim, complete_steps, read_metrics, started
from flexmemory.train.loop import train

ROOT = Path(__file__).parent.parent.parent
STEPS = 8
SMALL = {
    "model.pattern": "dense stem",
    "data.batch_size": 8,
    "data.seq_len": 96,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "train.eval_tokens": 1024,
    "optimizer.warmup_steps": 2,
    "optimizer.table_optimizer": "lazy_adam",
    "parallel.plan": "fsdp",
    "parallel.mesh": "data=2,fsdp=4",
}


def words(data, workdir, *more, **sets) -> list[str]:
    """``flexmemory train`` of a small stem model."""
    return [
        "train",
        f"--config={ROOT / 'configs' / 'stem.py'}:smoke",
        f"--workdir={workdir}",
        f"--config.data.path={data}",
        *(f"--config.{name}={value}" for name, value in (SMALL | sets).items()),
        *more,
    ]


def start(
    data,
    workdir,
    devices: int,
    process: int | None = None,
    processes: int = 2,
    port: int = 0,
    more=(),
    env=None,
    **sets,
) -> subprocess.Popen:
    """A process of its own with fake devices."""
    command = [
        sys.executable,
        "-m",
        "flexmemory.cli.main",
        *words(data, workdir, *more, **sets),
    ]
    if process is not None:
        command += [
            f"--coordinator=127.0.0.1:{port}",
            f"--processes={processes}",
            f"--process={process}",
        ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            **(env or {}),
        },
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def pair(data, workdir, sets=({}, {}), **more) -> list[subprocess.Popen]:
    port = free_port()
    return [
        start(data, workdir, 4, process, port=port, **more, **sets[process]) for process in range(2)
    ]


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit code, what it said on stderr) of each."""
    try:
        return [(process.wait(240), process.stderr.read()) for process in processes]
    finally:
        for process in processes:
            process.kill()


def losses(workdir) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(workdir) if "loss" in row}


def wait_for_step(workdir, step: int) -> None:
    deadline = time.monotonic() + 200
    while max(losses(workdir), default=0) < step:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def one_process(tiny_data, tmp_path_factory):
    """The same run on one device, in this process."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    cfg = stem.get_config("smoke")
    cfg.update_from_flattened_dict(
        SMALL | {"data.path": str(tiny_data), "parallel.plan": "single", "parallel.mesh": ""}
    )
    train(from_dict(cfg), workdir, progress=False)
    return workdir


def result(workdir) -> dict:
    return json.loads((workdir / "final_result.json").read_text())


def assert_same_run(workdir, other, bound=1e-5):
    assert losses(workdir).keys() == losses(other).keys() == set(range(1, STEPS + 1))
    for step, loss in losses(other).items():
        assert losses(workdir)[step] == pytest.approx(loss, rel=bound), step
    assert result(workdir)["val_loss"] == pytest.approx(result(other)["val_loss"], rel=bound)


@pytest.mark.slow
def test_two_processes_are_one_and_a_killed_one_is_no_loss(one_process, tiny_data, tmp_path):
    workdir = tmp_path / "run"
    processes = pair(tiny_data, workdir)
    wait_for_step(workdir, 4)
    processes[1].kill()
    assert processes[1].wait() == -signal.SIGKILL
    processes[0].kill()  # it notices by itself, but only after JAX's 100 s without a sign of life
    ended(processes)
    kept = complete_steps(workdir)
    assert kept and kept[-1] in (2, 4, 6)
    # and again, as SLURM would start them
    slurm = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    tasks = [
        start(
            tiny_data,
            workdir,
            4,
            more=["--distributed"],
            env=slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
        )
        for i in range(2)
    ]
    for code, said in ended(tasks):
        assert code == 0, said
    assert result(workdir)["resumed_from"] == kept[-1]
    assert json.loads((workdir / "run.json").read_text())["processes"] == 2
    assert_same_run(workdir, one_process)


def test_sigterm_to_one_stops_both_at_a_checkpoint_that_other_numbers_resume(
    one_process, tiny_data, tmp_path
):
    workdir = tmp_path / "run"
    on_host = {"train.eval_every": 1, "parallel.table_memory": "host"}
    processes = pair(
        tiny_data, workdir, **{"train.checkpoint_every": 0, "train.steps": STEPS} | on_host
    )
    wait_for_step(workdir, 2)
    processes[1].send_signal(signal.SIGTERM)
    made = ended(processes)
    assert [code for code, _ in made] == [128 + signal.SIGTERM] * 2, made
    assert ["the same command goes on from there" in said for _, said in made] == [
        True,
        False,
    ]  # process 0 speaks for both
    (step,) = complete_steps(workdir)
    assert 2 <= step < STEPS
    ((code, said),) = ended(
        [start(tiny_data, workdir, 2, **{"parallel.mesh": "fsdp=2", "train.checkpoint_every": 0})]
    )
    assert code == 0, said
    assert result(workdir)["resumed_from"] == step
    assert_same_run(workdir, one_process)


def test_different_configs_are_named_before_the_first_step(tiny_data, tmp_path):
    for code, said in ended(pair(tiny_data, tmp_path / "run", sets=({}, {"optimizer.lr": 0.02}))):
        assert code == 2
        assert (
            "error: config optimizer.lr: 0.001 on process 0, 0.02 on process 1; start all processes"
            " with the same" in said.splitlines()
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_different_data_are_named_before_the_first_step(tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    (tmp_path / "data" / "index.json").write_text(json.dumps(index | {"fingerprint": "another"}))
    for code, said in ended(
        pair(tiny_data, tmp_path / "run", sets=({}, {"data.path": str(tmp_path / "data")}))
    ):
        assert code == 2
        assert (
            f"error: data fingerprint: {index['fingerprint']!r} on process 0, 'another' on process"
            " 1; start all processes with the same" in said.splitlines()
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_what_is_missing_on_one_host_is_said_by_all(tiny_data, tmp_path):
    for code, said in ended(
        pair(tiny_data, tmp_path / "run", sets=({}, {"data.path": "/nowhere"}))
    ):
        assert code == 2 and len(said.splitlines()) == 1 and "/nowhere" in said, said


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_named(tiny_data, tmp_path):
    port = free_port()
    for code, said in ended(
        [
            start(tiny_data, tmp_path / f"run{process}", 4, process, port=port)
            for process in range(2)
        ]
    ):
        assert code == 2 and "--workdir" in said and "None on process 1" in said, said


def refused(capsys, command: list[str]) -> str:
    """In this process: what is refused before JAX joins the others needs none of its own."""
    assert main(command) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1, said
    return said


def test_a_process_that_never_comes_is_named(tiny_data, tmp_path, capsys):
    place = [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--process=0"]
    said = refused(capsys, words(tiny_data, tmp_path / "run", *place, "--start_timeout=1"))
    assert "error: process 1 of 2 did not come to 127.0.0.1:" in said and "within 1 s" in said


def test_a_number_given_twice_is_named():
    at = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(3) as pool:
        first, *others = [pool.submit(meet, at, 3, number, 2) for number in (0, 1, 1)]
        for each in (first, *others):  # process 0 tells the others why
            with pytest.raises(
                UserError, match="process: 1 was given to two processes; number them 0 to 2"
            ):
                each.result()


@pytest.mark.parametrize(
    "at", ["127.0.0.1", ":80", "127.0.0.1:0", "127.0.0.1:99999", "127.0.0.1:http"]
)
def test_a_place_that_is_none_is_named(at):
    with pytest.raises(
        UserError, match="coordinator: .* is not HOST:PORT with a port from 1 to 65535"
    ):
        meet(at, 2, 0, 2)


def test_one_that_is_kept_out_leaves_the_folder_as_it_is(one_process, tiny_data):
    cfg = load_json(one_process / "config.json")
    tokenizer, fingerprint = (
        tokenizers.load(tiny_data),
        json.loads((one_process / "run.json").read_text())["data_fingerprint"],
    )
    with claim(one_process, cfg, fingerprint, tokenizer):
        token = started(one_process)
        with pytest.raises(UserError, match="another process trains there"):
            claim(one_process, cfg, fingerprint, tokenizer)
        assert started(one_process) == token and token
    with claim(one_process, cfg, fingerprint, tokenizer):
        assert started(one_process) not in (token, "")


def test_a_stranger_at_the_meeting_place_does_not_disturb():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, f"127.0.0.1:{port}", 2, 0, 20)
        for word in (b"GET / HTTP/1.0", b""):
            while not first.done():
                with (
                    contextlib.suppress(ConnectionRefusedError),
                    socket.create_connection(("127.0.0.1", port)) as stranger,
                ):
                    stranger.sendall(word)
                    break
        pool.submit(meet, f"127.0.0.1:{port}", 2, 1, 20).result()
        first.result()


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--process=0"], "--coordinator, --processes: missing beside --process"),
        (
            ["--coordinator=127.0.0.1:1", "--processes=2", "--process=2"],
            "--process: 2 is outside 0..1 of --processes=2",
        ),
    ],
)
def test_a_wrong_start_is_one_line(flags, line, tiny_data, tmp_path, capsys):
    assert line in refused(capsys, words(tiny_data, tmp_path / "run", *flags))


def test_distributed_where_nothing_starts_processes_is_one_line(tiny_data, tmp_path):
    ((code, said),) = ended([start(tiny_data, tmp_path / "run", 1, more=["--distributed"])])
    assert code == 2 and len(said.splitlines()) == 1, said
    assert "--distributed: JAX does not see what starts the processes here" in said


@pytest.mark.slow
def test_one_device_plan_on_several_processes_is_refused(tiny_data, tmp_path):
    for code, said in ended(
        pair(tiny_data, tmp_path / "run", **{"parallel.plan": "single", "parallel.mesh": ""})
    ):
        assert (
            code == 2
            and "config parallel.plan: single in a run of 2 processes; set dp, fsdp or fsdp_tp"
            in said
        )
