"""A train step on devices that are not there: what each of them would hold, compute and send."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import Mesh

from flexmemory import parallel
from flexmemory.config import Config
from flexmemory.data.pipeline import padded_rows
from flexmemory.models.accounting import account, train_flops_per_token
from flexmemory.models.blocks import layer_specs
from flexmemory.models.parameters import is_table, join, path_name
from flexmemory.train.collectives import collectives, traffic
from flexmemory.train.compiled import memory
from flexmemory.train.host_tables import IN_FLIGHT, with_rows
from flexmemory.train.step import abstract_state, make_train_step

PARTS = ("weights", "weight moments", "tables", "table moments", "batch")
HOST = "tables in the host's memory"  # with their moments, where parallel.table_memory is host


def on_mesh(cfg: Config, mesh: str) -> tuple[Config, list[str]]:
    """(the config on that mesh, what had to be changed for it): the smallest plan that uses the
    mesh's axes where the config's does not, and micro-batches that its sections divide.
    """
    said, plan = [], cfg.parallel.plan
    used = {word.partition("=")[0] for word in mesh.split(",") if not word.endswith("=1")}
    if not used <= set(parallel.PLANS[plan][1]):
        plan = next(
            (name for name, (_, axes) in parallel.PLANS.items() if used <= set(axes)), "fsdp_tp"
        )
        said.append(f"parallel.plan={plan}")
    cfg = dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, plan=plan, mesh=mesh))
    pieces, batch, accum = (
        parallel.sections_of(parallel.mesh_sizes(cfg.parallel)),
        cfg.data.batch_size,
        cfg.train.accum_steps,
    )
    if batch // accum % pieces and batch % pieces == 0:
        accum = max(
            n for n in range(1, min(accum, batch // pieces) + 1) if batch % (n * pieces) == 0
        )
        said.append(f"train.accum_steps={accum}")
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, accum_steps=accum))
    return cfg, said


def abstract_step(cfg: Config, mesh, rows: int) -> tuple[dict, dict]:
    """(state, batch) of shapes with shardings on a mesh, for :func:`make_train_step`; ``rows``:
    unique ids of a section.
    """
    sections = parallel.sections_of(mesh.shape)
    count = min(max(rows, expected_rows(cfg, 1)), sections * rows, cfg.model.vocab_size)
    state = abstract_state(cfg)
    if cfg.parallel.table_memory == "host":
        cfg, state = parallel.on_devices(cfg), with_rows(state, count)
    places = parallel.placed(cfg, state)
    shape = (cfg.train.accum_steps, cfg.data.batch_size // cfg.train.accum_steps, cfg.data.seq_len)
    names = ("ids", "targets", "inverse", *(("segments",) if cfg.data.document_mask else ()))
    batch = {name: jax.ShapeDtypeStruct(shape, np.int32) for name in names}
    lengths = {"unique_ids": sections * rows, "places": sections * rows, "table_ids": count}
    batch |= {name: jax.ShapeDtypeStruct((length,), np.int32) for name, length in lengths.items()}
    specs = parallel.batch_specs(batch)
    return jax.tree.map(_at, state, places), {
        name: _at(leaf, jax.NamedSharding(mesh, specs[name])) for name, leaf in batch.items()
    }


def expected_rows(cfg: Config, sections: int) -> int:
    """Unique ids of a section, padded, if tokens were drawn by Zipf's law (exponent 1) over the
    vocabulary; of a model without rows as many as there may be, as in training.
    """
    tokens, vocab = cfg.data.batch_size * cfg.data.seq_len // sections, cfg.model.vocab_size
    if not any(spec.row_width for spec in layer_specs(cfg.model)):
        return min(tokens, vocab)
    share_V = 1 / np.arange(1, vocab + 1)
    found = -np.expm1(tokens * np.log1p(-share_V / share_V.sum())).sum()
    return min(padded_rows(math.ceil(found)), tokens, vocab)


def dry_run(cfg: Config, mesh, rows: int, compiled: bool = True) -> dict:
    """What a step of ``cfg`` needs on every device of ``mesh``, which may be abstract where nothing
    is to be compiled.

    {"devices", "mesh", "plan", "rows_per_section", "bytes": per device by PARTS (of tables in the
    host's memory the rows of three batches), HOST and, compiled, "temporaries" and "peak" (of the
    device); "arrays": per device, the largest first, [{"name", "shape", "bytes", "spec"}] (of such
    tables the rows of a batch); "flops": of a step on each device; "collectives": see
    collectives.py, and "sent": their bytes; None where not compiled}. Raises UserError where the
    mesh does not divide the model or the batch.
    """
    sizes = dict(mesh.shape)
    state = abstract_state(cfg)
    parallel.check(cfg, join(state["params"]), sizes)
    with jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh):
        whole = jax.tree.leaves(join(jax.tree.map(_at, state, parallel.placed(cfg, state))))
        state, batch = abstract_step(cfg, mesh, rows)
        arrays = [
            {
                "name": path_name(path),
                "shape": leaf.shape,
                "bytes": _own_bytes(leaf),
                "spec": str(leaf.sharding.spec),
            }
            for path, leaf in jax.tree_util.tree_leaves_with_path(join(state))
        ]
        traced = make_train_step(cfg).trace(state, batch)
    parts, more = dict.fromkeys((*PARTS, HOST), 0), 0
    for (path, leaf), array, there in zip(
        jax.tree_util.tree_leaves_with_path(join(state)), arrays, whole, strict=True
    ):
        what = "table" if is_table(path, leaf) else "weight"
        part = f"{what}s" if array["name"].startswith("params.") else f"{what} moments"
        parts[part] += array["bytes"]
        if cfg.parallel.table_memory == "host" and what == "table":
            others = (IN_FLIGHT - 1) * array["bytes"]  # of other batches, beside the step
            parts[part], parts[HOST], more = (
                parts[part] + others,
                parts[HOST] + _own_bytes(there),
                more + others,
            )
    parts["batch"] = sum(_own_bytes(leaf) for leaf in batch.values())
    numbers, tokens = account(cfg.model, cfg.data.seq_len), cfg.data.batch_size * cfg.data.seq_len
    sections = parallel.sections_of(sizes)
    made = {
        "devices": math.prod(sizes.values()),
        "mesh": sizes,
        "plan": cfg.parallel.plan,
        "rows_per_section": rows,
        "flops": (
            tokens
            * train_flops_per_token(numbers, rows * sections / tokens)
            / math.prod(sizes.values())
        ),
        "bytes": parts,
        "arrays": sorted(arrays, key=lambda array: -array["bytes"]),
        "collectives": None,
        "sent": None,
    }
    if compiled:
        program = traced.lower().compile()
        sent, need = collectives(program.as_text()), memory(program)
        made |= {"collectives": sent, "sent": traffic(sent)}
        parts |= {"temporaries": need["temporaries"], "peak": need["peak"] + more}
    return made


def _at(a, place) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)


def _own_bytes(leaf) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
