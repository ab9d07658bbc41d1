"""The rows as key-value memories, MemoryLLM section 3.1: which keys k_i (columns of the live row's
up-projection) a token uses, and how much.

Coefficients c_i = (q . k_i) SiLU(q . g_i) (Eq 2.7; the paper's c with tilde), q the layer's normed
X_0 (Eq 2.8 equals Eq 2.5 only so); the row is sum c_i v_i. Of a memoryllm layer it is the whole
FFN, of a flex layer FFN-M. All token ids of the vocabulary count alike.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.analysis.trained import Trained, not_applicable
from flexmemory.data.shards import read_train_counts
from flexmemory.errors import UserError
from flexmemory.models.config import ModelConfig
from flexmemory.models.ffn import gated, linear
from flexmemory.models.memory import TokenMemory, row_groups
from flexmemory.models.transformer import Transformer, build

AT_ONCE = 1024  # ids of one call
RESTARTS, PICTURED, EXAMPLES = 4, 2000, 12
CLUSTERED, JUDGED = 4096, 1024  # tokens of k-means and of the silhouette in a cluster coefficient
SIGMAS = (3, 6)
NOTHING = "no layer whose row an FFN of the token makes"


def clusters(trained: Trained) -> dict:
    """k-means on the first memory layer's coefficients of all tokens, MemoryLLM Fig 5, and their
    picture.

    Each token's coefficients are scaled to length 1, so that clusters are of directions. k is
    :func:`choose_k`; the best of RESTARTS k-means++ starts counts. The picture shows the two
    leading principal components (the paper's is t-SNE) of at most PICTURED tokens.

    {"layer", "k", "inertia": mean squared distance to the centre, "explained": by each component,
    "clusters": by size, [{"size", "seen": of them in the training data, "examples": texts of the
    tokens nearest to the centre}], "points": [[x, y, place in clusters], ...]}.
    """
    layers = _layers(trained)
    if not layers:
        return not_applicable(NOTHING)
    used = min(trained.tokenizer.vocab_size, trained.cfg.model.vocab_size)
    c_RF = sklearn().preprocessing.normalize(
        coefficients(trained.cfg.model, trained.params, layers[0], np.arange(used))
    )
    k = choose_k(used)
    fitted = kmeans(c_RF, k, trained.cfg.train.seed)
    by_size = np.argsort(-np.bincount(fitted.labels_, minlength=k), kind="stable")
    explained, xy_R2 = _components(c_RF)
    entries, place_K, seen_V = [], np.zeros(k, int), read_train_counts(trained.cfg.data.path) > 0
    for place, cluster in enumerate(by_size):
        members = np.flatnonzero(fitted.labels_ == cluster)
        distance = np.linalg.norm(c_RF[members] - fitted.cluster_centers_[cluster], axis=1)
        nearest = members[np.argsort(distance, kind="stable")[:EXAMPLES]]
        examples = [trained.tokenizer.decode([token]) for token in nearest]
        if len(members):
            seen = int(seen_V[members].sum())
            entries.append({"size": len(members), "seen": seen, "examples": examples})
        place_K[cluster] = place
    shown = np.sort(trained.rng("clusters").permutation(used)[:PICTURED])
    points = [
        [round(float(x), 4), round(float(y), 4), int(place_K[fitted.labels_[token]])]
        for token, (x, y) in zip(shown, xy_R2[shown], strict=True)
    ]
    facts = {"layer": layers[0], "k": k, "inertia": float(fitted.inertia_) / used}
    lists = {"explained": explained, "clusters": entries, "points": points}
    return {"applies": True} | facts | lists


def cluster_coefficient(trained: Trained) -> dict:
    """How well the coefficients fall into clusters, layer by layer, MemoryLLM Fig 6a. The paper
    does not define its number, so it is ours.

    It is the mean silhouette (cosine distance; -1 to 1) of JUDGED tokens under a k-means of
    CLUSTERED tokens, the same for all layers; scaling and k as in ``clusters``. Controls: "fresh",
    the weights before training, and "permuted", every key's coefficients dealt out anew among the
    tokens, which keeps how a key is distributed and nothing of which keys go together. {"k",
    "layers": [{"layer", "kind", "coefficient", "fresh", "permuted"}]}.
    """
    layers = _layers(trained)
    if not layers:
        return not_applicable(NOTHING)
    model, rows = trained.cfg.model, []
    rng = trained.rng("cluster_coefficient")
    ids_R = rng.permutation(min(trained.tokenizer.vocab_size, model.vocab_size))[:CLUSTERED]
    k = choose_k(len(ids_R))

    def coefficient(c_RF: np.ndarray) -> float:
        c_RF = sklearn().preprocessing.normalize(c_RF)
        label_R = kmeans(c_RF, k, trained.cfg.train.seed).labels_
        return silhouette(c_RF[:JUDGED], label_R[:JUDGED])  # ids_R are in random order

    for layer in layers:
        own_RF = np.asarray(coefficients(model, trained.params, layer, ids_R))
        fresh_RF = np.asarray(coefficients(model, trained.fresh_params, layer, ids_R))
        row = {"layer": layer, "kind": trained.specs[layer].kind}
        row |= {"coefficient": coefficient(own_RF), "fresh": coefficient(fresh_RF)}
        rows.append(row | {"permuted": coefficient(rng.permuted(own_RF, axis=0))})
    return {"applies": True, "k": k, "tokens": len(ids_R), "layers": rows}


def sklearn() -> Any:
    """scikit-learn. Raises UserError where it is not installed."""
    try:
        import sklearn.cluster
        import sklearn.metrics
        import sklearn.preprocessing
    except ImportError:
        raise UserError("needs scikit-learn; pip install 'flexmemory[experiments]'") from None
    return sklearn


def choose_k(tokens: int) -> int:
    """sqrt(tokens / 32), 4 at least and 16 at most: few enough to be read, some dozens of tokens in
    each.
    """
    return max(4, min(16, round((tokens / 32) ** 0.5)))


def kmeans(x_RF: np.ndarray, k: int, seed: int) -> Any:
    """A fitted sklearn.cluster.KMeans."""
    return sklearn().cluster.KMeans(k, n_init=RESTARTS, random_state=seed).fit(x_RF)


def silhouette(x_RF: np.ndarray, label_R: np.ndarray) -> float:
    """Mean silhouette by cosine distance; 0 where there is one cluster, or as many as rows."""
    if not 1 < len(np.unique(label_R)) < len(label_R):
        return 0.0
    return float(sklearn().metrics.silhouette_score(x_RF, label_R, metric="cosine"))


def outliers(trained: Trained) -> dict:
    """Mean number of keys that a token uses far more than its others, layer by layer, MemoryLLM Fig
    6b. The paper gives no threshold: here a coefficient is an outlier when |c| is above 6 (and
    above 3) standard deviations of that token's coefficients. "fresh": of the weights before
    training.

    {"layers": [{"layer", "kind", "keys": F, "above_3", "above_6", "fresh_above_3",
    "fresh_above_6"}]}.
    """
    layers = _layers(trained)
    if not layers:
        return not_applicable(NOTHING)
    model, fresh, rows = trained.cfg.model, trained.fresh_params, []
    ids_R = np.arange(min(trained.tokenizer.vocab_size, model.vocab_size))
    for layer in layers:
        row = {
            "layer": layer,
            "kind": trained.specs[layer].kind,
            "keys": trained.specs[layer].d_memory,
        }
        for name, params in (("", trained.params), ("fresh_", fresh)):
            calls = _calls(model, params, layer, ids_R)
            counts = np.sum([np.asarray(_above(c_RF), np.int64) for c_RF in calls], axis=0)
            row |= {
                f"{name}above_{sigma}": float(count / len(ids_R))
                for sigma, count in zip(SIGMAS, counts, strict=True)
            }
        rows.append(row)
    return {"applies": True, "layers": rows}


def coefficients(
    cfg: ModelConfig, params: dict, layer: int, ids_R: np.ndarray, before_gate: bool = False
) -> jax.Array:
    """c_RF float32 of the ids in one layer of kind memoryllm or flex; ``before_gate``: q . k_i
    alone.
    """
    return jnp.concatenate(list(_calls(cfg, params, layer, ids_R, before_gate)))


def _layers(trained: Trained) -> list[int]:
    return [layer for layer, spec in enumerate(trained.specs) if spec.d_memory]


def _calls(
    cfg: ModelConfig, params: dict, layer: int, ids_R: np.ndarray, before_gate: bool = False
) -> Iterator[jax.Array]:
    """c_RF of AT_ONCE ids after another; one program for all layers of a stack."""
    model = build(cfg)(params)
    name, members = next(item for item in row_groups(model.specs).items() if layer in item[1])
    in_group = members.index(layer)
    stack, places = next(part for part in dict(_memory(model).order)[name] if in_group in part[1])
    place = places.index(in_group)
    for start in range(0, len(ids_R), AT_ONCE):
        ids = np.asarray(ids_R[start : start + AT_ONCE], np.int32)
        padded = np.pad(ids, (0, -len(ids) % min(AT_ONCE, len(ids_R))))
        yield _coefficients(params, padded, place, cfg=cfg, stack=stack, before_gate=before_gate)[
            : len(ids)
        ]


@functools.partial(jax.jit, static_argnames=("cfg", "stack", "before_gate"))
def _coefficients(
    params: dict,
    ids_R: jax.Array,
    place: jax.Array,
    *,
    cfg: ModelConfig,
    stack: str,
    before_gate: bool,
) -> jax.Array:
    memory = _memory(build(cfg)(params))
    source, e_RD = (
        jax.tree.map(lambda a: a[place], memory.stacks[stack]),
        params["embed"][ids_R].astype(memory.dtype),
    )
    q_RD = (memory.norm or source.norm)(e_RD)
    up_RF = linear(q_RD, source.ffn.up[...])
    return (up_RF if before_gate else gated(linear(q_RD, source.ffn.gate[...]), up_RF)).astype(
        jnp.float32
    )


def _memory(model: Transformer) -> TokenMemory:
    assert model.memory is not None  # the layers asked for have rows
    return model.memory


@jax.jit
def _above(c_RF: jax.Array) -> jax.Array:
    """How many of these tokens' coefficients are outliers, for each of SIGMAS."""
    share_RF = jnp.abs(c_RF) / jnp.maximum(jnp.std(c_RF, axis=1, keepdims=True), 1e-30)
    return jnp.stack([jnp.sum(share_RF > sigma) for sigma in SIGMAS])


def _components(c_RF: np.ndarray) -> tuple[list[float], np.ndarray]:
    """(shares of the variance, places [R, 2]) of the two leading principal components; a
    component's largest weight is positive.
    """
    centred_RF = c_RF - c_RF.mean(axis=0)
    values, vectors = np.linalg.eigh((centred_RF.T @ centred_RF).astype(np.float64))
    axes_F2 = vectors[:, :-3:-1]
    axes_F2 = axes_F2 * np.sign(axes_F2[np.abs(axes_F2).argmax(0), np.arange(2)])
    return [
        float(value) for value in values[:-3:-1] / max(values.sum(), 1e-30)
    ], centred_RF @ axes_F2
