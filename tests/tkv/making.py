"""Toy models and the stores made of them, shared by the tests of tkv and runtime.

``python -m tests.tkv.making`` wrote tests/tkv/stores/v2 and v2_int4_rank (and the .json beside
each) when version 2 was new. They are never written again: the script refuses while they are there.
"""

import json
from pathlib import Path

import jax
import numpy as np

from flexmemory.config import Config
from flexmemory.data import tokenizer
from flexmemory.data.tokenizer import Tokenizer
from flexmemory.models.config import ModelConfig
from flexmemory.models.transformer import abstract_params
from flexmemory.tkv.export import export_params

VOCAB = 260  # above the byte tokenizer's 257, and no multiple of a shard
SHARD = 64
# every kind; rows of width 32 and 48
MIXED = "attn_only dense memoryllm (flex stem)*2 stem-gate parallel stem-dagger"


def config(pattern: str, **settings) -> Config:
    return Config(
        model=ModelConfig(
            **(
                dict(
                    pattern=pattern, vocab_size=VOCAB, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48
                )
                | settings
            )
        )
    )


def params(cfg: Config, seed: int = 0) -> dict:
    """Random weights without compiling an initialiser; large enough that greedy text varies."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return ((path[-1].key == "scale") + 0.3 * rng.standard_normal(leaf.shape)).astype(
            np.float32
        )

    return jax.tree.map_with_path(draw, abstract_params(cfg.model))


def byte_tokenizer() -> Tokenizer:
    return tokenizer.build("byte", lambda: iter(()))


def make_store(out: Path, cfg: Config, weights: dict, **options) -> dict:
    return export_params(
        cfg,
        weights,
        byte_tokenizer(),
        out,
        run="run",
        step=3,
        **(dict(shard_rows=SHARD, progress=False) | options),
    )


def tree_bytes(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


FROZEN = {"v2": {}, "v2_int4_rank": {"dtype": "int4", "scale_group": 5, "rank": 0.75}}


def frozen_weights() -> tuple[Config, dict]:
    cfg = config(
        "dense memoryllm flex stem-gate",
        vocab_size=257,
        d_model=8,
        n_heads=2,
        n_kv_heads=1,
        d_ff=24,
    )
    return cfg, params(cfg, seed=5)


def main() -> None:
    """Writes a store of every frozen kind, and what a reader must find in it."""
    from . import raw_reader

    cfg, weights = frozen_weights()
    for name, rows in FROZEN.items():
        out, ids = Path(__file__).parent / "stores" / name, list(b"token memory")
        if out.exists():
            raise SystemExit(f"{out} exists; stores of released versions are never written again")
        export_params(
            cfg,
            weights,
            byte_tokenizer(),
            out,
            run="frozen",
            step=0,
            counts_V=np.arange(257),
            shard_rows=128,
            progress=False,
            **rows,
        )
        expected = {"ids": ids, "logits_of_the_last": raw_reader.forward(out, ids)[-1].tolist()}
        (out.parent / f"{name}.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main()
