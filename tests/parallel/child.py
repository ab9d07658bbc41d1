"""A process with fake devices: ``python -m parallel.child DEVICES WHAT [ARGUMENTS]`` prints JSON.
The tests say what each WHAT is for.
"""

import dataclasses
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))

from jax import P
from jax.sharding import NamedSharding

from flexmemory import exchange, parallel
from flexmemory.config import Config, DataConfig, OptimizerConfig, ParallelConfig, TrainConfig
from flexmemory.data.pipeline import unique_rows
from flexmemory.models.blocks import check_model
from flexmemory.models.config import ModelConfig
from flexmemory.models.transformer import abstract_params, drawing, fresh_params
from flexmemory.train.collectives import collectives
from flexmemory.train.compiled import memory
from flexmemory.train.host_tables import HostTables
from flexmemory.train.step import init_state, make_train_step

B, T, V, STEPS = 16, 16, 96, 20
TABLE_SIZES = (24, 40)  # of batches on several sections; larger ones take as much as may be needed
ALL = "dense memoryllm flex stem"


def config(
    pattern=ALL, plan="single", mesh="", table_optimizer="adamw", accum=1, masked=False, **model
) -> Config:
    model = ModelConfig(
        pattern=pattern,
        **(dict(vocab_size=V, d_model=32, n_heads=4, d_ff=64, init_std=0.1) | model),
    )
    check_model(model)
    return Config(
        model,
        DataConfig(seq_len=T, batch_size=B, document_mask=masked),
        TrainConfig(steps=STEPS, accum_steps=accum),
        OptimizerConfig(table_optimizer=table_optimizer, warmup_steps=2, table_weight_decay=0.1),
        ParallelConfig(plan, mesh),
    )


def batches(cfg: Config, sections: int):
    """Zipf tokens, the same whatever the cut; every fifth batch of one token alone (not the first:
    there q and k have no gradient but rounding, which Adam's first step would make as large as
    any).
    """
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        tokens = np.minimum(
            rng.zipf(1.3, (cfg.train.accum_steps, B // cfg.train.accum_steps, T + 1)) - 1, V - 1
        ).astype(np.int32)
        tokens = tokens if step % 5 != 4 else np.full_like(tokens, 7)
        segments = (
            {
                "segments": np.cumsum(
                    rng.random(tokens[..., 1:].shape) < 0.2, axis=-1, dtype=np.int32
                )
            }
            if cfg.data.document_mask
            else {}
        )
        vocab = cfg.model.vocab_size
        yield {
            "ids": tokens[..., :-1],
            "targets": tokens[..., 1:],
            **segments,
            **unique_rows(tokens[..., :-1], vocab, (64, vocab), sections, table_sizes=TABLE_SIZES),
        }


def run(cfg: Config, devices=None):
    """(state as NumPy, losses, last metrics, where arrays lie, kinds of memory that hold the
    tables)
    """
    mesh = parallel.make_mesh(cfg.parallel, devices)
    with jax.set_mesh(mesh) if mesh else jax.default_device(jax.devices()[0]):
        step, put, losses = make_train_step(cfg), parallel.batch_loader(), []
        if cfg.parallel.table_memory == "host":
            tables = HostTables(cfg)
            state = tables.whole(tables.state)
        else:
            tables, state = None, init_state(cfg)
        lies = (
            {name: str(leaf.sharding.spec) for name, leaf in named(state).items()} if mesh else {}
        )
        made = map(put, batches(cfg, parallel.sections()))
        for batch in tables.ahead(made) if tables else made:
            state, metrics = step(tables.rows_in(state) if tables else state, batch)
            if tables:
                tables.rows_out(state)
            losses.append(float(metrics["loss"]))
        if tables:
            state = tables.whole(state)
            tables.close()
        assert not mesh or lies == {
            name: str(leaf.sharding.spec) for name, leaf in named(state).items()
        }
        memory = sorted(
            {
                leaf.sharding.memory_kind
                for name, leaf in named(state).items()
                if name.endswith(".table") and leaf.ndim == 3
            }
        )
        return (
            jax.tree.map(np.asarray, state),
            losses,
            {name: float(value) for name, value in metrics.items()},
            lies,
            memory,
        )


def named(tree) -> dict:
    return {
        parallel.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def equality(pattern, plan, mesh, table_optimizer, accum, tied):
    """Largest relative distances to one device: of losses, of metrics, of parameters (norm of the
    difference over the norm, of each array). Two heads share keys and values; under fsdp_tp
    attention stays inside documents.
    """
    model = {"tied_head": tied == "tied", "n_kv_heads": 2}
    many, one = (
        run(config(pattern, *where, table_optimizer, int(accum), plan == "fsdp_tp", **model))
        for where in ((plan, mesh), ("single", ""))
    )
    gaps = {
        name: float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
        for (name, a), b in zip(
            named(many[0]["params"]).items(), jax.tree.leaves(one[0]["params"]), strict=True
        )
    }
    return {
        "loss": max(abs(a - b) / b for a, b in zip(many[1], one[1], strict=True)),
        "losses": one[1],
        "params": gaps,
        "metrics": {
            name: abs(many[2][name] - value) / max(abs(value), 1e-30)
            for name, value in one[2].items()
        },
        "lies": many[3],
    }


def host_memory(plan, mesh, table_optimizer):
    """Distances of a run whose tables lie in the host's memory from one whose do not, and where
    they lay at its end.
    """
    cfg = config("dense stem", plan, mesh, table_optimizer)
    host = dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, table_memory="host"))
    one, other = run(cfg), run(host)
    different = [
        name
        for (name, a), b in zip(named(other[0]).items(), jax.tree.leaves(one[0]), strict=True)
        if a.tobytes() != b.tobytes()
    ]
    return {"different": different, "losses": [one[1], other[1]], "memory": [one[4], other[4]]}


def unit_mesh():
    """Is a mesh of one device the run without a mesh, to the bit?"""
    made = [
        run(
            config("flex stem", plan, "data=1" if plan == "dp" else "", "lazy_adam", 2),
            jax.devices()[:1],
        )
        for plan in ("single", "dp")
    ]
    return {
        "equal": (
            jax.tree.all(
                jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), made[0][0], made[1][0])
            )
            and made[0][1] == made[1][1]
        )
    }


