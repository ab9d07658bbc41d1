"""Proof that a store is its run: the rows are those that the weights fold to, and the model that
reads them gives the logits and the greedy tokens of the live weights."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexmemory.errors import UserError
from flexmemory.models.config import ModelConfig
from flexmemory.progress import ProgressLine
from flexmemory.run_folder import load_params
from flexmemory.runtime.engine import Engine
from flexmemory.runtime.rows import Budgets, LiveRows, new_bundles
from flexmemory.tkv.fold import fold_table, layouts_of
from flexmemory.tkv.format import Group, model_groups
from flexmemory.tkv.store import Store, decoded, open_store

TOLERANCE = 1e-5  # of the largest value; 0 is expected on the backend that exported


def verify(
    store_path: str | Path, workdir: str | Path, *, progress: bool = True, **options: Any
) -> dict:
    """:func:`verify_params` of the store and the run folder's checkpoint of the step that it was
    exported from, with the same options. Raises UserError where either cannot be opened."""
    store = open_store(store_path)
    config, params, _ = load_params(Path(workdir), store.manifest.source.step)
    return verify_params(store, config.model, params, progress=progress, **options)


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
    """Figures of the store against live parameters, both run by the same engine.

    tokens: length of each of ``prompts`` random prompts, and of the greedy text after it.
    tolerance: of differences relative to the largest value. ram_budget: bytes of row cache of the
    offloaded side; by default a quarter of the tokens of one prompt, so that rows are evicted and
    read again.

    Returned: rows_max_abs_diff, rows_max_rel_diff (over the largest row value),
    logits_max_abs_diff, logits_max_rel_diff (over the largest logit), greedy_equal: against live
    rows rounded to the store's dtype, so exactly 0 and True on the backend that exported.
    rounding_rows_max_abs_diff, rounding_logits_max_rel_diff: what that rounding itself costs, 0 for
    a float32 store. ok: all relative differences within ``tolerance`` and the greedy tokens equal.
    Also tokens, prompts, tolerance, dtype, and what the row cache saw. Raises UserError where the
    store is of another model."""
    m, tokenizer = store.manifest, store.tokenizer()
    if cfg != store.model:
        raise UserError(
            f"{store.location.url}: its model is not the run's; give the run"
            f" {m.source.run!r} that it was exported from"
        )
    if tokens < 1 or prompts < 1:
        raise UserError(f"tokens, prompts: {tokens}, {prompts} must be above 0")
    result = compare_rows(store, cfg, params, progress)

    if ram_budget is None:
        ram_budget = max(1, tokens // 4) * m.bundle_bytes
    rows = LiveRows(cfg, params, store.groups, store.bases(), m.fold_rows)
    live = Engine.of(cfg, params, rows, tokenizer, max_batch=prompts)
    offloaded = Engine(store, Budgets(ram=ram_budget), max_batch=prompts)
    ids_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (prompts, tokens))
    live_BTV = live.logits(ids_BT)
    largest = float(np.abs(live_BTV).max())
    result["logits_max_abs_diff"] = max_difference(offloaded.logits(ids_BT), live_BTV)
    result["logits_max_rel_diff"] = relative(result["logits_max_abs_diff"], largest)
    rounding = 0.0
    exact_groups = exact_form(store)
    if exact_groups != store.groups:
        rows = LiveRows(cfg, params, exact_groups, no_bases(exact_groups), m.fold_rows)
        exact_BTV = Engine.of(cfg, params, rows, tokenizer).logits(ids_BT)
        rounding = relative(max_difference(exact_BTV, live_BTV), largest)
    result["rounding_logits_max_rel_diff"] = rounding
    # ragged on purpose, and past the end of documents, so that all tokens are compared
    ragged = [ids[: max(1, tokens - b)] for b, ids in enumerate(ids_BT.tolist())]
    greedy = [engine.generate(ragged, tokens, stop_at_eos=False) for engine in (live, offloaded)]
    live_ids, offloaded_ids = ([generation.ids for generation in each] for each in greedy)
    result["greedy_equal"] = live_ids == offloaded_ids
    relatives = result["rows_max_rel_diff"], result["logits_max_rel_diff"]
    within = all(difference <= tolerance for difference in relatives)  # False for NaN
    result["ok"] = bool(within and result["greedy_equal"])
    settings = dict(dtype=m.dtype, tokens=tokens, prompts=prompts, tolerance=tolerance)
    return result | settings | {"rows": offloaded.source.stats()}


def compare_rows(store: Store, cfg: ModelConfig, params: dict, progress: bool = False) -> dict:
    """Every row of the store against the live fold, a shard at a time.

    rows_max_abs_diff, rows_max_rel_diff: against the fold encoded as the store is (with the store's
    bases), 0 on the backend that exported. rounding_rows_max_abs_diff: of that encoding against
    float32 rows."""
    m, v, bases, groups = store.manifest, cfg.vocab_size, store.bases(), store.groups
    exact_groups, params = exact_form(store), jax.device_put(params)
    call: dict = dict(cfg=cfg, fold_rows=m.fold_rows, shard_rows=m.shard_rows)
    shards = fold_table(params, bases, groups=groups, **call) if groups else ()
    exact_shards: Iterator = itertools.repeat(None)
    if exact_groups != groups:
        exact_shards = fold_table(params, no_bases(groups), groups=exact_groups, **call)
    stored_diff = rounding_diff = largest = 0.0
    with ProgressLine("verify", v, "rows", enabled=progress) as line:
        for (start, live), exact in zip(shards, exact_shards, strict=False):
            stop = min(start + m.shard_rows, v)
            stored = new_bundles(layouts_of(groups), stop - start)
            store.read_bundles(np.arange(start, stop), stored)
            for group, exact_group in zip(groups, exact_groups, strict=True):
                name, basis = group.name, bases[group.name]
                stored_RLW = decoded(group, stored[name], basis)
                live_RLW = decoded(group, live[name], basis)
                exact_RLW = decoded(exact_group, exact[1][name], ()) if exact else live_RLW
                stored_diff = larger(stored_diff, max_difference(stored_RLW, live_RLW))
                rounding_diff = larger(rounding_diff, max_difference(live_RLW, exact_RLW))
                largest = larger(largest, float(np.abs(exact_RLW).max()))
            line.update(stop)
    return {
        "rows_max_abs_diff": stored_diff,
        "rows_max_rel_diff": relative(stored_diff, largest),
        "rounding_rows_max_abs_diff": rounding_diff,
    }


def exact_form(store: Store) -> tuple[Group, ...]:
    """The store's groups as they are in float32; its own where they are."""
    groups = model_groups(store.model, "float32", store.manifest.shard_rows)
    same = layouts_of(groups) == layouts_of(store.groups)
    return store.groups if same else groups


def no_bases(groups: tuple[Group, ...]) -> dict:
    return {group.name: () for group in groups}


def max_difference(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b| in float32; NaN where either has one."""
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max(initial=0.0))


def relative(difference: float, scale: float) -> float:
    return difference / scale if scale else difference


def larger(a: float, b: float) -> float:
    return float(np.maximum(a, b))  # unlike max, keeps a NaN
