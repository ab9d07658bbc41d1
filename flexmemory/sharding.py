"""The mesh's axes, and what code inside a step needs of them.

Training runs the same code on one device and on many: without a mesh every function below does
what is left of it on one device. Arrays carry their shardings in their types (JAX's explicit
mode): an operation that would need an unplanned transfer does not trace.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import P
from jax.sharding import get_abstract_mesh

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # a batch, and whatever follows from its tokens, is cut over both
# columns of a table: tensor first, so that those of all sections make one slice of a tensor axis
COLUMNS = ("tensor", "data", "fsdp")


def sections_of(sizes: dict[str, int]) -> int:
    """Into how many sections a mesh of these sizes cuts a batch."""
    return math.prod(sizes[axis] for axis in BATCH)


def sections() -> int:
    """Into how many sections the mesh in force cuts a batch; 1 without one."""
    mesh = get_abstract_mesh()
    return 1 if mesh.empty else sections_of(mesh.shape)


def own_sections() -> tuple[int, ...]:
    """The sections that this process's devices compute, ascending; all without a mesh. They need
    not be neighbours: JAX orders devices as they are wired.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return (0,)
    devices = mesh.devices.reshape(sections(), -1)  # tensor is the last axis
    own = jax.process_index()
    return tuple(s for s, row in enumerate(devices) if any(d.process_index == own for d in row))


def names(entry: Any) -> tuple[str, ...]:
    """Axes of one entry of a spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def spec_of(x: Any) -> P:
    """How the array is cut."""
    return jax.typeof(x).sharding.spec


def local(f: Callable, out_specs: Callable) -> Callable:
    """``f`` on every device's own part of its arguments (arrays or None). ``out_specs`` gives the
    specs of the result from those of the arguments. Without a mesh ``f`` itself.
    """
    if get_abstract_mesh().empty:
        return f

    def call(*args: Any) -> Any:
        specs = jax.tree.map(spec_of, args)
        return jax.shard_map(f, in_specs=specs, out_specs=out_specs(*specs))(*args)

    return call


def gathered(weight: jax.Array) -> jax.Array:
    """The weight whole over the axes that cut the batch, for use by every section; cut over
    "tensor" still.
    """
    if get_abstract_mesh().empty:
        return weight
    kept = (tuple(a for a in names(entry) if a not in BATCH) or None for entry in spec_of(weight))
    return jax.reshard(weight, P(*kept))


def like(x: jax.Array, spec: P) -> jax.Array:
    """x cut as ``spec`` says."""
    return x if spec_of(x) == spec else jax.reshard(x, spec)


def sum_over_batch(grad: jax.Array, spec: P) -> jax.Array:
    """Inside :func:`local`: the sum over all sections of the batch of a weight's gradient, of which
    this device keeps the part that ``spec`` gives it.
    """
    if get_abstract_mesh().empty:
        return grad
    cut = {axis: i for i, entry in enumerate(spec) for axis in names(entry) if axis in BATCH}
    # axes that cut the gradient come first: what the others sum is then a part
    for axis in sorted(BATCH, key=lambda axis: axis not in cut):
        if axis in cut:
            grad = jax.lax.psum_scatter(grad, axis, scatter_dimension=cut[axis], tiled=True)
        else:
            grad = jax.lax.psum(grad, axis)
    return grad


def varying(x: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
    """Inside :func:`local`: a constant x as the start of a sum that differs between sections of the
    batch, and along ``axes``.
    """
    return x if get_abstract_mesh().empty else jax.lax.pcast(x, (*BATCH, *axes), to="varying")


def sharding(spec: P) -> P | None:
    """For ``out_sharding=``: the spec, None without a mesh."""
    return None if get_abstract_mesh().empty else spec
