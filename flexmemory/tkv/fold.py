"""The fold: a token memory evaluated on every address and encoded as it is stored. One call shape,
so that equal weights give equal bits everywhere.
"""

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
from flexmemory.models.memory import row_stacks
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


@functools.partial(jax.jit, static_argnames=("cfg", "layouts"))
def fold_call(
    params: dict, bases: Bases, ids_R: jax.Array, count, *, cfg: ModelConfig, layouts: Layouts
):
    """({group: stored}, {group: figures}) of the addresses ids_R int32, of which the first
    ``count`` are in the figures.

    stored: as :func:`encoding.encode` gives it, token-major. figures, each [L]: "finite" bool, of
    the stored rows and of the sums; and, but for plain float32, where nothing is lost,
    "squared_error", "squares", "max_abs" float32: sums over rows and numbers, and the largest
    error.
    """
    rows = build(cfg)(params).rows(ids_R)
    real_R1 = (jnp.arange(len(ids_R)) < count)[:, None]
    stored, figures = {}, {}
    for name, layout in layouts:
        exact_LRW = rows[name].astype(jnp.float32)
        stored[name] = encode(layout, jnp.swapaxes(exact_LRW, 0, 1), bases[name])
        again_LRW = decode(layout, stored[name], bases[name])
        figures[name] = {"finite": jnp.isfinite(again_LRW).all((1, 2))}
        if not layout.exact:
            error_LRW = jnp.where(real_R1, again_LRW - exact_LRW, 0)
            error_L, squares_L = (
                (error_LRW**2).sum((1, 2)),
                (jnp.where(real_R1, exact_LRW, 0) ** 2).sum((1, 2)),
            )
            figures[name] = {
                "finite": figures[name]["finite"] & jnp.isfinite(error_L + squares_L),
                "squared_error": error_L,
                "squares": squares_L,
                "max_abs": jnp.abs(error_LRW).max((1, 2)),
            }
    return stored, figures


def start_block(
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
    last one padded, and does not wait.

    ``start`` must be a multiple of ``fold_rows``, so that an address meets the same neighbours in
    every fold.
    """
    assert start % fold_rows == 0, (start, fold_rows)
    parts = []
    for at in range(start, stop, fold_rows) if layouts else ():
        ids_R, count = (
            np.minimum(np.arange(at, at + fold_rows), stop - 1).astype(np.int32),
            min(stop - at, fold_rows),
        )
        parts.append((*fold_call(params, bases, ids_R, count, cfg=cfg, layouts=layouts), at, count))
    return parts


def fetch_block(
    parts: list[Part], groups: tuple[Group, ...]
) -> tuple[dict[str, list[np.ndarray]], dict[int, list[float]]]:
    """Waits for a started block: ({group: [bundles uint8 [R, B] of each call]}, {model layer:
    [squared error, squares, largest error]}).

    The sums are float64; {} where the rows are plain float32. Raises UserError naming layer and
    tokens of rows that are not finite.
    """
    bundles, sums = {group.name: [] for group in groups}, {}
    for stored, figures, at, count in parts:
        for group in groups:
            figure = {
                name: np.asarray(value, np.float64) for name, value in figures[group.name].items()
            }
            _check_finite(figure["finite"], group, at, count)
            for place, layer in enumerate(group.layers if len(figure) > 1 else ()):
                error, squares, largest = sums.get(layer, (0.0, 0.0, 0.0))
                sums[layer] = [
                    error + float(figure["squared_error"][place]),
                    squares + float(figure["squares"][place]),
                    max(largest, float(figure["max_abs"][place])),
                ]
            array = np.asarray(stored[group.name])[:count]
            bundles[group.name].append(
                array.reshape(count, math.prod(array.shape[1:])).view(np.uint8)
            )
    return bundles, sums


def _check_finite(finite_L: np.ndarray, group: Group, at: int, count: int) -> None:
    if not finite_L.all():
        raise UserError(
            f"layer {group.layers[int(np.argmin(finite_L))]}: its rows of tokens {at} to"
            f" {at + count - 1} are not all finite in dtype {group.layout.dtype}, or their squares"
            " are not; export an earlier checkpoint (--step), or from float16 go to bfloat16"
        )


def learned_tables(
    params: dict, cfg: ModelConfig, groups: tuple[Group, ...]
) -> dict[str, list[np.ndarray]]:
    """{group: [table float32 [V, W] of each of its layers]} of the groups whose bundles
    :func:`copy_block` makes: views of ``params``, which lie on the host.
    """
    specs, made = layer_specs(cfg), {}
    for group in groups:
        learned = all(specs[layer].learned for layer in group.layers)
        if (
            learned and group.layout.exact and cfg.compute_dtype == "float32"
        ):  # else they are rounded
            tables = {
                layer: table_VW
                for stack, layers in row_stacks(specs)[group.name]
                for layer, table_VW in zip(
                    layers, params["memory"]["stacks"][stack]["table"], strict=True
                )
            }
            made[group.name] = [tables[layer] for layer in group.layers]
    return made


def copy_memory(groups: Iterable[Group], count: int) -> np.ndarray:
    """uint8 [count, N]: for each of ``count`` calls of :func:`copy_block` what it needs, beginning
    at a page, so that a disk takes it as it lies.
    """
    size = max([COPY_BYTES, *(group.bundle_bytes for group in groups)])
    return allocate(count, -(-size // PAGE) * PAGE)


def copy_block(
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
    while a processor's cache holds them. Raises the UserError of :func:`fetch_block`.
    """
    rows = min(fold_rows, format.floor_power(COPY_BYTES // group.bundle_bytes))
    for at in range(start, stop, rows):
        bundles_RB = memory_N[: rows * group.bundle_bytes].reshape(rows, group.bundle_bytes)[
            : stop - at
        ]
        bundles_RLW = host_view(group.layout, bundles_RB)
        for place, table_VW in enumerate(tables):
            bundles_RLW[:, place] = table_VW[at : at + len(bundles_RB)]
        if not np.isfinite(bundles_RLW).all():
            at -= at % fold_rows
            count = min(fold_rows, stop - at)
            _check_finite(
                np.stack([np.isfinite(table_VW[at : at + count]).all() for table_VW in tables]),
                group,
                at,
                count,
            )
        yield bundles_RB


def fold_table(
    params: dict,
    bases: Bases,
    *,
    cfg: ModelConfig,
    groups: tuple[Group, ...],
    fold_rows: int,
    block_rows: int,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(first address, {group: bundles uint8 [R, B]}) of successive blocks over all V, as an export
    with the same ``fold_rows`` stores them; a block at a time is in memory.
    """
    for start in range(0, cfg.vocab_size, block_rows):
        stop = min(start + block_rows, cfg.vocab_size)
        parts = start_block(
            params, bases, start, stop, cfg=cfg, layouts=layouts_of(groups), fold_rows=fold_rows
        )
        yield (
            start,
            {name: np.concatenate(made) for name, made in fetch_block(parts, groups)[0].items()},
        )
