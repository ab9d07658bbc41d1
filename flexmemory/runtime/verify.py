"""Verify: does a store hold what the run's weights fold to, and does the model run from disk as it
does from the weights?
"""

import itertools
from pathlib import Path

import jax
import numpy as np

from flexmemory.errors import UserError
from flexmemory.files import allocate
from flexmemory.models.config import ModelConfig
from flexmemory.progress import ProgressLine
from flexmemory.run_folder import load_params
from flexmemory.runtime.engine import Engine
from flexmemory.runtime.rows import Budgets, LiveRows
from flexmemory.tkv import format
from flexmemory.tkv.fold import fold_table
from flexmemory.tkv.store import Store, decoded, open_store

TOLERANCE = 1e-5  # of the largest value; 0 is expected on the backend that exported


def verify(
    store_path: str | Path,
    workdir: str | Path,
    *,
    tokens: int = 32,
    prompts: int = 4,
    tolerance: float = TOLERANCE,
    ram_budget: int | None = None,
    progress: bool = True,
) -> dict:
    """Compares the store with the run folder's checkpoint of the step that it was exported from.

    tokens: length of each of ``prompts`` random prompts, and greedy tokens decoded after it.
    tolerance: of differences relative to the largest value. ram_budget: bytes of row cache of the
    offloaded side; by default a quarter of the tokens of one prompt, so that rows are evicted and
    read again. Returns the dict of :func:`verify_params`. Raises UserError where either side cannot
    be opened or they are different models.
    """

    store = open_store(store_path)
    config, params, _ = load_params(Path(workdir), store.manifest.source.step)
    return verify_params(
        store,
        config.model,
        params,
        tokens=tokens,
        prompts=prompts,
        tolerance=tolerance,
        ram_budget=ram_budget,
        progress=progress,
    )


def verify_params(
    store: Store,
    cfg: ModelConfig,
    params: dict,
    *,
    tokens: int = 32,
    prompts: int = 4,
    tolerance: float = TOLERANCE,
    ram_budget: int | None = None,
    progress: bool = False,
) -> dict:
    """Figures of the store against live parameters. Both sides run the same engine.

    Returned: rows_max_abs_diff, rows_max_rel_diff (over the largest row value),
    logits_max_abs_diff, logits_max_rel_diff (over the largest logit), greedy_equal: against live
    rows rounded to the store's dtype, so exactly 0 and True on the backend that exported.
    rounding_rows_max_abs_diff, rounding_logits_max_rel_diff: what that rounding itself costs, 0 for
    a float32 store. ok: all relative differences within ``tolerance`` and the greedy tokens equal.
    Also tokens, prompts, tolerance, dtype, and what the row cache saw.
    """

    if cfg != store.model:
        raise UserError(
            f"{store.location.url}: its model is not the run's; give the run"
            f" {store.manifest.source.run!r} that it was exported from"
        )
    if tokens < 1 or prompts < 1:
        raise UserError(f"--tokens, --prompts: {tokens}, {prompts} must be above 0")
    result = compare_rows(store, cfg, params, progress)

    dtype, m = store.manifest.dtype, store.manifest
    tokenizer = store.tokenizer()
    if ram_budget is None:
        ram_budget = max(1, tokens // 4) * m.bundle_bytes
    live = Engine.of(
        cfg,
        params,
        LiveRows(cfg, params, store.groups, store.bases(), m.fold_rows),
        tokenizer,
        max_batch=prompts,
    )
    offloaded = Engine(store, Budgets(ram=ram_budget), max_batch=prompts)
    ids_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (prompts, tokens))
    live_logits_BTV = live.logits(ids_BT)
    scale = float(np.abs(live_logits_BTV).max())
    result["logits_max_abs_diff"] = max_abs(offloaded.logits(ids_BT), live_logits_BTV)
    result["logits_max_rel_diff"] = relative(result["logits_max_abs_diff"], scale)
    exact_groups = format.model_groups(cfg, "float32", m.shard_rows)
    if [group.layout for group in exact_groups] == [group.layout for group in store.groups]:
        result["rounding_logits_max_rel_diff"] = 0.0
    else:
        exact = Engine.of(
            cfg,
            params,
            LiveRows(
                cfg, params, exact_groups, {group.name: () for group in exact_groups}, m.fold_rows
            ),
            tokenizer,
        )
        result["rounding_logits_max_rel_diff"] = relative(
            max_abs(exact.logits(ids_BT), live_logits_BTV), scale
        )
    # ragged on purpose, and past the end of documents, so that all tokens are compared
    ragged = [ids[: max(1, tokens - b)] for b, ids in enumerate(ids_BT.tolist())]
    sides = [
        [g.ids for g in engine.generate(ragged, tokens, stop_at_eos=False)]
        for engine in (live, offloaded)
    ]
    result["greedy_equal"] = sides[0] == sides[1]
    within = all(
        result[name] <= tolerance for name in ("rows_max_rel_diff", "logits_max_rel_diff")
    )  # False for NaN
    return {
        **result,
        "ok": bool(within and result["greedy_equal"]),
        "dtype": dtype,
        "tokens": tokens,
        "prompts": prompts,
        "tolerance": tolerance,
        "rows": offloaded.source.stats(),
    }


