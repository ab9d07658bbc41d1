"""The seam: a token memory is a function from addresses to rows, and nothing else knows where a row
came from.

``TokenMemory(ids_R, e_RD)`` gives the rows of all memory layers for R addresses. The same values
come from the live weights (training), from a fold over every address (export) or from a TKV store
(serving); the blocks cannot tell.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P

from flexmemory.models.config import ModelConfig
from flexmemory.models.ffn import LayerNorm, RMSNorm, SwiGLU
from flexmemory.models.patterns import LayerSpec
from flexmemory.sharding import local

Rows = dict[str, jax.Array]  # group name -> rows_LRW of the group's memory layers, in layer order


@jax.custom_vjp
def gather_rows(rows_RW: jax.Array, inverse_BT: jax.Array) -> jax.Array:
    """rows_BTW = rows_RW[inverse_BT]; the gradient is summed in float32 whatever the rows' dtype.

    ``inverse_BT`` must lie in 0..R-1 (out of range is clipped); on a mesh every section of the
    batch counts its own section of rows from 0. Reverse-mode derivatives only.
    """
    return local(
        lambda rows_RW, inverse_BT: jnp.take(rows_RW, inverse_BT, axis=0, mode="clip"),
        lambda rows, inverse: P(*inverse, *rows[1:]),
    )(rows_RW, inverse_BT)


def _gather_forward(rows_RW, inverse_BT):
    return gather_rows(rows_RW, inverse_BT), (inverse_BT, rows_RW)


def _gather_backward(residuals, grad_BTW):
    def add(inverse_BT, rows_RW, grad_BTW):  # rows only for their shape and dtype
        grad_RW = (
            jnp.zeros(rows_RW.shape, jnp.float32)
            .at[inverse_BT]
            .add(grad_BTW.astype(jnp.float32), mode="clip")
        )
        return grad_RW.astype(rows_RW.dtype)

    return local(add, lambda inverse, rows, grad: rows)(*residuals, grad_BTW), np.zeros(
        residuals[0].shape, jax.dtypes.float0
    )


gather_rows.defvjp(_gather_forward, _gather_backward)


class FFNRows(nnx.Module):
    """Live row of one layer: a SwiGLU of the normed token embedding (MemoryLLM Eq 2.4-2.5). W = D."""

    # in a fold, an evaluation or under remat one layer's [R, F] activations are alive at a time
    stacking = "scan"

    def __init__(self, cfg: ModelConfig, layer: LayerSpec, rngs: nnx.Rngs):
        self.norm = None if cfg.x0_norm_shared else x0_norm(cfg)
        self.ffn = SwiGLU(cfg, layer.d_memory, rngs)

    def __call__(self, ids_R: jax.Array, e_RD: jax.Array) -> jax.Array:
        return self.ffn(e_RD if self.norm is None else self.norm(e_RD))


class TableRows(nnx.Module):
    """Learned row of one layer: table [V, W] float32, Xavier-normal as the STEM code initialises
    it, or normal with ``cfg.table_init_std``.
    """

    stacking = "vmap"  # tables lie side by side, [L, V, W]; scanning would copy whole ones

    def __init__(
        self, cfg: ModelConfig, layer: LayerSpec, rngs: nnx.Rngs, draw: Callable = jax.random.normal
    ):
        std = cfg.table_init_std or (2 / (cfg.vocab_size + layer.row_width)) ** 0.5
        self.table = nnx.Param(
            std * draw(rngs.params(), (cfg.vocab_size, layer.row_width), jnp.float32)
        )

    def __call__(self, ids_R: jax.Array | None, e_RD: jax.Array) -> jax.Array:
        return take_rows(self.table[...], ids_R).astype(e_RD.dtype)


def take_rows(table_VW: jax.Array, ids_R: jax.Array | None) -> jax.Array:
    """rows_RW of the addresses ids_R; with None the table holds the rows asked for alone, in their
    order: so it is trained.
    """
    return table_VW if ids_R is None else table_VW[ids_R]


def x0_norm(cfg: ModelConfig) -> nnx.Module:
    return (LayerNorm if cfg.x0_norm == "layernorm" else RMSNorm)(cfg.d_model, cfg.norm_eps)


def apply_stack(body: Callable, carry, xs, length: int, scan: bool):
    """``lax.scan(body, carry, xs)``, or the same as an unrolled Python loop."""
    if scan and length > 1:
        return jax.lax.scan(body, carry, xs)
    ys = []
    for i in range(length):
        carry, y = body(carry, jax.tree.map(lambda a: a[i], xs))
        ys.append(y)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *ys)


# Tensors that a remat may keep, named by checkpoint_name where they are made: what attention reads
# (q and k with RoPE) and gives before its output projection; the projections in front of an FFN's
# SiLU and beside it, of the context and of a live row.
KEEPABLE = ("q", "k", "v", "attention", "gate", "up")


def remat(body: Callable, length: int, scan: bool, keep: str) -> Callable:
    """``body`` of :func:`apply_stack` that keeps its inputs and the tensors named in ``keep`` (of
    KEEPABLE, between spaces) for the backward pass.

    Unrolled code needs a barrier, a loop has one.
    """
    policy = jax.checkpoint_policies.save_only_these_names(*keep.split())
    return jax.checkpoint(body, policy=policy, prevent_cse=not (scan and length > 1))


def row_groups(specs: tuple[LayerSpec, ...]) -> dict[str, list[int]]:
    """Group name -> indices of its memory layers. A group is one array of rows of one width."""
    groups: dict[str, list[int]] = {}
    for index, spec in enumerate(specs):
        if spec.row_width:
            groups.setdefault(f"w{spec.row_width}", []).append(index)
    return groups


def row_stacks(specs: tuple[LayerSpec, ...]) -> dict[str, list[tuple[str, list[int]]]]:
    """Group name -> [(name of a stack of parameters, indices of the memory layers whose rows it
    makes)]. Layers with equal specs share a stack.
    """
    places: dict[tuple[str, LayerSpec], list[int]] = {}
    for name, layers in row_groups(specs).items():
        for index in layers:
            places.setdefault((name, specs[index]), []).append(index)
    stacks: dict[str, list[tuple[str, list[int]]]] = {}
    for number, ((name, _), layers) in enumerate(places.items()):
        stacks.setdefault(name, []).append((f"stack{number}", layers))
    return stacks


def rows_by_unit(rows: Rows, cuts) -> list[dict[str, jax.Array]]:
    """Deals the rows out to the scanned stack: for each (unit, repeats) of ``patterns.segments``
    {"u<j>": rows [repeats, R, W]}.
    """
    taken, made = dict.fromkeys(rows, 0), []
    for unit, repeats in cuts:
        groups = [f"w{spec.row_width}" if spec.row_width else None for spec in unit]
        mine = {}
        for j, group in enumerate(groups):
            if group:
                first, step = taken[group] + groups[:j].count(group), groups.count(group)
                mine[f"u{j}"] = rows[group][first : first + step * repeats : step]
        for group in set(groups) - {None}:
            taken[group] += groups.count(group) * repeats
        made.append(mine)
    return made


class TokenMemory(nnx.Module):
    """The row sources of all memory layers, stacks of parameters [n, ...] as :func:`row_stacks` has
    them.

    ``sources`` maps a layer kind to the class that makes its rows: built as ``source(cfg, layer,
    rngs)``, called as ``source(ids_R, e_RD) -> rows_RW``.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        specs: tuple[LayerSpec, ...],
        sources: dict[str, type],
        rngs: nnx.Rngs,
    ):
        uses_e = any(
            spec.d_memory for spec in specs
        )  # a stack of learned tables alone reads no embedding
        self.norm = x0_norm(cfg) if cfg.x0_norm_shared and uses_e else None
        self.detach, self.scan, self.dtype = (
            cfg.detach_x0,
            cfg.scan_layers,
            jnp.dtype(cfg.compute_dtype),
        )
        self.remat, self.keep = cfg.remat, cfg.remat_keep
        groups, order, stacks = row_groups(specs), row_stacks(specs), {}
        for stack, layers in itertools.chain(*order.values()):
            spec = specs[layers[0]]
            source = sources[spec.kind]
            stacks[stack] = jax.vmap(lambda key: source(cfg, spec, key))(rngs.split(len(layers)))
        self.stacks = nnx.Dict(stacks)
        # static: which stack fills which places of a group's layer axis
        self.order = tuple(
            (
                name,
                tuple(
                    (stack, tuple(groups[name].index(i) for i in layers)) for stack, layers in parts
                ),
            )
            for name, parts in order.items()
        )

    def __call__(self, ids_R: jax.Array | None, e_RD: jax.Array) -> Rows:
        """Rows of the addresses ids_R (int32) whose token embeddings are e_RD. Returns rows_LRW by
        group.

        ids_R: see :func:`take_rows`, through which every source reads its table.
        """
        e_RD = e_RD.astype(self.dtype)
        if self.detach:
            e_RD = jax.lax.stop_gradient(e_RD)
        if self.norm is not None:
            e_RD = self.norm(e_RD)
        rows = {}
        for name, parts in self.order:
            made, places = [], []
            for stack, where in parts:
                made.append(self._stack_rows(self.stacks[stack], ids_R, e_RD, len(where)))
                places.extend(where)
            rows_LRW = made[0] if len(made) == 1 else jnp.concatenate(made)
            rows[name] = rows_LRW if places == sorted(places) else rows_LRW[np.argsort(places)]
        return rows

    def _stack_rows(self, stack, ids_R, e_RD, length: int) -> jax.Array:
        if stack.stacking == "vmap":
            return jax.vmap(lambda source: source(ids_R, e_RD))(stack)

        def body(carry, source):
            return carry, source(ids_R, e_RD)

        body = remat(body, length, self.scan, self.keep) if self.remat else body
        return apply_stack(body, None, stack, length, self.scan)[1]
