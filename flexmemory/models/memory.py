"""The seam: a token memory is a function from addresses to rows, and nothing else knows where a row
came from.

``TokenMemory(ids_R, e_RD)`` gives the rows of all memory layers for R addresses. The same values
come from the live weights (training), from a fold over every address (export) or from a TKV store
(serving); the blocks cannot tell."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, P

from flexmemory.models.config import ModelConfig
from flexmemory.models.ffn import LayerNorm, RMSNorm, SwiGLU
from flexmemory.models.patterns import LayerSpec
from flexmemory.sharding import local

Rows = dict[str, Array]  # group name -> rows_LRW of the group's memory layers, in layer order
TABLE_BLOCK = 256  # rows of a table whose first values come from one key


@jax.custom_vjp
def gather_rows(rows_RW: Array, inverse_BT: Array) -> Array:
    """rows_BTW = rows_RW[inverse_BT]; the gradient is summed in float32 whatever the rows' dtype.

    ``inverse_BT`` must lie in 0..R-1 (out of range is clipped); on a mesh every section of the
    batch counts its own section of rows from 0. Reverse-mode derivatives only."""
    return local(
        lambda rows_RW, inverse_BT: jnp.take(rows_RW, inverse_BT, axis=0, mode="clip"),
        lambda rows, inverse: P(*inverse, *rows[1:]),
    )(rows_RW, inverse_BT)


def _gather_forward(rows_RW: Array, inverse_BT: Array) -> tuple:
    return gather_rows(rows_RW, inverse_BT), (inverse_BT, rows_RW)


def _gather_backward(residuals: tuple, grad_BTW: Array) -> tuple:
    def add(inverse_BT: Array, rows_RW: Array, grad_BTW: Array) -> Array:
        zeros_RW = jnp.zeros(rows_RW.shape, jnp.float32)  # rows only for their shape and dtype
        grad_RW = zeros_RW.at[inverse_BT].add(grad_BTW.astype(jnp.float32), mode="clip")
        return grad_RW.astype(rows_RW.dtype)

    grad_RW = local(add, lambda inverse, rows, grad: rows)(*residuals, grad_BTW)
    return grad_RW, np.zeros(residuals[0].shape, jax.dtypes.float0)


gather_rows.defvjp(_gather_forward, _gather_backward)


class RowSource(nnx.Module):
    """What makes the rows of one layer: built as ``source(cfg, layer, rngs)``, called as
    ``source(ids_R, e_RD) -> rows_RW`` with addresses (see :func:`take_rows`) and their token
    embeddings.

    A source with a learned table sets ``self.table = empty_table(cfg, width)``, reads it by
    :func:`take_rows` and gives the table's ``table_std``."""

    stacking = "vmap"  # over the layers of a stack; with "scan" one layer is computed at a time

    def __init__(self, cfg: ModelConfig, layer: LayerSpec, rngs: nnx.Rngs):
        pass

    @staticmethod
    def table_std(cfg: ModelConfig, layer: LayerSpec) -> float:
        """Standard deviation of the table's first values, which are normal."""
        raise NotImplementedError("a source with a table gives table_std")

    def __call__(self, ids_R: Array | None, e_RD: Array) -> Array:
        raise NotImplementedError


class FFNRows(RowSource):
    """Live row of one layer: a SwiGLU of the normed token embedding (MemoryLLM Eq 2.4). W = D."""

    # in a fold, an evaluation or under remat one layer's [R, F] activations are alive at a time
    stacking = "scan"

    def __init__(self, cfg: ModelConfig, layer: LayerSpec, rngs: nnx.Rngs):
        self.norm = None if cfg.x0_norm_shared else x0_norm(cfg)
        self.ffn = SwiGLU(cfg, layer.d_memory, rngs)

    def __call__(self, ids_R: Array | None, e_RD: Array) -> Array:
        return self.ffn(e_RD if self.norm is None else self.norm(e_RD))


