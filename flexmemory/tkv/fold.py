"""The fold: a token memory evaluated on every address and encoded as it is stored. One call shape, so that equal weights give equal bits
everywhere."""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.config import ModelConfig
from flexmemory.errors import UserError
from flexmemory.models.transformer import build
from flexmemory.tkv.encoding import Basis, Layout, decode, encode
from flexmemory.tkv.format import Group

Bases = dict[str, Basis]
Layouts = tuple[tuple[str, Layout], ...]
# of one call: ({group: stored rows}, {group: figures}, first address, number of addresses)
Part = tuple[dict[str, jax.Array], dict[str, dict[str, jax.Array]], int, int]


def layouts_of(groups: tuple[Group, ...]) -> Layouts:
    return tuple((group.name, group.layout) for group in groups)


@functools.partial(jax.jit, static_argnames=("cfg", "layouts"))
def fold_call(params: dict, bases: Bases, ids_R: jax.Array, count, *, cfg: ModelConfig, layouts: Layouts):
    """({group: stored}, {group: figures}) of the addresses ids_R int32, of which the first ``count`` are in the figures.

    stored: as :func:`encoding.encode` gives it, token-major. figures, each [L]: "finite" bool, of the stored rows and of the sums; and, but
    for plain float32, where nothing is lost, "squared_error", "squares", "max_abs" float32: sums over rows and numbers, and the largest error.
    """
    rows = build(cfg)(params).rows(ids_R)
    real_R1 = (jnp.arange(len(ids_R)) < count)[:, None]
    stored, figures = {}, {}
    for name, layout in layouts:
        exact_LRW = rows[name].astype(jnp.float32)
        stored[name] = encode(layout, jnp.swapaxes(exact_LRW, 0, 1), bases[name])
        again_LRW = decode(layout, stored[name], bases[name])
        figures[name] = {"finite": jnp.isfinite(again_LRW).all((1, 2))}
        if layout != Layout(layout.layers, layout.width, "float32"):
            error_LRW = jnp.where(real_R1, again_LRW - exact_LRW, 0)
            error_L, squares_L = (error_LRW**2).sum((1, 2)), (jnp.where(real_R1, exact_LRW, 0) ** 2).sum((1, 2))
            figures[name] = {"finite": figures[name]["finite"] & jnp.isfinite(error_L + squares_L), "squared_error": error_L, "squares": squares_L,
                             "max_abs": jnp.abs(error_LRW).max((1, 2))}
    return stored, figures


def start_block(params: dict, bases: Bases, start: int, stop: int, *, cfg: ModelConfig, layouts: Layouts, fold_rows: int) -> list[Part]:
    """Dispatches the fold of the addresses start..stop-1 in calls of ``fold_rows`` addresses, the last one padded, and does not wait.

    ``start`` must be a multiple of ``fold_rows``, so that an address meets the same neighbours in every fold.
    """
    assert start % fold_rows == 0, (start, fold_rows)
    parts = []
    for at in range(start, stop, fold_rows):
        ids_R, count = np.minimum(np.arange(at, at + fold_rows), stop - 1).astype(np.int32), min(stop - at, fold_rows)
        parts.append((*fold_call(params, bases, ids_R, count, cfg=cfg, layouts=layouts), at, count))
    return parts


def fetch_block(parts: list[Part], groups: tuple[Group, ...]) -> tuple[dict[str, list[np.ndarray]], dict[int, list[float]]]:
    """Waits for a started block: ({group: [bundles uint8 [R, B] of each call]}, {model layer: [squared error, squares, largest error]}).

    The sums are float64; {} where the rows are plain float32. Raises UserError naming layer and tokens of rows that are not finite.
    """
    bundles, sums = {group.name: [] for group in groups}, {}
    for stored, figures, at, count in parts:
        for group in groups:
            figure = {name: np.asarray(value, np.float64) for name, value in figures[group.name].items()}
            if not figure["finite"].all():
                layer = group.layers[int(np.argmin(figure["finite"]))]
                raise UserError(f"layer {layer}: its rows of tokens {at} to {at + count - 1} are not all finite in dtype {group.layout.dtype}, "
                                "or their squares are not; export an earlier checkpoint (--step), or from float16 go to bfloat16")
            for place, layer in enumerate(group.layers if len(figure) > 1 else ()):
                error, squares, largest = sums.get(layer, (0.0, 0.0, 0.0))
                sums[layer] = [error + float(figure["squared_error"][place]), squares + float(figure["squares"][place]),
                               max(largest, float(figure["max_abs"][place]))]
            array = np.asarray(stored[group.name])[:count]
            bundles[group.name].append(array.reshape(count, math.prod(array.shape[1:])).view(np.uint8))
    return bundles, sums


def fold_table(params: dict, bases: Bases, *, cfg: ModelConfig, groups: tuple[Group, ...], fold_rows: int,
               block_rows: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(first address, {group: bundles uint8 [R, B]}) of successive blocks over all V, as an export with the same ``fold_rows`` stores them;
    a block at a time is in memory."""
    for start in range(0, cfg.vocab_size, block_rows):
        stop = min(start + block_rows, cfg.vocab_size)
        parts = start_block(params, bases, start, stop, cfg=cfg, layouts=layouts_of(groups), fold_rows=fold_rows)
        yield start, {name: np.concatenate(made) for name, made in fetch_block(parts, groups)[0].items()}
