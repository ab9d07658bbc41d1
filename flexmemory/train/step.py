"""The train step: rows once per unique id, loss with exact denominators, accumulation, clipping,
update. One compiled function."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from flexmemory.config import Config
from flexmemory.exchange import dense_gradient, sum_over_sections
from flexmemory.models.loss import mean_loss
from flexmemory.models.parameters import addressed_rows, join, split
from flexmemory.models.transformer import abstract_params, build, init_params
from flexmemory.parallel import on_devices, placed
from flexmemory.train.optimizer import clip, group_norms, make_optimizer, schedule
from flexmemory.train.tables import apply_rows, make_table_optimizer


def init_state(cfg: Config) -> dict:
    """{"params": in three parts (models/parameters.py), "optimizer", "step"}: arrays, a pure
    function of the config; on a mesh each lies where the plan says. The tables lie on the devices
    whatever parallel.table_memory is: for those in the host's memory see train/host_tables.py."""
    if cfg.parallel.plan == "single":
        params = split(init_params(cfg.model, cfg.train.seed))
        optimizer = init_optimizer(cfg, params)
        return {"params": params, "optimizer": optimizer, "step": jnp.zeros((), jnp.int32)}
    shardings = placed(on_devices(cfg), abstract_state(cfg))
    params = split(init_params(cfg.model, cfg.train.seed, join(shardings["params"])))
    init = jax.jit(functools.partial(init_optimizer, cfg), out_shardings=shardings["optimizer"])
    step = jnp.zeros((), jnp.int32, device=shardings["step"])
    return {"params": params, "optimizer": init(params), "step": step}


def abstract_state(cfg: Config) -> dict:
    """Shapes and dtypes of :func:`init_state`, without computing it."""
    params = split(abstract_params(cfg.model))
    return {
        "params": params,
        "optimizer": jax.eval_shape(functools.partial(init_optimizer, cfg), params),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }


def init_optimizer(cfg: Config, params: dict) -> dict:
    """The optimisers' states: {"weights": of the parts that AdamW trains, "tables": of the tables
    trained row by row, {} where there are none}."""
    weights, tables = by_optimizer(cfg, params)
    settings = cfg.optimizer, cfg.train.steps
    return {
        "weights": make_optimizer(*settings).init(weights),
        "tables": make_table_optimizer(*settings).init(tables) if tables else {},
    }


def by_optimizer(cfg: Config, parts: dict) -> tuple[dict, dict]:
    """(parts that AdamW trains, tables trained row by row) of parameters or anything like them."""
    if cfg.optimizer.table_optimizer == "adamw":
        return parts, {}
    return parts | {"tables": {}}, parts["tables"]


def make_gradients(cfg: Config) -> Callable[[dict, dict, dict], tuple[tuple[dict, dict], tuple]]:
    """Returns ``gradients(rows, backbone, batch) -> ((row_grads, grads), (loss, z))``, to be
    jitted: float32, loss and mean logsumexp^2 in nats per token.

    rows: {"embed", "tables"} of the batch's unique ids; backbone: that part of the parameters, and
    in a tied model "head", the transposed embedding. A batch as data/pipeline.py makes it:
    micro-batches on a leading axis A, one set of unique ids for all. The memory's rows are computed
    once, before the micro-batches, and differentiated once, after them: its work is R rows a step
    however the batch is split, and the loss of every token counts the same."""
    untied = dataclasses.replace(cfg.model, tied_head=False)
    merge_all, merge_blocks = build(untied), build(untied, with_memory=False)

    def loss_fn(weights: dict, rows: dict, micro: dict, tokens: int) -> tuple:
        model = merge_blocks(weights)
        # the embedding holds the batch's rows, so that a token's address is its place among the
        # unique ids
        segments, inverse = micro.get("segments"), micro["inverse"]
        x_BTD, _ = model.hidden(inverse, rows, inverse, segments_BT=segments)
        return mean_loss(x_BTD, model.head_DV, micro["targets"], tokens, cfg.train.z_loss)

    def gradients(rows: dict, backbone: dict, batch: dict) -> tuple[tuple[dict, dict], tuple]:
        micros = {n: a for n, a in batch.items() if n in ("inverse", "targets", "segments")}
        tokens = batch["targets"].size
        params = join({"backbone": backbone, **rows})
        weights = {name: leaf for name, leaf in params.items() if name != "memory"}
        sources = {name: params[name] for name in ("memory", "embed") if "memory" in params}
        memory_rows, pull_back = jax.vjp(
            lambda sources: merge_all(params | sources).rows(None), sources
        )
        grad_and_sums = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)

        def accumulate(total: tuple, micro: dict) -> tuple:
            new = grad_and_sums(weights, memory_rows, micro, tokens)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, new), None

        if cfg.train.accum_steps == 1:
            micro = jax.tree.map(lambda leaf: leaf[0], micros)
            (grads, row_grads), sums = grad_and_sums(weights, memory_rows, micro, tokens)
        else:
            like = (weights, memory_rows), (jnp.zeros(()), jnp.zeros(()))
            zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), like)
            ((grads, row_grads), sums), _ = jax.lax.scan(accumulate, zeros, micros)
        (through_rows,) = pull_back(
            jax.tree.map(lambda grad, row: grad.astype(row.dtype), row_grads, memory_rows)
        )
        if through_rows:
            through_rows["embed"] += grads["embed"]
        parts = split(grads | through_rows)
        return ({name: parts[name] for name in ("embed", "tables")}, parts["backbone"]), sums

    return gradients


