"""Choosing the next token."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames=("vocab_size",))
def greedy(logits_BV: jax.Array, vocab_size: int) -> jax.Array:
    """int32 [B], the id of the largest logit below ``vocab_size``; the lowest id of equals."""
    return jnp.argmax(logits_BV[:, :vocab_size], axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("vocab_size",))
def sample(logits_BV: jax.Array, seed: jax.Array, requests_B: jax.Array, step: jax.Array, temperature: jax.Array, top_p: jax.Array,
           vocab_size: int) -> jax.Array:
    """int32 [B], drawn from softmax(logits / temperature) cut to the fewest tokens whose probabilities reach ``top_p``.

    The draw is a function of (seed, request number, step) and the request's own logits, whatever else is in the batch.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)

    def one(logits_V, request):
        scaled_V = logits_V / temperature
        order_V = jnp.argsort(-scaled_V)
        p_V = jax.nn.softmax(scaled_V[order_V])
        before_V = jnp.cumsum(p_V) - p_V  # mass of the likelier ones; the likeliest always stays
        kept_V = jnp.where((before_V < top_p) | (jnp.arange(vocab_size) == 0), scaled_V[order_V], -jnp.inf)
        return order_V[jax.random.categorical(jax.random.fold_in(key, request), kept_V)]

    return jax.vmap(one)(logits_BV[:, :vocab_size], requests_B).astype(jnp.int32)
