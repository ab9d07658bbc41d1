"""AdamW with a label for every parameter: clipping by true global norm, warm-up schedules, own
settings for tables."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from flexmemory.config import OptimizerConfig
from flexmemory.models.parameters import join, label_params, parameter_kind, path_name


def schedule(cfg: OptimizerConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate at a step: linear warm-up from lr/warmup_steps, then cosine or wsd (constant,
    then linear) to min_lr, or constant."""
    warmup = min(cfg.warmup_steps, steps)
    rest = max(steps - warmup, 1)
    if cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(cfg.lr, rest, alpha=cfg.min_lr / cfg.lr)
    elif cfg.schedule == "wsd":
        decay = max(int(rest * cfg.decay_fraction), 1)
        fall = optax.linear_schedule(cfg.lr, cfg.min_lr, decay)
        after = optax.join_schedules([optax.constant_schedule(cfg.lr), fall], [rest - decay])
    else:
        after = optax.constant_schedule(cfg.lr)
    if not warmup:
        return after
    rise = optax.linear_schedule(cfg.lr / warmup, cfg.lr, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def group_norms(grads: dict) -> dict[str, jax.Array]:
    """Global norm of the gradient of each label, float32 scalars."""
    groups: dict[str, list] = {}
    for path, grad in jax.tree_util.tree_leaves_with_path(join(grads)):
        groups.setdefault(parameter_kind(path_name(path)).label, []).append(grad)
    return {label: optax.tree.norm(parts) for label, parts in groups.items()}


def clip(grads: dict, norms: dict[str, jax.Array], cfg: OptimizerConfig) -> dict:
    """Scales gradients so that the norm over all labels (tables apart when they have their own
    clip) is at most clip_norm."""

    def factor(names: list[str], limit: float) -> jax.Array:
        norm = jnp.sqrt(sum(norms[n] ** 2 for n in names))
        return jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))

    tables = ["table"] if cfg.table_clip_norm and "table" in norms else []
    shared = [n for n in norms if n not in tables]
    factors = dict.fromkeys(shared, factor(shared, cfg.clip_norm) if cfg.clip_norm else 1.0)
    factors |= {n: factor(tables, cfg.table_clip_norm) for n in tables}
    return jax.tree.map(lambda grad, label: grad * factors[label], grads, label_params(grads))


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (decoupled decay) on clipped gradients; norms do not decay, tables take table_lr and
    table_weight_decay."""

    def decay(updates: dict, params: dict | None) -> dict:
        rate, labels = {"table": cfg.table_weight_decay, "norm": 0.0}, label_params(params)
        decayed = lambda u, p, label: u + rate.get(label, cfg.weight_decay) * p
        return jax.tree.map(decayed, updates, params, labels)

    def table_lr(updates: dict, params: dict | None) -> dict:
        scaled = lambda u, label: u * cfg.table_lr if label == "table" else u
        return jax.tree.map(scaled, updates, label_params(updates))

    return optax.chain(
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        optax.stateless(decay),
        optax.stateless(table_lr),
        optax.scale_by_learning_rate(schedule(cfg, steps)),
    )
