"""Generation with rows handed in: chunked prefill, KV-cache decode, fixed shapes.

The forward pass is one jitted function of (backbone, cache, tokens, rows); where the rows come from is the row source's
business. So a resident and an offloaded engine run the same compiled program, and equal rows give equal bits.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.config import ModelConfig
from flexmemory.data.tokenizer import Tokenizer
from flexmemory.errors import UserError
from flexmemory.models.transformer import build, empty_cache, served
from flexmemory.runtime.rows import OffloadedRows, ResidentRows, RowSource
from flexmemory.runtime.sampling import greedy, sample
from flexmemory.tkv.format import next_power
from flexmemory.tkv.store import Store, open_store

MAX_BATCH = 8
CHUNK = 64  # prompt tokens of each sequence in one prefill step
LENGTH_STEP = 64  # smallest cache; lengths are powers of two above it, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Generation:
    """One finished request. ``ids`` are the new tokens, the end of document included where it came."""

    text: str
    ids: list[int]
    prompt_ids: list[int]
    stop: str  # eos | length


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def forward_step(params, cache, ids_BT, positions_BT, pick_B, rows, inverse_BT, *, cfg: ModelConfig):
    """(logits_BV float32 at place pick_B of each sequence, cache). rows: {group: rows_RLW}, any float dtype."""
    model = build(cfg, with_memory=False)(params)
    x_BTD, cache = model.hidden(ids_BT, _model_rows(rows, cfg), inverse_BT, positions_BT=positions_BT, cache=cache)
    picked_B1D = jnp.take_along_axis(x_BTD, pick_B[:, None, None], axis=1)
    return model.logits(picked_B1D)[:, 0], cache


@functools.partial(jax.jit, static_argnames="cfg")
def forward_logits(params, ids_BT, rows, inverse_BT, *, cfg: ModelConfig):
    """logits_BTV float32 without a cache."""
    return build(cfg, with_memory=False)(params)(ids_BT, _model_rows(rows, cfg), inverse_BT)


def _model_rows(rows: dict, cfg: ModelConfig) -> dict:
    """Token-major rows of a source as the model takes them: layer-major, in compute dtype."""
    return {name: jnp.swapaxes(rows_RLW, 0, 1).astype(cfg.compute_dtype) for name, rows_RLW in rows.items()}


class Engine:
    """A model that generates. ``params`` is the params dict without ``memory``; ``tokenizer`` may be None for prompts of ids.

    Prompts run in batches of up to ``max_batch``; compiled shapes are powers of two in batch and cache length.
    """

    def __init__(self, cfg: ModelConfig, params: dict, source: RowSource, tokenizer: Tokenizer | None, *,
                 max_batch: int = MAX_BATCH, chunk: int = CHUNK):
        self.cfg, self.source, self.tokenizer = served(cfg), source, tokenizer
        self.params = jax.device_put(params)
        self.max_batch, self.chunk = max_batch, chunk
        self.vocab_size = min(cfg.vocab_size, tokenizer.vocab_size) if tokenizer else cfg.vocab_size
        self._shapes: set[tuple] = set()
        self._clock = dict.fromkeys(("compile_seconds", "prefill_seconds", "prefill_tokens", "decode_seconds", "decode_tokens"), 0.0)

    @classmethod
    def from_store(cls, path: str | Path | Store, ram_budget: int | None = 64 << 20, *, check: bool = True, **options) -> "Engine":
        """An engine on a TKV store alone. ram_budget: bytes of cached rows, None to load the whole table."""
        store = path if isinstance(path, Store) else open_store(path, check=check)
        source = ResidentRows.from_store(store) if ram_budget is None else OffloadedRows(store, ram_budget)
        return cls(store.model, store.backbone(), source, store.tokenizer(), **options)

    @classmethod
    def from_params(cls, cfg: ModelConfig, params: dict, tokenizer: Tokenizer | None, *, dtype: str = "float32",
                    block_rows: int | None = None, **options) -> "Engine":
        """An engine on live parameters, folded into device memory with rows of ``dtype``."""
        source = ResidentRows.from_params(cfg, params, dtype, block_rows)
        return cls(cfg, {name: value for name, value in params.items() if name != "memory"}, source, tokenizer, **options)

    @classmethod
    def from_run(cls, workdir: str | Path, *, step: int | None = None, dtype: str = "float32", **options) -> "Engine":
        """An engine on a run folder's checkpoint, the latest by default."""
        from flexmemory.data.tokenizer import load
        from flexmemory.train.checkpoint import load_params  # late: Orbax takes a second to import

        config, params, _ = load_params(Path(workdir), step)
        return cls.from_params(config.model, params, load(Path(workdir)), dtype=dtype, **options)

    def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]], max_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
                 seed: int = 0, stop_at_eos: bool = True, on_token: Callable[[int, int], None] | None = None) -> list[Generation]:
        """Continues each prompt by up to ``max_tokens`` tokens. An empty prompt starts after an end of document.

        temperature 0 takes the likeliest token; otherwise the draw depends on (seed, number of the prompt, its text) alone.
        on_token(prompt number, token id) is called as tokens appear. Raises UserError for a bad option or a prompt outside
        the vocabulary.
        """
        if isinstance(prompts, str):
            raise UserError("prompts: give a list of prompts, not one text")
        if max_tokens < 1:
            raise UserError(f"--max_tokens: {max_tokens} must be above 0")
        if not temperature >= 0:
            raise UserError(f"--temperature: {temperature} must not be negative")
        if not 0 < top_p <= 1:
            raise UserError(f"--top_p: {top_p} must be above 0 and at most 1")
        if not 0 <= seed < 1 << 32:
            raise UserError(f"--seed: {seed} must be in 0..{(1 << 32) - 1}")
        encoded = [self.encode(prompt) for prompt in prompts]
        if stop_at_eos and self.tokenizer is None:
            raise UserError("stop_at_eos: an engine without a tokenizer does not know the end of document; give stop_at_eos=False")
        made: list[list[int]] = []
        for first in range(0, len(encoded), self.max_batch):
            numbers = range(first, min(first + self.max_batch, len(encoded)))
            made += self._generate_batch([encoded[n] for n in numbers], numbers, max_tokens, temperature, top_p, seed, stop_at_eos, on_token)
        eos = self.tokenizer.eos_id if stop_at_eos else None
        return [Generation(self.tokenizer.decode(ids) if self.tokenizer else "", ids, prompt_ids, "eos" if ids[-1] == eos else "length")
                for ids, prompt_ids in zip(made, encoded, strict=True)]

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt. Raises UserError outside the vocabulary, and for text or nothing without a tokenizer."""
        if self.tokenizer is None and (isinstance(prompt, str) or not len(prompt)):
            raise UserError("--prompt: this engine has no tokenizer; give at least one token id")
        if isinstance(prompt, str) and not prompt.isascii():
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise UserError(f"--prompt: {prompt!r} is not valid Unicode text; give UTF-8") from None
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        for i in ids:
            if not 0 <= i < self.cfg.vocab_size:
                raise UserError(f"--prompt: token id {i} is outside the vocabulary of {self.cfg.vocab_size}; use the store's tokenizer")
        return ids or [self.tokenizer.eos_id]  # documents follow an end of document in training

    def _generate_batch(self, prompts, numbers, max_tokens, temperature, top_p, seed, stop_at_eos, on_token) -> list[list[int]]:
        count, batch = len(prompts), next_power(len(prompts))
        rest = prompts + [prompts[0]] * (batch - count)  # fills the shape; its rows are needed anyway
        numbers_B = np.asarray([*numbers] + [0] * (batch - count), np.int32)
        lengths_B = np.asarray([len(ids) for ids in rest], np.int32)
        padded = -(-int(lengths_B.max()) // self.chunk) * self.chunk
        cache = empty_cache(self.cfg, batch, next_power(max(padded, int(lengths_B.max()) + max_tokens, LENGTH_STEP)))
        logits_BV, cache = self._prefill(rest, lengths_B, padded, cache)

        made: list[list[int]] = [[] for _ in prompts]
        alive_B = np.arange(batch) < count
        for step in range(max_tokens):
            began = time.perf_counter()
            if temperature:
                ids_B = sample(logits_BV, np.uint32(seed), numbers_B, step, float(temperature), float(top_p), vocab_size=self.vocab_size)
            else:
                ids_B = greedy(logits_BV, vocab_size=self.vocab_size)
            ids_B = np.asarray(ids_B)
            for b in np.flatnonzero(alive_B):
                made[b].append(int(ids_B[b]))
                if on_token:
                    on_token(int(numbers_B[b]), int(ids_B[b]))
                alive_B[b] = not (stop_at_eos and ids_B[b] == self.tokenizer.eos_id)
            if not alive_B.any() or step + 1 == max_tokens:
                break
            # a finished sequence repeats what a live one feeds: no extra row, and its cache is its own
            ids_B = np.where(alive_B, ids_B, ids_B[np.argmax(alive_B)])
            positions_B1 = (lengths_B + step)[:, None].astype(np.int32)
            logits_BV, cache = self._step(cache, ids_B[:, None], positions_B1, np.zeros(batch, np.int32))
            jax.block_until_ready(logits_BV)
            self._count("decode", (batch, 1, cache_length(cache), temperature > 0), time.perf_counter() - began, int(alive_B.sum()))
        return made

    def _prefill(self, prompts, lengths_B, padded: int, cache):
        """Logits after each prompt's last token, and the filled cache.

        Prompts are padded on the right: what a pad writes to the cache lies behind every real position, so no real token
        attends to it, and decoding overwrites it before its position is reached.
        """
        batch, logits_BV = len(prompts), jnp.zeros((len(prompts), self.cfg.vocab_size), jnp.float32)
        ids_BT = np.empty((batch, padded), np.int32)
        for b, ids in enumerate(prompts):
            ids_BT[b, : len(ids)] = ids
            ids_BT[b, len(ids) :] = ids[-1]
        for start in range(0, padded, self.chunk):
            began = time.perf_counter()
            part_BT = ids_BT[:, start : start + self.chunk]
            positions_BT = np.broadcast_to(np.arange(start, start + self.chunk, dtype=np.int32), part_BT.shape)
            pick_B = np.clip(lengths_B - 1 - start, 0, self.chunk - 1)
            new_BV, cache = self._step(cache, part_BT, positions_BT, pick_B)
            ends_B1 = ((lengths_B - 1) // self.chunk == start // self.chunk)[:, None]
            logits_BV = jnp.where(ends_B1, new_BV, logits_BV)
            jax.block_until_ready(logits_BV)
            tokens = int(np.clip(lengths_B - start, 0, self.chunk).sum())
            self._count("prefill", (batch, self.chunk, cache_length(cache)), time.perf_counter() - began, tokens)
        return logits_BV, cache

    def _step(self, cache, ids_BT, positions_BT, pick_B):
        rows, inverse_BT = self._rows(ids_BT)
        return forward_step(self.params, cache, ids_BT, positions_BT, pick_B, rows, inverse_BT, cfg=self.cfg)

    def _rows(self, ids_BT: np.ndarray) -> tuple[dict, np.ndarray]:
        """Rows of the different ids, padded to the most there can be, and the place of each token's row."""
        unique_R, inverse = np.unique(ids_BT, return_inverse=True)
        size = min(ids_BT.size, self.cfg.vocab_size)
        return self.source.rows(unique_R, size), inverse.reshape(ids_BT.shape).astype(np.int32)

    def logits(self, ids_BT: np.ndarray) -> np.ndarray:
        """Teacher-forced logits_BTV float32 of token ids [B, T] in one pass without a cache."""
        ids_BT = np.asarray([self.encode(ids) for ids in ids_BT], np.int32)
        rows, inverse_BT = self._rows(ids_BT)
        return np.asarray(forward_logits(self.params, ids_BT, rows, inverse_BT, cfg=self.cfg))

    def _count(self, phase: str, shape: tuple, seconds: float, tokens: int) -> None:
        if shape in self._shapes:
            self._clock[f"{phase}_seconds"] += seconds
            self._clock[f"{phase}_tokens"] += tokens
        else:  # the first step of a shape compiles it
            self._shapes.add(shape)
            self._clock["compile_seconds"] += seconds

    @property
    def stats(self) -> dict:
        """Speeds over all sequences of a batch, and the row source's counters.

        The first step of a shape counts as compile time, so a rate is None until a second one ran: generate twice to measure.
        """
        rates = {f"{phase}_tokens_per_s": self._clock[f"{phase}_tokens"] / self._clock[f"{phase}_seconds"] if self._clock[f"{phase}_seconds"] else None
                 for phase in ("prefill", "decode")}
        return {**rates, **self._clock, "rows": self.source.stats()}

    def reset_stats(self) -> None:
        """Starts the engine's clocks again; the row source's counters go on."""
        self._clock = dict.fromkeys(self._clock, 0.0)


def cache_length(cache: dict) -> int:
    """S of a KV cache."""
    return jax.tree.leaves(cache)[0].shape[2]
