"""The train step: rows once per unique id, loss with exact denominators, accumulation, clipping, update. One compiled function."""

import jax
import jax.numpy as jnp
import optax

from flexmemory.config import Config
from flexmemory.models.transformer import build, init_params
from flexmemory.train.loss import mean_loss
from flexmemory.train.optimizer import clip, group_norms, make_optimizer, schedule
from flexmemory.train.tables import apply_rows, gather_tables, make_table_optimizer, merge_tables, split_tables


def init_state(cfg: Config) -> dict:
    """{"params", "optimizer", "step"}: plain arrays, a pure function of the config."""
    params = init_params(cfg.model, cfg.train.seed)
    return {"params": params, "optimizer": init_optimizer(cfg, params), "step": jnp.zeros((), jnp.int32)}


def init_optimizer(cfg: Config, params: dict) -> dict:
    """{"weights", "tables"}: the optimisers' states; "tables" of those trained row by row, {} where AdamW trains them like the rest."""
    tables, weights = split(cfg, params)
    return {"weights": make_optimizer(cfg.optimizer, cfg.train.steps).init(weights),
            "tables": make_table_optimizer(cfg.optimizer, cfg.train.steps).init(tables) if tables else {}}


def split(cfg: Config, params: dict) -> tuple[dict, dict]:
    """(tables trained by their touched rows alone, all other parameters)"""
    return ({}, params) if cfg.optimizer.table_optimizer == "adamw" else split_tables(params)


def make_gradients(cfg: Config):
    """Returns ``gradients(params, batch) -> (grads, (loss, z))``, to be jitted: float32, loss and mean logsumexp^2 in nats per token.

    A batch as data/pipeline.py makes it: micro-batches on a leading axis A, one set of unique ids for all. Rows of the R unique ids are
    computed once, before the micro-batches, and differentiated once, after them: the memory's work is R rows a step however the batch is
    split, and the loss of every token counts the same. Tables trained by touched rows come in, and their gradients out, as those R rows.
    """
    merge, merge_backbone = build(cfg.model), build(cfg.model, with_memory=False)
    gathered = cfg.optimizer.table_optimizer != "adamw"  # see split

    def loss_fn(backbone, rows, micro, tokens):
        model = merge_backbone(backbone)
        x_BTD, _ = model.hidden(micro["ids"], rows, micro["inverse"], segments_BT=micro.get("segments"))
        return mean_loss(x_BTD, model.head_DV, micro["targets"], tokens, cfg.train.z_loss)

    def gradients(params, batch):
        micros, tokens = {name: leaf for name, leaf in batch.items() if name != "unique_ids"}, batch["targets"].size
        backbone = {name: leaf for name, leaf in params.items() if name != "memory"}
        sources = {name: params[name] for name in ("memory", "embed") if "memory" in params}
        rows, pull_back = jax.vjp(lambda sources: merge(params | sources).rows(batch["unique_ids"], gathered), sources)
        grad_and_sums = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)

        def accumulate(total, micro):
            made = grad_and_sums(backbone, rows, micro, tokens)
            return jax.tree.map(lambda total, new: total + new.astype(jnp.float32), total, made), None

        if cfg.train.accum_steps == 1:
            (grads, row_grads), sums = grad_and_sums(backbone, rows, jax.tree.map(lambda leaf: leaf[0], micros), tokens)
        else:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.float32), ((backbone, rows), (0.0, 0.0)))
            ((grads, row_grads), sums), _ = jax.lax.scan(accumulate, zeros, micros)
        (through_rows,) = pull_back(jax.tree.map(lambda grad, row: grad.astype(row.dtype), row_grads, rows))
        if through_rows:
            grads |= {"memory": through_rows["memory"], "embed": grads["embed"] + through_rows["embed"]}
        return grads, sums

    return gradients


def make_train_step(cfg: Config):
    """Returns ``step(state, batch) -> (state, metrics)``, jitted, with the state donated.

    metrics: loss and z_loss in nats per token, lr, grad_norm, grad_norm/<label>, and param_norm of all that the step may have changed (of
    row-sparse tables the touched rows); float32 scalars. With a row-sparse table_optimizer nothing of the size of a table is made, read or written.
    """
    gradients, optimizer, rate = make_gradients(cfg), make_optimizer(cfg.optimizer, cfg.train.steps), schedule(cfg.optimizer, cfg.train.steps)

    def step(state, batch):
        tables, weights = split(cfg, state["params"])
        rows = gather_tables(tables, batch["unique_ids"])
        grads, (loss, z) = gradients(merge_tables(rows, weights), batch)
        norms = group_norms(grads)
        row_grads, grads = split(cfg, clip(grads, norms, cfg.optimizer))
        updates, dense = optimizer.update(grads, state["optimizer"]["weights"], weights)
        weights, sparse = optax.apply_updates(weights, updates), state["optimizer"]["tables"]
        if tables:
            ids_R = touched_ids(batch["unique_ids"], batch["inverse"], cfg.model.vocab_size)
            updates, sparse = make_table_optimizer(cfg.optimizer, cfg.train.steps).update(row_grads, sparse, rows, ids_R=ids_R)
            tables, touched_R1 = apply_rows(tables, updates, ids_R), (ids_R < cfg.model.vocab_size)[:, None]
            rows = jax.tree.map(lambda row, update: jnp.where(touched_R1, row + update, 0), rows, updates)
        metrics = {"loss": loss, "z_loss": z, "lr": jnp.asarray(rate(state["step"]), jnp.float32),
                   "grad_norm": jnp.sqrt(sum(n**2 for n in norms.values())), "param_norm": optax.tree.norm((weights, rows)),
                   **{f"grad_norm/{label}": norm for label, norm in norms.items()}}
        return {"params": merge_tables(tables, weights), "optimizer": {"weights": dense, "tables": sparse}, "step": state["step"] + 1}, metrics

    return jax.jit(step, donate_argnums=0)


def touched_ids(unique_R: jax.Array, inverse: jax.Array, vocab_size: int) -> jax.Array:
    """``unique_R`` with V, which is no row, where no token of the batch refers to the place: padding, or the rest of a whole vocabulary."""
    touched_R = jnp.zeros(unique_R.shape, bool).at[inverse.ravel()].set(True)
    return jnp.where(touched_R, unique_R, vocab_size)
