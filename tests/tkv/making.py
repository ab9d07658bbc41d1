"""Toy models and the stores made of them, shared by the tests of tkv and runtime."""

from pathlib import Path

import jax
import numpy as np

from flexmemory.config import Config, ModelConfig
from flexmemory.data import tokenizer
from flexmemory.data.tokenizer import Tokenizer
from flexmemory.models.transformer import abstract_params
from flexmemory.tkv.export import export_params

VOCAB = 260  # above the byte tokenizer's 257, and no multiple of a shard
SHARD = 64
# every kind; rows of width 32 and 48
MIXED = "attn_only dense memoryllm (flex stem)*2 stem-gate parallel stem-dagger"


def config(pattern: str, **settings) -> Config:
    return Config(model=ModelConfig(**(dict(pattern=pattern, vocab_size=VOCAB, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48) | settings)))


def params(cfg: Config, seed: int = 0) -> dict:
    """Random weights without compiling an initialiser; large enough that greedy text varies."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return ((path[-1].key == "scale") + 0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map_with_path(draw, abstract_params(cfg.model))


def byte_tokenizer() -> Tokenizer:
    return tokenizer.build("byte", lambda: iter(()))


def make_store(out: Path, cfg: Config, weights: dict, **options) -> dict:
    return export_params(cfg, weights, byte_tokenizer(), out, run="run", step=3, **(dict(block_rows=SHARD, progress=False) | options))


def tree_bytes(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}
