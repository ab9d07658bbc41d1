"""Loss, accumulation, and the golden first step of every kind."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexmemory.data.pipeline import make_batches, unique_rows
from flexmemory.data.shards import TokenShards
from flexmemory.exchange import dense_gradient, lookup
from flexmemory.models.blocks import KINDS
from flexmemory.models.parameters import join, path_name, split
from flexmemory.models.transformer import abstract_params
from flexmemory.train.loop import resolve
from flexmemory.train.step import abstract_state, init_state, make_gradients, make_train_step

GOLDEN = Path(__file__).parent / "golden_first_step.json"


def batch_of(cfg, accum=1):
    shards = TokenShards(cfg.data.path, "train")
    return make_batches(
        shards, seq_len=cfg.data.seq_len, batch_size=cfg.data.batch_size, seed=0, accum=accum
    )[0]


@pytest.mark.parametrize("table_optimizer", ["adamw", "lazy_adam", "rowwise_adagrad"])
def test_accumulation_of_micro_batches_is_one_batch(table_optimizer, tiny_config):
    # eps of 1 makes Adam's first update lr * g / (|g| + 1), smooth in g, so that gradients are
    # compared and not their signs
    made = []
    for accum in (1, 4) if table_optimizer != "adamw" else (1, 2, 4):
        sets = {
            "train.accum_steps": accum,
            "optimizer.eps": 1.0,
            "optimizer.table_optimizer": table_optimizer,
        }
        cfg, _, _ = resolve(
            tiny_config("flex memoryllm stem" if table_optimizer == "adamw" else "stem", **sets)
        )
        state, metrics = make_train_step(cfg)(init_state(cfg), batch_of(cfg, accum))
        made.append((state["params"], {name: float(value) for name, value in metrics.items()}))
    for params, metrics in made[1:]:
        for name, value in made[0][1].items():
            assert metrics[name] == pytest.approx(value, rel=2e-6), name
        assert jax.tree.all(
            jax.tree.map(
                lambda a, b: bool(np.abs(a - b).max() <= 1e-8 + 1e-6 * np.abs(b).max()),
                params,
                made[0][0],
            )
        )


def test_the_memory_of_a_step_does_its_work_once_however_the_batch_is_split(tiny_config):
    products = []
    for accum in (1, 4):
        cfg, _, _ = resolve(
            tiny_config("memoryllm", **{"train.accum_steps": accum, "model.scan_layers": False})
        )
        batch = batch_of(cfg, accum)
        traced = jax.make_jaxpr(full_gradients(cfg))(abstract_params(cfg.model), batch)
        products.append(sum(count_products(traced.jaxpr, batch["unique_ids"].size)))
    assert products[0] == products[1] == 9  # gate, up and down; each with its two gradients


def count_products(jaxpr, rows: int):
    """One per matrix product with a side of ``rows``, wherever it stands; those inside a scan count
    for every round.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general" and any(
            rows in getattr(v.aval, "shape", ()) for v in eqn.invars
        ):
            yield 1
        for inner in jax.tree.leaves(
            eqn.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield eqn.params.get("length", 1) * sum(count_products(inner, rows))


def full_gradients(cfg):
    """``gradients(params, batch)``: of every parameter, of its own size."""
    gradients = make_gradients(cfg)

    def call(params, batch):
        parts = split(params)
        addressed = {name: parts[name] for name in ("embed", "tables")}
        rows = lookup(addressed, batch["unique_ids"])
        (row_grads, grads), sums = gradients(rows, parts["backbone"], batch)
        ids_R = jnp.where(
            batch["places"] < len(batch["table_ids"]), batch["unique_ids"], cfg.model.vocab_size
        )
        return join({"backbone": grads, **dense_gradient(row_grads, ids_R, addressed)}), sums

    return call


def gradients_64(cfg, params, batch):
    """Gradients in float64, but for sums that the model asks for in float32."""
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, compute_dtype="float64"))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        return {
            path_name(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(
                jax.jit(full_gradients(cfg))(params, batch)[0]
            )
        }


MEMORY_KINDS = [kind for kind, block in KINDS.items() if block.source is not None]


@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_rows_once_per_unique_id_are_rows_once_per_token(kind, tiny_config):
    cfg, _, _ = resolve(tiny_config(f"dense {kind}"))
    batch, vocab = batch_of(cfg), cfg.model.vocab_size
    gradients, params, count = (
        jax.jit(full_gradients(cfg)),
        join(init_state(cfg)["params"]),
        batch["ids"].size,
    )
    one = np.full_like(batch["ids"], 7)
    for case, ids, sizes, size in (
        ("full", batch["ids"], (count,), count),
        ("tiny", one, (8, count), 8),
        ("overflow", batch["ids"], (8, count), count),
        ("whole vocabulary", batch["ids"], (vocab,), vocab),
    ):
        both = {"ids": ids, "targets": batch["targets"]}
        deduplicated = both | unique_rows(ids, vocab, sizes)
        places = np.arange(count, dtype=np.int32)
        naive = both | {
            "unique_ids": ids.ravel(),
            "inverse": places.reshape(ids.shape),
            "table_ids": ids.ravel(),
            "places": places,
        }
        assert len(deduplicated["unique_ids"]) == size, case
        (got, (loss, _)), (want, (naive_loss, _)) = (
            gradients(params, deduplicated),
            gradients(params, naive),
        )
        # a matmul of 8 rows may round otherwise than one of many
        assert float(loss) == (
            pytest.approx(float(naive_loss), rel=2e-7) if case == "tiny" else float(naive_loss)
        ), case
        largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(want))
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
        ):
            name = path_name(path)
            # where all keys are equal, the gradients of q and k are 0 but for rounding
            scale = (
                largest
                if case == "tiny" and name.endswith((".q", ".k"))
                else float(np.abs(b).max())
            )
            if (
                float(np.abs(a - b).max()) > 1e-6 * scale
            ):  # then because the naive sum, here of 384 tokens, is as far from float64
                exact = gradients_64(cfg, params, naive)[name]
                assert np.abs(a - exact).max() <= min(np.abs(b - exact).max(), 1e-6 * scale), (
                    case,
                    name,
                )