def make_train_step(cfg: Config) -> jax.stages.Wrapped:
    """Returns ``step(state, batch) -> (state, metrics)``, jitted, with the state donated. Where
    tables lie in the host's memory, those of the state have the C rows of the batch's ``table_ids``
    alone; others are a ValueError.

    metrics: loss and z_loss in nats per token, lr, grad_norm, grad_norm/<label>, and param_norm of
    all that the step may have changed (of row-sparse tables the touched rows); float32 scalars.
    With a row-sparse table_optimizer nothing of the size of a table is computed, read or written,
    unless a batch has the whole vocabulary."""
    settings = cfg.optimizer, cfg.train.steps
    gradients, optimizer, rate = make_gradients(cfg), make_optimizer(*settings), schedule(*settings)
    vocab, on_host = cfg.model.vocab_size, cfg.parallel.table_memory == "host"

    def step(state: dict, batch: dict) -> tuple[dict, dict]:
        params, moments = state["params"], state["optimizer"]
        unique_ids, ids_C, places_R = batch["unique_ids"], batch["table_ids"], batch["places"]
        if on_host and any(a.shape[1] != len(ids_C) for a in jax.tree.leaves(params["tables"])):
            raise ValueError(
                "parallel.table_memory=host: a step takes tables of its batch's rows, see"
                " train/host_tables.py"
            )
        rows = addressed_rows(params, unique_ids, places_R if on_host else None)
        head = {"head": params["embed"].T} if cfg.model.tied_head else {}
        (row_grads, grads), (loss, z) = gradients(rows, params["backbone"] | head, batch)
        # the gradient of a part that AdamW trains has its size, that of others C rows
        (weights, tables), (row_grads, table_grads), (_, table_rows) = (
            by_optimizer(cfg, tree) for tree in (params, row_grads, rows)
        )
        ids_R = jnp.where(places_R < len(ids_C), unique_ids, vocab)
        dense = dense_gradient(row_grads, ids_R, {name: weights[name] for name in row_grads})
        if head:
            dense["embed"] += grads.pop("head").T
        is_row_C = ids_C < vocab
        if on_host:
            ids_C = jnp.where(is_row_C, jnp.arange(len(ids_C), dtype=jnp.int32), len(ids_C))
        if tables:
            table_grads, table_rows = sum_over_sections(
                table_grads, table_rows, ids_C, places_R, tables
            )
            dense["tables"] = table_grads
        grads = {"backbone": grads, **dense}
        norms = group_norms(grads)
        grads, table_grads = by_optimizer(cfg, clip(grads, norms, cfg.optimizer))
        updates, weight_moments = optimizer.update(grads, moments["weights"], weights)
        weights, table_moments = optax.apply_updates(weights, updates), moments["tables"]
        if tables:
            updates, table_moments = make_table_optimizer(*settings).update(
                table_grads, table_moments, table_rows, ids_R=ids_C
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
            "param_norm": optax.tree.norm((join(weights), table_rows if tables else {})),
            **{f"grad_norm/{label}": norm for label, norm in norms.items()},
        }
        return {
            "params": weights | ({"tables": tables} if tables else {}),
            "optimizer": {"weights": weight_moments, "tables": table_moments},
            "step": state["step"] + 1,
        }, metrics

    return jax.jit(step, donate_argnums=0)
