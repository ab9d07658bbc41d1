"""A train step on devices that are not there: what each of them would hold, compute and send."""

import dataclasses
import importlib.util
import math
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh

from flexmemory import parallel
from flexmemory.config import Config
from flexmemory.data.pipeline import padded_rows
from flexmemory.errors import UserError
from flexmemory.models.accounting import account, train_flops_per_token
from flexmemory.models.blocks import layer_specs
from flexmemory.models.parameters import is_table, join, path_name
from flexmemory.train.collectives import collectives, traffic
from flexmemory.train.compiled import memory
from flexmemory.train.host_tables import IN_FLIGHT, with_rows
from flexmemory.train.step import abstract_state, make_train_step

PARTS = ("weights", "weight moments", "tables", "table moments", "batch")
HOST = "tables in the host's memory"  # with their moments, where parallel.table_memory is host
# with these libtpu asks nobody about the machine
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def cpu_mesh(sizes: dict[str, int]) -> Mesh:
    """A mesh of so many CPU devices that XLA makes up. Nothing may have touched a device before."""
    count = math.prod(sizes.values())
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    if jax.device_count() != count:
        raise RuntimeError(f"{jax.device_count()} devices, not {count}: JAX was in use before")
    return parallel.mesh_of(sizes, jax.devices())


def tpu_mesh(topology: str, sizes: dict[str, int]) -> Mesh:
    """A mesh of the devices of a TPU topology that only the compiler knows. Raises UserError
    without libtpu, for an unknown name and for another number of devices."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "topology: needs the TPU compiler; 'pip install jax[tpu]', a TPU is not needed"
        )
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    for name, value in NO_TPU.items():
        os.environ.setdefault(name, value)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"topology: {topology!r}: {str(error).partition('\n')[0]}; write for example"
            " v5e:16x16 or v5p:4x4x4"
        ) from error
    count = math.prod(sizes.values())
    if len(devices) != count:
        raise UserError(
            f"topology: {topology} has {len(devices)} devices, mesh= has {count}; give a mesh of"
            f" {len(devices)}"
        )
    return parallel.mesh_of(sizes, devices)


def on_mesh(cfg: Config, mesh: str) -> tuple[Config, list[str]]:
    """(the config on that mesh, fields changed for it): the smallest plan that uses the mesh's axes
    where the config's does not, and micro-batches that its sections divide."""
    changed, plan = [], cfg.parallel.plan
    used = {word.partition("=")[0] for word in mesh.split(",") if not word.endswith("=1")}
    if not used <= set(parallel.PLANS[plan][1]):
        fitting = (name for name, (_, axes) in parallel.PLANS.items() if used <= set(axes))
        plan = next(fitting, "fsdp_tp")
        changed.append(f"parallel.plan={plan}")
    cfg = dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, plan=plan, mesh=mesh))
    sections = parallel.sections_of(parallel.mesh_sizes(cfg.parallel))
    batch, accum = cfg.data.batch_size, cfg.train.accum_steps
    if batch // accum % sections and batch % sections == 0:
        counts = range(1, min(accum, batch // sections) + 1)
        accum = max(n for n in counts if batch % (n * sections) == 0)
        changed.append(f"train.accum_steps={accum}")
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, accum_steps=accum))
    return cfg, changed


def abstract_step(cfg: Config, mesh: Mesh | AbstractMesh, rows: int) -> tuple[dict, dict]:
    """(state, batch) of shapes with shardings on a mesh, for :func:`make_train_step`; ``rows``:
    unique ids of a section."""
    sections = parallel.sections_of(dict(mesh.shape))
    count = min(max(rows, expected_rows(cfg, 1)), sections * rows, cfg.model.vocab_size)
    state = abstract_state(cfg)
    if cfg.parallel.table_memory == "host":
        cfg, state = parallel.on_devices(cfg), with_rows(state, count)
    accum = cfg.train.accum_steps
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("ids", "targets", "inverse", *(("segments",) if cfg.data.document_mask else ())),
        (accum, cfg.data.batch_size // accum, cfg.data.seq_len),
    )
    shapes |= dict.fromkeys(("unique_ids", "places"), (sections * rows,)) | {"table_ids": (count,)}
    batch = {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in shapes.items()}
    specs = parallel.batch_specs(batch)
    return jax.tree.map(_at, state, parallel.placed(cfg, state)), {
        name: _at(leaf, jax.NamedSharding(mesh, specs[name])) for name, leaf in batch.items()
    }


