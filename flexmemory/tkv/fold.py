"""The fold: a token memory evaluated on every address and encoded as it is stored. One call shape,
so that equal weights give equal bits everywhere.

Learned tables may lie in the host's memory and be larger than a device: a call is given the rows of
its own addresses."""

import functools
import math
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.errors import UserError
from flexmemory.files import PAGE, allocate
from flexmemory.models.blocks import layer_specs
from flexmemory.models.config import ModelConfig
from flexmemory.models.memory import Rows, row_stacks, take_rows
from flexmemory.models.parameters import is_table
from flexmemory.models.transformer import build
from flexmemory.tkv import format
from flexmemory.tkv.encoding import Basis, Layout, decode, encode, host_view
from flexmemory.tkv.format import Group

COPY_BYTES = 1 << 20  # of bundles copied at a time

Bases = dict[str, Basis]
Layouts = tuple[tuple[str, Layout], ...]
# of one call: ({group: stored rows}, {group: figures}, first address, number of addresses)
Part = tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]], int, int]


def layouts_of(groups: tuple[Group, ...]) -> Layouts:
    return tuple((group.name, group.layout) for group in groups)


def on_device(params: dict) -> dict:
    """``params`` with learned tables as NumPy arrays on the host, all else on the device."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (np.asarray if is_table(path, leaf) else jax.device_put)(leaf), params
    )


def with_rows_of(params: dict, ids_R: np.ndarray, cfg: ModelConfig, names: Iterable[str]) -> dict:
    """``params`` whose learned tables hold the rows of the addresses ids_R alone, [L, R, W]; those
    that no group of ``names`` needs hold zeros."""
    used = {stack for name in names for stack, _ in row_stacks(layer_specs(cfg))[name]}

    def rows(path: tuple, leaf: np.ndarray) -> np.ndarray:
        if not is_table(path, leaf):
            return leaf
        if any(getattr(key, "key", None) in used for key in path):
            return leaf[:, ids_R]
        return np.broadcast_to(np.float32(0), (len(leaf), len(ids_R), *leaf.shape[2:]))

    memory = jax.tree_util.tree_map_with_path(rows, {"memory": params["memory"]})
    return params | memory


def live_rows(cfg: ModelConfig, params: dict, ids_R: jax.Array) -> Rows:
    """The rows of the addresses ids_R from what :func:`with_rows_of` gave; inside jit."""
    model = build(cfg)(params)
    assert model.memory is not None  # only layers with rows are folded
    return model.memory(None, take_rows(model.embed[...], ids_R))


def fold_call(
    params: dict, bases: Bases, ids_R: np.ndarray, count: int, *, cfg: ModelConfig, layouts: Layouts
) -> tuple[dict, dict]:
    """({group: stored}, {group: figures}) of the addresses ids_R int32, of which the first
    ``count`` are in the figures. Dispatches and does not wait.

    stored: as :func:`encoding.encode` gives it. figures, each [L]: "finite" bool, of the stored
    rows and of the sums; but for plain float32 also "squared_error", "squares" (sums over rows and
    numbers) and "max_abs" (the largest error), float32."""
    params = with_rows_of(params, ids_R, cfg, [name for name, _ in layouts])
    return _fold(params, bases, ids_R, count, cfg=cfg, layouts=layouts)


@functools.partial(jax.jit, static_argnames=("cfg", "layouts"))
def _fold(
    params: dict, bases: Bases, ids_R: jax.Array, count: int, *, cfg: ModelConfig, layouts: Layouts
) -> tuple[dict, dict]:
    rows = live_rows(cfg, params, ids_R)
    real_R1 = (jnp.arange(len(ids_R)) < count)[:, None]
    stored, figures = {}, {}
    for name, layout in layouts:
        exact_LRW = rows[name].astype(jnp.float32)
        stored[name] = encode(layout, jnp.swapaxes(exact_LRW, 0, 1), bases[name])
        again_LRW = decode(layout, stored[name], bases[name])
        figures[name] = {"finite": jnp.isfinite(again_LRW).all((1, 2))}
        if not layout.exact:
            error_LRW = jnp.where(real_R1, again_LRW - exact_LRW, 0)
            error_L = (error_LRW**2).sum((1, 2))
            squares_L = (jnp.where(real_R1, exact_LRW, 0) ** 2).sum((1, 2))
            figures[name]["finite"] &= jnp.isfinite(error_L + squares_L)
            figures[name] |= {"squared_error": error_L, "squares": squares_L}
            figures[name]["max_abs"] = jnp.abs(error_LRW).max((1, 2))
    return stored, figures


def start_shard(
    params: dict,
    bases: Bases,
    start: int,
    stop: int,
    *,
    cfg: ModelConfig,
    layouts: Layouts,
    fold_rows: int,
) -> list[Part]:
    """Dispatches the fold of the addresses start..stop-1 in calls of ``fold_rows`` addresses, the
    last one padded, and does not wait. ``start``: a multiple of ``fold_rows``."""
    assert start % fold_rows == 0, (start, fold_rows)  # so an address has always equal neighbours
    parts = []
    for at in range(start, stop, fold_rows) if layouts else ():
        count = min(stop - at, fold_rows)
        ids_R = np.minimum(np.arange(at, at + fold_rows), stop - 1).astype(np.int32)
        stored, figures = fold_call(params, bases, ids_R, count, cfg=cfg, layouts=layouts)
        parts.append((stored, figures, at, count))
    return parts


def fetch_shard(
    parts: list[Part], groups: tuple[Group, ...]
) -> tuple[dict[str, list[np.ndarray]], dict[int, list[float]]]:
    """Waits for a started shard: ({group: [bundles uint8 [R, B] of each call]}, {model layer:
    [squared error, squares, largest error]}, float64, {} for plain float32). Raises UserError
    naming layer and tokens of rows that are not finite."""
    bundles: dict[str, list[np.ndarray]] = {group.name: [] for group in groups}
    sums: dict[int, list[float]] = {}
    for stored, figures, at, count in parts:
        for group in groups:
            figure = {k: np.asarray(v, np.float64) for k, v in figures[group.name].items()}
            _check_finite(figure["finite"], group, at, count)
            for place, layer in enumerate(group.layers if len(figure) > 1 else ()):
                error, squares, largest = sums.get(layer, (0.0, 0.0, 0.0))
                sums[layer] = [
                    error + float(figure["squared_error"][place]),
                    squares + float(figure["squares"][place]),
                    max(largest, float(figure["max_abs"][place])),
                ]
            array = np.asarray(stored[group.name])[:count]
            shape = count, math.prod(array.shape[1:])
            bundles[group.name].append(array.reshape(shape).view(np.uint8))
    return bundles, sums


def _check_finite(finite_L: np.ndarray, group: Group, at: int, count: int) -> None:
    if not finite_L.all():
        layer, tokens = group.layers[int(np.argmin(finite_L))], f"{at} to {at + count - 1}"
        what = f"are not all finite in dtype {group.layout.dtype}, or their squares are not"
        mend = "export an earlier checkpoint (step=), or from float16 go to bfloat16"
        raise UserError(f"layer {layer}: its rows of tokens {tokens} {what}; {mend}")


def learned_tables(
    params: dict, cfg: ModelConfig, groups: tuple[Group, ...]
) -> dict[str, list[np.ndarray]]:
    """{group: [table float32 [V, W] of each of its layers]} of the groups whose bundles
    :func:`copy_shard` makes: views of ``params``, which lie on the host."""
    specs, learned = layer_specs(cfg), {}
    for group in groups:
        tables = all(specs[layer].learned for layer in group.layers)
        # else they are computed, or rounded
        if tables and group.layout.exact and cfg.compute_dtype == "float32":
            table_of: dict[int, np.ndarray] = {}
            for stack, layers in row_stacks(specs)[group.name]:
                stacked_LVW = params["memory"]["stacks"][stack]["table"]
                table_of |= zip(layers, stacked_LVW, strict=True)
            learned[group.name] = [table_of[layer] for layer in group.layers]
    return learned


def copy_memory(groups: Iterable[Group], count: int) -> np.ndarray:
    """uint8 [count, N]: the memory of ``count`` calls of :func:`copy_shard`, each from a page on,
    so that a disk takes it as it lies."""
    size = max([COPY_BYTES, *(group.bundle_bytes for group in groups)])
    return allocate(count, -(-size // PAGE) * PAGE)


def copy_shard(
    tables: list[np.ndarray],
    group: Group,
    start: int,
    stop: int,
    fold_rows: int,
    memory_N: np.ndarray,
) -> Iterator[np.ndarray]:
    """Bundles uint8 [R, B] of the addresses start..stop-1, bit for bit those of the fold, whose
    gather of learned rows computes nothing.

    Every array is the same ``memory_N`` again, so small that its bundles are checked and written
    while a processor's cache holds them. Raises the UserError of :func:`fetch_shard`."""
    size = group.bundle_bytes
    rows = min(fold_rows, format.floor_power(COPY_BYTES // size))
    for at in range(start, stop, rows):
        bundles_RB = memory_N[: rows * size].reshape(rows, size)[: stop - at]
        bundles_RLW = host_view(group.layout, bundles_RB)
        for place, table_VW in enumerate(tables):
            bundles_RLW[:, place] = table_VW[at : at + len(bundles_RB)]
        if not np.isfinite(bundles_RLW).all():
            at -= at % fold_rows
            count = min(fold_rows, stop - at)
            finite_L = [np.isfinite(table_VW[at : at + count]).all() for table_VW in tables]
            _check_finite(np.stack(finite_L), group, at, count)
        yield bundles_RB


def fold_table(
    params: dict,
    bases: Bases,
    *,
    cfg: ModelConfig,
    groups: tuple[Group, ...],
    fold_rows: int,
    shard_rows: int,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(first address, {group: bundles uint8 [R, B]}) of one shard after another, over all V, as an
    export with the same ``fold_rows`` stores them."""
    layouts = layouts_of(groups)
    for start in range(0, cfg.vocab_size, shard_rows):
        span = start, min(start + shard_rows, cfg.vocab_size)
        parts = start_shard(params, bases, *span, cfg=cfg, layouts=layouts, fold_rows=fold_rows)
        bundles, _ = fetch_shard(parts, groups)
        yield start, {name: np.concatenate(parts) for name, parts in bundles.items()}
