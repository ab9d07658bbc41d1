"""Low-rank rows: the best basis of a layer's rows is the leading eigenvectors of their Gram matrix
X^T X (Eckart and Young)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.errors import UserError
from flexmemory.models.config import ModelConfig
from flexmemory.progress import ProgressLine
from flexmemory.tkv.encoding import Ranks
from flexmemory.tkv.fold import live_rows, with_rows_of
from flexmemory.tkv.format import Group

CALLS = 32  # of the fold whose float32 sums stay on the device before they are added up in float64


def uniform_ranks(groups: tuple[Group, ...], rank: int | float) -> tuple[int, ...]:
    """One rank per memory layer in model order: ``rank`` itself, or as a float that share of each
    layer's width.

    Raises UserError for a rank outside 1..W, a share outside 0..1."""
    ranks: dict[int, int] = {}
    for group in groups:
        r = rank
        if isinstance(rank, float):
            if not 0 < rank <= 1:
                mend = "give such a share, or a whole number of columns"
                raise UserError(f"rank: {rank} is not a share above 0 and at most 1; {mend}")
            r = max(1, round(rank * group.width))
        if not 1 <= r <= group.width:
            what = f"the width of the rows of group {group.name}"
            raise UserError(f"rank: {r} is not between 1 and {group.width}, {what}")
        ranks |= dict.fromkeys(group.layers, int(r))
    return tuple(ranks[layer] for layer in sorted(ranks))


def useful_rank(vocab_size: int, width: int) -> int:
    """The largest rank whose numbers [V, r] and basis [r, W] are smaller than the rows [V, W]."""
    return max(0, (vocab_size * width - 1) // (vocab_size + width))


def find_bases(
    params: dict,
    cfg: ModelConfig,
    groups: tuple[Group, ...],
    fold_rows: int,
    ranks: Ranks = None,
    rank_error: float | None = None,
    progress: bool = True,
) -> dict[int, np.ndarray]:
    """{model layer: basis float32 [r, W], orthonormal rows}, from one pass over all V.

    ranks: by memory layer in model order. Without them each layer gets the smallest rank whose
    error, ||X - X B^T B|| / ||X|| in the Frobenius norm, is at most ``rank_error``. In memory: the
    Gram matrices of all layers, in float32 on the device and in float64 on the host."""
    layers = sorted(layer for group in groups for layer in group.layers)
    rank_of = dict(zip(layers, ranks, strict=True)) if ranks else {}
    bases = {}
    for layer, gram_WW in grams(params, cfg, groups, fold_rows, progress).items():
        if not np.isfinite(gram_WW).all():
            mend = "export an earlier checkpoint (step=)"
            raise UserError(f"layer {layer}: its rows are not all finite; {mend}")
        values, vectors = np.linalg.eigh(gram_WW)  # ascending
        rank = rank_of.get(layer) or _smallest_rank(values[::-1], rank_error)
        bases[layer] = np.ascontiguousarray(vectors[:, ::-1][:, :rank].T, np.float32)
    return {layer: bases[layer] for layer in layers}


def _smallest_rank(values: np.ndarray, rank_error: float | None) -> int:
    assert rank_error is not None, "neither ranks nor rank_error"
    values = np.maximum(values, 0)
    tail = np.append(np.cumsum(values[::-1])[::-1], 0.0)  # tail[r]: what rank r leaves out
    return max(1, int(np.argmax(tail <= rank_error**2 * tail[0])))


def grams(
    params: dict, cfg: ModelConfig, groups: tuple[Group, ...], fold_rows: int, progress: bool
) -> dict[int, np.ndarray]:
    """{model layer: X^T X float64 [W, W]} of all V rows; CALLS calls are summed in float32."""
    shapes = {group.name: (len(group.layers), group.width, group.width) for group in groups}
    total = {name: np.zeros(shape) for name, shape in shapes.items()}
    v, step = cfg.vocab_size, fold_rows * CALLS
    with ProgressLine("export: bases", v, "rows", enabled=progress) as line:
        for start in range(0, v, step):
            sums = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
            for at in range(start, min(start + step, v), fold_rows):
                ids_R = np.arange(at, at + fold_rows, dtype=np.int32)
                near_R = np.minimum(ids_R, v - 1)
                sums = _add_gram(sums, with_rows_of(params, near_R, cfg, shapes), ids_R, cfg=cfg)
            for name, gram_LWW in sums.items():
                total[name] += np.asarray(gram_LWW)
            line.update(min(start + step, v))
    return {layer: gram for g in groups for layer, gram in zip(g.layers, total[g.name])}


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="sums")
def _add_gram(sums: dict, params: dict, ids_R: jax.Array, *, cfg: ModelConfig) -> dict:
    rows = live_rows(cfg, params, jnp.minimum(ids_R, cfg.vocab_size - 1))
    real_R1 = (ids_R < cfg.vocab_size)[:, None]  # the last call is padded
    grams = {}
    for name, gram_LWW in sums.items():
        x_LRW = jnp.where(real_R1, rows[name].astype(jnp.float32), 0)
        grams[name] = gram_LWW + jnp.einsum("LRW,LRX->LWX", x_LRW, x_LRW, precision="highest")
    return grams
