"""Choosing the next token."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames=("vocab_size",))
def greedy(logits_BV: jax.Array, vocab_size: int) -> jax.Array:
    """int32 [B], the id of the largest logit below ``vocab_size``; the lowest id of equals."""
    return jnp.argmax(logits_BV[:, :vocab_size], axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("vocab_size", "k"))
def likeliest(logits_BV: jax.Array, vocab_size: int, k: int) -> jax.Array:
    """int32 [B, k], the ids of the k largest logits."""
    return jax.lax.top_k(logits_BV[:, :vocab_size], k)[1].astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("vocab_size",))
def sample(
    logits_BV: jax.Array,
    seed_B: jax.Array,
    request_B: jax.Array,
    step_B: jax.Array,
    temperature_B: jax.Array,
    top_p_B: jax.Array,
    vocab_size: int,
) -> jax.Array:
    """int32 [B], drawn from softmax(logits / temperature) cut to the fewest tokens whose
    probabilities reach ``top_p``; the likeliest where the temperature is 0.

    The draw is a function of (seed, request number, step) and the request's own logits, whatever
    else is in the batch."""

    def one(
        logits_V: jax.Array,
        seed: jax.Array,
        request: jax.Array,
        step: jax.Array,
        temperature: jax.Array,
        top_p: jax.Array,
    ) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), request)
        scaled_V = logits_V / jnp.where(temperature > 0, temperature, 1)
        order_V = jnp.argsort(-scaled_V)
        p_V = jax.nn.softmax(scaled_V[order_V])
        before_V = jnp.cumsum(p_V) - p_V  # mass of the likelier ones; the likeliest always stays
        kept_V = jnp.where(
            (before_V < top_p) | (jnp.arange(vocab_size) == 0), scaled_V[order_V], -jnp.inf
        )
        return jnp.where(
            temperature > 0, order_V[jax.random.categorical(key, kept_V)], jnp.argmax(logits_V)
        )

    return jax.vmap(one)(
        logits_BV[:, :vocab_size], seed_B, request_B, step_B, temperature_B, top_p_B
    ).astype(jnp.int32)
