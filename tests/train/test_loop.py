"""Runs: bit-equal resume, kill -9, faults, bad input."""

import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmemory.config import to_json
from flexmemory.errors import UserError
from flexmemory.run_folder import complete_steps, load_params, read_checkpoint, read_metrics
from flexmemory.train import checkpoint, loop
from flexmemory.train.clock import PARTS, Clock
from flexmemory.train.loop import TrainingDiverged, TrainingInterrupted, train

TRAIN = """
import os, signal, sys
from pathlib import Path
from flexmemory.config import load_json
from flexmemory.train.loop import train
config, workdir, fatal = load_json(Path(sys.argv[1])), sys.argv[2], sys.argv[3]
if fatal:
    # the commit of that checkpoint is the moment of the kill
    for module, name in ((os, "rename"), (os, "replace")):
        def deadly(source, target, *rest, real=getattr(module, name), **kwargs):
            if str(target).endswith("checkpoints/" + fatal):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(source, target, *rest, **kwargs)
        setattr(module, name, deadly)
train(config, workdir, progress=False)
"""


def start(cfg, workdir: Path, fatal: str = "") -> subprocess.Popen:
    config = workdir.with_suffix(".json")
    config.write_text(to_json(cfg))
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(config), str(workdir), fatal],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def equal(a, b) -> bool:
    return jax.tree.all(
        jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    )