class TableRows(RowSource):
    """Learned row of one layer: the row of a table [V, W] float32, at first Xavier-normal as the
    STEM code initialises it, or normal with ``cfg.table_init_std``."""

    def __init__(self, cfg: ModelConfig, layer: LayerSpec, rngs: nnx.Rngs):
        self.table = empty_table(cfg, layer.row_width)

    @staticmethod
    def table_std(cfg: ModelConfig, layer: LayerSpec) -> float:
        return cfg.table_init_std or (2 / (cfg.vocab_size + layer.row_width)) ** 0.5

    def __call__(self, ids_R: Array | None, e_RD: Array) -> Array:
        return take_rows(self.table[...], ids_R).astype(e_RD.dtype)


def empty_table(cfg: ModelConfig, width: int) -> nnx.Param:
    """A table [V, width] of zeros. ``transformer.init_params`` draws the first values, because a
    table may be larger than a device."""
    return nnx.Param(jnp.zeros((cfg.vocab_size, width), jnp.float32))


def first_rows(keys_L: Array, std: float, first: int | Array, blocks: int, width: int) -> Array:
    """First values [L, blocks * TABLE_BLOCK, width], float32, of some rows of L tables. Block b of
    a table, its TABLE_BLOCK rows from row b * TABLE_BLOCK on, is std * normal(fold_in(key, b)):
    the same numbers however many blocks are drawn at a time. ``first``: number of the first block.
    """

    def block(key: Array, b: Array) -> Array:
        return std * jax.random.normal(jax.random.fold_in(key, b), (TABLE_BLOCK, width))

    over_blocks = jax.vmap(block, (None, 0))
    rows = jax.vmap(over_blocks, (0, None))(keys_L, first + jnp.arange(blocks))
    return rows.reshape(len(keys_L), blocks * TABLE_BLOCK, width)


def take_rows(table_VW: Array, ids_R: Array | None) -> Array:
    """rows_RW of the addresses ids_R. ids_R=None: the table is already gathered to these rows, as
    in a train step."""
    return table_VW if ids_R is None else table_VW[ids_R]


def x0_norm(cfg: ModelConfig) -> RMSNorm | LayerNorm:
    return (LayerNorm if cfg.x0_norm == "layernorm" else RMSNorm)(cfg.d_model, cfg.norm_eps)


def apply_stack(body: Callable, carry: Any, xs: Any, length: int, scan: bool) -> tuple[Any, Any]:
    """``lax.scan(body, carry, xs)``, or the same as an unrolled Python loop."""
    if scan and length > 1:
        return jax.lax.scan(body, carry, xs)
    ys = []
    for i in range(length):
        carry, y = body(carry, jax.tree.map(lambda a: a[i], xs))
        ys.append(y)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *ys)


# Tensors that a remat may keep, named by checkpoint_name where they are computed: what attention
# reads (q and k with RoPE) and gives before its output projection; the projections in front of an
# FFN's SiLU and beside it, of the context and of a live row.
KEEPABLE = ("q", "k", "v", "attention", "gate", "up")


def remat(body: Callable, length: int, scan: bool, keep: str) -> Callable:
    """``body`` of :func:`apply_stack` that keeps its inputs and the tensors named in ``keep`` (of
    KEEPABLE, between spaces) for the backward pass.

    Unrolled code needs a barrier, a loop has one."""
    policy = jax.checkpoint_policies.save_only_these_names(*keep.split())
    return jax.checkpoint(body, policy=policy, prevent_cse=not (scan and length > 1))


def row_groups(specs: tuple[LayerSpec, ...]) -> dict[str, list[int]]:
    """Group name -> indices of its memory layers. A group is one array of rows of one width."""
    groups: dict[str, list[int]] = {}
    for index, spec in enumerate(specs):
        if spec.group:
            groups.setdefault(spec.group, []).append(index)
    return groups


