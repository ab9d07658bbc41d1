"""The train step: rows once per unique id, loss with exact denominators, accumulation, clipping,
update. One compiled function.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from flexmemory.config import Config
from flexmemory.exchange import dense_gradient, sum_over_sections
from flexmemory.models.loss import mean_loss
from flexmemory.models.parameters import ADDRESSED, addressed_rows, combine, partition
from flexmemory.models.transformer import abstract_params, build, init_params
from flexmemory.parallel import on_devices, placed
from flexmemory.train.optimizer import clip, group_norms, make_optimizer, schedule
from flexmemory.train.tables import apply_rows, make_table_optimizer


def init_state(cfg: Config) -> dict:
    """{"params", "optimizer", "step"}: plain arrays, a pure function of the config; on a mesh each
    lies where the plan says. The tables lie on the devices whatever parallel.table_memory is: for
    those in the host's memory see train/host_tables.py.
    """
    if cfg.parallel.plan == "single":
        params = init_params(cfg.model, cfg.train.seed)
        return {
            "params": params,
            "optimizer": init_optimizer(cfg, params),
            "step": jnp.zeros((), jnp.int32),
        }
    places = placed(on_devices(cfg), abstract_state(cfg))
    params = init_params(cfg.model, cfg.train.seed, places["params"])
    optimizer = jax.jit(functools.partial(init_optimizer, cfg), out_shardings=places["optimizer"])(
        params
    )
    return {
        "params": params,
        "optimizer": optimizer,
        "step": jnp.zeros((), jnp.int32, device=places["step"]),
    }


def abstract_state(cfg: Config) -> dict:
    """Shapes and dtypes of :func:`init_state`, without computing it."""
    params = abstract_params(cfg.model)
    return {
        "params": params,
        "optimizer": jax.eval_shape(functools.partial(init_optimizer, cfg), params),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }


def init_optimizer(cfg: Config, params: dict) -> dict:
    """{"weights", "tables"}: the optimisers' states; "tables" of those trained row by row, {} where
    AdamW trains them like the rest.
    """
    sparse, weights = partition(params, sparse_labels(cfg))
    return {
        "weights": make_optimizer(cfg.optimizer, cfg.train.steps).init(weights),
        "tables": (
            make_table_optimizer(cfg.optimizer, cfg.train.steps).init(sparse) if sparse else {}
        ),
    }


def sparse_labels(cfg: Config) -> tuple[str, ...]:
    """Labels of the parameters trained by their touched rows alone."""
    return () if cfg.optimizer.table_optimizer == "adamw" else ("table",)


def make_gradients(cfg: Config):
    """Returns ``gradients(rows, weights, batch) -> ((row_grads, grads), (loss, z))``, to be jitted:
    float32, loss and mean logsumexp^2 in nats per token.

    rows: of the parameters with ADDRESSED labels, :func:`exchange.lookup` of the batch's unique
    ids; weights: all others, and in a tied model "head", the transposed embedding. A batch as
    data/pipeline.py makes it: micro-batches on a leading axis A, one set of unique ids for all. The
    memory's rows are computed once, before the micro-batches, and differentiated once, after them:
    its work is R rows a step however the batch is split, and the loss of every token counts the
    same.
    """
    untied = dataclasses.replace(cfg.model, tied_head=False)
    merge_all, merge_backbone = build(untied), build(untied, with_memory=False)

    def loss_fn(backbone, rows, micro, tokens):
        model = merge_backbone(backbone)
        # the embedding holds the batch's rows, in which a token's address is its place among the
        # unique ids
        x_BTD, _ = model.hidden(
            micro["inverse"], rows, micro["inverse"], segments_BT=micro.get("segments")
        )
        return mean_loss(x_BTD, model.head_DV, micro["targets"], tokens, cfg.train.z_loss)

    def gradients(rows, weights, batch):
        micros, tokens = (
            {
                name: leaf
                for name, leaf in batch.items()
                if name in ("inverse", "targets", "segments")
            },
            batch["targets"].size,
        )
        params = combine(rows, weights)
        backbone = {name: leaf for name, leaf in params.items() if name != "memory"}
        sources = {name: params[name] for name in ("memory", "embed") if "memory" in params}
        memory_rows, pull_back = jax.vjp(
            lambda sources: merge_all(params | sources).rows(None), sources
        )
        grad_and_sums = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)

        def accumulate(total, micro):
            made = grad_and_sums(backbone, memory_rows, micro, tokens)
            return (
                jax.tree.map(lambda total, new: total + new.astype(jnp.float32), total, made),
                None,
            )

        if cfg.train.accum_steps == 1:
            (grads, row_grads), sums = grad_and_sums(
                backbone, memory_rows, jax.tree.map(lambda leaf: leaf[0], micros), tokens
            )
        else:
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros_like(leaf, jnp.float32),
                ((backbone, memory_rows), (jnp.zeros(()), jnp.zeros(()))),
            )
            ((grads, row_grads), sums), _ = jax.lax.scan(accumulate, zeros, micros)
        (through_rows,) = pull_back(
            jax.tree.map(lambda grad, row: grad.astype(row.dtype), row_grads, memory_rows)
        )
        if through_rows:
            grads |= {
                "memory": through_rows["memory"],
                "embed": grads["embed"] + through_rows["embed"],
            }
        return partition(grads, ADDRESSED), sums

    return gradients


def make_train_step(cfg: Config):
    """Returns ``step(state, batch) -> (state, metrics)``, jitted, with the state donated. Where
    tables lie in the host's memory, those of the state have the C rows of the batch's ``table_ids``
    alone; others are a ValueError.

    metrics: loss and z_loss in nats per token, lr, grad_norm, grad_norm/<label>, and param_norm of
    all that the step may have changed (of row-sparse tables the touched rows); float32 scalars.
    With a row-sparse table_optimizer nothing of the size of a table is made, read or written,
    unless a batch has the whole vocabulary.
    """
    gradients, optimizer, rate = (
        make_gradients(cfg),
        make_optimizer(cfg.optimizer, cfg.train.steps),
        schedule(cfg.optimizer, cfg.train.steps),
    )
    vocab, labels, compact = (
        cfg.model.vocab_size,
        sparse_labels(cfg),
        cfg.parallel.table_memory == "host",
    )

    def step(state, batch):
        addressed, weights = partition(state["params"], ADDRESSED)
        if compact and any(
            table.shape[1] != len(batch["table_ids"])
            for table in jax.tree.leaves(partition(addressed, labels)[0])
        ):
            raise ValueError(
                "parallel.table_memory=host: a step takes tables of its batch's rows, see"
                " train/host_tables.py"
            )
        unique_ids, ids_C, places_R = batch["unique_ids"], batch["table_ids"], batch["places"]
        rows = addressed_rows(addressed, unique_ids, places_R if compact else None)
        head = {"head": addressed["embed"].T} if cfg.model.tied_head else {}
        (row_grads, grads), (loss, z) = gradients(rows, weights | head, batch)
        # each table's gradient: of its own size, or of the touched rows
        ids_R = jnp.where(places_R < len(ids_C), unique_ids, vocab)
        (tables, dense), (table_rows, _), (table_grads, dense_grads) = (
            partition(tree, labels) for tree in (addressed, rows, row_grads)
        )
        is_row_C = ids_C < vocab
        if compact:
            ids_C = jnp.where(is_row_C, jnp.arange(len(ids_C), dtype=jnp.int32), len(ids_C))
        table_grads, table_rows = (
            sum_over_sections(table_grads, table_rows, ids_C, places_R, tables)
            if tables
            else ({}, {})
        )
        dense_grads = dense_gradient(dense_grads, ids_R, dense)
        if head:
            dense_grads["embed"] += grads.pop("head").T
        grads = combine(combine(grads, dense_grads), table_grads)
        norms = group_norms(grads)
        table_grads, grads = partition(clip(grads, norms, cfg.optimizer), labels)
        weights = combine(weights, dense)
        updates, moments = optimizer.update(grads, state["optimizer"]["weights"], weights)
        weights, sparse = optax.apply_updates(weights, updates), state["optimizer"]["tables"]
        if tables:
            updates, sparse = make_table_optimizer(cfg.optimizer, cfg.train.steps).update(
                table_grads, sparse, table_rows, ids_R=ids_C
            )
            tables = apply_rows(tables, updates, ids_C)
            table_rows = jax.tree.map(
                lambda row, update: jnp.where(is_row_C[:, None], row + update, 0),
                table_rows,
                updates,
            )
        metrics = {
            "loss": loss,
            "z_loss": z,
            "lr": jnp.asarray(rate(state["step"]), jnp.float32),
            "grad_norm": jnp.sqrt(sum(n**2 for n in norms.values())),
            "param_norm": optax.tree.norm((weights, table_rows)),
            **{f"grad_norm/{label}": norm for label, norm in norms.items()},
        }
        return {
            "params": combine(tables, weights),
            "optimizer": {"weights": moments, "tables": sparse},
            "step": state["step"] + 1,
        }, metrics

    return jax.jit(step, donate_argnums=0)