@pytest.mark.parametrize("table_optimizer", ["lazy_adam", "rowwise_adagrad"])
def test_only_touched_rows_of_a_table_and_its_moments_move(table_optimizer, tiny_config):
    cfg, _, _ = resolve(
        tiny_config(
            "dense stem stem-gate",
            **{"optimizer.table_optimizer": table_optimizer, "optimizer.table_weight_decay": 0.1},
        )
    )
    batch, state = batch_of(cfg), init_state(cfg)
    batch["ids"][batch["ids"] == 5] = 6  # token 5 occurs nowhere, and 0 only as padding
    batch["ids"][batch["ids"] == 0] = 6
    batch |= unique_rows(
        batch["ids"], cfg.model.vocab_size, (cfg.model.vocab_size // 2, cfg.model.vocab_size)
    )
    touched = np.zeros(cfg.model.vocab_size, bool)
    touched[batch["ids"]] = True
    before = jax.tree.map(np.array, state)
    after = jax.tree.map(np.array, make_train_step(cfg)(state, batch)[0])
    tables = [
        (before["params"]["tables"], after["params"]["tables"]),
        (before["optimizer"]["tables"], after["optimizer"]["tables"]),
    ]
    seen = 0
    for was, now in zip(
        *(jax.tree.leaves([pair[k] for pair in tables]) for k in (0, 1)), strict=True
    ):
        if was.ndim > 1:
            seen += 1
            np.testing.assert_array_equal(was[:, ~touched], now[:, ~touched])
            assert (
                (was[:, touched] != now[:, touched]).any(axis=-1).all()
                if was.ndim == 3
                else (was[:, touched] != now[:, touched]).all()
            )
    assert seen == 2 * (3 if table_optimizer == "lazy_adam" else 2)


def test_the_first_step_of_lazy_adam_is_that_of_adamw(tiny_config):
    """No moment has decayed yet. The clip is at work, so both see the same norm over tables and
    weights.
    """
    made = {}
    for name in ("adamw", "lazy_adam"):
        cfg, _, _ = resolve(
            tiny_config(
                "stem memoryllm",
                **{
                    "optimizer.table_optimizer": name,
                    "optimizer.clip_norm": 0.1,
                    "optimizer.eps": 1e-3,
                },
            )
        )
        made[name] = make_train_step(cfg)(init_state(cfg), batch_of(cfg))
    (dense, dense_metrics), (lazy, lazy_metrics) = made["adamw"], made["lazy_adam"]
    for name in ("loss", "grad_norm", "grad_norm/table"):
        assert float(lazy_metrics[name]) == pytest.approx(float(dense_metrics[name]), rel=1e-6), (
            name
        )
    assert float(dense_metrics["grad_norm"]) > 1
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(lazy["params"]),
        jax.tree.leaves(dense["params"]),
        strict=True,
    ):
        assert float(np.abs(a - b).max()) <= 1e-6 * float(np.abs(b).max()), path_name(path)