def traffic():
    """Collectives of a row-sparse update for V and 8 V, and of a whole step whose tables are by far
    the largest arrays.
    """
    found = {}
    for v in (512, 4096):
        cfg = config(
            "stem stem", "fsdp", "fsdp=8", "lazy_adam", vocab_size=v, d_model=8, n_heads=2, d_ff=256
        )
        with jax.set_mesh(parallel.make_mesh(cfg.parallel)):
            state, put = init_state(cfg), parallel.batch_loader()
            batch = put(next(batches(cfg, 8)))
            table = state["params"]["tables"]["memory"]["stacks"]["stack0"]["table"]

            def update(table, unique_R, ids_C, places_R, cfg=cfg):
                from flexmemory.train.tables import apply_rows, make_table_optimizer

                optimizer, tables = make_table_optimizer(cfg.optimizer, STEPS), {"a": table}
                moments = optimizer.init(tables)
                rows = exchange.lookup(tables, unique_R)
                grads, whole = exchange.sum_over_sections(rows, rows, ids_C, places_R, tables)
                updates, moments = optimizer.update(grads, moments, whole, ids_R=ids_C)
                return apply_rows(tables, updates, ids_C), moments

            lookup = collectives(
                jax.jit(update)
                .lower(table, *(batch[name] for name in ("unique_ids", "table_ids", "places")))
                .compile()
                .as_text()
            )
            step = (
                collectives(make_train_step(cfg).lower(state, batch).compile().as_text())
                if v == 4096
                else []
            )
        found[v] = {
            "lookup": lookup,
            "step": step,
            "table_bytes": table.nbytes,
            "rows": batch["unique_ids"].size // 8,
        }
    return found


def fresh():
    """Bytes that a device needs to draw its parameters, and those of all tables."""
    cfg = config("stem*4", "fsdp", "fsdp=8", vocab_size=8192, d_ff=256)
    with jax.set_mesh(parallel.make_mesh(cfg.parallel)):
        places = parallel.placed(cfg, abstract_params(cfg.model))
        need = memory(drawing(lambda: fresh_params(cfg.model, 0), places).lower().compile())
    return {"device": need["temporaries"] + need["outputs"], "tables": 4 * 8192 * 256 * 4}


