"""What smaller tables cost, MemoryLLM appendix D: the numbers that an export with these options
would store, without writing a store.

The encoded table is in host memory whole. Bytes are those of a store: rows with their scales, and
the float32 basis of low-rank rows.
"""

import numpy as np

from flexmemory.analysis.trained import Trained, not_applicable, scores
from flexmemory.evals.rows import RowsOf
from flexmemory.models.memory import Rows
from flexmemory.tkv import encoding, fold, lowrank
from flexmemory.tkv.export import RowFormat, draft, sizes
from flexmemory.tkv.format import Manifest, TokenizerInfo

# dtype, numbers that share a scale; 0: a whole row
ENCODINGS = (("float32", 0), ("bfloat16", 0), ("int8", 0), ("int8", 32), ("int4", 0), ("int4", 32))
CUTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
NOTHING = "no memory layer, so no table"


def quantised(trained: Trained) -> dict:
    """The table in 32, 16, 8 and 4 bits a number, MemoryLLM Table 7. The paper gives neither method
    nor granularity: here round-to-nearest, symmetric, with one scale a row or one for each 32
    numbers.

    {"points": [{"dtype", "scale_group", "table_bytes", "saved": share of the float32 table,
    "relative_error": |stored - exact| / |exact| in the Frobenius norm over all layers, scores}]}.
    """
    if not trained.memory_layers:
        return not_applicable(NOTHING)
    points = []
    for dtype, scale_group in ENCODINGS:
        rows_of, facts = stored(trained, RowFormat(dtype=dtype, scale_group=scale_group), {})
        del facts["ranks"]
        points.append(
            {
                "dtype": dtype,
                "scale_group": scale_group,
                **facts,
                **scores(trained, rows_of=rows_of),
            }
        )
    return {"applies": True, "points": points}


def svd(trained: Trained) -> dict:
    """Every layer's table cut to the same share of its rank, MemoryLLM Table 8: rows float32 [V, r]
    and basis [r, W] with r = W (1 - cut).

    The basis is the best for all tokens alike, as in the paper. {"points": [{"cut", "ranks" by
    memory layer, "table_bytes" with the basis, "saved": share of the uncut table, below 0 where the
    basis is larger than what it saves, "relative_error", scores}]}. The first point is not
    factorised.
    """
    if not trained.memory_layers:
        return not_applicable(NOTHING)
    whole = _manifest(trained, RowFormat())
    widths = tuple(trained.specs[layer].row_width for layer in trained.memory_layers)
    bases = lowrank.find_bases(
        trained.params,
        cfg=whole.model,
        groups=whole.groups,
        fold_rows=whole.fold_rows,
        ranks=widths,
        progress=False,
    )
    points = []
    for cut in CUTS:
        rows_of, facts = stored(trained, RowFormat(rank=1 - cut) if cut else RowFormat(), bases)
        points.append(
            {
                "cut": cut,
                "ranks": facts.pop("ranks") or list(widths),
                **facts,
                **scores(trained, rows_of=rows_of),
            }
        )
    return {"applies": True, "points": points}


def stored(trained: Trained, rows: RowFormat, bases: dict[int, np.ndarray]) -> tuple[RowsOf, dict]:
    """(rows as a store made with these options gives them, {"table_bytes", "saved",
    "relative_error", "ranks"}). bases: of all layers, float32 [W, W], best direction first; only
    low ranks need them.
    """
    manifest = _manifest(trained, rows)
    used: dict[str, tuple] = {
        group.name: (
            tuple(
                bases[layer][:rank]
                for layer, rank in zip(group.layers, group.layout.ranks or (), strict=True)
            )
            if manifest.ranks
            else ()
        )
        for group in manifest.groups
    }
    parts: dict[str, list[np.ndarray]] = {group.name: [] for group in manifest.groups}
    error = squares = 0.0
    for start in range(0, manifest.vocab_size, manifest.shard_rows):
        block = fold.start_shard(
            trained.params,
            used,
            start,
            min(start + manifest.shard_rows, manifest.vocab_size),
            cfg=manifest.model,
            layouts=fold.layouts_of(manifest.groups),
            fold_rows=manifest.fold_rows,
        )
        bundles, sums = fold.fetch_shard(block, manifest.groups)
        for name, shard in bundles.items():
            parts[name] += shard
        error, squares = (
            error + sum(layer[0] for layer in sums.values()),
            squares + sum(layer[1] for layer in sums.values()),
        )
    stored = {name: np.concatenate(shards) for name, shards in parts.items()}
    size, dtype = sizes(manifest), manifest.model.compute_dtype

    def rows_of(ids_R: np.ndarray) -> Rows:
        return {
            group.name: encoding.jitted_decode(
                group.layout,
                encoding.host_view(group.layout, stored[group.name][np.asarray(ids_R)]),
                used[group.name],
                dtype,
            )
            for group in manifest.groups
        }

    table_bytes = size["table_bytes"] + size["basis_bytes"]
    return rows_of, {
        "table_bytes": table_bytes,
        "saved": 1 - table_bytes / size["float32_bytes"],
        "relative_error": (error / squares) ** 0.5 if squares else 0.0,
        "ranks": manifest.ranks and list(manifest.ranks),
    }


def _manifest(trained: Trained, rows: RowFormat) -> Manifest:
    """What an export would do; where it comes from makes no difference to the rows."""
    tokenizer = trained.tokenizer
    return draft(
        trained.cfg,
        rows,
        TokenizerInfo(tokenizer.fingerprint, tokenizer.eos_id, tokenizer.vocab_size),
        run="",
        step=0,
        crc32=0,
    )
