"""The train step: loss with exact denominators, gradient accumulation, clipping, update. One compiled function."""

import jax
import jax.numpy as jnp
import optax

from flexmemory.config import Config
from flexmemory.models.transformer import build, init_params
from flexmemory.train.optimizer import clip, group_norms, make_optimizer, schedule


def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cross-entropy in nats, logsumexp^2), each float32 [B, T]."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return lse_BT - picked_BT, lse_BT**2


def forward_losses(model, batch: dict, ffn_scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Losses of one micro-batch of ids, targets, unique_ids, inverse (and segments). See data/pipeline.py for shapes."""
    logits_BTV = model(batch["ids"], model.rows(batch["unique_ids"]), batch["inverse"],
                       segments_BT=batch.get("segments"), ffn_scale=ffn_scale)
    return token_losses(logits_BTV, batch["targets"])


def init_state(cfg: Config) -> dict:
    """{"params", "optimizer", "step"}: plain arrays, a pure function of the config."""
    params = init_params(cfg.model, cfg.train.seed)
    return {"params": params, "optimizer": make_optimizer(cfg.optimizer, cfg.train.steps).init(params), "step": jnp.zeros((), jnp.int32)}


def make_train_step(cfg: Config):
    """Returns ``step(state, batch) -> (state, metrics)``, jitted, with the state donated.

    batch leaves have a leading axis of ``accum_steps`` micro-batches; the loss of every token counts the same whatever the
    split. metrics: loss and z_loss in nats per token, lr, param_norm (after the
    update), grad_norm, grad_norm/<label>; float32 scalars.
    """
    merge, optimizer = build(cfg.model), make_optimizer(cfg.optimizer, cfg.train.steps)
    rate = schedule(cfg.optimizer, cfg.train.steps)

    def loss_fn(params, micro, tokens):
        ce_BT, z_BT = forward_losses(merge(params), micro)
        loss, z = ce_BT.sum() / tokens, z_BT.sum() / tokens
        return loss + cfg.train.z_loss * z, (loss, z)

    def step(state, batch):
        params, tokens = state["params"], batch["targets"].size
        grad_and_sums = jax.grad(loss_fn, has_aux=True)

        def accumulate(carry, micro):
            grads, sums = grad_and_sums(params, micro, tokens)
            return jax.tree.map(jnp.add, carry, (grads, sums)), None

        if cfg.train.accum_steps == 1:
            grads, (loss, z) = grad_and_sums(params, jax.tree.map(lambda a: a[0], batch), tokens)
        else:
            zeros = (jax.tree.map(jnp.zeros_like, params), (jnp.zeros(()), jnp.zeros(())))
            (grads, (loss, z)), _ = jax.lax.scan(accumulate, zeros, batch)
        norms = group_norms(grads)
        updates, opt = optimizer.update(clip(grads, norms, cfg.optimizer), state["optimizer"], params)
        params = optax.apply_updates(params, updates)
        metrics = {"loss": loss, "z_loss": z, "lr": jnp.asarray(rate(state["step"]), jnp.float32),
                   "grad_norm": jnp.sqrt(sum(n**2 for n in norms.values())), "param_norm": optax.tree.norm(params),
                   **{f"grad_norm/{label}": norm for label, norm in norms.items()}}
        return {"params": params, "optimizer": opt, "step": state["step"] + 1}, metrics

    return jax.jit(step, donate_argnums=0)
