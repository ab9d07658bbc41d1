"""Where an evaluation's rows come from, ``rows(ids_R) -> {group: rows_LRW in compute dtype}`` of
int32 ids, repeats allowed, and what reads them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flexmemory.exchange import lookup
from flexmemory.models.config import ModelConfig
from flexmemory.models.memory import Rows
from flexmemory.models.parameters import addressed_rows, join, split
from flexmemory.models.transformer import build
from flexmemory.tkv import encoding
from flexmemory.tkv.format import Group
from flexmemory.tkv.store import Store

RowsOf = Callable[[Any], Rows]  # of ids_R, a NumPy or a JAX array


def live_rows(cfg: ModelConfig, params: dict) -> RowsOf:
    """Rows computed from the weights."""
    return functools.partial(live, params, cfg=cfg)


def stored_rows(store: Store) -> RowsOf:
    """Rows read from a store, as encoded and rounded as they are there. Raises UserError where they
    cannot be read or are damaged.
    """
    dtype, bases = store.model.compute_dtype, store.bases()

    def rows(ids_R: np.ndarray) -> Rows:
        unique_U, inverse_R = np.unique(np.asarray(ids_R, np.int64), return_inverse=True)
        bundles = {
            g.name: np.empty((len(unique_U), g.bundle_bytes), np.uint8) for g in store.groups
        }
        store.read_bundles(unique_U, bundles)

        def decoded(group: Group) -> jax.Array:
            view = encoding.host_view(group.layout, bundles[group.name][inverse_R])
            return encoding.jitted_decode(group.layout, view, bases[group.name], dtype)

        return {group.name: decoded(group) for group in store.groups}

    return rows


@functools.partial(jax.jit, static_argnames="cfg")
def live(
    params: dict, ids_R: jax.Array, places_R: jax.Array | None = None, *, cfg: ModelConfig
) -> Rows:
    """Rows computed from the weights. places_R: see :func:`parameters.addressed_rows`."""
    parts = split(params)
    return build(cfg)(join(parts | addressed_rows(parts, ids_R, places_R))).rows(None)


def make_hidden(cfg: ModelConfig) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """``hidden(params, rows, batch, **switches) -> (x_BTD, head_DV)``, for use inside jit: final
    states of a batch with unique_ids, of which ``rows`` are the rows, and inverse. params: without
    ``memory``. switches: of :meth:`Transformer.hidden`.
    """
    merge_backbone = build(dataclasses.replace(cfg, tied_head=False), with_memory=False)

    def hidden(
        params: dict, rows: Rows, batch: dict, **switches: Any
    ) -> tuple[jax.Array, jax.Array]:
        head_DV = params["embed"].T if cfg.tied_head else params["head"]
        embed = lookup({"embed": params["embed"]}, batch["unique_ids"])
        x_BTD, _ = merge_backbone(params | embed | {"head": head_DV}).hidden(
            batch["inverse"], rows, batch["inverse"], **switches
        )
        return x_BTD, head_DV

    return hidden
