"""`flexmemory bench table`: what a row-sparse table update costs as the table grows, beside the
memory's own limits, and against dense AdamW.
"""

import ctypes
import dataclasses
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexmemory.bench.machine import facts, median_seconds, timed
from flexmemory.config import OptimizerConfig
from flexmemory.exchange import lookup
from flexmemory.train.optimizer import make_optimizer
from flexmemory.train.tables import apply_rows, make_table_optimizer


@dataclasses.dataclass(frozen=True)
class Scale:
    layers: int
    width: int
    sizes: tuple[int, ...]  # V, ascending
    rows: int  # R, distinct ids of a step
    dense: tuple[int, int, int]  # layers, width, V of the comparison with dense AdamW
    rounds: int


SCALES = {
    "smoke": Scale(2, 8, (256, 1024), 40, (2, 16, 512), 4),
    # R is what 4,096 Zipf tokens of a vocabulary of 16k hold. Rows of 1 KiB in two layers: Adam's
    # three arrays at V = 1M have 6.4 GB
    "cpu": Scale(2, 256, (16_384, 131_072, 1_048_576), 1636, (2, 1024, 131_072), 80),
    "gpu": Scale(4, 1024, (16_384, 131_072, 1_048_576), 8192, (4, 4096, 131_072), 48),
}
ID_SETS = 8
SWEEP_BYTES = 128 << 20  # more than a cache holds
CFG = OptimizerConfig()
STEPS = 1000


def measure(scratch: Path, scale: str) -> dict:
    """Microseconds of one compiled call, medians of interleaved rounds. ``scratch`` is only named,
    never written.

    An update gathers R rows, is given their gradient, and updates rows and moments, everything
    donated. A round takes every program in turn, each after a sweep through memory that leaves no
    row in a cache, as a training step does. Ids are Zipf draws whose ranks lie anywhere in the
    table, in random order, other ones in the next round. "move" gathers and scatters the same rows
    of the same arrays and computes nothing; "stream" is the time of the same bytes at the speed of
    the sweep, which is sequential. "huge_pages" is the same again with tables and state in pages of
    2 MiB: with pages of 4 KiB a CPU walks the page tables for every row of a large table. None
    where the system does not give them.
    """
    s = SCALES[scale]
    sweep, gb_per_s = make_sweep()
    return {
        "bench": "table",
        "scale": scale,
        "machine": facts(scratch),
        "load": os.getloadavg()[0],
        "stream_gb_per_s": gb_per_s,
        "layers": s.layers,
        "width": s.width,
        "rows": s.rows,
        "optimizers": {
            name: against_size(name, s, sweep, gb_per_s)
            for name in ("lazy_adam", "rowwise_adagrad")
        },
        "dense": against_dense(s, sweep),
    }


def against_size(name: str, s: Scale, sweep: Callable, gb_per_s: float) -> dict:
    """The update of one optimiser at every V of ``s``."""
    # [L, V, W]; the accumulators [L, V] of rowwise_adagrad are small
    arrays = 3 if name == "lazy_adam" else 1
    # every row in and out, the gradient in
    moved = (2 * arrays + 1) * s.layers * s.rows * s.width * 4
    steps = {"update": sparse_step(name), "move": move}
    states = {v: fresh_state(name, s.layers, v, s.width) for v in s.sizes}
    programs = {
        (v, what): compile_step(step, states[v], s.rows)
        for v in s.sizes
        for what, step in steps.items()
    }

    def figures() -> dict:
        us = medians_us(programs, states, s.rows, s.rounds, sweep)
        first, last = s.sizes[0], s.sizes[-1]
        return {
            "sizes": {str(v): {"us": us[v, "update"], "move_us": us[v, "move"]} for v in s.sizes},
            "ratio": us[last, "update"] / us[first, "update"],
            "move_ratio": us[last, "move"] / us[first, "move"],
        }

    return {
        "moved_bytes": moved,
        "stream_us": moved / gb_per_s / 1e3,
        "table_bytes": {str(v): s.layers * v * s.width * 4 for v in s.sizes},
        "temp_bytes": {str(v): temp_bytes(programs[v, "update"]) for v in s.sizes},
        **figures(),
        "huge_pages": figures() if huge_pages(states) else None,
    }


