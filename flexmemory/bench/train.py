"""Tokens/s of training steps of several kinds of model at equal total parameters, in rounds taken
in turn, and the ratios that matter.

A kind is a layer kind with options, ``KIND[:OPTION...]``: "naive" computes the rows of every token
instead of every unique id, a number is the beta of flex, and the name of a table optimiser trains
the tables with it. Weights are random and the same batch returns in every step: speed does not
depend on either.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from flexmemory.bench.machine import facts, median_seconds, timed, zipf
from flexmemory.config import CHOICES, Config, DataConfig, TrainConfig
from flexmemory.data.pipeline import Batch, make_batches
from flexmemory.errors import UserError, nearest
from flexmemory.machine import peak_device_bytes
from flexmemory.models.accounting import account, train_flops_per_token
from flexmemory.models.blocks import KINDS, check_model, layer_specs
from flexmemory.models.config import ModelConfig
from flexmemory.models.memory import gather_rows
from flexmemory.train.clock import peak_flops
from flexmemory.train.compiled import compile_step
from flexmemory.train.loop import resolve
from flexmemory.train.step import abstract_state, init_state, make_train_step


def shape(layers: int, vocab: int, d_model: int, heads: int, d_ff: int, **more: Any) -> ModelConfig:
    sizes = dict(vocab_size=vocab, d_model=d_model, n_heads=heads, d_ff=d_ff)
    return ModelConfig(pattern=f"dense*{layers}", **sizes | more)


CONFIGS = {  # by scale; of a config's pattern only the number of layers counts here
    "smoke": Config(shape(2, 256, 32, 4, 88), DataConfig(seq_len=32, batch_size=4)),
    "cpu": Config(shape(6, 16_384, 512, 8, 1368), DataConfig(seq_len=512, batch_size=8)),
    # MemoryLLM 1b; micro-batches of 4 sequences keep activations without remat beside four states
    # of 12 to 21 GB
    "gpu": Config(
        shape(24, 128_256, 2048, 32, 5464, compute_dtype="bfloat16"),
        DataConfig(seq_len=2048, batch_size=8),
        TrainConfig(accum_steps=2),
    ),
}
# steps: per round, before one wait for the device; square: side of the matrices of the roofline's
# matmul
ROUNDS = {
    "smoke": dict(rounds=2, steps=1, square=128),
    "cpu": dict(rounds=3, steps=1, square=2048),
    "gpu": dict(rounds=5, steps=4, square=8192),
}
MATMULS = 5  # of the roofline, in each round
DEFAULT_KINDS = "dense,memoryllm,memoryllm:naive,attn_only,flex:3"
GOALS = {  # tokens/s of one kind over another's: what is aimed at on two CPU cores and on one H200
    ("memoryllm", "dense"): {"cpu": 1.5, "gpu": 1.6},
    ("memoryllm", "attn_only"): {"cpu": 0.85, "gpu": 0.85},
    ("flex:3", "dense"): {"cpu": 1.15, "gpu": 1.25},
    ("memoryllm", "memoryllm:naive"): {"cpu": 1.35, "gpu": 1.55},
    ("stem", "dense"): {},
    ("stem:lazy_adam", "stem"): {},
    ("stem:rowwise_adagrad", "stem"): {},
}
DENSE_MFU_GOAL = {"gpu": 0.5}
DEPTHS, COMPILE_GOAL = (2, 24), 1.5
SHALLOW_AND_DEEP = Config(shape(2, 512, 64, 2, 176), DataConfig(seq_len=64, batch_size=2))


def measure(
    scratch: Path,
    scale: str,
    kinds: str = DEFAULT_KINDS,
    config: Config | None = None,
    data: str | None = None,
) -> dict:
    """The figures as a JSON-able dict; nothing is written under ``scratch``. Raises UserError
    before any work where the flags do not fit.
    """
    size, cfg = ROUNDS[scale], config or CONFIGS[scale]
    # the goals are of the scales' own shapes, on the device that they are named for
    own = cfg.model == CONFIGS[scale].model and scale == jax.default_backend()
    goals_of = scale if own else ""
    cfg, batch, ids = prepare(cfg, data)
    variants = {name: variant(name, cfg) for name in check_names(kinds)}
    with no_compilation_cache():
        rounds = Rounds(cfg, batch, variants, size["steps"], size["square"])
        for _ in range(size["rounds"]):
            rounds.round()
        compile_ = compile_times()
        with_seam = [n for n, v in variants.items() if not v.naive and layers_with_rows(v)]
        seams = {name: rounds.seam(name) for name in with_seam}
    figures = {name: rounds.figures(name) for name in variants}
    shown = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=""))
    return {
        "bench": "train",
        "scale": scale,
        "machine": facts(scratch),
        "weights": "random",
        "ids": ids,
        "config": dataclasses.asdict(shown),
        "tokens_per_step": batch["ids"].size,
        "rounds": size["rounds"],
        "steps_per_round": size["steps"],
        "matmul": {
            "side": size["square"],
            "dtype": cfg.model.compute_dtype,
            "flops_per_s": statistics.median(rounds.matmul),
        },
        "kinds": figures,
        "ratios": ratios(figures, goals_of),
        "dense_mfu": {
            "measured": figures.get("dense", {}).get("mfu"),
            "goal": DENSE_MFU_GOAL.get(goals_of),
        },
        "seam": seams,
        "compile": compile_,
        "device_peak_bytes_of_all_kinds": peak_device_bytes(),
    }


def prepare(cfg: Config, data: str | None) -> tuple[Config, Batch, str]:
    """(config with the vocabulary filled in, the batch that every step takes, where its ids come
    from).
    """
    if cfg.parallel.table_memory == "host":
        raise UserError(
            "config parallel.table_memory: host; these steps are measured with tables on the"
            " device, a run logs rows_wait_s of the others"
        )
    if data:
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=data))
    shards: Any
    if cfg.data.path:
        cfg, shards, _ = resolve(cfg)
        ids = f"dataset {shards.fingerprint}"
    elif not cfg.model.vocab_size:
        raise UserError(
            "config model.vocab_size: 0 takes the data's, and there is none; set it, or give data="
        )
    elif cfg.data.document_mask:
        raise UserError(
            "config data.document_mask: ids from a Zipf law have no documents; give data=, or leave"
            " it out"
        )
    else:
        shards, ids = Zipf(cfg.model.vocab_size), "Zipf law, s = 1 over a random order of ids"
    batches = make_batches(
        shards,
        seq_len=cfg.data.seq_len,
        batch_size=cfg.data.batch_size,
        seed=cfg.train.seed,
        accum=cfg.train.accum_steps,
        segments=cfg.data.document_mask,
    )
    return cfg, batches[0], ids


class Zipf:
    """As much of TokenShards as `make_batches` reads: every window is dealt from a Zipf law."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self._order_V = np.random.default_rng(0).permutation(vocab_size)

    def num_windows(self, seq_len: int) -> int:
        return 1 << 20

    def window(self, i: int, seq_len: int) -> np.ndarray:
        ranks = zipf(np.random.default_rng(i), self.vocab_size, seq_len + 1)
        return self._order_V[ranks].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Variant:
    config: Config
    naive: bool

    def batch(self, batch: Batch) -> Batch:
        """``batch``, or where naive the same with a row for every token: R = B T."""
        if not self.naive:
            return batch
        ids = batch["ids"]
        places = np.arange(ids.size, dtype=np.int32)
        return batch | {
            "unique_ids": ids.reshape(-1),
            "inverse": places.reshape(ids.shape),
            "table_ids": ids.reshape(-1),
            "places": places,
        }