def test_padding_changes_no_figure_of_a_sparse_step(tiny_config):
    cfg, _, _ = resolve(
        tiny_config(
            "stem",
            **{"optimizer.table_optimizer": "lazy_adam", "optimizer.table_weight_decay": 0.1},
        )
    )
    batch, vocab, made = batch_of(cfg), cfg.model.vocab_size, []
    count, step = len(np.unique(batch["ids"])), make_train_step(cfg)
    for size in (count, count + 40, vocab):
        state = init_state(cfg)
        for _ in range(2):  # in the second, moments of rows that stand at padding are not 0
            state, metrics = step(state, batch | unique_rows(batch["ids"], vocab, (size,)))
        made.append({name: float(value) for name, value in metrics.items()})
    for metrics in made[1:]:
        assert metrics == pytest.approx(made[0], rel=1e-6)


def test_a_sparse_step_makes_nothing_of_the_size_of_a_table(tiny_config):
    sets = {
        "model.vocab_size": 50_000,
        "model.d_model": 8,
        "model.n_heads": 2,
        "model.d_ff": 256,
        "data.seq_len": 8,
        "data.batch_size": 2,
    }
    cfg, _, _ = resolve(tiny_config("stem stem", **sets))
    temporary = {}
    for name in ("lazy_adam", "rowwise_adagrad", "adamw"):
        cfg = dataclasses.replace(
            cfg, optimizer=dataclasses.replace(cfg.optimizer, table_optimizer=name)
        )
        compiled = make_train_step(cfg).lower(abstract_state(cfg), batch_of(cfg)).compile()
        temporary[name] = compiled.memory_analysis().temp_size_in_bytes
    table = 50_000 * 256 * 4
    assert (
        temporary["lazy_adam"] < table / 4
        and temporary["rowwise_adagrad"] < table / 4
        and temporary["adamw"] > table
    )


def test_a_bfloat16_step_is_a_float32_step_within_its_bound(tiny_config):
    made = {}
    for dtype in ("float32", "bfloat16"):
        cfg, _, _ = resolve(tiny_config("flex memoryllm stem", **{"model.compute_dtype": dtype}))
        made[dtype] = jax.jit(full_gradients(cfg))(join(init_state(cfg)["params"]), batch_of(cfg))
    (want, (loss, _)), (got, (low_loss, _)) = made["float32"], made["bfloat16"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))
    assert float(low_loss) == pytest.approx(float(loss), rel=1e-4)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, got, want)) < 0.02 * optax.tree.norm(want)


def test_z_loss_enters_the_gradient_but_not_the_reported_loss(tiny_config):
    norms, losses = [], []
    for weight in (0.0, 1.0):
        cfg, _, _ = resolve(tiny_config("dense", **{"train.z_loss": weight}))
        _, metrics = make_train_step(cfg)(init_state(cfg), batch_of(cfg))
        norms.append(float(metrics["grad_norm"]))
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1]
    assert norms[1] > 2 * norms[0]


def first_step(cfg) -> dict:
    cfg, _, _ = resolve(cfg)
    step, state, batch = make_train_step(cfg), init_state(cfg), batch_of(cfg)
    state, first = step(state, batch)
    _, second = step(state, batch)
    return {
        "loss": float(first["loss"]),
        "grad_norm": float(first["grad_norm"]),
        "loss_after": float(second["loss"]),
    }


@pytest.mark.parametrize("kind", [*KINDS, "flex-square"])
def test_golden_first_step(kind, tiny_config):
    sets = {"model.ffn_c_kind": "square"} if kind == "flex-square" else {}
    got = first_step(tiny_config(f"dense {kind.removesuffix('-square')}", **sets))
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for name, value in got.items():
        assert golden.get(kind, {}).get(name) == pytest.approx(value, rel=1e-4), (
            f"the first step of {kind} moved: {name} is {value!r}, golden {golden.get(kind)}. If"
            " the change is meant to alter the numbers (init, equation, optimiser, data), say so"
            f" in the commit and put {json.dumps(got)} under {kind!r} in {GOLDEN.name}; a"
            " refactoring must not move it."
        )
