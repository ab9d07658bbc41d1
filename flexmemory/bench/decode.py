"""Decoding with rows on disk against rows on the device, and against a dense model; memory; time to
the first token.

Weights are random: speed does not depend on them. Tokens are dealt from a Zipf law (s = 1 over a
random order of ids), whatever the model prefers.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.bench.machine import cached_pages, drop_cache, facts, zipf
from flexmemory.config import Config
from flexmemory.data import tokenizer as tokenizers
from flexmemory.models.accounting import account
from flexmemory.models.config import ModelConfig
from flexmemory.models.transformer import init_params
from flexmemory.runtime.engine import Engine
from flexmemory.runtime.rows import Budgets
from flexmemory.tkv.export import export_params
from flexmemory.tkv.format import shard_file
from flexmemory.tkv.store import Store, open_store


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, tokens of one round, rounds. kinds_vocab: of the models of equal total parameters,
    whose FFNs have 8/3 D. start: (layers, D, V) of the store whose first token is timed: 4 GiB of
    rows beside a tenth of that in other weights, as a 1B model has.
    """

    d_model: int
    n_heads: int
    layers: int
    vocab: int
    kinds_vocab: int
    tokens: int
    rounds: int
    dtype: str
    start: tuple[int, int, int]

    def model(self, pattern: str, **changes: Any) -> ModelConfig:
        sizes = dict(d_model=self.d_model, n_heads=self.n_heads, vocab_size=self.vocab)
        options: dict[str, Any] = sizes | dict(d_ff=NARROW_FF, compute_dtype=self.dtype)
        return ModelConfig(pattern=pattern, **options | changes)