def against_dense(s: Scale, sweep: Callable) -> dict:
    """lazy_adam against AdamW over whole tables, whose gradient is a scatter into zeros: what
    training does without a row-sparse optimiser.
    """
    layers, width, v = s.dense
    states = {name: fresh_state(name, layers, v, width) for name in ("adamw", "lazy_adam")}
    steps = {"adamw": dense_step, "lazy_adam": sparse_step("lazy_adam")}
    programs = {
        (name, "update"): compile_step(step, states[name], s.rows) for name, step in steps.items()
    }
    us = medians_us(programs, states, s.rows, max(s.rounds // 8, 3), sweep)
    return {
        "layers": layers,
        "width": width,
        "vocab_size": v,
        "table_bytes": layers * width * v * 4,
        **{f"{name}_us": us[name, "update"] for name in states},
        **{f"{name}_temp_bytes": temp_bytes(programs[name, "update"]) for name in states},
        "speedup": us["adamw", "update"] / us["lazy_adam", "update"],
    }


def medians_us(programs: dict, states: dict, rows: int, rounds: int, sweep: Callable) -> dict:
    """Median microseconds of every program, keyed (state's name, what). A call takes its state and
    gives it back.
    """
    seconds: dict[tuple, list[float]] = {key: [] for key in programs}
    inputs = {
        name: (jnp.asarray(gradient(state, rows)), id_sets(table_of(state).shape[1], rows))
        for name, state in states.items()
    }
    for k in range(rounds + 1):
        for (name, what), program in programs.items():
            grad_LRW, ids = inputs[name]

            def call() -> object:
                states[name] = program(states[name], grad_LRW, ids[k % ID_SETS])
                return states[name]

            sweep()
            seconds[name, what].append(timed(call))
    # the first call may still page memory in
    return {key: statistics.median(times[1:]) * 1e6 for key, times in seconds.items()}


def fresh_state(name: str, layers: int, v: int, width: int) -> tuple:
    """(params with one table, optimiser state)."""
    table = jnp.zeros((layers, v, width), jnp.float32)
    params = {"memory": {"stacks": {"stack0": {"table": table}}}}
    return jax.block_until_ready((params, make(name).init(params)))


def make(name: str) -> Any:
    if name == "adamw":
        return make_optimizer(CFG, STEPS)
    return make_table_optimizer(dataclasses.replace(CFG, table_optimizer=name), STEPS)


def sparse_step(name: str) -> Callable:
    optimizer = make(name)

    def step(state: tuple, grad_LRW: jax.Array, ids_R: jax.Array) -> tuple:
        tables, opt = state
        rows = lookup(tables, ids_R)
        grads = jax.tree.map(lambda _: grad_LRW, rows)
        updates, opt = optimizer.update(grads, opt, rows, ids_R=ids_R)
        return apply_rows(tables, updates, ids_R), opt

    return step


def dense_step(state: tuple, grad_LRW: jax.Array, ids_R: jax.Array) -> tuple:
    params, opt = state
    rows, pull = jax.vjp(lambda params: lookup(params, ids_R), params)
    (grads,) = pull(jax.tree.map(lambda _: grad_LRW, rows))
    updates, opt = make("adamw").update(grads, opt, params)
    return optax.apply_updates(params, updates), opt


def move(state: tuple, grad_LRW: jax.Array, ids_R: jax.Array) -> tuple:
    """Takes the rows of every [L, V, W] off themselves: the bytes of an update, no mathematics."""
    return jax.tree.map(
        lambda a: apply_rows(a, -lookup(a, ids_R), ids_R) if a.ndim == 3 else a, state
    )


def compile_step(step: Callable, state: tuple, rows: int) -> jax.stages.Compiled:
    shapes = (
        jax.eval_shape(lambda: state),
        jax.ShapeDtypeStruct(gradient_shape(state, rows), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    return jax.jit(step, donate_argnums=0, keep_unused=True).lower(*shapes).compile()


def temp_bytes(program: jax.stages.Compiled) -> int:
    analysis: Any = program.memory_analysis()
    return analysis.temp_size_in_bytes


def table_of(state: tuple) -> jax.Array:
    """[L, V, W]"""
    return jax.tree.leaves(state[0])[0]


def gradient_shape(state: tuple, rows: int) -> tuple[int, int, int]:
    layers, _, width = table_of(state).shape
    return layers, rows, width


def gradient(state: tuple, rows: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(gradient_shape(state, rows), np.float32)


def id_sets(v: int, rows: int) -> list[jax.Array]:
    """ID_SETS times ``rows`` distinct Zipf draws of 0..v-1 in random order; a rank's id is the same
    in all sets and lies anywhere.
    """
    rng = np.random.default_rng(v)
    id_of_rank, share = rng.permutation(v), np.cumsum(1 / np.arange(1, v + 1))
    sets = []
    for _ in range(ID_SETS):
        ranks = np.zeros(0, np.int64)
        while len(ranks) < rows:
            ranks = np.union1d(ranks, np.searchsorted(share, share[-1] * rng.random(rows)))
        sets.append(jnp.asarray(id_of_rank[rng.permutation(ranks)[:rows]], jnp.int32))
    return sets


def huge_pages(tree: Any) -> bool:
    """Moves the arrays into pages of 2 MiB (Linux 6.1 and newer); donated arrays stay in them.
    False where that is refused, or on another device.
    """
    if jax.default_backend() != "cpu" or platform.system() != "Linux":
        return False
    madvise, page, collapse = ctypes.CDLL(None).madvise, 2 << 20, 25

    def moved(start: int, length: int) -> bool:
        # while memory is in use elsewhere a try may fail and the next succeed
        where = ctypes.c_void_p(start), ctypes.c_size_t(length)
        return any(madvise(*where, collapse) == 0 for _ in range(4))

    results = []
    for array in jax.tree.leaves(tree):
        address = array.unsafe_buffer_pointer()
        start = -(-address // page) * page
        length = (address + array.nbytes - start) // page * page
        if length > 0:
            results.append(moved(start, length))
    return bool(results) and all(results)


def make_sweep() -> tuple[Callable, float]:
    """(a call that reads and writes SWEEP_BYTES one after the other, its median speed in GB/s)."""
    held = [jnp.zeros(SWEEP_BYTES // 4, jnp.float32)]
    program = jax.jit(lambda a: a + 1, donate_argnums=0)

    def sweep() -> None:
        held[0] = jax.block_until_ready(program(held[0]))

    return sweep, 2 * SWEEP_BYTES / median_seconds(sweep, 9) / 1e9