def check_names(kinds: str) -> list[str]:
    names = kinds.split(",")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"kinds: {repeated[0]!r} is named twice")
    return names


def variant(name: str, cfg: Config) -> Variant:
    """A kind as --kinds names it, in the shape of ``cfg``. Raises UserError."""
    kind, *options = name.split(":")
    if kind not in KINDS:
        raise UserError(f"kinds: {kind!r}, {nearest(kind, KINDS)}")
    model = dataclasses.replace(cfg.model, pattern=f"{kind}*{len(layer_specs(cfg.model))}")
    optimizer, tables, naive = cfg.optimizer, CHOICES["optimizer.table_optimizer"], False
    for option in options:
        if option == "naive":
            naive = True
        elif option in tables:
            optimizer = dataclasses.replace(optimizer, table_optimizer=option)
        elif KINDS[kind].takes_beta:
            model = dataclasses.replace(model, beta=option)
        else:
            raise UserError(
                f"kinds: {name!r}, option {option!r}: {nearest(option, ['naive', *tables])}"
            )
    check_model(model)
    specs = layer_specs(model)
    if naive and not any(spec.d_memory for spec in specs):
        raise UserError(f"kinds: {name!r}: {kind} computes no rows; leave out naive")
    if set(options) & set(tables) and not any(spec.learned for spec in specs):
        raise UserError(f"kinds: {name!r}: {kind} has no tables; leave out the table optimiser")
    return Variant(dataclasses.replace(cfg, model=model, optimizer=optimizer), naive)