def losses(workdir) -> dict:
    return {row["step"]: row["loss"] for row in read_metrics(workdir) if "loss" in row}


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory):
    """An uninterrupted run of 6 steps with a checkpoint every 2."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    cfg = tiny_config(
        **{"train.checkpoint_every": 2, "train.keep_checkpoints": 5, "train.eval_every": 3}
    )
    return cfg, workdir, train(cfg, workdir, progress=False)


def test_run_folder_stands_alone(whole):
    cfg, workdir, final = whole
    for name in (
        "config.json",
        "run.json",
        "tokenizer.json",
        "metrics.jsonl",
        "final_result.json",
        "compile.json",
        "checkpoints",
    ):
        assert (workdir / name).exists(), name
    assert final == json.loads((workdir / "final_result.json").read_text())
    assert complete_steps(workdir) == [2, 4, 6]
    assert {p.name for p in (workdir / "checkpoints" / "6").iterdir()} >= {
        "params",
        "optimizer",
        "data",
    }
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6]
    assert {
        "loss",
        "z_loss",
        "lr",
        "grad_norm",
        "grad_norm/table",
        "grad_norm/memory",
        "tokens",
        "data_wait_s",
    } <= set(rows[0])
    assert losses(workdir)[6] < losses(workdir)[1]


def test_resume_is_bit_identical(whole, tmp_path):
    cfg, workdir, final = whole
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    shutil.rmtree(copy / "checkpoints" / "6")
    again = train(cfg, copy, progress=False)
    assert again["resumed_from"] == 2
    assert equal(load_params(copy)[1], load_params(workdir)[1])
    assert losses(copy) == losses(workdir)
    assert again["val_loss"] == final["val_loss"]
    assert read_checkpoint(copy, 6, {"data": None})["data"]["step"] == 6


def test_killed_in_the_middle_of_a_save(whole, tmp_path):
    cfg, workdir, _ = whole
    killed = tmp_path / "killed"
    process = start(cfg, killed, fatal="4")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert complete_steps(killed) == [2], "a save that was not committed must not count"
    assert [p.name for p in (killed / "checkpoints").iterdir() if p.name.startswith("4")], (
        "the kill came before the save began"
    )
    again = train(cfg, killed, progress=False)
    assert again["resumed_from"] == 2
    assert equal(load_params(killed)[1], load_params(workdir)[1])
    assert losses(killed) == losses(workdir)


@pytest.mark.slow
def test_killed_at_any_moment(whole, tmp_path):
    cfg, workdir, _ = whole
    killed = tmp_path / "killed"
    process = start(cfg, killed)
    deadline = time.monotonic() + 120
    while not losses(killed) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    train(cfg, killed, progress=False)
    assert equal(load_params(killed)[1], load_params(workdir)[1])
    assert losses(killed) == losses(workdir)


@pytest.mark.parametrize(
    "table_optimizer", ["lazy_adam", pytest.param("rowwise_adagrad", marks=pytest.mark.slow)]
)
def test_tables_trained_by_their_rows_resume_to_the_same_bits(
    table_optimizer, tiny_config, tmp_path
):
    """Under accumulation; what comes after a checkpoint is the same only if moments and counts were
    restored.
    """
    cfg, workdir = (
        tiny_config(
            "stem",
            **{
                "train.checkpoint_every": 2,
                "train.steps": 4,
                "train.accum_steps": 2,
                "optimizer.table_optimizer": table_optimizer,
            },
        ),
        tmp_path / "run",
    )
    train(cfg, workdir, progress=False)
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    assert train(cfg, copy, progress=False)["resumed_from"] == 2
    assert equal(load_params(copy)[1], load_params(workdir)[1])


def test_a_diverging_run_stops_and_names_the_step(tiny_config, tmp_path, monkeypatch):
    # the learning rate jumps at the third step: two sound steps, then parameters beyond float32
    cfg = tiny_config(
        "memoryllm",
        **{
            "optimizer.lr": 1e38,
            "optimizer.min_lr": 1.0,
            "optimizer.warmup_steps": 10**6,
            "train.steps": 12,
            "train.checkpoint_every": 1,
        },
    )
    monkeypatch.setattr(
        "flexmemory.train.optimizer.schedule",
        lambda cfg, steps: lambda step: jnp.where(step < 2, 1e-3, 1e38),
    )
    with pytest.raises(
        TrainingDiverged, match=r"step 3: param_norm inf; last good checkpoint: .*checkpoints/2$"
    ):
        train(cfg, tmp_path / "run", progress=False)
    assert complete_steps(tmp_path / "run") == [1, 2]
    assert not (tmp_path / "run" / "final_result.json").exists()


def test_another_config_is_refused(whole, tiny_config):
    cfg, workdir, _ = whole
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match="model.d_ff is 88 there, 96 here"):
        train(
            tiny_config(**{"model.d_ff": 96, "train.checkpoint_every": 2}), workdir, progress=False
        )
    assert (workdir / "config.json").read_bytes() == before


def test_other_data_is_refused(whole, tiny_config, tmp_path):
    from flexmemory.data.prepare import prepare

    cfg, workdir, _ = whole
    prepare(
        "facts:people=4,docs=6,seed=1+tasks:n=60,eval=12,length=4,pairs=3",
        "bpe:400",
        tmp_path / "other",
        val_fraction=0.1,
        progress=False,
    )
    with pytest.raises(UserError, match="trained on other data"):
        train(
            tiny_config(
                **{
                    "data.path": str(tmp_path / "other"),
                    "train.checkpoint_every": 2,
                    "train.eval_every": 3,
                }
            ),
            workdir,
            progress=False,
        )


def test_a_foreign_folder_is_not_taken(tiny_config, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not a run folder"):
        train(tiny_config(), tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_vocabulary_and_sequence_must_fit_the_data(tiny_config, tmp_path):
    with pytest.raises(UserError, match="model.vocab_size: 300 is smaller"):
        train(tiny_config(**{"model.vocab_size": 300}), tmp_path / "a", progress=False)
    with pytest.raises(UserError, match=r"seq_len"):
        train(tiny_config(**{"data.seq_len": 10**6}), tmp_path / "b", progress=False)
    with pytest.raises(UserError, match=r"seq_len: 16 is shorter than the data's longest question"):
        train(tiny_config(**{"data.seq_len": 16}), tmp_path / "c", progress=False)
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Orbax leaves its other reads unawaited
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_named(whole, tmp_path, damage):
    _, workdir, _ = whole
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    files = sorted(
        (copy / "checkpoints" / "6" / "params").rglob("*"),
        key=lambda p: p.stat().st_size if p.is_file() else -1,
    )
    biggest = files[-1]
    if damage == "truncated":
        os.truncate(biggest, biggest.stat().st_size // 2)
    else:
        shutil.rmtree(copy / "checkpoints" / "6" / "params")
    with pytest.raises(UserError, match="checkpoint 6 .* is damaged"):
        load_params(copy)
    shutil.rmtree(copy / "checkpoints" / "6")
    assert load_params(copy)[2] == 4


def test_a_run_without_checkpoint_is_named(whole, tmp_path):
    (tmp_path / "config.json").write_text(to_json(whole[0]))
    with pytest.raises(UserError, match="no finished checkpoint"):
        load_params(tmp_path)


def test_metrics_are_the_same_on_tensorboard(tiny_config, tmp_path):
    train(
        tiny_config("dense", **{"train.tensorboard": True, "train.steps": 1}),
        tmp_path / "run",
        progress=False,
    )
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_a_finished_run_is_left_as_it_is(whole):
    cfg, workdir, final = whole
    before = {
        path.name: path.read_bytes()
        for path in workdir.iterdir()
        if path.suffix in (".json", ".jsonl") and path.name != "run.json"
    }
    assert train(cfg, workdir, progress=False) == final
    assert {name: (workdir / name).read_bytes() for name in before} == before


def test_killed_before_the_result_was_written(whole, tmp_path):
    """The counts behind tokens/s and rows per token are part of the checkpoint."""
    cfg, workdir, final = whole
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    (copy / "final_result.json").unlink()
    again = train(cfg, copy, progress=False)
    assert again["rows_per_token"] == final["rows_per_token"] > 0
    assert again["train_tokens_per_s"] == final["train_tokens_per_s"] > 0
    assert again["val_loss"] == final["val_loss"]
    assert [row["step"] for row in read_metrics(copy) if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_two_processes_do_not_share_a_run(whole, tmp_path):
    cfg, workdir, _ = whole
    with open(workdir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process trains there"):
            train(cfg, workdir, progress=False)


def test_leftovers_of_a_kill_at_the_very_start_do_not_block(tiny_config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json.tmp", ".lock"):
        (folder / name).write_text("{")
    assert train(tiny_config("dense", **{"train.steps": 1}), folder, progress=False)["step"] == 1


def test_an_unwritable_place_is_one_line(tiny_config):
    with pytest.raises(UserError, match="cannot be written"):
        train(tiny_config("dense"), "/dev/null/run", progress=False)


@pytest.mark.slow
def test_a_run_can_be_evaluated_from_anywhere(tiny_config, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_data.parent)
    train(
        tiny_config("dense", **{"train.steps": 1, "data.path": tiny_data.name}),
        tmp_path / "run",
        progress=False,
    )
    monkeypatch.chdir(tmp_path)
    made = subprocess.run(
        [sys.executable, "-m", "flexmemory.cli.main", "eval", "--workdir=run", "--max_tokens=100"],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr


def test_too_little_memory_is_not_called_damage(whole, monkeypatch):

    def load(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", load)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        load_params(whole[1])


def test_a_full_disk_is_one_line(tiny_config, tmp_path, monkeypatch):
    from flexmemory.train import loop

    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device")

    monkeypatch.setattr(loop.checkpoint, "save", full)
    with pytest.raises(
        UserError, match="the disk is full; make room and run the same command again"
    ):
        train(tiny_config("dense", **{"train.steps": 1}), tmp_path / "run", progress=False)


def test_asked_to_stop_it_saves_and_resumes_to_the_same_bits(whole, tmp_path):
    cfg, workdir, _ = whole
    calls = []
    with pytest.raises(TrainingInterrupted, match="stopped after step 3"):
        train(
            cfg, tmp_path / "run", progress=False, stop=lambda: calls.append(1) or len(calls) == 3
        )
    assert complete_steps(tmp_path / "run") == [2, 3]
    assert train(cfg, tmp_path / "run", progress=False)["resumed_from"] == 3
    assert equal(load_params(tmp_path / "run")[1], load_params(workdir)[1])
    assert losses(tmp_path / "run") == losses(workdir)


def test_every_second_has_a_name(whole):
    _, workdir, final = whole
    seconds = dict(final["seconds"])
    total = seconds.pop("total")
    assert set(seconds) == set(PARTS) and total == sum(seconds.values())
    none = {"profile", "rows_wait"}  # nothing is traced, tables lie on the device
    assert (
        min(seconds[part] for part in PARTS if part not in none)
        > 0
        == max(seconds[part] for part in none)
    )
    lines = [row for row in read_metrics(workdir) if "loss" in row]
    assert {f"{part}_s" for part in PARTS} <= set(lines[0])
    assert [lines[0]["step_s"], lines[0]["eval_s"]] < [
        lines[-1]["step_s"],
        lines[-1]["eval_s"],
    ] and lines[0]["eval_s"] == 0


def test_the_compiled_step_and_the_memory_are_described(whole):
    _, workdir, final = whole
    made = json.loads((workdir / "compile.json").read_text())
    steps = sorted(made["steps"], key=lambda step: step["rows"])
    assert made["device"] == jax.devices()[0].device_kind
    for step in steps:
        assert step["rows_per_token"] == step["rows"] / (4 * 96)
        assert (
            min(step["seconds"].values()) > 0
            and step["bytes"]["peak"] > step["bytes"]["arguments"] > step["bytes"]["aliased"] > 0
        )
    assert steps[0]["rows_per_token"] <= final["rows_per_token"] <= steps[-1]["rows_per_token"]
    least, most = (6 * steps[i]["flops"]["counted"] for i in (0, -1))
    assert 0.999999 * least <= final["flops"]["counted"] <= 1.000001 * most
    assert 0 < final["flops"]["saved_share"] < 1
    assert final["peak_bytes"]["process"] > 1 << 20


class Arriving:
    """A metric of a step; ``read`` is called when somebody waits for it."""

    def __init__(self, value, read):
        self.value, self.read = value, read

    def __array__(self, dtype=None, copy=None):
        self.read()
        return np.asarray(self.value)


def watch(monkeypatch, read) -> list[dict]:
    """Has ``read(step)`` called whenever metrics of a step are waited for. Returns the batches of
    the steps called so far.
    """
    compile_step, batches = loop.compile_step, []

    def compile_(*args):
        step, facts = compile_step(*args)

        def called(state, batch):
            state, metrics = step(state, batch)
            batches.append(batch)
            return state, {
                name: Arriving(value, functools.partial(read, len(batches)))
                for name, value in metrics.items()
            }

        return called, facts

    monkeypatch.setattr(loop, "compile_step", compile_)
    return batches


def test_the_loop_waits_for_the_step_before_never_for_the_newest(
    tiny_config, tmp_path, monkeypatch
):
    reads = set()
    batches = watch(monkeypatch, lambda step: reads.add((step, len(batches))))
    monkeypatch.setattr(jax, "block_until_ready", lambda *_: pytest.fail("the loop waits"))
    train(
        tiny_config("dense", **{"train.eval_every": 4, "train.log_every": 2}),
        tmp_path / "run",
        progress=False,
    )
    # the metrics of step 4, which is evaluated, and of the last one are read before another is
    # called
    assert sorted(reads) == [(1, 2), (2, 3), (3, 4), (4, 4), (5, 6), (6, 6)]
    assert all(isinstance(leaf, jax.Array) for batch in batches for leaf in batch.values()), (
        "batches come on the device"
    )


@pytest.mark.slow
def test_a_compilation_in_the_middle_is_no_training_time(
    tiny_config, tmp_path, monkeypatch, capsys
):
    """On a clock that moves by 1 for each step waited for, by 1,000 for each compilation."""
    arrived, sizes, compile_step = set(), [], loop.compile_step
    monkeypatch.setattr(loop, "Clock", lambda: Clock(lambda: len(arrived) + 1000.0 * len(sizes)))
    monkeypatch.setattr(loop, "make_batches", lambda *args, **kwargs: Sizes())
    monkeypatch.setattr(
        loop,
        "compile_step",
        lambda step, state, batch: (
            sizes.append(batch["unique_ids"].size) or compile_step(step, state, batch)
        ),
    )
    watch(monkeypatch, arrived.add)
    monkeypatch.setattr(
        "flexmemory.progress.ProgressLine.update", lambda line, done, text=None: print(text)
    )

    class Sizes:
        """R = 400, the vocabulary, and from the fourth batch on 384."""

        def __getitem__(self, k):
            ids = np.arange(4 * 96, dtype=np.int32).reshape(1, 4, 96) % 300
            unique = np.arange(400 if k < 3 else 384, dtype=np.int32)
            return {
                "ids": ids,
                "targets": ids,
                "inverse": ids,
                "unique_ids": unique,
                "table_ids": unique,
                "places": unique,
            }

    final = train(tiny_config("memoryllm"), tmp_path / "run", progress=False)
    assert (
        sizes == [400, 384]
        and final["seconds"]["compile"] == 2000
        and final["seconds"]["step"] == 6
    )
    assert (
        final["train_tokens_per_s"] == 4 * 96 == read_metrics(tmp_path / "run")[-2]["tokens_per_s"]
    )
    assert ["tokens_per_s" in row for row in read_metrics(tmp_path / "run")[:6]] == [
        False,
        True,
        True,
        False,
        True,
        True,
    ]  # each first one may be slow
    assert [
        step["rows"]
        for step in json.loads((tmp_path / "run" / "compile.json").read_text())["steps"]
    ] == sizes
    assert final["rows_per_token"] == pytest.approx((3 * 400 + 3 * 384) / (6 * 4 * 96))
    said = capsys.readouterr().out.splitlines()
    assert [text for text in said if "compiling" in text] == [
        "compiling for 400 rows",
        "compiling for 384 rows",
    ]


def traces(workdir) -> list[Path]:
    return list((workdir / "profile").rglob("*.xplane.pb"))


def test_a_trace_of_some_steps(whole, tiny_config, tmp_path, capsys):
    assert not (whole[1] / "profile").exists()
    cfg, run = tiny_config("dense"), tmp_path / "run"
    for steps in (range(5, 5), range(2), range(3, 8)):
        with pytest.raises(UserError, match="1 <= FIRST <= LAST <= 6"):
            train(cfg, run, progress=False, profile_steps=steps)
    calls = []
    with pytest.raises(TrainingInterrupted):  # while the trace is being made
        train(
            cfg,
            run,
            progress=False,
            profile_steps=range(2, 6),
            stop=lambda: calls.append(1) or len(calls) == 3,
        )
    (written,) = traces(run)
    assert b"step_num" in written.read_bytes()
    shutil.rmtree(run / "profile")
    final = train(cfg, run, progress=False, profile_steps=range(2, 6))  # goes on after step 3
    assert len(traces(run)) == 1 and final["seconds"]["profile"] > 0
    shutil.rmtree(run / "profile")
    train(cfg, run, progress=False, profile_steps=range(2, 6))
    assert (
        not traces(run)
        and "the run is at step 6, past those to profile; nothing is traced"
        in capsys.readouterr().err
    )
