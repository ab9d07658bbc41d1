"""The rows as key-value memories, MemoryLLM section 3.1: which keys k_i (columns of the live row's
up-projection) a token uses, and how much.

Coefficients c_i = (q . k_i) SiLU(q . g_i) (Eq 2.7; the paper's c with tilde), q the layer's normed
X_0 (Eq 2.8 equals Eq 2.5 only so); the row is sum c_i v_i. Of a memoryllm layer it is the whole
FFN, of a flex layer FFN-M. All token ids of the vocabulary count alike.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.analysis import kmeans
from flexmemory.analysis.trained import Trained, not_applicable
from flexmemory.data.shards import read_train_counts
from flexmemory.models.config import ModelConfig
from flexmemory.models.ffn import gated, linear
from flexmemory.models.memory import row_groups
from flexmemory.models.transformer import build

AT_ONCE = 1024  # ids of one call
PICTURED, EXAMPLES = 2000, 12
CLUSTERED, JUDGED = (
    4096,
    1024,
)  # tokens of a cluster coefficient: those that k-means sees, those of the silhouette
SIGMAS = (3, 6)
NOTHING = "no layer whose row an FFN of the token makes"


def clusters(trained: Trained) -> dict:
    """k-means on the first memory layer's coefficients of all tokens, MemoryLLM Fig 5, and their
    picture.

    Every token's coefficients are scaled to length 1, so that clusters are of directions; the paper
    names neither k nor distance. k, seeds and
    restarts: :mod:`flexmemory.analysis.kmeans`. The picture is of the two leading principal
    components (the paper's is t-SNE) and of PICTURED tokens at most.

    {"layer", "k", "inertia": mean squared distance to the centre, "explained": by each component,
    "clusters": by size, [{"size", "seen": of them in the training data, "examples": texts of the
    tokens nearest to the centre}], "points": [[x, y, place in clusters], ...]}.
    """
    layers = _layers(trained)
    if not layers:
        return not_applicable(NOTHING)
    used = min(trained.tokenizer.vocab_size, trained.cfg.model.vocab_size)
    c_RF = kmeans.directions(
        coefficients(trained.cfg.model, trained.params, layers[0], np.arange(used))
    )
    k = kmeans.choose_k(used)
    centre_KF, label_R, inertia = kmeans.cluster(c_RF, k, trained.cfg.train.seed)
    c_RF, label_R = np.asarray(c_RF), np.asarray(label_R)
    sizes_K = np.bincount(label_R, minlength=k)
    by_size = np.argsort(-sizes_K, kind="stable")
    by_size = by_size[sizes_K[by_size] > 0]
    explained, xy_R2 = _components(c_RF)
    found, place_K, seen_V = [], np.zeros(k, int), read_train_counts(trained.cfg.data.path) > 0
    for place, cluster in enumerate(by_size):
        members = np.flatnonzero(label_R == cluster)
        distance = np.linalg.norm(c_RF[members] - np.asarray(centre_KF[cluster]), axis=1)
        nearest = members[np.argsort(distance, kind="stable")[:EXAMPLES]]
        found.append(
            {
                "size": int(sizes_K[cluster]),
                "seen": int(seen_V[members].sum()),
                "examples": [trained.tokenizer.decode([token]) for token in nearest],
            }
        )
        place_K[cluster] = place
    shown = np.sort(trained.rng("clusters").permutation(used)[:PICTURED])
    points = [
        [round(float(x), 4), round(float(y), 4), int(place_K[label_R[token]])]
        for token, (x, y) in zip(shown, xy_R2[shown], strict=True)
    ]
    return {
        "applies": True,
        "layer": layers[0],
        "k": k,
        "inertia": inertia / used,
        "explained": explained,
        "clusters": found,
        "points": points,
    }


def cluster_coefficient(trained: Trained) -> dict:
    """How well the coefficients fall into clusters, layer by layer, MemoryLLM Fig 6a. The paper
    does not define its number, so it is ours:

    the mean silhouette (cosine distance; -1 to 1) of JUDGED tokens under a k-means of CLUSTERED
    tokens, the same for all layers; scaling and k as in ``clusters``. Controls: "fresh", the
    weights before training, and "permuted", every key's coefficients dealt out anew among the
    tokens, which keeps how a key is distributed and nothing of which keys go together. {"k",
    "layers": [{"layer", "kind", "coefficient", "fresh", "permuted"}]}.
    """
    layers = _layers(trained)
    if not layers:
        return not_applicable(NOTHING)
    model, seed, fresh, rows = trained.cfg.model, trained.cfg.train.seed, trained.fresh_params, []
    used = min(trained.tokenizer.vocab_size, model.vocab_size)
    rng = trained.rng("cluster_coefficient")
    ids_R = rng.permutation(used)[:CLUSTERED]
    k = kmeans.choose_k(len(ids_R))

    def coefficient(c_RF):
        c_RF = kmeans.directions(c_RF)
        _, label_R, _ = kmeans.cluster(c_RF, k, seed)
        return float(
            kmeans.silhouette(c_RF[:JUDGED], label_R[:JUDGED], k)
        )  # ids_R are in random order

    for layer in layers:
        own_RF = coefficients(model, trained.params, layer, ids_R)
        fresh_RF, permuted_RF = (
            coefficients(model, fresh, layer, ids_R),
            jnp.asarray(rng.permuted(own_RF, axis=0)),
        )
        rows.append(
            {
                "layer": layer,
                "kind": trained.specs[layer].kind,
                "coefficient": coefficient(own_RF),
                "fresh": coefficient(fresh_RF),
                "permuted": coefficient(permuted_RF),
            }
        )
    return {"applies": True, "k": k, "tokens": len(ids_R), "layers": rows}


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
            counts = sum(
                np.asarray(_above(c_RF), np.int64) for c_RF in _calls(model, params, layer, ids_R)
            )
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


def _calls(cfg, params, layer, ids_R, before_gate=False):
    """c_RF of AT_ONCE ids after another; one program for all layers of a stack."""
    model = build(cfg)(params)
    name, members = next(item for item in row_groups(model.specs).items() if layer in item[1])
    in_group = members.index(layer)
    stack, places = next(part for part in dict(model.memory.order)[name] if in_group in part[1])
    place = places.index(in_group)
    for start in range(0, len(ids_R), AT_ONCE):
        ids = np.asarray(ids_R[start : start + AT_ONCE], np.int32)
        padded = np.pad(ids, (0, -len(ids) % min(AT_ONCE, len(ids_R))))
        yield _coefficients(params, padded, place, cfg=cfg, stack=stack, before_gate=before_gate)[
            : len(ids)
        ]


@functools.partial(jax.jit, static_argnames=("cfg", "stack", "before_gate"))
def _coefficients(params, ids_R, place, *, cfg: ModelConfig, stack: str, before_gate: bool):
    memory = build(cfg)(params).memory
    source, e_RD = (
        jax.tree.map(lambda a: a[place], memory.stacks[stack]),
        params["embed"][ids_R].astype(memory.dtype),
    )
    q_RD = (memory.norm or source.norm)(e_RD)
    up_RF = linear(q_RD, source.ffn.up[...])
    return (up_RF if before_gate else gated(linear(q_RD, source.ffn.gate[...]), up_RF)).astype(
        jnp.float32
    )


@jax.jit
def _above(c_RF):
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
