"""Named plans, the mesh of a config, and where arrays lie on it. What code inside a step needs of a
mesh is in sharding.py.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import P
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, get_abstract_mesh

from flexmemory.config import Config, ParallelConfig
from flexmemory.errors import UserError
from flexmemory.models.parameters import TABLE, is_table, parameter_kind, path_name
from flexmemory.sharding import AXES, BATCH, COLUMNS, names, own_sections, sections, sections_of


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each kind of tensor lies; letters as in docs/architecture.md, axes in front of them
    (layers, accumulation steps) are never cut.
    """

    batch_BT: P = P(BATCH, None)  # ids, targets, inverse, segments, weights of tokens
    ids_R: P = P(BATCH)  # unique ids and their places: a section for every section of the batch
    ids_C: P = P(None)  # those of all sections
    embed_VD: P = P(None, None)
    head_DV: P = P(None, None)
    q_DNH: P = P(None, None, None)  # also k and v
    o_NHD: P = P(None, None, None)
    up_DF: P = P(None, None)  # also gate
    down_FD: P = P(None, None)
    norm_D: P = P()  # gains of any shape
    table_VW: P = P(None, COLUMNS)
    sums_V: P = P(None)  # one number per row of a table


FSDP = Plan(
    embed_VD=P(None, "fsdp"),
    head_DV=P("fsdp", None),
    q_DNH=P("fsdp", None, None),
    o_NHD=P(None, None, "fsdp"),
    up_DF=P("fsdp", None),
    down_FD=P(None, "fsdp"),
)
FSDP_TP = Plan(
    embed_VD=P(None, "fsdp"),
    head_DV=P("fsdp", "tensor"),
    q_DNH=P("fsdp", "tensor", None),
    o_NHD=P("tensor", None, "fsdp"),
    up_DF=P("fsdp", "tensor"),
    down_FD=P("tensor", "fsdp"),
)
EXPLICIT = (AxisType.Explicit,) * len(AXES)
# name: (plan, axes that its mesh may have above 1)
PLANS = {
    "single": (Plan(), ()),
    "dp": (Plan(), ("data",)),
    "fsdp": (FSDP, ("data", "fsdp")),
    "fsdp_tp": (FSDP_TP, AXES),
}


# --- meshes ---