def expected_rows(cfg: Config, sections: int) -> int:
    """Unique ids of a section, padded, if tokens were drawn by Zipf's law (exponent 1) over the
    vocabulary; of a model without rows as many as there may be, as in training."""
    tokens, vocab = cfg.data.batch_size * cfg.data.seq_len // sections, cfg.model.vocab_size
    if not any(spec.row_width for spec in layer_specs(cfg.model)):
        return min(tokens, vocab)
    share_V = 1 / np.arange(1, vocab + 1)
    unique = -np.expm1(tokens * np.log1p(-share_V / share_V.sum())).sum()
    return min(padded_rows(math.ceil(unique)), tokens, vocab)


def dry_run(cfg: Config, mesh: Mesh | AbstractMesh, rows: int, compiled: bool = True) -> dict:
    """What a step of ``cfg`` needs on every device of ``mesh``, which may be abstract where nothing
    is to be compiled.

    {"devices", "mesh", "plan", "rows_per_section", "bytes": per device by PARTS (of tables in the
    host's memory the rows of three batches), HOST and, compiled, "temporaries" and "peak" (of the
    device); "arrays": per device, the largest first, [{"name", "shape", "bytes", "spec"}] (of such
    tables the rows of a batch); "flops": of a step on each device; "collectives": see
    collectives.py, and "sent": their bytes; None where not compiled}. Raises UserError where the
    mesh does not divide the model or the batch."""
    sizes = dict(mesh.shape)
    count, sections = math.prod(sizes.values()), parallel.sections_of(sizes)
    state = abstract_state(cfg)
    parallel.check(cfg, join(state["params"]), sizes)
    with jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh):
        whole = jax.tree.leaves(join(jax.tree.map(_at, state, parallel.placed(cfg, state))))
        state, batch = abstract_step(cfg, mesh, rows)
        traced = make_train_step(cfg).trace(state, batch)
    parts, arrays, more = dict.fromkeys((*PARTS, HOST), 0), [], 0
    leaves = jax.tree_util.tree_leaves_with_path(join(state))
    for (path, leaf), there in zip(leaves, whole, strict=True):
        name, own = path_name(path), _own_bytes(leaf)
        spec = str(leaf.sharding.spec)
        arrays.append({"name": name, "shape": leaf.shape, "bytes": own, "spec": spec})
        kind = "table" if is_table(path, leaf) else "weight"
        part = f"{kind}s" if name.startswith("params.") else f"{kind} moments"
        parts[part] += own
        if cfg.parallel.table_memory == "host" and kind == "table":
            others = (IN_FLIGHT - 1) * own  # of other batches, beside the step
            parts[part] += others
            parts[HOST] += _own_bytes(there)
            more += others
    parts["batch"] = sum(_own_bytes(leaf) for leaf in batch.values())
    tokens, numbers = cfg.data.batch_size * cfg.data.seq_len, account(cfg.model, cfg.data.seq_len)
    sent = None
    if compiled:
        program = traced.lower().compile()
        sent, need = collectives(program.as_text()), memory(program)
        if need is None:
            raise RuntimeError("the compiler does not say how much memory the step needs")
        parts |= {"temporaries": need["temporaries"], "peak": need["peak"] + more}
    return {
        "devices": count,
        "mesh": sizes,
        "plan": cfg.parallel.plan,
        "rows_per_section": rows,
        "flops": tokens * train_flops_per_token(numbers, rows * sections / tokens) / count,
        "bytes": parts,
        "arrays": sorted(arrays, key=lambda array: -array["bytes"]),
        "collectives": sent,
        "sent": None if sent is None else traffic(sent),
    }


def _at(a: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)


def _own_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
