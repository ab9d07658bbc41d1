"""The shape of a table's rows: spectra, angles, and how many of them a text of some length uses."""

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.analysis.trained import Trained, not_applicable
from flexmemory.data.shards import read_train_counts
from flexmemory.evals.rows import live_rows
from flexmemory.models.memory import Rows, row_groups
from flexmemory.tkv import format, lowrank

CUTS = (0.1, 0.2, 0.3, 0.4, 0.5)
PLOTTED = 128  # points of a spectrum at most
PAIRS, PAIRS_AT_ONCE, BINS = 4096, 256, 40
STARTS, LONGEST, HEAPS_FROM = 8, 1 << 20, 64
NOTHING = "no memory layer, so no rows"


def spectra(trained: Trained) -> dict:
    """Singular values of each memory layer's folded table, MemoryLLM Fig 13, from the eigenvalues
    of X^T X.

    {"layers": [{"layer", "kind", "width", "ranks", "singular_values": over the largest, at those
    ranks (counted from 1), "effective_rank": exp of the entropy of the squared values' shares,
    "energy": [{"cut", "kept": share of the squared values}]}]}. The sums are float32 on the device
    and float64 over its calls, so values below about 1e-3 of the largest are rounding. The paper
    says "normalised" without saying by what.
    """
    if not trained.memory_layers:
        return not_applicable(NOTHING)
    model = trained.cfg.model
    groups = format.model_groups(model, "float32", 1)
    grams = lowrank.grams(
        trained.params, model, groups, min(model.vocab_size, format.FOLD_ROWS), progress=False
    )
    layers = []
    for layer in trained.memory_layers:
        squares_W = np.maximum(np.linalg.eigvalsh(grams[layer])[::-1], 0)
        if not np.isfinite(squares_W).all() or not squares_W[0]:
            return not_applicable(f"the rows of layer {layer} are all 0 or not finite")
        width, share_W = len(squares_W), squares_W / squares_W.sum()
        ranks = np.unique(np.linspace(1, width, min(width, PLOTTED)).round().astype(int))
        entropy = -float(np.sum(share_W[share_W > 0] * np.log(share_W[share_W > 0])))
        layers.append(
            {
                "layer": layer,
                "kind": trained.specs[layer].kind,
                "width": width,
                "ranks": ranks.tolist(),
                "singular_values": np.sqrt(squares_W / squares_W[0])[ranks - 1].tolist(),
                "effective_rank": float(np.exp(entropy)),
                "energy": [
                    {"cut": cut, "kept": float(share_W[: round((1 - cut) * width)].sum())}
                    for cut in CUTS
                ],
            }
        )
    return {"applies": True, "layers": layers}


def angular(trained: Trained) -> dict:
    """Angles between rows of one table, STEM section on angular spread: the cosine of PAIRS random
    pairs of different ids.

    Ids occur in the training data; they are drawn all alike ("rows"), and as often as they occur
    ("weighted"); "fresh" has the pairs of "rows" and the weights before training. {"layers":
    [{"layer", "kind", "width", "random_p95": 1.96 / sqrt(W), what Gaussian rows have, "edges", and
    for each of the three {"p50", "p95": of |cos|, "mean": of cos, "density": of cos between the
    edges}}]}. The paper names neither pairs nor ids nor this control. Only learned tables (stem
    layers) are meant; the paper's comparison with W_up x of a dense layer is left out.
    """
    layers = [layer for layer, spec in enumerate(trained.specs) if spec.learned]
    if not layers:
        return not_applicable("no layer with a learned table")
    counts_V, rng = (
        read_train_counts(trained.cfg.data.path).astype(np.float64),
        trained.rng("angular"),
    )
    if np.count_nonzero(counts_V) < 2:
        return not_applicable("fewer than two different ids in the training data")
    alike_2P, weighted_2P = _pairs(rng, counts_V > 0), _pairs(rng, counts_V)
    found = {
        "rows": _cosines(trained, trained.params, layers, alike_2P),
        "weighted": _cosines(trained, trained.params, layers, weighted_2P),
        "fresh": _cosines(trained, trained.fresh_params, layers, alike_2P),
    }
    rows = []
    for place, layer in enumerate(layers):
        cosines = {name: cosine_LP[place] for name, cosine_LP in found.items()}
        edges = np.histogram_bin_edges(np.concatenate(list(cosines.values())), BINS)
        row = {
            "layer": layer,
            "kind": trained.specs[layer].kind,
            "width": trained.specs[layer].row_width,
            "random_p95": 1.96 / trained.specs[layer].row_width ** 0.5,
            "edges": edges.tolist(),
        }
        for name, cosine_P in cosines.items():
            p50, p95 = np.percentile(np.abs(cosine_P), (50, 95))
            row[name] = {
                "p50": float(p50),
                "p95": float(p95),
                "mean": float(cosine_P.mean()),
                "density": np.histogram(cosine_P, edges, density=True)[0].tolist(),
            }
        rows.append(row)
    return {"applies": True, "pairs": PAIRS, "layers": rows}


