"""The command line: one clear line and exit code 2 for a user's mistake, before any long work,
nothing left behind.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flexmemory.cli.flags import with_dashes
from flexmemory.cli.main import COMMANDS, main
from flexmemory.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIG = f"--config={ROOT / 'configs/quickstart.py'}:smoke"


def refused(capsys, *argv) -> str:
    assert main(list(argv)) == 2
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), said.err
    assert "Traceback" not in said.err
    return lines[0]


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (
            ["--config.model.d_mdoel=64"],
            "config model.d_mdoel: no such field 'd_mdoel'; did you mean 'd_model'?",
        ),
        (["--config.modle.d_model=64"], "did you mean 'model'?"),
        (["--config.model.d_model=wide"], "config model.d_model: 'wide', give a whole number"),
        (["--config.model.d_model=64.5"], "config model.d_model: '64.5', give a whole number"),
        (["--config.optimizer.lr=fast"], "config optimizer.lr: 'fast', give a number"),
        (
            ["--config.train.tensorboard=maybe"],
            "config train.tensorboard: 'maybe', give true or false",
        ),
        (["--config.optimizer.min_lr=7"], "config optimizer.min_lr: 7.0 is above optimizer.lr"),
        (["--config.train.seed=4294967296"], "config train.seed: 4294967296 must be below 2^32"),
        (["--workdri=x"], "--workdri: no such flag; did you mean 'workdir'?"),
        (["--config.model.d_model"], "give a value"),
        (
            ["--config.model.pattern=dense*2 memorylm"],
            "unknown layer 'memorylm', did you mean 'memoryllm'?, at 9",
        ),
        (["--config.model.pattern="], "config model.pattern: empty"),
        (["--config.model.pattern=(dense"], "missing ')'"),
        (["--config.model.beta=9"], "config model.beta: 9 is outside 0..8"),
        (["--config.model.beta=1 2 3"], "3 values for 4 flex layers"),
        (
            ["--config.model.ffn_c_kind=cubic"],
            "config model.ffn_c_kind: 'cubic' is not one of swiglu, square",
        ),
        (["--config.data.batch_size=0"], "config data.batch_size: 0 must be above 0"),
        (
            ["--config.train.accum_steps=3"],
            "config train.accum_steps: 3 does not divide data.batch_size 4",
        ),
        (["--config.data.path="], "config data.path: empty"),
        (["--config.data.path=nowhere"], "nowhere"),
        (["--nonsense=3"], "nonsense"),
        (["stray"], "argument 'stray'"),
    ],
)
def test_train_refuses(extra, says, capsys, tmp_path, tiny_data):
    workdir = tmp_path / "run"
    assert says in refused(
        capsys, "train", CONFIG, f"--workdir={workdir}", f"--config.data.path={tiny_data}", *extra
    )
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", CONFIG], "--workdir: missing"),
        (["train", "--workdir=x"], "--config: missing"),
        (["train", "--config=configs/nothing.py", "--workdir=x"], "no file 'configs/nothing.py'"),
        (
            ["params", f"--config={ROOT / 'configs/memoryllm.py'}:2b"],
            "no such size; known: 1b, 250m, 750m, smoke",
        ),
        (
            ["params", f"--config={ROOT / 'configs/memoryllm.py'}:1b,bta=3"],
            "config argument 'bta': no such option",
        ),
        (
            ["params", f"--config={ROOT / 'configs/memoryllm.py'}:1b,dense=99"],
            "99 is outside 0..24",
        ),
        (["params", f"--config={ROOT / 'configs/stem.py'}:1b,kind=stemm"], "did you mean 'stem'?"),
        (["eval", "--workdir=nowhere"], "nowhere"),
        (["export", "--workdir=nowhere", "--out=x"], "nowhere"),
        (["generate", "--tkv=nowhere", "--prompt=a"], "nowhere"),
        (["verify", "--tkv=nowhere", "--workdir=nowhere"], "nowhere"),
        (["prepare", "--source=nowhere.txt", "--tokenizer=byte", "--out=x"], "nowhere.txt"),
    ],
)
def test_commands_refuse(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as end:  # argparse's way
        code = end.code
    assert code == 0 and "--" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("tokens: 0 must be above 0", "--tokens: 0 must be above 0"),
        ("rank, rank_error: give one", "--rank, --rank_error: give one"),
        ("rank, other: give one", "rank, other: give one"),
        ("config rank.tokens: 3; set rank.tokens=2", "config rank.tokens: 3; set rank.tokens=2"),
        ("out: s3://a; give overwrite=True", "--out: s3://a; give --overwrite"),
        (
            "ram: 3; give a larger ram=, or rank=0.5",
            "--ram_budget: 3; give a larger --ram_budget, or --rank=0.5",
        ),
        ("(step=) beside ram=None", "(--step) beside --ram_budget=all"),
        ("run `train --rank=2`, mesh data=8,rank=2", "run `train --rank=2`, mesh data=8,rank=2"),
    ],
)
def test_the_command_line_adds_the_dashes(message, shown):
    options = {"tokens", "rank", "rank_error", "out", "overwrite", "step", "ram_budget"}
    aliases = {"ram": "ram_budget", "ram=None": "ram_budget=all"}
    assert with_dashes(message, options, aliases) == shown


def test_ctrl_c_ends_at_a_checkpoint_and_the_same_command_goes_on(tiny_config, tmp_path):
    import signal
    import time

    from flexmemory.run_folder import complete_steps, read_metrics

    cfg = tiny_config("dense", **{"train.steps": 4000})
    sets = [
        f"--config.{section}.{name}={value}"
        for section, fields in dataclasses.asdict(cfg).items()
        for name, value in fields.items()
    ]
    command = [
        sys.executable,
        "-m",
        "flexmemory.cli.main",
        "train",
        CONFIG,
        f"--workdir={tmp_path / 'run'}",
        *sets,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not read_metrics(tmp_path / "run") and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said and "the same command goes on" in said
    (step,) = complete_steps(tmp_path / "run")
    assert 0 < step < 4000 and f"stopped after step {step}" in said


def test_generate_prints_nothing_before_it_is_accepted(tiny_run, tmp_path, capsys):
    from flexmemory.tkv.export import export

    export(tiny_run[1], tmp_path / "store", progress=False)
    for extra, says in (
        (["--max_tokens=0"], "--max_tokens: 0"),
        (["--temperature=-1"], "--temperature"),
        (["--top_p=0"], "--top_p"),
        (["--prompt=a\udcff"], "not valid Unicode"),
    ):
        capsys.readouterr()
        assert (
            main(
                [
                    "generate",
                    f"--tkv={tmp_path / 'store'}",
                    *(extra if "prompt" in extra[0] else ["--prompt=Question:", *extra]),
                ]
            )
            == 2
        )
        said = capsys.readouterr()
        assert said.out == "" and says in said.err


@pytest.fixture
def run_folder(tiny_run):
    return tiny_run[1]


def output(capsys, *argv) -> str:
    assert main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


def loss_of_the_fold(run_folder, out) -> float:
    """With rows computed from the weights in calls of the shape that the manifest of ``out``
    records.
    """
    from flexmemory.data.shards import TokenShards
    from flexmemory.evals.perplexity import perplexity
    from flexmemory.run_folder import load_params
    from flexmemory.tkv import encoding, fold
    from flexmemory.tkv.manifest import read_manifest
    from flexmemory.tkv.storage.location import open_location

    (cfg, params, _), manifest = load_params(run_folder, None), read_manifest(open_location(out))
    (group,) = manifest.groups
    blocks = fold.fold_table(
        params,
        {group.name: ()},
        cfg=cfg.model,
        groups=manifest.groups,
        fold_rows=manifest.fold_rows,
        shard_rows=manifest.shard_rows,
    )
    table_VB = np.concatenate([bundles[group.name] for _, bundles in blocks])

    def rows(ids_R):
        return {
            group.name: encoding.jitted_decode(
                group.layout,
                encoding.host_view(group.layout, table_VB[ids_R]),
                (),
                cfg.model.compute_dtype,
            )
        }

    return perplexity(cfg, params, TokenShards(cfg.data.path, "val"), max_tokens=0, rows_of=rows)[
        "loss"
    ]


def test_the_papers_tables_7_and_8_are_commands(run_folder, tmp_path, capsys):
    """export prints sizes and errors; eval --tkv the loss with those rows: with exact ones that of
    the live fold, to the bit, and the run's, whose rows are computed in matmuls of another shape;
    further off with coarser ones.
    """
    whole = json.loads(output(capsys, "eval", f"--workdir={run_folder}"))
    losses = {}
    for name, options in (
        ("float32", []),
        ("int8", ["--dtype=int8"]),
        ("int4", ["--dtype=int4"]),
        ("half", ["--rank=0.5"]),
    ):
        said = output(
            capsys, "export", f"--workdir={run_folder}", f"--out={tmp_path / name}", *options
        )
        assert ("relative RMS" in said) == (name != "float32") and "rows, " in said
        made = json.loads(
            output(capsys, "eval", f"--tkv={tmp_path / name}", f"--workdir={run_folder}")
        )
        losses[name] = made["loss"]
        assert made["table_bytes"] < 400 * 32 * 4 or name == "float32"
    assert losses["float32"] == loss_of_the_fold(run_folder, tmp_path / "float32")
    assert losses["float32"] == pytest.approx(whole["loss"], rel=2e-7) and losses[
        "int8"
    ] != pytest.approx(whole["loss"], rel=2e-7)
    assert abs(losses["int8"] - whole["loss"]) < abs(losses["int4"] - whole["loss"]) < 0.1


def test_plan_and_generate_with_budgets(run_folder, tmp_path, capsys):
    store = tmp_path / "store"
    output(capsys, "export", f"--workdir={run_folder}", f"--out={store}")
    said = output(
        capsys, "generate", f"--tkv={store}", "--plan", "--max_batch=4", "--hot_budget=5%"
    )
    assert "100.00%" in said and "proposed" in said
    texts = {
        output(
            capsys, "generate", f"--tkv={store}", "--prompt=Question:", "--max_tokens=8", *options
        )
        for options in (
            ["--ram_budget=all"],
            ["--ram_budget=0"],
            ["--ram_budget=10%", "--ram_policy=static", "--hot_budget=5%"],
            ["--read_ahead=3"],
            ["--ram_policy=window", "--window=2"],
            ["--no_check"],
        )
    }
    assert len(texts) == 1 and texts.pop().startswith("Question:")
    assert (
        main(
            ["generate", f"--tkv={store}", "--prompt=a", "--prompt=b", "--max_tokens=3", "--stats"]
        )
        == 0
    )
    said = capsys.readouterr()
    stats = json.loads(said.err.strip().splitlines()[-1])
    assert said.out.startswith("--- 1\na") and "\n--- 2\nb" in said.out
    assert (
        stats["rows"]["cold"]["rows"] > 0
        and stats["peak_rss_bytes"] > 1 << 20
        and stats["first_token_seconds"] > stats["open_seconds"] > 0
    )
    (store / "counts.npy").unlink()
    assert "missing" in refused(capsys, "generate", f"--tkv={store}", "--plan")


def test_sizes_of_budgets():
    from flexmemory.cli.generate import parse_bytes

    assert [
        parse_bytes("ram_budget", text, 1000)
        for text in ("0", "4096", "64MiB", "1.5GiB", "2 kB", "5%")
    ] == [0, 4096, 64 << 20, 3 << 29, 2000, 50]
    for text in ("", "64mib", "-1", "lots", "64MiBs", "%"):
        with pytest.raises(UserError, match="--ram_budget"):
            parse_bytes("ram_budget", text, 1000)


def test_bench_refuses(capsys, tmp_path):
    assert "did you mean 'decode'" in refused(capsys, "bench", "decod")
    assert "--scale: 'huge'" in refused(capsys, "bench", "read", "--scale=huge")
    assert "is not a folder" in refused(capsys, "bench", "read", f"--dir={tmp_path / 'nowhere'}")


def test_bench_writes_its_json(capsys, tmp_path):
    said = output(
        capsys,
        "bench",
        "export",
        "--scale=smoke",
        f"--dir={tmp_path}",
        f"--out={tmp_path / 'x.json'}",
    )
    assert json.loads(said) == json.loads((tmp_path / "x.json").read_text()) and [
        path.name for path in tmp_path.iterdir()
    ] == ["x.json"]


def test_a_missing_argument_is_a_users_mistake(capsys):
    assert "--workdir" in refused(capsys, "eval")


def test_a_closed_pipe_is_no_error():
    made = subprocess.run(
        f"{sys.executable} -m flexmemory.cli.main params"
        f" --config={ROOT / 'configs/memoryllm.py'}:1b | head -1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert made.stderr == "" and made.stdout.startswith("pattern")


IN_A_COLLECTION = """
import gc, os, signal, sys, time
from flexmemory.cli.flags import with_dashes
from flexmemory.cli.main import interrupt

