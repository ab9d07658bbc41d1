"""The command line: one clear line and exit code 2 for a user's mistake, before any long work, nothing left behind."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from flexmemory.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
CONFIG = f"--config={ROOT / 'configs/quickstart.py'}:smoke"


def refused(capsys, *argv) -> str:
    assert main(list(argv)) == 2
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), said.err
    assert "Traceback" not in said.err
    return lines[0]


@pytest.mark.parametrize(("extra", "says"), [
    (["--config.model.d_mdoel=64"], "config model.d_mdoel: no such field 'd_mdoel'; did you mean 'd_model'?"),
    (["--config.modle.d_model=64"], "did you mean 'model'?"),
    (["--config.model.d_model=wide"], "config model.d_model: 'wide', give a whole number"),
    (["--config.model.d_model=64.5"], "config model.d_model: '64.5', give a whole number"),
    (["--config.optimizer.lr=fast"], "config optimizer.lr: 'fast', give a number"),
    (["--config.train.tensorboard=maybe"], "config train.tensorboard: 'maybe', give true or false"),
    (["--config.optimizer.min_lr=7"], "config optimizer.min_lr: 7.0 is above optimizer.lr"),
    (["--config.train.seed=4294967296"], "config train.seed: 4294967296 must be below 2^32"),
    (["--workdri=x"], "--workdri: no such flag; did you mean 'workdir'?"),
    (["--config.model.d_model"], "give a value"),
    (["--config.model.pattern=dense*2 memorylm"], "unknown layer 'memorylm', did you mean 'memoryllm'?, at 9"),
    (["--config.model.pattern="], "config model.pattern: empty"),
    (["--config.model.pattern=(dense"], "missing ')'"),
    (["--config.model.beta=9"], "config model.beta: 9 is outside 0..8"),
    (["--config.model.beta=1 2 3"], "3 values for 4 flex layers"),
    (["--config.model.ffn_c_kind=cubic"], "config model.ffn_c_kind: 'cubic' is not one of swiglu, square"),
    (["--config.data.batch_size=0"], "config data.batch_size: 0 must be above 0"),
    (["--config.train.accum_steps=3"], "config train.accum_steps: 3 does not divide data.batch_size 4"),
    (["--config.data.path="], "config data.path: empty"),
    (["--config.data.path=nowhere"], "nowhere"),
    (["--nonsense=3"], "nonsense"),
    (["stray"], "argument 'stray'"),
])
def test_train_refuses(extra, says, capsys, tmp_path, tiny_data):
    workdir = tmp_path / "run"
    assert says in refused(capsys, "train", CONFIG, f"--workdir={workdir}", f"--config.data.path={tiny_data}", *extra)
    assert not workdir.exists()


@pytest.mark.parametrize(("argv", "says"), [
    (["trian"], "did you mean 'train'?"),
    (["train", CONFIG], "--workdir: missing"),
    (["train", "--workdir=x"], "--config: missing"),
    (["train", "--config=configs/nothing.py", "--workdir=x"], "no file 'configs/nothing.py'"),
    (["params", f"--config={ROOT / 'configs/memoryllm.py'}:2b"], "no such size; known: 1b, 250m, 750m, smoke"),
    (["params", f"--config={ROOT / 'configs/memoryllm.py'}:1b,bta=3"], "config argument 'bta': no such option"),
    (["params", f"--config={ROOT / 'configs/memoryllm.py'}:1b,dense=99"], "99 is outside 0..24"),
    (["params", f"--config={ROOT / 'configs/stem.py'}:1b,kind=stemm"], "did you mean 'stem'?"),
    (["eval", "--workdir=nowhere"], "nowhere"),
    (["export", "--workdir=nowhere", "--out=x"], "nowhere"),
    (["generate", "--tkv=nowhere", "--prompt=a"], "nowhere"),
    (["verify", "--tkv=nowhere", "--workdir=nowhere"], "nowhere"),
    (["prepare", "--source=nowhere.txt", "--tokenizer=byte", "--out=x"], "nowhere.txt"),
])
def test_commands_refuse(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    made = subprocess.run([sys.executable, "-m", "flexmemory.cli.main", command, "--help"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "--" in made.stdout


def test_ctrl_c_ends_at_a_checkpoint_and_the_same_command_goes_on(tiny_config, tmp_path):
    import signal
    import time

    from flexmemory.train.checkpoint import complete_steps
    from flexmemory.train.run import read_metrics

    cfg = tiny_config("dense", **{"train.steps": 4000})
    sets = [f"--config.{section}.{name}={value}" for section, fields in dataclasses.asdict(cfg).items() for name, value in fields.items()]
    command = [sys.executable, "-m", "flexmemory.cli.main", "train", CONFIG, f"--workdir={tmp_path / 'run'}", *sets]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not read_metrics(tmp_path / "run") and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said and "the same command goes on" in said
    (step,) = complete_steps(tmp_path / "run")
    assert 0 < step < 4000 and f"stopped after step {step}" in said


def test_generate_prints_nothing_before_it_is_accepted(tiny_config, tmp_path, capsys):
    from flexmemory.tkv.export import export
    from flexmemory.train.loop import train

    train(tiny_config("memoryllm", **{"train.steps": 1}), tmp_path / "run", progress=False)
    export(tmp_path / "run", tmp_path / "store", progress=False)
    for extra, says in ((["--max_tokens=0"], "--max_tokens: 0"), (["--temperature=-1"], "--temperature"), (["--top_p=0"], "--top_p"),
                        (["--prompt=a\udcff"], "not valid Unicode")):
        capsys.readouterr()
        assert main(["generate", f"--tkv={tmp_path / 'store'}", *(extra if "prompt" in extra[0] else ["--prompt=Question:", *extra])]) == 2
        said = capsys.readouterr()
        assert said.out == "" and says in said.err


def test_a_missing_argument_is_a_users_mistake(capsys):
    assert "--workdir" in refused(capsys, "eval")


def test_a_closed_pipe_is_no_error():
    made = subprocess.run(f"{sys.executable} -m flexmemory.cli.main params --config={ROOT / 'configs/memoryllm.py'}:1b | head -1",
                          shell=True, capture_output=True, text=True)
    assert made.stderr == "" and made.stdout.startswith("pattern")
