"""Models of toy size: config, random parameters, a batch with its unique ids, and compiled calls
shared by the tests.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.models.blocks import check_model
from flexmemory.models.config import ModelConfig
from flexmemory.models.transformer import abstract_params, build

# Every kind, repeated so that scans, groups and stacks all have several members.
MIXED = "attn_only (dense memoryllm flex)*3 (stem stem-gate stem-dagger parallel)*2"


def tiny(pattern: str, **settings) -> ModelConfig:
    defaults = dict(vocab_size=50, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24)
    cfg = ModelConfig(pattern=pattern, **(defaults | settings))
    check_model(cfg)
    return cfg


def mixed(**settings) -> ModelConfig:
    return tiny(MIXED, **settings)


def random_params(cfg: ModelConfig, seed: int = 0) -> dict:
    """Parameters in which nothing is trivial: norm scales around 1, norm biases, tables and weights
    around 0.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return jnp.asarray(
            (path[-1].key == "scale") + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype
        )

    return jax.tree.map_with_path(draw, abstract_params(cfg))


@dataclasses.dataclass(frozen=True)
class Batch:
    ids_BT: np.ndarray
    unique_R: np.ndarray
    inverse_BT: np.ndarray


def deduplicated(ids_BT, padding=()) -> Batch:
    """What the input pipeline makes of ids: unique ids, here with any padding behind them, and each
    token's place among them.
    """
    ids_BT = np.asarray(ids_BT, np.int32)
    unique_R, inverse_BT = np.unique(ids_BT, return_inverse=True)
    return Batch(
        ids_BT,
        np.append(unique_R, padding).astype(np.int32),
        inverse_BT.reshape(ids_BT.shape).astype(np.int32),
    )


def naive(ids_BT) -> Batch:
    """One address per token, nothing shared."""
    ids_BT = np.asarray(ids_BT, np.int32)
    return Batch(
        ids_BT, ids_BT.reshape(-1), np.arange(ids_BT.size, dtype=np.int32).reshape(ids_BT.shape)
    )


def _sequences() -> np.ndarray:
    ids_BT = np.random.default_rng(1).integers(0, 50, (2, 9)).astype(np.int32)
    ids_BT[:, 4:7] = ids_BT[
        0, :3
    ]  # repeated tokens: rows are shared inside and between the sequences
    return ids_BT


SEQUENCES = _sequences()


@functools.cache
def compiled_logits(cfg: ModelConfig):
    merge = build(cfg)

    @functools.partial(jax.jit, static_argnames="ffn_scale")
    def call(params, ids_BT, unique_R, inverse_BT, segments_BT=None, ffn_scale=1.0):
        model = merge(params)
        return model(
            ids_BT, model.rows(unique_R), inverse_BT, segments_BT=segments_BT, ffn_scale=ffn_scale
        )

    return call


def logits(cfg: ModelConfig, params, batch: Batch, **switches) -> np.ndarray:
    return np.asarray(
        compiled_logits(cfg)(params, batch.ids_BT, batch.unique_R, batch.inverse_BT, **switches)
    )


def cross_entropy(logits_BTV, ids_BT):
    log_p = jax.nn.log_softmax(logits_BTV[:, :-1])
    return -jnp.take_along_axis(log_p, jnp.asarray(ids_BT)[:, 1:, None], axis=-1).mean()


@functools.cache
def compiled_loss_and_grads(cfg: ModelConfig):
    merge = build(cfg)

    @jax.jit
    @jax.value_and_grad
    def call(params, ids_BT, unique_R, inverse_BT):
        model = merge(params)
        return cross_entropy(model(ids_BT, model.rows(unique_R), inverse_BT), ids_BT)

    return call


def loss_and_grads(cfg: ModelConfig, params, batch: Batch):
    return compiled_loss_and_grads(cfg)(params, batch.ids_BT, batch.unique_R, batch.inverse_BT)


def relative_gap(got, want) -> float:
    """max |got - want| / max |want|"""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def widest_gap(got_tree, want_tree) -> float:
    """Largest relative_gap over the leaves of two equal trees."""
    return max(jax.tree.leaves(jax.tree.map(relative_gap, got_tree, want_tree)))


def assert_same_bits(got_tree, want_tree):
    jax.tree.map(np.testing.assert_array_equal, got_tree, want_tree)
