"""`flexmemory bench sharding`: what a lookup of a sharded table and its gradient send, ours against
what XLA's partitioner makes of a plain gather.
"""

import contextlib
import dataclasses
import functools
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from flexmemory.bench.machine import facts, median_seconds, zipf
from flexmemory.errors import UserError
from flexmemory.exchange import dense_gradient, lookup
from flexmemory.parallel import mesh_of
from flexmemory.sharding import AXES, BATCH, COLUMNS, sections_of
from flexmemory.train.collectives import collectives, traffic


@dataclasses.dataclass(frozen=True)
class Scale:
    sizes: tuple[int, ...]  # V
    width: int
    tokens: int  # of the whole batch
    rounds: int


SCALES = {
    "smoke": Scale((512, 4096), 32, 256, 2),
    "cpu": Scale((65_536, 524_288), 256, 1024, 5),
    "gpu": Scale((65_536, 524_288), 2048, 65_536, 20),
}
LAYOUTS = {
    "rows": P(AXES, None),
    "columns": P(None, AXES),
    "replicated": P(None, None),
    "columns, tensor first": P(None, COLUMNS),
}
PLAIN = ("rows", "columns", "replicated")


def measure(scratch: Path, scale: str, devices: int) -> dict:
    """Bytes of the results of all collectives on one device, forward and backward, and seconds of a
    call.

    A call looks up the rows of each section's unique ids (Zipf tokens) and makes the table's
    gradient from that of the rows, on a mesh of data 2, tensor 2 and the rest fsdp. "ours" is
    :func:`exchange.lookup` and :func:`exchange.dense_gradient`; the others are ``table[ids]`` and
    its derivative, left to the partitioner, with the table cut by rows or by columns in the mesh's
    order of axes, not at all, or by columns as ours is. "partitioner_over_ours" is the best of the
    first three over ours. "growth": ours with as many tokens per device on fewer devices, fsdp
    alone, and the table's bytes on each. Seconds of devices that are parts of one CPU say nothing
    of a network: "fake_devices" is true there.
    """
    s = SCALES[scale]
    fake = fake_devices(devices)
    rng = np.random.default_rng(0)
    sizes = {}
    for v in s.sizes:
        whole = mesh(2, devices // 4, 2) if devices % 4 == 0 else mesh(1, devices, 1)
        sections = sections_of(whole.shape)
        ids = section_ids(rng, v, s.tokens, sections)
        with jax.set_mesh(whole):
            sent = {name: call(name, v, s.width, ids, s.rounds) for name in ("ours", *LAYOUTS)}
        sizes[str(v)] = {
            "unique_ids_per_section": len(ids) // sections,
            "table_bytes": v * s.width * 4,
            "layouts": sent,
            "partitioner_over_ours": min(sent[k]["bytes"] for k in PLAIN) / sent["ours"]["bytes"],
        }
    growth, v = {}, s.sizes[0]
    for n in [n for n in (1, 2, 4, 8, 16, 32) if n <= devices]:
        ids = section_ids(np.random.default_rng(0), v, s.tokens * n // devices, n)
        with jax.set_mesh(mesh(1, n, 1)):
            growth[str(n)] = call("ours", v, s.width, ids, s.rounds)
        growth[str(n)]["table_bytes_per_device"] = v * s.width * 4 // n
    return {
        "bench": "sharding",
        "scale": scale,
        "machine": facts(scratch),
        "load": os.getloadavg()[0],
        "devices": devices,
        "fake_devices": fake,
        "tokens": s.tokens,
        "width": s.width,
        "sizes": sizes,
        "growth": growth,
    }


def fake_devices(devices: int) -> bool:
    """Sees to enough devices; True where they are parts of one CPU."""
    if jax.config.jax_platforms in (None, "", "cpu"):
        with contextlib.suppress(RuntimeError):  # JAX runs already, with what it has
            jax.config.update("jax_num_cpu_devices", devices)
    if jax.device_count() < devices:
        raise UserError(f"devices: {devices}, JAX sees {jax.device_count()}; give at most that")
    return jax.default_backend() == "cpu"


def mesh(*sizes: int) -> jax.sharding.Mesh:
    return mesh_of(dict(zip(AXES, sizes, strict=True)), jax.devices()[: math.prod(sizes)])


def section_ids(rng: np.random.Generator, vocab: int, tokens: int, sections: int) -> np.ndarray:
    """Unique ids of Zipf tokens, a section after another, filled up with V to one size."""
    id_of = rng.permutation(vocab).astype(np.int32)
    parts = [np.unique(id_of[zipf(rng, vocab, tokens // sections)]) for _ in range(sections)]
    ids = np.full((sections, max(map(len, parts))), vocab, np.int32)
    for row, part in zip(ids, parts, strict=True):
        row[: len(part)] = part
    return ids.reshape(-1)


def call(name: str, vocab: int, width: int, ids: np.ndarray, rounds: int) -> dict:
    """{"bytes", "seconds", "collectives"} of one layout on the mesh in force."""
    spec = LAYOUTS["columns, tensor first" if name == "ours" else name]
    rows_spec = P(BATCH, "tensor")

    def ours(table: jax.Array, ids_R: jax.Array, grad_RW: jax.Array) -> tuple:
        return lookup(table, ids_R), dense_gradient(grad_RW, ids_R, table)

    def plain(table: jax.Array, ids_R: jax.Array, grad_RW: jax.Array) -> tuple:
        def gather(table: jax.Array) -> jax.Array:
            return table.at[ids_R].get(mode="fill", fill_value=0, out_sharding=rows_spec)

        rows_RW, pull_back = jax.vjp(gather, table)
        return rows_RW, pull_back(grad_RW)[0]

    at = functools.partial(jax.NamedSharding, jax.sharding.get_mesh())
    args = (
        jax.jit(lambda: jnp.zeros((vocab, width), jnp.float32), out_shardings=at(spec))(),
        jax.device_put(ids, at(P(BATCH))),
        jax.jit(lambda: jnp.ones((len(ids), width), jnp.float32), out_shardings=at(rows_spec))(),
    )
    step = jax.jit(ours if name == "ours" else plain, out_shardings=(at(rows_spec), at(spec)))
    compiled = step.lower(*args).compile()
    sent = collectives(compiled.as_text() or "")
    seconds = median_seconds(lambda: compiled(*args), rounds)
    return {"bytes": traffic(sent), "seconds": seconds, "collectives": sent}