def unique_growth(trained: Trained) -> dict:
    """How the rows in use grow with the length of a text, STEM's test-time capacity |S| W
    unique(n).

    The validation split is taken as a ring of its documents, shuffled, and read from STARTS of
    them, at even distances. {"points": [{"tokens": n, "unique": mean, "lowest", "highest",
    "values": numbers in the rows in use, all layers}], n by powers of two, the last one the split
    or LONGEST, "exponent", "factor": of Heaps' law unique = factor n^exponent by least squares of
    the logarithms from HEAPS_FROM tokens on until half of all that occur are met,
    "values_per_token": |S| W}. The paper says sublinear and cites Heaps; it gives neither text nor
    fit.
    """
    if not trained.memory_layers:
        return not_applicable(NOTHING)
    tokens, starts = _documents(trained)
    limit = min(len(tokens), LONGEST)
    lengths = [1 << power for power in range(limit.bit_length()) if 1 << power < limit] + [limit]
    starts = starts[np.unique(np.arange(STARTS) * len(starts) // STARTS)]
    unique_SN = np.array([_unique(np.roll(tokens, -start)[:limit], lengths) for start in starts])
    values, points = sum(trained.specs[layer].row_width for layer in trained.memory_layers), []
    for length, unique_S in zip(lengths, unique_SN.T, strict=True):
        points.append(
            {
                "tokens": length,
                "unique": float(unique_S.mean()),
                "lowest": int(unique_S.min()),
                "highest": int(unique_S.max()),
                "values": float(values * unique_S.mean()),
            }
        )
    half = len(np.unique(tokens)) / 2  # beyond it the end of the vocabulary bends the curve
    fitted = [
        (np.log(point["tokens"]), np.log(point["unique"]))
        for point in points
        if point["tokens"] >= HEAPS_FROM and point["unique"] <= half
    ]
    exponent, factor = None, None
    if len(fitted) > 1:
        tokens_P, unique_P = np.transpose(fitted)
        exponent, factor = np.polyfit(tokens_P, unique_P, 1)
    return {
        "applies": True,
        "starts": len(starts),
        "values_per_token": values,
        "points": points,
        "exponent": None if exponent is None else float(exponent),
        "factor": None if factor is None else float(np.exp(factor)),
    }


def _pairs(rng: np.random.Generator, weight_V: np.ndarray) -> np.ndarray:
    """PAIRS pairs of ids drawn by weight, int32 [2, P]; equal ones are drawn again."""
    total_V = np.cumsum(weight_V, dtype=np.float64)
    made = np.empty((2, 0), np.int32)
    while made.shape[1] < PAIRS:
        drawn = np.searchsorted(total_V, rng.random((2, PAIRS)) * total_V[-1], side="right").astype(
            np.int32
        )
        made = np.concatenate([made, drawn[:, drawn[0] != drawn[1]]], axis=1)
    return made[:, :PAIRS]


def _cosines(trained: Trained, params: dict, layers: list[int], pairs_2P: np.ndarray) -> np.ndarray:
    """cosine_LP of the rows of these layers, float32."""
    rows_of, groups = live_rows(trained.cfg.model, params), row_groups(trained.specs)
    place_of = {
        layer: (name, place)
        for name, members in groups.items()
        for place, layer in enumerate(members)
    }
    made = []
    for start in range(0, PAIRS, PAIRS_AT_ONCE):
        cosines = _paired_cosines(rows_of(pairs_2P[:, start : start + PAIRS_AT_ONCE].reshape(-1)))
        made.append([cosines[name][place] for name, place in (place_of[layer] for layer in layers)])
    return np.concatenate(made, axis=1)


@jax.jit
def _paired_cosines(rows: Rows) -> Rows:
    """{group: cosine [L, P]} of rows_LRW, R = 2 P: row p with row P + p."""

    def cosines(rows_LRW: jax.Array) -> jax.Array:
        one_LPW, other_LPW = jnp.split(rows_LRW.astype(jnp.float32), 2, axis=1)
        norms_LP = jnp.linalg.norm(one_LPW, axis=-1) * jnp.linalg.norm(other_LPW, axis=-1)
        return jnp.sum(one_LPW * other_LPW, axis=-1) / jnp.maximum(norms_LP, 1e-30)

    return jax.tree.map(cosines, rows)


def _documents(trained: Trained) -> tuple[np.ndarray, np.ndarray]:
    """(all tokens of the validation split, where its documents begin), the documents shuffled: in
    the split a source comes after another.
    """
    val, parts, starts, before = trained.val, [], [], 0
    for shard, count in enumerate(val.shard_tokens):
        segments_T = val.token_segments(shard, 0, count)
        parts.append(val.tokens(shard, 0, count))
        starts.append(before + np.flatnonzero(np.diff(segments_T, prepend=-1)))
        before += count
    documents = np.split(np.concatenate(parts), np.concatenate(starts)[1:])
    documents = [documents[i] for i in np.random.default_rng(0).permutation(len(documents))]
    return np.concatenate(documents), np.cumsum([0, *map(len, documents[:-1])])


def _unique(tokens_T: np.ndarray, lengths: list[int]) -> np.ndarray:
    """Different ids among the first n tokens, for each n."""
    first = np.sort(np.unique(tokens_T, return_index=True)[1])
    return np.searchsorted(first, lengths)
