"""k-means and what judges its clusters: Lloyd's algorithm on the device, seeded by k-means++, the
best of RESTARTS.
"""

import functools

import jax
import jax.numpy as jnp

RESTARTS, ROUNDS = 4, 30


def choose_k(tokens: int) -> int:
    """sqrt(tokens / 32), 4 at least and 16 at most: few enough to be read, some dozens of tokens in
    each.
    """
    return max(4, min(16, round((tokens / 32) ** 0.5)))


@jax.jit
def directions(x_RF: jax.Array) -> jax.Array:
    """Every row scaled to length 1; a row of zeros stays."""
    return x_RF / jnp.maximum(jnp.linalg.norm(x_RF, axis=1, keepdims=True), 1e-30)


def cluster(x_RF: jax.Array, k: int, seed: int) -> tuple[jax.Array, jax.Array, float]:
    """(centre_KF, label_R int32, inertia: sum of squared distances to the own centre) of the best
    of RESTARTS runs of ROUNDS rounds.
    """
    centre_KF, label_R, inertia = _best(x_RF, jax.random.key(seed), k=k)
    return centre_KF, label_R, float(inertia)


@functools.partial(jax.jit, static_argnames="k")
def _best(x_RF, key, *, k):
    centre_NKF, label_NR, inertia_N = jax.lax.map(
        functools.partial(_lloyd, x_RF, k), jax.random.split(key, RESTARTS)
    )
    best = jnp.argmin(inertia_N)
    return centre_NKF[best], label_NR[best], inertia_N[best]


def _lloyd(x_RF, k, key):
    def round_(_, centre_KF):
        chosen_RK = jax.nn.one_hot(jnp.argmin(squared_distances(x_RF, centre_KF), axis=1), k)
        count_K1 = chosen_RK.sum(axis=0)[:, None]
        mean_KF = jnp.matmul(chosen_RK.T, x_RF, precision="highest") / jnp.maximum(count_K1, 1)
        return jnp.where(count_K1 > 0, mean_KF, centre_KF)  # an empty cluster stays where it is

    centre_KF = jax.lax.fori_loop(0, ROUNDS, round_, _seeds(x_RF, k, key))
    distance_RK = squared_distances(x_RF, centre_KF)
    return centre_KF, jnp.argmin(distance_RK, axis=1), jnp.min(distance_RK, axis=1).sum()


def _seeds(x_RF, k, key):
    """k-means++: each next centre is a row drawn by its squared distance from the nearest one so
    far.
    """
    keys = jax.random.split(key, k)
    first = x_RF[jax.random.randint(keys[0], (), 0, len(x_RF))]

    def add(i, carry):
        centre_KF, nearest_R = carry
        new = x_RF[jax.random.categorical(keys[i], jnp.log(nearest_R + 1e-30))]
        return centre_KF.at[i].set(new), jnp.minimum(
            nearest_R, squared_distances(x_RF, new[None])[:, 0]
        )

    nearest_R = squared_distances(x_RF, first[None])[:, 0]
    return jax.lax.fori_loop(
        1, k, add, (jnp.zeros((k, x_RF.shape[1])).at[0].set(first), nearest_R)
    )[0]


def squared_distances(x_RF: jax.Array, centre_KF: jax.Array) -> jax.Array:
    """|x_R - centre_K|^2 [R, K], never below 0."""
    cross_RK = jnp.matmul(x_RF, centre_KF.T, precision="highest")
    return jnp.maximum(
        jnp.sum(x_RF**2, axis=1)[:, None] - 2 * cross_RK + jnp.sum(centre_KF**2, axis=1), 0
    )


@functools.partial(jax.jit, static_argnames="k")
def silhouette(unit_RF: jax.Array, label_R: jax.Array, k: int) -> jax.Array:
    """Mean of (b - a) / max(a, b) over rows of length 1: a, b the mean cosine distances to the own
    cluster's others and to the nearest other cluster. 0 for a row alone in its cluster; 0 where all
    rows are in one.
    """
    distance_RR = jnp.maximum(1 - jnp.matmul(unit_RF, unit_RF.T, precision="highest"), 0) * (
        1 - jnp.eye(len(unit_RF))
    )
    member_RK = jax.nn.one_hot(label_R, k)
    count_K, own_R1 = member_RK.sum(axis=0), label_R[:, None]
    sum_RK = jnp.matmul(distance_RR, member_RK, precision="highest")
    own_count_R = count_K[label_R]
    a_R = jnp.take_along_axis(sum_RK, own_R1, axis=1)[:, 0] / jnp.maximum(own_count_R - 1, 1)
    mean_RK = jnp.where(
        (count_K > 0) & (jnp.arange(k) != own_R1), sum_RK / jnp.maximum(count_K, 1), jnp.inf
    )
    b_R = mean_RK.min(axis=1)
    value_R = jnp.where(b_R < jnp.inf, (b_R - a_R) / jnp.maximum(jnp.maximum(a_R, b_R), 1e-30), 0)
    return jnp.where(own_count_R > 1, value_R, 0).mean()