def row_stacks(specs: tuple[LayerSpec, ...]) -> dict[str, list[tuple[str, list[int]]]]:
    """Group name -> [(name of a stack of parameters, indices of the memory layers whose rows it
    gives)]. Layers with equal specs share a stack."""
    layers_of: dict[LayerSpec, list[int]] = {}
    for index in itertools.chain(*row_groups(specs).values()):
        layers_of.setdefault(specs[index], []).append(index)
    stacks: dict[str, list[tuple[str, list[int]]]] = {}
    for number, (spec, layers) in enumerate(layers_of.items()):
        stacks.setdefault(spec.group, []).append((f"stack{number}", layers))
    return stacks


def rows_by_unit(rows: Rows, cuts: tuple) -> list[Rows]:
    """Deals the rows out to the scanned stack: for each (unit, repeats) of ``patterns.segments``
    {"u<j>": rows [repeats, R, W]}."""
    taken, units = dict.fromkeys(rows, 0), []
    for unit, repeats in cuts:
        groups, unit_rows = [spec.group for spec in unit], {}
        for j, group in enumerate(groups):
            if group:
                first, step = taken[group] + groups[:j].count(group), groups.count(group)
                unit_rows[f"u{j}"] = rows[group][first : first + step * repeats : step]
        for group in set(groups) - {""}:
            taken[group] += groups.count(group) * repeats
        units.append(unit_rows)
    return units


class TokenMemory(nnx.Module):
    """The row sources of all memory layers, in stacks of parameters [n, ...] as :func:`row_stacks`
    has them. ``sources`` maps a layer kind to its RowSource."""

    def __init__(
        self,
        cfg: ModelConfig,
        specs: tuple[LayerSpec, ...],
        sources: dict[str, type[RowSource]],
        rngs: nnx.Rngs,
    ):
        uses_e = any(spec.d_memory for spec in specs)  # learned tables alone read no embedding
        self.norm = x0_norm(cfg) if cfg.x0_norm_shared and uses_e else None
        self.detach, self.scan = cfg.detach_x0, cfg.scan_layers
        self.dtype = jnp.dtype(cfg.compute_dtype)
        self.remat, self.keep = cfg.remat, cfg.remat_keep
        groups, order, stacks = row_groups(specs), row_stacks(specs), {}
        for stack, layers in itertools.chain(*order.values()):
            spec = specs[layers[0]]
            source = sources[spec.kind]
            stacks[stack] = jax.vmap(lambda key: source(cfg, spec, key))(rngs.split(len(layers)))
        self.stacks = nnx.Dict(stacks)
        # static: which stack fills which layers of a group
        self.order = tuple(
            (g, tuple((stack, tuple(map(groups[g].index, layers))) for stack, layers in parts))
            for g, parts in order.items()
        )

    def __call__(self, ids_R: Array | None, e_RD: Array) -> Rows:
        """Rows of the addresses ids_R (int32, see :func:`take_rows`) whose token embeddings are
        e_RD. Returns rows_LRW by group."""
        e_RD = e_RD.astype(self.dtype)
        if self.detach:
            e_RD = jax.lax.stop_gradient(e_RD)
        if self.norm is not None:
            e_RD = self.norm(e_RD)
        rows = {}
        for group, stacks in self.order:
            parts = [self._stack_rows(self.stacks[s], ids_R, e_RD, len(at)) for s, at in stacks]
            at = list(itertools.chain(*(at for _, at in stacks)))
            rows_LRW = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
            rows[group] = rows_LRW if at == sorted(at) else rows_LRW[np.argsort(at)]
        return rows

    def _stack_rows(self, stack: RowSource, ids_R: Array | None, e_RD: Array, length: int) -> Array:
        if stack.stacking == "vmap":
            return jax.vmap(lambda source: source(ids_R, e_RD))(stack)

        def body(carry: None, source: RowSource) -> tuple[None, Array]:
            return carry, source(ids_R, e_RD)

        body = remat(body, length, self.scan, self.keep) if self.remat else body
        return apply_stack(body, None, stack, length, self.scan)[1]
