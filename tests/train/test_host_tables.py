"""Tables in the host's memory: the same run to the bit as with tables on the device, whatever is
slow, and its errors are heard.
"""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from flexmemory.bench.train import prepare
from flexmemory.config import ParallelConfig
from flexmemory.data.pipeline import unique_rows
from flexmemory.errors import UserError
from flexmemory.models.memory import TABLE_BLOCK
from flexmemory.models.transformer import TABLE_KEYS
from flexmemory.run_folder import load_params, read_metrics
from flexmemory.train import host_tables
from flexmemory.train.host_tables import HostTables
from flexmemory.train.loop import TrainingInterrupted, resolve, train
from flexmemory.train.step import init_state, make_train_step

PATTERN = "stem dense stem-dagger stem"
RATES = ("_s", "mfu", "rows_per_token")


def on_host(cfg):
    return dataclasses.replace(cfg, parallel=ParallelConfig(table_memory="host"))


def same(a, b) -> bool:
    return jax.tree.all(
        jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), a, b)
    )


@pytest.mark.parametrize(
    "pattern, table_optimizer",
    [
        ("dense stem", "lazy_adam"),
        pytest.param(PATTERN, "lazy_adam", marks=pytest.mark.slow),
        pytest.param(PATTERN, "rowwise_adagrad", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_the_same_to_the_bit_and_may_move_in_the_middle(
    pattern, table_optimizer, tiny_config, tmp_path
):
    cfg = tiny_config(
        pattern,
        **{
            "optimizer.table_optimizer": table_optimizer,
            "train.eval_every": 2,
            "train.checkpoint_every": 3,
        },
    )
    made = {
        "device": train(cfg, tmp_path / "device", progress=False),
        "host": train(on_host(cfg), tmp_path / "host", progress=False),
    }
    for first, then, name in ((cfg, on_host(cfg), "to host"), (on_host(cfg), cfg, "to device")):
        calls = []
        with pytest.raises(TrainingInterrupted):
            train(
                first,
                tmp_path / name,
                progress=False,
                stop=lambda calls=calls: calls.append(1) or len(calls) == 2,
            )
        made[name] = train(then, tmp_path / name, progress=False)
    rows = {
        name: [
            {key: value for key, value in row.items() if not key.endswith(RATES)}
            for row in read_metrics(tmp_path / name)
        ]
        for name in made
    }
    params = load_params(tmp_path / "device")[1]
    for name, final in made.items():
        assert [row for row in rows[name] if "loss" in row] == [
            row for row in rows["device"] if "loss" in row
        ], name
        assert (
            final["val_loss"] == made["device"]["val_loss"]
            and final["kinds"] == made["device"]["kinds"]
        ), name
        assert same(load_params(tmp_path / name)[1], params), name
    assert (
        rows["host"] == rows["device"]
        and made["host"]["seconds"]["rows_wait"] > 0 == made["device"]["seconds"]["rows_wait"]
    )


@pytest.mark.parametrize("draw_bytes", [1 << 28, 1])
def test_fresh_tables_are_drawn_block_by_block_as_if_whole(draw_bytes, tiny_config, monkeypatch):
    monkeypatch.setattr(host_tables, "DRAW_BYTES", draw_bytes)
    cfg, _, _ = resolve(tiny_config(PATTERN, **{"optimizer.table_optimizer": "lazy_adam"}))
    tables = HostTables(on_host(cfg))
    assert same(tables.whole(tables.state), init_state(cfg))
    tables.close()


def test_first_rows_are_those_of_the_key_and_the_block_alone(tiny_config):
    """Whatever the vocabulary, the other layers and the number of rows drawn at a time."""
    cfg, _, _ = resolve(tiny_config("dense stem", **{"model.vocab_size": 2 * TABLE_BLOCK + 40}))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.train.seed), TABLE_KEYS), 1)
    (table_LVW,) = jax.tree.leaves(init_state(cfg)["params"]["tables"])
    std = np.float32((2 / (table_LVW.shape[1] + table_LVW.shape[2])) ** 0.5)
    for block in range(3):
        rows = jax.random.normal(jax.random.fold_in(key, block), (TABLE_BLOCK, cfg.model.d_ff))
        got = table_LVW[0, block * TABLE_BLOCK :][:TABLE_BLOCK]
        np.testing.assert_allclose(got, std * rows[: len(got)], rtol=1e-6)


def batches(cfg, count):
    """Every second one has the whole vocabulary's room; ids return from step to step, and some do
    not.
    """
    rng, vocab = np.random.default_rng(0), cfg.model.vocab_size
    for k in range(count):
        tokens = np.minimum(rng.zipf(1.5, (1, 4, 33)) - 1, vocab - 1).astype(np.int32)
        yield {
            "ids": tokens[..., :-1],
            "targets": tokens[..., 1:],
            **unique_rows(tokens[..., :-1], vocab, (128, vocab) if k % 2 else (vocab,)),
        }


def test_the_next_rows_are_there_before_the_last_ones_are_back(tiny_config, monkeypatch):
    cfg, _, _ = resolve(tiny_config(PATTERN, **{"optimizer.table_optimizer": "lazy_adam"}))
    step, state = make_train_step(cfg), init_state(cfg)
    for batch in batches(cfg, 6):
        state, _ = step(state, batch)
    tables, put_back, may_go = (
        HostTables(on_host(cfg)),
        HostTables._put_back,
        threading.Semaphore(0),
    )

    def slow(self, *args):
        assert may_go.acquire(
            timeout=60
        )  # the rows of a step wait for those of the step before, and these for it
        put_back(self, *args)

    monkeypatch.setattr(HostTables, "_put_back", slow)
    other, step = tables.state, make_train_step(on_host(cfg))
    for k, batch in enumerate(tables.ahead(map(jax.device_put, batches(cfg, 6)))):
        other, _ = step(
            tables.rows_in(other), batch
        )  # of step k - 1 nothing is back, and yet its rows are here
        tables.rows_out(other)
        if k:
            may_go.release()
    may_go.release()
    assert same(tables.whole(other), state)
    tables.close()


@pytest.mark.parametrize("part", ["_read", "_put_back"])
def test_an_error_in_the_background_ends_the_run(part, tiny_config, tmp_path, monkeypatch):
    calls, real = [], getattr(HostTables, part)

    def fails(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room for rows")
        return real(self, *args)

    monkeypatch.setattr(HostTables, part, fails)
    with pytest.raises(MemoryError, match="no room for rows"):
        train(
            on_host(tiny_config(PATTERN, **{"optimizer.table_optimizer": "lazy_adam"})),
            tmp_path / "run",
            progress=False,
        )
    assert not any(thread.name.startswith(("tables", "rows")) for thread in threading.enumerate())


def test_a_step_for_rows_refuses_whole_tables(tiny_config):
    cfg, _, _ = resolve(on_host(tiny_config(PATTERN, **{"optimizer.table_optimizer": "lazy_adam"})))
    batch = list(batches(cfg, 2))[1]
    with pytest.raises(ValueError, match="a step takes tables of its batch's rows"):
        make_train_step(cfg).trace(init_state(cfg), batch)
    with pytest.raises(
        UserError,
        match=(
            "config parallel.table_memory: host; these steps are measured with tables on the device"
        ),
    ):
        prepare(cfg, None)
