"""Where an evaluation's rows come from: ``rows(ids_R) -> {group: rows_LRW in compute dtype}`` of int32 ids, repeats allowed."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from flexmemory.config import ModelConfig
from flexmemory.models.memory import Rows
from flexmemory.models.transformer import build
from flexmemory.tkv import encoding
from flexmemory.tkv.store import Store

RowsOf = Callable[[np.ndarray], Rows]


def live_rows(cfg: ModelConfig, params: dict) -> RowsOf:
    """Rows computed from the weights."""
    return functools.partial(_live, params, cfg=cfg)


def stored_rows(store: Store) -> RowsOf:
    """Rows read from a store, as encoded and rounded as they are there. Raises UserError where they cannot be read or are damaged."""
    dtype, bases = store.model.compute_dtype, store.bases()

    def rows(ids_R: np.ndarray) -> Rows:
        unique_U, inverse_R = np.unique(np.asarray(ids_R, np.int64), return_inverse=True)
        bundles = {group.name: np.empty((len(unique_U), group.bundle_bytes), np.uint8) for group in store.groups}
        store.read_bundles(unique_U, bundles)
        return {group.name: encoding.jitted_decode(group.layout, encoding.host_view(group.layout, bundles[group.name][inverse_R]), bases[group.name], dtype)
                for group in store.groups}

    return rows


@functools.partial(jax.jit, static_argnames="cfg")
def _live(params: dict, ids_R: jax.Array, *, cfg: ModelConfig) -> Rows:
    return build(cfg)(params).rows(ids_R)