def mesh_sizes(cfg: ParallelConfig, devices: int | None = None) -> dict[str, int]:
    """{axis: size} of a config's mesh. "" gives all ``devices`` (None: not known) to fsdp, or in
    plan dp to data.

    Raises UserError for a bad text, an axis that the plan does not use, sizes that do not make up
    ``devices``.
    """
    sizes, may = dict.fromkeys(AXES, 1), PLANS[cfg.plan][1]
    for word in filter(None, cfg.mesh.split(",")):
        axis, equals, size = word.partition("=")
        if axis not in AXES or not equals or not size.isdecimal() or not int(size):
            raise UserError(
                f"config parallel.mesh: {word!r} in {cfg.mesh!r} is not AXIS=SIZE; write for"
                f" example data=8,fsdp=4 (axes {', '.join(AXES)})"
            )
        if axis + "=" in cfg.mesh[: cfg.mesh.rindex(word)]:
            raise UserError(
                f"config parallel.mesh: axis {axis} twice in {cfg.mesh!r}; give each once"
            )
        if int(size) > 1 and axis not in may:
            good = [name for name, (_, axes) in PLANS.items() if axis in axes]
            raise UserError(
                f"config parallel.mesh: axis {axis} of size {size} under plan {cfg.plan}, which"
                f" uses {', '.join(may) or 'none'}; set parallel.plan={good[0]}"
            )
        sizes[axis] = int(size)
    if not cfg.mesh and may and devices:
        sizes["fsdp" if "fsdp" in may else may[0]] = devices
    count = math.prod(sizes.values())
    if devices is not None and may and count != devices:
        tensor = math.gcd(sizes["tensor"], devices)
        data = math.gcd(sizes["data"], devices // tensor) if "fsdp" in may else devices
        near = ",".join(
            f"{axis}={size}"
            for axis, size in zip(AXES, (data, devices // tensor // data, tensor), strict=True)
            if axis in may
        )
        raise UserError(
            f"config parallel.mesh: {cfg.mesh!r} is for {count} devices, there are {devices}; the"
            f" nearest is {near}"
        )
    return sizes


def make_mesh(cfg: ParallelConfig, devices: Sequence | None = None) -> Mesh | None:
    """The mesh of a config over ``devices`` (all of the run by default), to be entered with
    ``jax.set_mesh``; None for plan "single".
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(cfg, len(devices))
    if cfg.plan == "single":
        if jax.process_count() > 1:
            raise UserError(
                f"config parallel.plan: single in a run of {jax.process_count()} processes; set dp,"
                " fsdp or fsdp_tp"
            )
        return None
    return mesh_of(sizes, devices)


def mesh_of(sizes: dict[str, int], devices: Sequence) -> Mesh:
    return jax.make_mesh(tuple(sizes[a] for a in AXES), AXES, axis_types=EXPLICIT, devices=devices)


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh without devices, to trace under."""
    return AbstractMesh(tuple(sizes[a] for a in AXES), AXES, axis_types=EXPLICIT)


def batch_loader() -> Callable[[dict], dict]:
    """``put(batch)``: this process's sections of a batch onto its devices, from any thread."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put
    count, place_of = sections(), {section: place for place, section in enumerate(own_sections())}

    def load(local: np.ndarray, spec: P) -> jax.Array:
        if BATCH not in spec:
            place = NamedSharding(mesh, spec)
            return jax.make_array_from_callback(local.shape, place, local.__getitem__)
        axis = spec.index(BATCH)
        size = local.shape[axis] // len(place_of)  # of a section
        whole = (*local.shape[:axis], count * size, *local.shape[axis + 1 :])

        def part(index: Any) -> np.ndarray:
            first = place_of[(index[axis].start or 0) // size] * size
            return local[(*index[:axis], slice(first, first + size), *index[axis + 1 :])]

        return jax.make_array_from_callback(whole, NamedSharding(mesh, spec), part)

    return lambda batch: {name: load(batch[name], s) for name, s in batch_specs(batch).items()}


# --- where arrays lie ---


def plan_of(cfg: Config) -> Plan:
    return PLANS[cfg.parallel.plan][0]


def spec(plan: Plan, path: str, ndim: int) -> P:
    """Of the parameter ``path`` (dotted), of its gradient and moments, and of one number for each
    row of a table. Raises ValueError for a parameter of no known kind.
    """
    kind = parameter_kind(path)
    return padded(plan.sums_V if kind is TABLE and ndim == 2 else getattr(plan, kind.field), ndim)


def padded(spec: P, ndim: int) -> P:
    """The spec of an array with more axes in front, which are not cut."""
    return P(*(None,) * (ndim - len(spec)), *spec[max(0, len(spec) - ndim) :])


def state_specs(plan: Plan, state: Any) -> Any:
    """A tree of specs shaped like a train state or parameters: moments lie where their parameters
    do, single numbers everywhere.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: spec(plan, path_name(path), leaf.ndim) if leaf.ndim else P(), state
    )


def batch_specs(batch: dict) -> dict:
    """Specs of a batch as data/pipeline.py makes it, the same in every plan."""
    of = {"unique_ids": Plan.ids_R, "places": Plan.ids_R, "table_ids": Plan.ids_C}
    return {
        name: padded(of.get(name, Plan.batch_BT), np.ndim(leaf)) for name, leaf in batch.items()
    }


def placed(cfg: Config, state: Any) -> Any:
    """Shardings of a train state or of parameters (shapes or arrays): on the mesh in force, on the
    first own device without one. Tables trained by touched rows, and their moments, lie in the
    host's memory where the config wants that.
    """
    plan, mesh = plan_of(cfg), jax.sharding.get_mesh()
    mesh = get_abstract_mesh() if mesh.empty else mesh  # type: ignore[assignment]
    on_host = cfg.parallel.table_memory == "host"

    def place(path: tuple, spec: P, leaf: Any) -> jax.sharding.Sharding:
        memory = "pinned_host" if on_host and is_table(path, leaf) else None
        if mesh.empty:
            return jax.sharding.SingleDeviceSharding(jax.local_devices()[0], memory_kind=memory)
        return NamedSharding(mesh, spec, memory_kind=memory)

    return jax.tree_util.tree_map_with_path(place, state_specs(plan, state), state)


def on_devices(cfg: Config) -> Config:
    """The config by which tables, or rows of those in the host's memory, lie on the devices."""
    where = dataclasses.replace(cfg.parallel, table_memory="device")
    return dataclasses.replace(cfg, parallel=where)


def check(cfg: Config, params: dict, sizes: dict[str, int]) -> None:
    """Raises UserError where the mesh does not divide what it cuts: the batch or a width.
    ``params``: shapes.
    """
    pieces, batch, accum = sections_of(sizes), cfg.data.batch_size, cfg.train.accum_steps
    if batch // accum % pieces:
        near = max(
            (n for n in range(1, batch + 1) if batch % (n * pieces) == 0),
            key=lambda n: -abs(n - accum),
            default=None,
        )
        mend = (
            f"train.accum_steps={near}"
            if near
            else f"data.batch_size={-(-batch // (pieces * accum)) * pieces * accum}"
        )
        raise UserError(
            f"config data.batch_size: {batch} in {accum} micro-batches makes {batch // accum}"
            f" sequences, which data*fsdp={pieces} does not divide; set {mend}"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        for axis, entry in enumerate(spec(plan_of(cfg), name, leaf.ndim)):
            count = math.prod(sizes[a] for a in names(entry))
            if leaf.shape[axis] % count:
                cut, size = [a for a in names(entry) if sizes[a] > 1], leaf.shape[axis]
                letter = parameter_kind(name).field.rpartition("_")[2][axis - leaf.ndim]
                near = max(n for n in range(1, count + 1) if size % n == 0)
                raise UserError(
                    f"config parallel.mesh: {'*'.join(cut)}={count} does not divide {letter}={size}"
                    f" of {name}; the nearest mesh does with {near}, the nearest {letter} is"
                    f" {-(-size // count) * count}"
                )