def compare_rows(store: Store, cfg: ModelConfig, params: dict, progress: bool = False) -> dict:
    """Every row of the store against the live fold, a block at a time.

    rows_max_abs_diff, rows_max_rel_diff: against the fold encoded as the store is (with the store's
    bases), 0 on the backend that exported. rounding_rows_max_abs_diff: of that encoding against
    float32 rows.
    """
    m, v, bases = store.manifest, cfg.vocab_size, store.bases()
    exact_groups, none = (
        format.model_groups(cfg, "float32", m.shard_rows),
        {group.name: () for group in store.groups},
    )
    same = tuple(group.layout for group in exact_groups) == tuple(
        group.layout for group in store.groups
    )
    params, call = (
        jax.device_put(params),
        dict(cfg=cfg, fold_rows=m.fold_rows, shard_rows=m.shard_rows),
    )
    live_blocks = fold_table(params, bases, groups=store.groups, **call) if store.groups else ()
    exact_blocks = (
        itertools.repeat(None) if same else fold_table(params, none, groups=exact_groups, **call)
    )
    stored_diff = rounding_diff = largest = 0.0
    with ProgressLine("verify", v, "rows", enabled=progress) as line:
        for (start, live), exact_block in zip(live_blocks, exact_blocks, strict=False):
            stop, exact = min(start + m.shard_rows, v), live if same else exact_block[1]
            found = {
                group.name: allocate(stop - start, group.bundle_bytes) for group in store.groups
            }
            store.read_bundles(np.arange(start, stop), found)
            for group, exact_group in zip(store.groups, exact_groups, strict=True):
                name, basis = group.name, bases[group.name]
                live_RLW, exact_RLW = (
                    decoded(group, live[name], basis),
                    decoded(exact_group, exact[name], ()),
                )
                stored_diff = _worst(
                    stored_diff, max_abs(decoded(group, found[name], basis), live_RLW)
                )
                rounding_diff = _worst(rounding_diff, max_abs(live_RLW, exact_RLW))
                largest = _worst(largest, float(np.abs(exact_RLW).max()))
            line.update(stop)
    return {
        "rows_max_abs_diff": stored_diff,
        "rows_max_rel_diff": relative(stored_diff, largest),
        "rounding_rows_max_abs_diff": rounding_diff,
    }


def max_abs(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b| in float32; NaN where either has one."""
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max(initial=0.0))


def relative(difference: float, scale: float) -> float:
    return difference / scale if scale else difference


def _worst(a: float, b: float) -> float:
    return float(np.maximum(a, b))  # unlike max, keeps a NaN
