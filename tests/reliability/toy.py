"""The one small model of these tests, for the tests' own process and for those that they kill."""

import functools

import jax
import numpy as np
from tkv.making import config, make_store, params

from flexmemory.config import Config

KINDS = {"float32": {}, "int8": {"dtype": "int8"}, "int4 rank": {"dtype": "int4", "rank": 0.75}}


@functools.cache
def model() -> tuple[Config, dict]:
    """Two groups of rows, 4 and 8 wide; a store of it is about 40 kB."""
    cfg = config("flex stem-gate", vocab_size=257, d_model=4, n_heads=1, n_kv_heads=1, d_ff=8)
    return cfg, params(cfg)


@functools.cache
def other_params() -> dict:
    """Other weights of the same model: a store of them has files of the same names and sizes."""
    return jax.tree.map(lambda leaf: np.asarray(leaf * 1.5), model()[1])


def export_to(out, weights: dict | None = None, **options) -> dict:
    """One and the same export every time; three shards, one token in the last."""
    return make_store(
        out,
        model()[0],
        model()[1] if weights is None else weights,
        **dict(shard_rows=128, counts_V=np.arange(257)) | options,
    )