def layers_with_rows(variant: Variant) -> list[int]:
    """Row widths of the memory layers."""
    return [spec.row_width for spec in layer_specs(variant.config.model) if spec.row_width]


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Compile times are those of a first run: the cache on disk is left alone."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it remembers whether it is in use
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


class Rounds:
    """The compiled steps of all variants and their states, and what was timed. Variants of one
    config share a state: speed knows no values.
    """

    def __init__(
        self, cfg: Config, batch: Batch, variants: dict[str, Variant], steps: int, square: int
    ):
        self.variants, self.steps_each = variants, steps
        self.tokens, self.seq_len = batch["ids"].size, cfg.data.seq_len
        self.states: dict[Config, Any] = {}
        self.steps: dict[str, Any] = {}
        self.batches: dict[str, dict] = {}
        self.facts: dict[str, dict] = {}
        self.seconds: dict[str, list[float]] = {name: [] for name in variants}
        self.matmul: list[float] = []
        shape, dtype = (square, square), cfg.model.compute_dtype
        self.square_NN = jax.random.normal(jax.random.key(0), shape, dtype)
        self.multiply = jax.jit(lambda a_NN: a_NN @ a_NN)
        for name, variant in variants.items():
            self._set_up(name, variant, batch)
        jax.block_until_ready(self.multiply(self.square_NN))

    def _set_up(self, name: str, variant: Variant, batch: Batch) -> None:
        """Compiles a variant and takes the first step, which is not timed."""
        self.states.pop(variant.config, None)  # the first loss is that of fresh weights
        state, on_device = init_state(variant.config), jax.device_put(variant.batch(batch))
        step, compiled = compile_step(make_train_step(variant.config), state, on_device)
        state, metrics = step(state, on_device)
        how = "the compiler's memory analysis of the step"
        self.facts[name] = {
            "compile_seconds": compile_seconds(compiled),
            "first_loss": float(metrics["loss"]),
            "memory": {"how": how, **(compiled["bytes"] or {})},
        }
        self.states[variant.config], self.steps[name], self.batches[name] = state, step, on_device

    def round(self) -> None:
        for name, variant in self.variants.items():
            batch, step = self.batches[name], self.steps[name]
            state = self.states.pop(variant.config)
            began = time.perf_counter()
            for _ in range(self.steps_each):
                state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            self.seconds[name].append((time.perf_counter() - began) / self.steps_each)
            self.states[variant.config] = state
        seconds = timed(lambda: [self.multiply(self.square_NN) for _ in range(MATMULS)])
        self.matmul.append(2 * len(self.square_NN) ** 3 * MATMULS / seconds)

    def seam(self, name: str) -> dict:
        """What it costs to hand rows to the blocks in one step, over all memory layers, and what
        computing them once saved: seconds.

        gather: rows_RW[inverse]; scatter: its gradient, summed in float32. saved: the FLOPs of rows
        that were not computed, at this kind's own speed.
        """
        variant, batch, numbers = self.variants[name], self.batches[name], self.figures(name)
        widths, inverse_BT = layers_with_rows(variant), batch["inverse"][0]
        shape, dtype = (batch["unique_ids"].size, widths[0]), variant.config.model.compute_dtype
        rows_RW = jax.random.normal(jax.random.key(0), shape, dtype)
        gather = jax.jit(gather_rows)

        @jax.jit
        def scatter(grad_BTW: jax.Array) -> tuple:
            return jax.vjp(lambda rows: gather_rows(rows, inverse_BT), rows_RW)[1](grad_BTW)

        grad_BTW, per_step = gather(rows_RW, inverse_BT), len(widths) * len(batch["inverse"])
        saved = numbers["flops_saved_per_token"] * self.tokens / numbers["flops_per_s"]
        return {
            "gather_seconds": per_step * median_seconds(lambda: gather(rows_RW, inverse_BT)),
            "scatter_seconds": per_step * median_seconds(lambda: scatter(grad_BTW)),
            "saved_seconds": saved,
        }

    def figures(self, name: str) -> dict:
        numbers, peak = account(self.variants[name].config.model, self.seq_len), peak_flops()
        per_token = 0.0
        if numbers["row_bytes_per_token"]:
            per_token = self.batches[name]["unique_ids"].size / self.tokens
        flops = train_flops_per_token(numbers, per_token)
        saved = train_flops_per_token(numbers, 1.0) - flops if per_token else 0.0
        rate = self.tokens / statistics.median(self.seconds[name])
        return {
            "pattern": numbers["pattern"],
            "total_parameters": numbers["total"],
            "parameters_with_embedding_and_head": numbers["total_all"],
            "tokens_per_s": rate,
            "step_seconds": self.seconds[name],
            "rows_per_token": per_token,
            "flops_per_token": flops,
            "flops_saved_per_token": saved,
            "flops_per_s": flops * rate,
            "matmul_share": flops * rate / statistics.median(self.matmul),
            "mfu": flops * rate / peak if peak else None,
            **self.facts[name],
        }


