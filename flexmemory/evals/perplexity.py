"""Validation loss, perplexity and bits per byte."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from flexmemory.config import Config
from flexmemory.data.pipeline import eval_batches
from flexmemory.data.shards import TokenShards
from flexmemory.evals.rows import RowsOf, live_rows, make_hidden
from flexmemory.models.config import ModelConfig
from flexmemory.models.loss import chunked_losses
from flexmemory.models.memory import Rows
from flexmemory.parallel import batch_loader
from flexmemory.sharding import own_sections, sections


def make_eval_step(
    cfg: Config, ffn_scale: float | jax.Array = 1.0
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """``step(params, rows, batch) -> (sum of weighted losses, sum of weights)`` for a batch of
    ``eval_batches``.

    params: without ``memory``; rows: {group: rows_LRW} of the batch's unique_ids. ffn_scale: a
    number, or an array [L] of one for each layer; all numbers but 1.0 share a compilation, and so
    do all arrays.
    """
    return functools.partial(_sums, ffn_scale=as_argument(ffn_scale), cfg=cfg.model)


def as_argument(ffn_scale: float | jax.Array) -> jax.Array | None:
    """ffn_scale as an argument of a compiled function: float32, or None for 1.0, which is then left
    out of it.
    """
    return (
        None
        if jnp.ndim(ffn_scale) == 0 and ffn_scale == 1.0
        else jnp.asarray(ffn_scale, jnp.float32)
    )


@functools.partial(jax.jit, static_argnames="cfg")
def _sums(
    params: dict, rows: Rows, batch: dict, ffn_scale: jax.Array | None, *, cfg: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    scale = 1.0 if ffn_scale is None else ffn_scale
    x_BTD, head_DV = make_hidden(cfg)(
        params, rows, batch, segments_BT=batch.get("segments"), ffn_scale=scale
    )
    ce_BT, _ = chunked_losses(x_BTD, head_DV, batch["targets"])
    return jnp.sum(ce_BT * batch["weight"]), jnp.sum(batch["weight"])


def perplexity(
    cfg: Config,
    params: dict,
    shards: TokenShards,
    step: Callable[..., tuple[jax.Array, jax.Array]] | None = None,
    max_tokens: int | None = None,
    rows_of: RowsOf | None = None,
) -> dict:
    """{"loss" nats per token, "perplexity", "bits_per_byte", "tokens"} over the split's windows.

    ``step`` reuses a compiled step; ``max_tokens`` bounds the work (default: config
    train.eval_tokens; 0 is all) to windows at even distances; bits per byte use the whole split's
    bytes per token. ``rows_of`` gives the rows, by default those of ``params``.
    """
    step, rows_of = step or make_eval_step(cfg), rows_of or live_rows(cfg.model, params)
    backbone = {name: value for name, value in params.items() if name != "memory"}
    limit = cfg.train.eval_tokens if max_tokens is None else max_tokens
    sums = []
    rows = cfg.data.batch_size // cfg.train.accum_steps  # what fits in training fits here
    put = batch_loader()
    for batch in eval_batches(
        shards,
        seq_len=cfg.data.seq_len,
        batch_size=rows,
        max_tokens=limit or None,
        segments=cfg.data.document_mask,
        sections=sections(),
        own=own_sections(),
    ):
        batch = put(batch)
        sums.append(step(backbone, rows_of(batch["unique_ids"]), batch))
    tokens = sum(float(weight) for _, weight in sums)
    loss = sum(float(total) for total, _ in sums) / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "tokens": int(tokens),
        "bits_per_byte": loss / math.log(2) * shards.n_tokens / shards.n_bytes,
    }