SHAPES = {
    "smoke": Shape(64, 4, 4, 512, 384, 8, 2, "float32", (4, 64, 512)),
    "cpu": Shape(1024, 16, 16, 65536, 8192, 64, 3, "float32", (32, 512, 65536)),
    "gpu": Shape(2048, 32, 24, 128256, 128256, 512, 7, "bfloat16", (24, 1024, 65536)),
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

    def _draw(self, logits_BV: jax.Array, runs: list) -> np.ndarray:
        own = super()._draw(logits_BV, runs)
        ids = self._forced[self._at : self._at + len(own)]
        self._at += len(own)
        return ids.astype(np.int32)

    def decode(self, ids_N: np.ndarray) -> dict:
        """Stats of a round that takes these ids."""
        self.force(ids_N)
        self.reset_stats()
        self.generate([[int(ids_N[0])]], len(ids_N) - 1, stop_at_eos=False)
        return self.stats


def measure(scratch: Path, scale: str) -> dict:
    """The figures as a JSON-able dict. Writes the stores of ``scale`` (one of SHAPES) under
    ``scratch``.
    """
    shape = SHAPES[scale]
    layers, d_model, vocab = shape.start
    start = dict(d_model=d_model, n_heads=d_model // 64, vocab_size=vocab)
    tiny = dict(d_model=64, n_heads=1, vocab_size=shape.kinds_vocab)
    measured = {}
    for name, pattern in placements(shape.layers).items():
        seconds = make_store(scratch / name, shape.model(pattern))["seconds"]
        figures = offloaded_against_resident(scratch / name, shape)
        measured[name] = {"pattern": pattern, "export_seconds": seconds} | figures
    of_kinds = kinds(scratch, shape)
    make_store(scratch / "start", shape.model(f"memoryllm*{layers}", **start))
    make_store(scratch / "tiny", shape.model("memoryllm", **tiny))
    floor = child(scratch / "tiny", 0)["peak_rss_bytes"]
    stores = ("memory", "kind memoryllm", "start")
    return {
        "bench": "decode",
        "scale": scale,
        "machine": facts(scratch),
        "weights": "random",
        "shape": dataclasses.asdict(shape),
        "placements": measured,
        "kinds": of_kinds,
        "processes": {"floor_peak_rss": floor}
        | {name: process(scratch / name, floor, shape) for name in stores},
    }


def placements(layers: int) -> dict[str, str]:
    """All layers with rows, and the first quarter without: there the read has compute to hide
    behind.
    """
    compute = layers // 4
    return {
        "memory": f"memoryllm*{layers}",
        "compute_first": f"dense*{compute} memoryllm*{layers - compute}",
    }


def make_store(path: Path, cfg: ModelConfig) -> dict:
    params = jax.tree.map(np.asarray, init_params(cfg, 0))
    tokenizer = tokenizers.build("byte", lambda: iter(()))
    options: dict[str, Any] = dict(dtype=cfg.compute_dtype, progress=False)
    return export_params(Config(model=cfg), params, tokenizer, path, run="bench", step=0, **options)


def ram_budget(store: Store) -> int:
    return max(int(store.manifest.table_bytes * RAM_SHARE), store.manifest.bundle_bytes)


def offloaded_against_resident(path: Path, shape: Shape) -> dict:
    """Rounds of both engines in turn over the same tokens; before each offloaded round the store
    leaves the page cache.
    """
    store = open_store(path)
    budget = ram_budget(store)
    engines = {"resident": Forced(path, Budgets(ram=None), max_batch=1)}
    for policy in ("lru", "lfu"):
        budgets = Budgets(ram=budget, ram_policy=policy)
        engines[f"offloaded_{policy}"] = Forced(path, budgets, max_batch=1)
    files = [path / shard_file(group, k) for group in store.groups for k in range(group.shards)]
    rng = np.random.default_rng(0)
    order = rng.permutation(shape.vocab)
    rates: dict[str, list] = {name: [] for name in engines}
    waits: dict[str, list] = {name: [] for name in engines}
    pages = []
    for name, engine in engines.items():  # the tiers as they are after some reading
        for _ in range(WARM_STEPS if name != "resident" else 0):
            ticket = engine.source.request(np.unique(order[zipf(rng, shape.vocab, 64)]), 64)
            ticket.collect()
            ticket.release()
    for k in range(shape.rounds + 1):  # the first one compiles
        ids_N = order[zipf(rng, shape.vocab, shape.tokens + 1)]
        for name, engine in engines.items():
            drop_cache(files)
            pages.append(cached_pages(files))
            stats = engine.decode(ids_N)
            if k:
                rates[name].append(stats["decode_tokens_per_s"])
                waits[name].append(stats["decode_wait_seconds"] / stats["decode_seconds"])
    resident = statistics.median(rates["resident"])
    figures: dict[str, dict] = {}
    for name, engine in engines.items():
        rate = statistics.median(rates[name])
        figures[name] = {"tokens_per_s": rate, "wait_share": statistics.median(waits[name])}
        if name != "resident":
            rows = engine.source.stats()
            figures[name] |= {"over_resident": rate / resident, "rows": rows}
    return {
        "table_bytes": store.manifest.table_bytes,
        "bundle_bytes": store.manifest.bundle_bytes,
        "ram_budget": budget,
        "step_ms": 1e3 / resident,
        "cold": {
            "how": "posix_fadvise(DONTNEED) on every shard before each round, then counted",
            "most_cached_pages_found": max(pages, key=lambda n: -1 if n is None else n),
        },
        **figures,
    }


def kinds(scratch: Path, shape: Shape) -> dict:
    """Models of equal total parameters with rows on the device, one sequence, rounds in turn."""
    d_ff, vocab = shape.d_model * 8 // 3 // 16 * 16, shape.kinds_vocab
    cfgs, engines = {}, {}
    for name, (kind, beta) in KINDS.items():
        pattern, path = f"{kind}*{shape.layers}", scratch / f"kind {name}"
        cfgs[name] = shape.model(pattern, d_ff=d_ff, beta=beta, vocab_size=vocab)
        make_store(path, cfgs[name])
        engines[name] = Forced(path, Budgets(ram=None), max_batch=1)
    ids_N = np.random.default_rng(1).integers(0, vocab, shape.tokens + 1)
    rates: dict[str, list] = {name: [] for name in engines}
    for _ in range(shape.rounds + 1):
        for name, engine in engines.items():
            rates[name].append(engine.decode(ids_N)["decode_tokens_per_s"])
    figures = {}
    for name, engine in engines.items():
        rate = statistics.median(rates[name][1:])
        weights = sum(array.nbytes for array in jax.tree.leaves(engine.params))
        figures[name] = {
            "total_parameters": account(cfgs[name])["total"],
            "tokens_per_s": rate,
            "weight_bytes_without_rows": weights,
            "weights_gb_per_s": weights * rate / 1e9,
        }
    for over, what in (
        ("tokens_per_s_over_dense", "tokens_per_s"),
        ("memory_over_dense", "weight_bytes_without_rows"),
    ):
        for figure in figures.values():
            figure[over] = figure[what] / figures["dense"][what]
    return {"d_ff": d_ff, "vocab": vocab, **figures}


def process(path: Path, floor: int, shape: Shape) -> dict:
    """Peak memory and times of a `flexmemory generate` process; ``floor``: peak memory of one with
    a tiny model.
    """
    manifest, budget = (store := open_store(path)).manifest, ram_budget(store)
    float32 = sum(file.bytes for file in manifest.backbone)
    backbone = float32 * jnp.dtype(shape.dtype).itemsize // 4  # as it is served
    child(path, budget)  # compiles; compiled programs are kept
    stats = child(path, budget)
    peak, first, compiling = (
        stats[name] for name in ("peak_rss_bytes", "first_token_seconds", "prefill_compile_seconds")
    )
    return {
        "table_bytes": manifest.table_bytes,
        "peak_rss": peak,
        "backbone_bytes": backbone,
        "ram_budget": budget,
        "peak_over_floor_backbone_budget": peak / (floor + backbone + budget),
        "open_seconds": stats["open_seconds"],
        "first_token_seconds": first,
        "prefill_compile_seconds": compiling,
        "first_token_without_compile_seconds": first - compiling,
    }


def child(path: Path, budget: int) -> dict:
    """What ``flexmemory generate --stats`` prints, in a process of its own."""
    words = ["--prompt=the first words", "--max_tokens=32", f"--ram_budget={budget}", "--stats"]
    command = [sys.executable, "-m", "flexmemory.cli.main", "generate", f"--tkv={path}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stderr.strip().splitlines()[-1])