def compile_seconds(compiled: dict) -> float:
    return compiled["seconds"]["lower"] + compiled["seconds"]["compile"]


def ratios(figures: dict[str, dict], goals_of: str) -> dict[str, dict]:
    """For each pair of GOALS that was measured: the median over rounds of tokens/s over tokens/s,
    what it would be if time were proportional to FLOPs, and the goal of the device.
    """
    result = {}
    for (one, other), goals in GOALS.items():
        if one in figures and other in figures:
            a, b = figures[one], figures[other]
            pairs = zip(a["step_seconds"], b["step_seconds"], strict=True)
            rounds = [theirs / ours for ours, theirs in pairs]
            result[f"{one} / {other}"] = {
                "measured": statistics.median(rounds),
                "rounds": rounds,
                "by_flops": b["flops_per_token"] / a["flops_per_token"],
                "goal": goals.get(goals_of),
            }
    return result


def compile_times() -> dict:
    """Seconds to trace and compile a memoryllm step of 2 and of 24 narrow layers."""
    cfg, seconds = variant("memoryllm", SHALLOW_AND_DEEP).config, []
    # the first pays for what is done once in a process and is left out
    for layers in (DEPTHS[0], *DEPTHS):
        model = dataclasses.replace(cfg.model, pattern=f"memoryllm*{layers}")
        deep = dataclasses.replace(cfg, model=model)
        step, batch = make_train_step(deep), prepare(deep, None)[1]
        seconds.append(compile_seconds(compile_step(step, abstract_state(deep), batch)[1]))
    return {
        "kind": "memoryllm",
        "layers": list(DEPTHS),
        "seconds": seconds[1:],
        "ratio": seconds[2] / seconds[1],
        "goal": COMPILE_GOAL,
    }
