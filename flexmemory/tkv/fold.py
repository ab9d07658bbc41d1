"""The fold: a token memory evaluated on every address. One call shape, so that equal weights give equal bits everywhere."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.config import ModelConfig
from flexmemory.models.transformer import build


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def fold_rows(params: dict, ids_R: jax.Array, *, cfg: ModelConfig, dtype: str) -> dict[str, jax.Array]:
    """{group: rows_RLW in ``dtype``} of the addresses ids_R int32, token-major as a store keeps them."""
    rows = build(cfg)(params).rows(ids_R)
    return {group: jnp.swapaxes(rows_LRW, 0, 1).astype(dtype) for group, rows_LRW in rows.items()}


def fold_range(params: dict, start: int, stop: int, *, cfg: ModelConfig, dtype: str, fold_rows_count: int) -> dict[str, np.ndarray]:
    """{group: rows_RLW} of the addresses start..stop-1, in calls of ``fold_rows_count`` addresses; the last one is padded.

    ``start`` must be a multiple of ``fold_rows_count``, so that an address meets the same neighbours in every fold.
    """
    assert start % fold_rows_count == 0, (start, fold_rows_count)
    parts = []
    for at in range(start, stop, fold_rows_count):
        ids_R = np.minimum(np.arange(at, at + fold_rows_count), stop - 1).astype(np.int32)
        parts.append((fold_rows(params, ids_R, cfg=cfg, dtype=dtype), min(stop - at, fold_rows_count)))
    return {group: np.concatenate([np.asarray(rows[group])[:count] for rows, count in parts]) for group in parts[0][0]}


def fold_table(params: dict, *, cfg: ModelConfig, dtype: str, fold_rows_count: int, block_rows: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(first address, {group: rows_RLW}) of successive blocks over all V; a block at a time is in memory."""
    for start in range(0, cfg.vocab_size, block_rows):
        stop = min(start + block_rows, cfg.vocab_size)
        yield start, fold_range(params, start, stop, cfg=cfg, dtype=dtype, fold_rows_count=fold_rows_count)
