"""Row-sparse optimisers of learned tables: a step reads and writes the R rows of its batch alone,
however many rows a table has.

Tables are any tree of float32 arrays [L, V, W]. The step works with their gathered rows [L, R, W]
and computes nothing of size V·W:

    rows = exchange.lookup(tables, ids_R)
    grads = ...  # with respect to rows, clipped together with all others
    updates, state = optimizer.update(grads, state, rows, ids_R=ids_R)
    tables = apply_rows(tables, updates, ids_R)  # in place where the caller donates them

ids_R is int32 [R], every id at most once. An entry equal to V is no row (padding, an id that the
batch does not hold): whatever stands there in rows, gradients and updates changes nothing."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import P

from flexmemory.config import OptimizerConfig
from flexmemory.sharding import sharding, spec_of
from flexmemory.train.optimizer import schedule


class LazyAdamState(NamedTuple):
    """count: steps done, int32. mu, nu: moments shaped like the tables."""

    count: jax.Array  # type: ignore[assignment]  # optax's name, which hides tuple.count
    mu: optax.Updates
    nu: optax.Updates


class RowwiseAdagradState(NamedTuple):
    """sums: per row the sum of its mean squared gradients, float32 [L, V] for every table."""

    sums: optax.Updates


def make_table_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """The transformation of ``cfg.table_optimizer``, then decoupled decay of the touched rows,
    ``table_lr`` and the learning rate's schedule.

    ``init(tables)``; ``update(grads, state, rows, ids_R=ids_R)`` with grads and rows [L, R, W],
    grads summed over equal ids. Raises KeyError for "adamw": a dense table is a parameter like
    others."""
    scale = {
        "lazy_adam": scale_by_lazy_adam(cfg.b1, cfg.b2, cfg.eps),
        "rowwise_adagrad": scale_by_rowwise_adagrad(cfg.eps),
    }
    return optax.chain(
        scale[cfg.table_optimizer],
        optax.add_decayed_weights(cfg.table_weight_decay),
        optax.scale(cfg.table_lr),
        optax.scale_by_learning_rate(schedule(cfg, steps)),
    )


def scale_by_lazy_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """Adam whose moments and updates exist for touched rows only. For each row r of ids_R at step t
    = 1, 2, ...:

        m_r <- b1 m_r + (1 - b1) g_r        v_r <- b2 v_r + (1 - b2) g_r^2
        u_r  = (m_r / (1 - b1^t)) / (sqrt(v_r / (1 - b2^t)) + eps)

    Adam is Kingma and Ba 2015, algorithm 1; dense Adam lets m and v of an unseen row decay and
    keeps moving it by its old m, here both stand still. With every row touched at every step the
    two are one. t counts steps, not the row's visits, as in LazyAdam of TensorFlow Addons: with b1
    = 0.9, b2 = 0.95 a row first seen late takes a first step of (1 - b1) / sqrt(1 - b2) = 0.45 of
    the rate, where counts per row ([L, V] more state) would make it 1."""

    def init(tables: Any) -> LazyAdamState:
        mu, nu = (jax.tree.map(jnp.zeros_like, tables) for _ in range(2))
        return LazyAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(grads: Any, state: Any, rows: Any = None, *, ids_R: jax.Array, **_: Any) -> tuple:
        count = optax.safe_increment(state.count)
        fix1, fix2 = 1 - b1**count, 1 - b2**count

        def table(grad_LRW: jax.Array, mu_LVW: jax.Array, nu_LVW: jax.Array) -> tuple:
            # a layer at a time: its rows are still in cache when they are written back, and
            # temporaries are [R, W]
            def layer(l: jax.Array, carry: tuple) -> tuple:
                update_LRW, mu_LVW, nu_LVW = carry
                grad_RW = update_LRW[l]
                # the barriers keep XLA from gathering twice, and from a gather that runs after the
                # scatter: that would copy a whole table
                moments = _gather(mu_LVW, l, ids_R), _gather(nu_LVW, l, ids_R)
                mu_RW, nu_RW = jax.lax.optimization_barrier(moments)
                mu_RW = b1 * mu_RW + (1 - b1) * grad_RW
                nu_RW = b2 * nu_RW + (1 - b2) * grad_RW**2
                update_RW = (mu_RW / fix1) / (jnp.sqrt(nu_RW / fix2) + eps)
                update_RW, mu_RW, nu_RW = jax.lax.optimization_barrier((update_RW, mu_RW, nu_RW))
                return (
                    update_LRW.at[l].set(update_RW),
                    mu_LVW.at[l, ids_R].set(mu_RW, **SCATTER),
                    nu_LVW.at[l, ids_R].set(nu_RW, **SCATTER),
                )

            return jax.lax.fori_loop(0, len(mu_LVW), layer, (grad_LRW, mu_LVW, nu_LVW))

        each = jax.tree.map(table, grads, state.mu, state.nu)
        updates, mu, nu = (
            jax.tree.map(lambda _, parts, k=k: parts[k], grads, each) for k in range(3)
        )
        return updates, LazyAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_rowwise_adagrad(eps: float) -> optax.GradientTransformationExtraArgs:
    """AdaGrad with one accumulator per row, fed with the row's mean squared gradient. For each row
    r of ids_R:

        s_r <- s_r + mean_w(g_rw^2)        u_r = g_r / (sqrt(s_r) + eps)

    The exact row-wise AdaGrad of embedding tables in DLRM training: FBGEMM,
    fbgemm_gpu/codegen/genscript/optimizers.py, ``rowwise_adagrad`` (decoupled decay: its
    weight_decay_mode 2). The state is W times smaller than one of Adam's moments; a row that was
    not seen would not change under the dense form either, so sparse and dense are one, decay apart.
    """

    def init(tables: Any) -> RowwiseAdagradState:
        zeros = lambda table_LVW: jnp.zeros(table_LVW.shape[:2], jnp.float32)
        return RowwiseAdagradState(jax.tree.map(zeros, tables))

    def update(grads: Any, state: Any, rows: Any = None, *, ids_R: jax.Array, **_: Any) -> tuple:
        def summed(s_LV: jax.Array, grad_LRW: jax.Array) -> jax.Array:
            at = s_LV.at[_layers(s_LV), ids_R]
            return at.add(jnp.mean(grad_LRW**2, axis=-1), **SCATTER)

        def scaled(grad_LRW: jax.Array, s_LV: jax.Array) -> jax.Array:
            s_LR = _gather(s_LV, _layers(s_LV), ids_R)
            return grad_LRW / (jnp.sqrt(s_LR) + eps)[..., None]

        sums = jax.tree.map(summed, state.sums, grads)
        return jax.tree.map(scaled, grads, sums), RowwiseAdagradState(sums)

    return optax.GradientTransformationExtraArgs(init, update)


def apply_rows(tables: Any, updates: Any, ids_R: jax.Array) -> Any:
    """The tables with update_LRW added to the rows ids_R; all other rows keep their bits."""

    def add(table_LVW: jax.Array, update_LRW: jax.Array) -> jax.Array:
        return table_LVW.at[_layers(table_LVW), ids_R].add(update_LRW, **SCATTER)

    return jax.tree.map(add, tables, updates)


SCATTER: Any = dict(mode="drop", unique_indices=True)


def _gather(table: jax.Array, layers: jax.Array, ids_R: jax.Array) -> jax.Array:
    # (layer, id) pairs here and above: see exchange._rows_at
    cut = P(*(None,) * (1 if jnp.ndim(layers) == 0 else 2), *spec_of(table)[2:])
    return table.at[layers, ids_R].get(mode="clip", out_sharding=sharding(cut))


def _layers(table: jax.Array) -> jax.Array:
    return jnp.arange(len(table), dtype=jnp.int32)[:, None]
