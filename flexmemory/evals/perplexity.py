"""Validation loss, perplexity and bits per byte."""

import math

import jax
import jax.numpy as jnp

from flexmemory.config import Config
from flexmemory.data.pipeline import eval_batches
from flexmemory.data.shards import TokenShards
from flexmemory.models.transformer import build
from flexmemory.train.step import forward_losses


def make_eval_step(cfg: Config, ffn_scale: float = 1.0):
    """``step(params, micro) -> (sum of weighted losses, sum of weights)`` for one micro-batch with a float32 ``weight`` [B, T]."""
    merge = build(cfg.model)

    @jax.jit
    def step(params, micro):
        ce_BT, _ = forward_losses(merge(params), micro, ffn_scale)
        return jnp.sum(ce_BT * micro["weight"]), jnp.sum(micro["weight"])

    return step


def perplexity(cfg: Config, params: dict, shards: TokenShards, step=None, max_tokens: int | None = None) -> dict:
    """{"loss" nats per token, "perplexity", "bits_per_byte", "tokens"} over the split's windows.

    ``step`` reuses a compiled step; ``max_tokens`` bounds the work (default: config train.eval_tokens; 0 is all) to windows at
    even distances; bits per byte use the whole split's bytes per token.
    """
    step = step or make_eval_step(cfg)
    limit = cfg.train.eval_tokens if max_tokens is None else max_tokens
    sums = []
    rows = cfg.data.batch_size // cfg.train.accum_steps  # what fits in training fits here
    for batch in eval_batches(shards, seq_len=cfg.data.seq_len, batch_size=rows, max_tokens=limit or None, segments=cfg.data.document_mask):
        sums.append(step(params, {name: leaf[0] for name, leaf in batch.items()}))
    tokens = sum(float(weight) for _, weight in sums)
    loss = sum(float(total) for total, _ in sums) / tokens
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": int(tokens),
            "bits_per_byte": loss / math.log(2) * shards.n_tokens / shards.n_bytes}