def balance():
    """Numbers of a table that each device reads in a lookup of Zipf ids, by columns as we cut it
    and by rows.
    """
    rng, vocab, width = np.random.default_rng(0), 4096, 64
    tokens_SN = np.minimum(rng.zipf(1.1, (8, 512)) - 1, vocab - 1)
    mesh = parallel.make_mesh(ParallelConfig("fsdp", "data=2,fsdp=4"))
    table = jax.device_put(
        np.zeros((vocab, width), np.float32), NamedSharding(mesh, parallel.Plan.table_VW)
    )
    reads = {"columns": [], "rows": []}
    unique = [np.unique(tokens) for tokens in tokens_SN]
    for shard in table.addressable_shards:
        rows, columns = (
            range(*index.indices(size))
            for index, size in zip(shard.index, table.shape, strict=True)
        )
        reads["columns"].append(sum(int(np.isin(ids, rows).sum()) for ids in unique) * len(columns))
    for device in range(8):
        reads["rows"].append(
            sum(
                int(((ids >= device * vocab // 8) & (ids < (device + 1) * vocab // 8)).sum())
                for ids in unique
            )
            * width
        )
    return {name: max(counts) / (sum(counts) / len(counts)) for name, counts in reads.items()}


def train(config_file, workdir, stop_after):
    """A run through the training loop, asked to stop after so many steps of this process."""
    from pathlib import Path

    from flexmemory.config import load_json
    from flexmemory.train.loop import TrainingInterrupted
    from flexmemory.train.loop import train as train_run

    calls = []
    try:
        return train_run(
            load_json(Path(config_file)),
            workdir,
            progress=False,
            stop=lambda: calls.append(1) or len(calls) == int(stop_after),
        )
    except TrainingInterrupted as error:
        return {"stopped": str(error)}


def lookups(seed):
    """Lookups, their dense gradients and their combined ones on several cuts of tables of several
    shapes, beside NumPy.
    """
    rng, bad = np.random.default_rng(int(seed)), []
    for plan, mesh in (
        ("dp", "data=8"),
        ("fsdp", "data=2,fsdp=4"),
        ("fsdp_tp", "data=2,fsdp=2,tensor=2"),
        ("fsdp_tp", "tensor=8"),
    ):
        with jax.set_mesh(parallel.make_mesh(ParallelConfig(plan, mesh))) as _:
            mesh_now, cut = jax.sharding.get_mesh(), parallel.PLANS[plan][0]
            sections, vocab, rows = parallel.sections(), 40, 6
            shapes = {
                "embed": ((vocab, 16), cut.embed_VD),
                "a": ((3, vocab, 8), cut.table_VW),
                "b": ((1, vocab, 24), cut.table_VW),
            }
            put = lambda a, spec: jax.device_put(
                a, NamedSharding(mesh_now, parallel.padded(spec, a.ndim))
            )  # noqa: E731
            plain = {
                name: rng.standard_normal(shape).astype(np.float32)
                for name, (shape, _) in shapes.items()
            }
            tables = {name: put(plain[name], spec) for name, (_, spec) in shapes.items()}
            ids = np.concatenate(
                [
                    np.append(rng.permutation(vocab)[: rows - 2], [vocab, vocab])
                    for _ in range(sections)
                ]
            ).astype(np.int32)
            ids_R = put(ids, P(parallel.BATCH))
            ids_C = (
                ids if sections == 1 else np.append(np.unique(ids), [vocab, vocab]).astype(np.int32)
            )
            place = {i: place for place, i in enumerate(ids_C.tolist())} | {vocab: len(ids_C)}
            places_R = put(np.array([place[i] for i in ids.tolist()], np.int32), P(parallel.BATCH))
            got = jax.jit(exchange.lookup)(tables, ids_R)
            want = {
                name: np.take(table, np.minimum(ids, vocab - 1), axis=-2)
                for name, table in plain.items()
            }
            bad += [
                (plan, mesh, "lookup", name)
                for name in want
                if not np.array_equal(got[name], want[name])
            ]
            # whole numbers, so that sums are exact in any order
            grads = {
                name: np.round(10 * rng.standard_normal(want[name].shape)).astype(np.float32)
                for name in want
            }
            placed = {name: jax.device_put(grads[name], got[name].sharding) for name in got}
            dense = jax.jit(exchange.dense_gradient)(placed, ids_R, tables)
            summed = {name: np.zeros_like(table) for name, table in plain.items()}
            for place, i in enumerate(ids):
                for name in summed:
                    if i < vocab:
                        summed[name][..., i, :] += grads[name][..., place, :]
            bad += [
                (plan, mesh, "dense", name)
                for name in summed
                if not np.array_equal(dense[name], summed[name])
            ]
            bad += [
                (plan, mesh, "lies", name)
                for name in summed
                if dense[name].sharding.spec != tables[name].sharding.spec
            ]
            sparse = {name: tables[name] for name in ("a", "b")}
            made, whole = jax.jit(exchange.sum_over_sections)(
                {n: placed[n] for n in sparse},
                {n: got[n] for n in sparse},
                put(ids_C, P(None)),
                places_R,
                sparse,
            )
            real = ids_C < vocab
            for name in sparse:
                if not np.array_equal(
                    np.asarray(made[name])[:, real], summed[name][:, ids_C[real]]
                ):
                    bad.append((plan, mesh, "combined", name))
                if not np.array_equal(
                    np.asarray(whole[name])[:, real], plain[name][:, ids_C[real]]
                ):
                    bad.append((plan, mesh, "rows", name))
    return bad


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "equality": equality,
                "unit_mesh": unit_mesh,
                "traffic": traffic,
                "fresh": fresh,
                "balance": balance,
                "train": train,
                "lookups": lookups,
                "host_memory": host_memory,
            }[sys.argv[2]](*sys.argv[3:])
        )
    )
