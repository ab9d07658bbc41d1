"""Decoding with rows on disk against rows on the device, and against a dense model; memory; time to
the first token.

Weights are random: speed does not depend on them. Tokens are dealt from a Zipf law (s = 1 over a
random order of ids), whatever the model prefers.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.bench.machine import cached_pages, drop_cache, facts
from flexmemory.config import Config
from flexmemory.data import tokenizer as tokenizers
from flexmemory.models.accounting import account
from flexmemory.models.config import ModelConfig
from flexmemory.models.transformer import init_params
from flexmemory.runtime.engine import Engine
from flexmemory.runtime.rows import Budgets
from flexmemory.tkv import format
from flexmemory.tkv.export import export_params
from flexmemory.tkv.store import open_store

# model, tokens of one round, rounds. kinds_vocab: of the models of equal total parameters, whose
# FFNs have 8/3 D. start: of the store whose first token is timed, (layers, D, V): 4 GiB of rows
# beside a tenth of that in other weights, as a 1B model has
SHAPES = {
    "smoke": dict(
        d_model=64,
        n_heads=4,
        layers=4,
        vocab=512,
        kinds_vocab=384,
        tokens=8,
        rounds=2,
        dtype="float32",
        start=(4, 64, 512),
    ),
    "cpu": dict(
        d_model=1024,
        n_heads=16,
        layers=16,
        vocab=65536,
        kinds_vocab=8192,
        tokens=64,
        rounds=3,
        dtype="float32",
        start=(32, 512, 65536),
    ),
    "gpu": dict(
        d_model=2048,
        n_heads=32,
        layers=24,
        vocab=128256,
        kinds_vocab=128256,
        tokens=512,
        rounds=7,
        dtype="bfloat16",
        start=(24, 1024, 65536),
    ),
}
KINDS = {
    "dense": ("dense", "0"),
    "flex beta=3": ("flex", "3"),
    "flex beta=2": ("flex", "2"),
    "flex beta=1": ("flex", "1"),
    "memoryllm": ("memoryllm", "0"),
}
# inner width of the folded FFNs of the large stores, to export them quickly: they are not there
# when serving
NARROW_FF = 16
RAM_SHARE = 0.05
WARM_STEPS = 128  # of 64 tokens that pass through the tiers before anything is timed


class Forced(Engine):
    """An engine that takes given tokens instead of its own, and waits for its own all the same."""

    def force(self, ids_N: np.ndarray) -> None:
        self._forced, self._at = ids_N, 0
        self.tokenizer = None  # the ids need not be its own

    def _draw(self, logits_BV, runs):
        own = super()._draw(logits_BV, runs)
        ids = self._forced[self._at : self._at + len(own)]
        self._at += len(own)
        return ids.astype(np.int32)


def measure(scratch: Path, scale: str) -> dict:
    """The figures as a JSON-able dict. Writes the stores of ``scale`` (one of SHAPES) under
    ``scratch``.
    """
    shape = SHAPES[scale]
    result = {
        "bench": "decode",
        "scale": scale,
        "machine": facts(scratch),
        "weights": "random",
        "shape": shape,
        "placements": {},
    }
    for name, pattern in placements(shape["layers"]).items():
        path = scratch / name
        made = make_store(path, model(shape, pattern))
        result["placements"][name] = {
            "pattern": pattern,
            "export_seconds": made["seconds"],
            **offloaded_against_resident(path, shape),
        }
    result["kinds"] = kinds(scratch, shape)
    layers, d_model, vocab = shape["start"]
    make_store(
        scratch / "start",
        dataclasses.replace(
            model(shape, f"memoryllm*{layers}"),
            d_model=d_model,
            n_heads=d_model // 64,
            vocab_size=vocab,
        ),
    )
    make_store(
        scratch / "tiny",
        dataclasses.replace(
            model(shape, "memoryllm"), d_model=64, n_heads=1, vocab_size=shape["kinds_vocab"]
        ),
    )
    floor = child(scratch / "tiny", 0)["peak_rss_bytes"]
    names = ("memory", "kind memoryllm", "start")
    result["processes"] = {
        "floor_peak_rss": floor,
        **{name: process(scratch / name, floor, shape) for name in names},
    }
    return result


def placements(layers: int) -> dict[str, str]:
    """All layers with rows, and the first quarter without: there the read has compute to hide
    behind.
    """
    return {
        "memory": f"memoryllm*{layers}",
        "compute_first": f"dense*{layers // 4} memoryllm*{layers - layers // 4}",
    }


def model(shape: dict, pattern: str) -> ModelConfig:
    return ModelConfig(
        pattern=pattern,
        vocab_size=shape["vocab"],
        d_model=shape["d_model"],
        n_heads=shape["n_heads"],
        d_ff=NARROW_FF,
        compute_dtype=shape["dtype"],
    )


def make_store(path: Path, cfg: ModelConfig) -> dict:
    params = jax.tree.map(np.asarray, init_params(cfg, 0))
    return export_params(
        Config(model=cfg),
        params,
        tokenizers.build("byte", lambda: iter(())),
        path,
        run="bench",
        step=0,
        dtype=cfg.compute_dtype,
        progress=False,
    )


def offloaded_against_resident(path: Path, shape: dict) -> dict:
    """Rounds of both engines in turn over the same tokens; before each offloaded round the store
    leaves the page cache.
    """
    store = open_store(path)
    budget = max(int(store.manifest.table_bytes * RAM_SHARE), store.manifest.bundle_bytes)
    engines = {"resident": Forced(path, Budgets(ram=None), max_batch=1)}
    for policy in ("lru", "lfu"):
        engines[f"offloaded_{policy}"] = Forced(
            path, Budgets(ram=budget, ram_policy=policy), max_batch=1
        )
    files = [
        path / format.shard_file(group, k) for group in store.groups for k in range(group.shards)
    ]
    rng = np.random.default_rng(0)
    order = rng.permutation(shape["vocab"])
    rates = {name: [] for name in engines}
    waits = {name: [] for name in engines}
    pages = []
    for name, engine in engines.items():  # the tiers as they are after some reading
        for _ in range(WARM_STEPS if name != "resident" else 0):
            ticket = engine.source.request(np.unique(order[zipf(rng, shape["vocab"], 64)]), 64)
            ticket.collect()
            ticket.release()
    for round_ in range(shape["rounds"] + 1):  # the first one compiles
        ids_N = order[zipf(rng, shape["vocab"], shape["tokens"] + 1)]
        for name, engine in engines.items():
            drop_cache(files)
            pages.append(cached_pages(files))
            engine.force(ids_N)
            engine.reset_stats()
            engine.generate([[int(ids_N[0])]], shape["tokens"], stop_at_eos=False)
            stats = engine.stats
            if round_:
                rates[name].append(stats["decode_tokens_per_s"])
                waits[name].append(stats["decode_wait_seconds"] / stats["decode_seconds"])
    figures = {}
    for name, engine in engines.items():
        figures[name] = {
            "tokens_per_s": statistics.median(rates[name]),
            "wait_share": statistics.median(waits[name]),
        }
        if name != "resident":
            figures[name] |= {
                "over_resident": (
                    figures[name]["tokens_per_s"] / figures["resident"]["tokens_per_s"]
                ),
                "rows": engine.source.stats(),
            }
    step_ms = 1e3 / figures["resident"]["tokens_per_s"]
    return {
        "table_bytes": store.manifest.table_bytes,
        "bundle_bytes": store.manifest.bundle_bytes,
        "ram_budget": budget,
        "step_ms": step_ms,
        "cold": {
            "how": "posix_fadvise(DONTNEED) on every shard before each round, then counted",
            "most_cached_pages_found": max(pages, key=lambda n: -1 if n is None else n),
        },
        **figures,
    }


def kinds(scratch: Path, shape: dict) -> dict:
    """Models of equal total parameters with rows on the device, one sequence, rounds in turn."""
    d_ff = shape["d_model"] * 8 // 3 // 16 * 16
    cfgs = {
        name: dataclasses.replace(
            model(shape, f"{kind}*{shape['layers']}"),
            d_ff=d_ff,
            beta=beta,
            vocab_size=shape["kinds_vocab"],
        )
        for name, (kind, beta) in KINDS.items()
    }
    engines = {}
    for name, cfg in cfgs.items():
        make_store(scratch / f"kind {name}", cfg)
        engines[name] = Forced(scratch / f"kind {name}", Budgets(ram=None), max_batch=1)
    ids_N = np.random.default_rng(1).integers(0, shape["kinds_vocab"], shape["tokens"] + 1)
    rates = {name: [] for name in engines}
    for round_ in range(shape["rounds"] + 1):
        for name, engine in engines.items():
            engine.force(ids_N)
            engine.reset_stats()
            engine.generate([[int(ids_N[0])]], shape["tokens"], stop_at_eos=False)
            if round_:
                rates[name].append(engine.stats["decode_tokens_per_s"])
    figures = {}
    for name, engine in engines.items():
        rate, weights = (
            statistics.median(rates[name]),
            sum(array.nbytes for array in jax.tree.leaves(engine.params)),
        )
        figures[name] = {
            "total_parameters": account(cfgs[name])["total"],
            "tokens_per_s": rate,
            "weight_bytes_without_rows": weights,
            "weights_gb_per_s": weights * rate / 1e9,
        }
    for figure in figures.values():
        figure["tokens_per_s_over_dense"] = (
            figure["tokens_per_s"] / figures["dense"]["tokens_per_s"]
        )
        figure["memory_over_dense"] = (
            figure["weight_bytes_without_rows"] / figures["dense"]["weight_bytes_without_rows"]
        )
    return {"d_ff": d_ff, "vocab": shape["kinds_vocab"], **figures}


def process(path: Path, floor: int, shape: dict) -> dict:
    """Peak memory and times of a `flexmemory generate` process; ``floor``: peak memory of one with
    a tiny model.
    """
    store = open_store(path)
    budget = max(int(store.manifest.table_bytes * RAM_SHARE), store.manifest.bundle_bytes)
    backbone = (
        sum(file.bytes for file in store.manifest.backbone)
        * np.dtype(jnp.dtype(shape["dtype"])).itemsize
        // 4
    )  # as it is served
    child(path, budget)  # compiles; compiled programs are kept
    found = child(path, budget)
    return {
        "table_bytes": store.manifest.table_bytes,
        "peak_rss": found["peak_rss_bytes"],
        "backbone_bytes": backbone,
        "ram_budget": budget,
        "peak_over_floor_backbone_budget": found["peak_rss_bytes"] / (floor + backbone + budget),
        "open_seconds": found["open_seconds"],
        "first_token_seconds": found["first_token_seconds"],
        "prefill_compile_seconds": found["prefill_compile_seconds"],
        "first_token_without_compile_seconds": (
            found["first_token_seconds"] - found["prefill_compile_seconds"]
        ),
    }


def child(path: Path, budget: int) -> dict:
    command = [
        sys.executable,
        "-m",
        "flexmemory.cli.main",
        "generate",
        f"--tkv={path}",
        "--prompt=the first words",
        "--max_tokens=32",
        f"--ram_budget={budget}",
        "--stats",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    return json.loads(done.stderr.strip().splitlines()[-1])


def zipf(rng: np.random.Generator, n: int, count: int) -> np.ndarray:
    """int64 [count] ranks 0..n-1 with probability proportional to 1 / (rank + 1)."""
    weight = 1 / np.arange(1, n + 1)
    return rng.choice(n, count, p=weight / weight.sum())
