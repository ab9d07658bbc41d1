"""`flexmemory bench sharding`: what a lookup of a sharded table and its gradient send, ours against
what XLA's partitioner makes of a plain gather.
"""

import dataclasses
import math
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from flexmemory.bench.machine import facts
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
    fake = made_up(devices)
    rng = np.random.default_rng(0)
    found = {}
    for v in s.sizes:
        whole = mesh(2, devices // 4, 2) if devices % 4 == 0 else mesh(1, devices, 1)
        cut = sections_of(whole.shape)
        ids = section_ids(rng, v, s.tokens, cut)
        with jax.set_mesh(whole):
            made = {name: call(name, v, s.width, ids, s.rounds) for name in ("ours", *LAYOUTS)}
        best = min(made[name]["bytes"] for name in PLAIN)
        found[str(v)] = {
            "unique_ids_per_section": len(ids) // cut,
            "table_bytes": v * s.width * 4,
            "layouts": made,
            "partitioner_over_ours": best / made["ours"]["bytes"],
        }
    growth = {}
    for n in [n for n in (1, 2, 4, 8, 16, 32) if n <= devices]:
        ids = section_ids(np.random.default_rng(0), s.sizes[0], s.tokens * n // devices, n)
        with jax.set_mesh(mesh(1, n, 1)):
            growth[str(n)] = call("ours", s.sizes[0], s.width, ids, s.rounds) | {
                "table_bytes_per_device": s.sizes[0] * s.width * 4 // n
            }
    return {
        "bench": "sharding",
        "scale": scale,
        "machine": facts(scratch),
        "load": os.getloadavg()[0],
        "devices": devices,
        "fake_devices": fake,
        "tokens": s.tokens,
        "width": s.width,
        "sizes": found,
        "growth": growth,
    }


def made_up(devices: int) -> bool:
    """Sees to enough devices; True where they are made up of one CPU."""
    if jax.config.jax_platforms in (None, "", "cpu"):
        try:
            jax.config.update("jax_num_cpu_devices", devices)
        except RuntimeError:  # JAX runs already, with what it has
            pass
    if jax.device_count() < devices:
        raise UserError(f"--devices: {devices}, JAX sees {jax.device_count()}; give at most that")
    return jax.default_backend() == "cpu"


def mesh(*sizes: int):
    return mesh_of(dict(zip(AXES, sizes, strict=True)), jax.devices()[: math.prod(sizes)])


def section_ids(rng, vocab: int, tokens: int, sections: int) -> np.ndarray:
    """Unique ids of Zipf tokens, a section after another, filled up with V to one size."""
    rank_of = rng.permutation(vocab).astype(np.int32)
    share = 1 / np.arange(1, vocab + 1)
    parts = [
        np.unique(rank_of[rng.choice(vocab, tokens // sections, p=share / share.sum())])
        for _ in range(sections)
    ]
    size = max(map(len, parts))
    return np.concatenate(
        [np.append(part, np.full(size - len(part), vocab, np.int32)) for part in parts]
    ).astype(np.int32)


def call(name: str, vocab: int, width: int, ids: np.ndarray, rounds: int) -> dict:
    """{"bytes", "seconds", "collectives"} of one layout on the mesh in force."""
    spec, rows_spec = (
        LAYOUTS["columns, tensor first" if name == "ours" else name],
        P(BATCH, "tensor"),
    )

    def ours(table, ids_R, grad_RW):
        return lookup(table, ids_R), dense_gradient(grad_RW, ids_R, table)

    def plain(table, ids_R, grad_RW):
        rows_RW, pull_back = jax.vjp(
            lambda table: table.at[ids_R].get(mode="fill", fill_value=0, out_sharding=rows_spec),
            table,
        )
        return rows_RW, pull_back(grad_RW)[0]

    at = lambda spec: jax.NamedSharding(jax.sharding.get_mesh(), spec)  # noqa: E731
    args = (
        jax.jit(lambda: jnp.zeros((vocab, width), jnp.float32), out_shardings=at(spec))(),
        jax.device_put(ids, at(P(BATCH))),
        jax.jit(lambda: jnp.ones((len(ids), width), jnp.float32), out_shardings=at(rows_spec))(),
    )
    compiled = (
        jax.jit(ours if name == "ours" else plain, out_shardings=(at(rows_spec), at(spec)))
        .lower(*args)
        .compile()
    )
    sent = collectives(compiled.as_text())
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - began)
    return {"bytes": traffic(sent), "seconds": statistics.median(seconds[1:]), "collectives": sent}