def _xla_gc_callback(*_):
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0)

signal.signal(signal.SIGINT, interrupt)
gc.callbacks.append(_xla_gc_callback)
gc.collect()
try:
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(7)
"""


def test_an_interrupt_in_a_garbage_collection_is_not_lost():
    assert subprocess.run([sys.executable, "-c", IN_A_COLLECTION]).returncode == 7


WITHOUT_JAX = """
import sys
from flexmemory.cli.main import COMMANDS, main

for command in COMMANDS:
    try:
        assert main([command, "--help"]) == 0
    except SystemExit as end:
        assert end.code == 0
for argv in (
    ["train", CONFIG],
    ["train", CONFIG, "--workdir=x", "--config.optimizer.lr=0"],
    ["train", CONFIG, "--workdir=x", "--config.model.d_mdoel=3"],
    ["params", CONFIG, "--config.train.accum_steps=3"],
    ["plan", CONFIG],
    ["eval"],
    ["export", "--out=x"],
    ["verify", "--tkv=x"],
    ["generate", "--tkv=x"],
    ["bench", "read", "--scale=huge"],
    ["prepare", "--source=nowhere.txt", "--tokenizer=byte", "--out=x"],
):
    assert main(argv) == 2, argv
heavy = {"jax", "flax", "orbax", "tensorstore", "grain"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
assert main(["params", CONFIG, "--config.model.vocab_size=400"]) == 0
assert not {"orbax", "tensorstore", "grain"} & sys.modules.keys()
"""


def test_help_and_refusals_do_not_import_jax(tmp_path):
    script = WITHOUT_JAX.replace("CONFIG", repr(CONFIG))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
