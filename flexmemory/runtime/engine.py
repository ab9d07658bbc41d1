"""Generation with rows handed in: chunked prefill, KV-cache decode, requests that come and go in
fixed slots.

The compiled steps are functions of (parameters, cache, tokens, rows) in fixed shapes; where the
rows come from is the row source's business. So a resident and an offloaded engine run the same
programs, and equal rows give equal bits."""

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexmemory.data import tokenizer as tokenizers
from flexmemory.data.tokenizer import Tokenizer
from flexmemory.errors import UserError
from flexmemory.models.config import ModelConfig
from flexmemory.models.transformer import empty_cache
from flexmemory.run_folder import load_params
from flexmemory.runtime import forward
from flexmemory.runtime.requests import IDLE, Generation, OnText, OnToken, Request, Running
from flexmemory.runtime.rows import Budgets, ResidentRows, RowSource, Ticket
from flexmemory.runtime.sampling import greedy, likeliest, sample
from flexmemory.runtime.stream import TextStream
from flexmemory.runtime.tiers import TieredRows
from flexmemory.tkv.format import FOLD_ROWS, default_shard_rows, model_groups, next_power
from flexmemory.tkv.store import Store, open_store

MAX_BATCH = 8
CHUNK = 64  # prompt tokens in one prefill step
# smallest cache; lengths are powers of two above it, so that few shapes are compiled
LENGTH_STEP = 64
WAITS = 1 << 16  # decode steps whose waits are remembered
CLOCKS = ("compile_seconds", "seconds", "wait_seconds", "tokens", "steps")


class Engine:
    """A model that generates from a TKV store: ``Engine(store, Budgets(ram=1 <<
    30)).generate(prompts, 64)``.

    max_batch: slots for requests that run together; chunk: prompt tokens in one prefill step;
    max_length: of prompt and generation together, 0 to follow the requests (a longer one than any
    before compiles the steps again); read_ahead: this many of the likeliest next tokens have their
    rows read while the token is drawn; check: verify the checksum of every row that is read, for a
    store given by its address. ``close`` gives files and threads back, as does leaving a ``with``
    block."""

    _own: Store | None = None  # a store that was opened here, to be closed here

    def __init__(
        self,
        store: str | Path | Store,
        budgets: Budgets | None = None,
        *,
        check: bool = True,
        progress: bool = False,
        **options: int,
    ):
        budgets = budgets or Budgets()
        if budgets.ram is None and budgets.hot:
            raise UserError(
                f"hot: {budgets.hot} bytes beside ram=None, which has the whole table on the"
                " device; give 0"
            )
        if not isinstance(store, Store):
            store = self._own = open_store(store, check=check)
        source: RowSource
        if budgets.ram is None:
            source = ResidentRows.from_store(store, progress)
        else:
            source = TieredRows(store, budgets, progress)
        params = store.backbone(stacked=False, dtype=store.model.compute_dtype)
        self._start(store.model, params, source, store.tokenizer(), **options)

    @classmethod
    def of(
        cls,
        cfg: ModelConfig,
        params: dict,
        source: RowSource,
        tokenizer: Tokenizer | None,
        **options: int,
    ) -> "Engine":
        """An engine of its parts. params: the params dict, ``memory`` is not needed. Without a
        tokenizer prompts are ids."""
        engine = cls.__new__(cls)
        engine._start(cfg, forward.served_params(params, cfg), source, tokenizer, **options)
        return engine

    @classmethod
    def from_params(
        cls,
        cfg: ModelConfig,
        params: dict,
        tokenizer: Tokenizer | None,
        *,
        dtype: str = "float32",
        shard_rows: int | None = None,
        **options: int,
    ) -> "Engine":
        """An engine on live parameters, folded into device memory with rows of the float ``dtype``.
        Equal bits to a store of the same dtype and ``shard_rows`` exported on the same backend."""
        shard_rows = shard_rows or default_shard_rows(cfg, dtype)
        groups = model_groups(cfg, dtype, shard_rows)
        bases: dict = {group.name: () for group in groups}
        source = ResidentRows.from_params(cfg, params, groups, bases, min(shard_rows, FOLD_ROWS))
        return cls.of(cfg, params, source, tokenizer, **options)

    @classmethod
    def from_run(cls, workdir: str | Path, *, step: int | None = None, **options: Any) -> "Engine":
        """An engine on a run folder's checkpoint, the latest by default. Options also those of
        :meth:`from_params`."""
        config, params, _ = load_params(Path(workdir), step)
        return cls.from_params(config.model, params, tokenizers.load(Path(workdir)), **options)

    def close(self) -> None:
        self.source.close()
        if self._own:
            self._own.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(
        self,
        cfg: ModelConfig,
        params: dict,
        source: RowSource,
        tokenizer: Tokenizer | None,
        *,
        max_batch: int = MAX_BATCH,
        chunk: int = CHUNK,
        max_length: int = 0,
        read_ahead: int = 0,
    ) -> None:
        """params: in the served form."""
        sizes = dict(max_batch=max_batch, chunk=chunk, max_length=max_length, read_ahead=read_ahead)
        for (name, value), least in zip(sizes.items(), (1, 1, 0, 0), strict=True):
            if value < least:
                raise UserError(f"{name}: {value} must be {least} or more")
        if read_ahead and not isinstance(source, TieredRows):
            raise UserError(
                f"read_ahead: {read_ahead} with the whole table on the device; nothing is read"
                " there, give 0"
            )
        self.cfg, self.params, self.source, self.tokenizer = cfg, params, source, tokenizer
        self.max_batch, self.chunk, self.max_length = max_batch, chunk, max_length
        self.read_ahead, self.layouts = read_ahead, source.layouts
        self.bases = jax.device_put(source.bases)
        self.vocab_size = min(cfg.vocab_size, tokenizer.vocab_size) if tokenizer else cfg.vocab_size
        self._caches: tuple[dict, dict] | None = None  # of lead and tail
        self._length = 0  # S of them
        self._next: Ticket | None = None  # rows of the next decode step
        self._shapes: set[tuple] = set()
        self.reset_stats()

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        stop_at_eos: bool = True,
        on_token: OnToken | None = None,
        on_text: OnText | None = None,
    ) -> list[Generation]:
        """Continues each prompt by up to ``max_tokens`` tokens; :meth:`run` with the same options
        for all."""
        if isinstance(prompts, str):
            raise UserError("prompts: give a list of prompts, not one text")
        options = (max_tokens, temperature, top_p, seed)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        requests = [Request(prompt, *options, stops, stop_at_eos) for prompt in prompts]
        return self.run(requests, on_token, on_text)

    def run(
        self,
        requests: Sequence[Request],
        on_token: OnToken | None = None,
        on_text: OnText | None = None,
    ) -> list[Generation]:
        """Runs the requests, ``max_batch`` at a time: one that ends gives its slot to the next.

        on_token and on_text are called as tokens and pieces of text appear; the pieces of a request
        joined are its text. A draw depends on (seed, number of the request, its text) alone. Raises
        UserError for a prompt outside the vocabulary, before anything runs."""
        waiting = deque(self._running(n, request) for n, request in enumerate(requests))
        results: dict[int, Generation] = {}
        slots: list[Running | None] = [None] * self.max_batch

        def accept(run: Running, token: int) -> None:
            if end := run.accept(token, on_token, on_text):
                results[run.number], slots[run.slot] = run.generation(end), None

        self._make_caches(waiting)
        try:
            while waiting or any(slots):
                for b in range(self.max_batch):
                    if slots[b] is None and waiting:
                        slots[b] = run = waiting.popleft()
                        run.slot = b
                filling = [run for run in slots if run and run.filled < len(run.prompt_ids)]
                if filling:
                    run, *others = sorted(filling, key=lambda run: run.number)
                    logits_1V = self._prefill(run, others[0] if others else None)
                    if run.filled == len(run.prompt_ids):
                        accept(run, int(self._draw(logits_1V, [run])[0]))
                live = [run for run in slots if run and run.ids]
                if live:
                    ids_B = self._decode(slots, live)
                    for run in live:
                        accept(run, int(ids_B[run.slot]))
            if self._next:  # read for a step that did not come
                self._next.collect()
                self._next.release()
        except BaseException:
            self._caches = None  # perhaps donated to a step that did not end
            self.source.abandon()
            raise
        finally:
            self._next = None
        return [results[n] for n in range(len(requests))]

    def _running(self, number: int, request: Request) -> Running:
        """Raises UserError."""
        ids, tokenizer = self.encode(request.prompt), self.tokenizer
        if tokenizer is None:
            if request.stop_at_eos or request.stop:
                raise UserError(
                    "stop_at_eos: an engine without a tokenizer does not know the end of document;"
                    " give stop_at_eos=False and no stop text"
                )
            return Running(number, request, ids, None, None)
        eos_id = tokenizer.eos_id if request.stop_at_eos else None
        return Running(number, request, ids, TextStream(tokenizer.decode, request.stop), eos_id)

    def _request(self, ids: Sequence[int] | np.ndarray, tokens: int) -> Ticket:
        """Asks for the rows of a step of that many tokens."""
        return self.source.request(np.unique(ids), min(tokens, self.cfg.vocab_size))

    def _request_chunk(self, run: Running) -> Ticket:
        """Asks for the rows of a prompt's next chunk, once."""
        if run.ticket is None:
            ids = run.prompt_ids[run.filled : run.filled + self.chunk]
            run.ticket = self._request(ids, self.chunk)
        return run.ticket

    def _step(
        self,
        ticket: Ticket,
        ids_BT: np.ndarray,
        positions_BT: np.ndarray,
        slot: np.int32 | None,
        last_B: np.ndarray,
    ) -> jax.Array:
        """logits_BV at index last_B of each sequence. slot: that of one sequence, None for all."""
        assert self._caches is not None
        (lead_cache, tail_cache), cfg = self._caches, self.cfg
        where = (positions_BT, slot)
        x_BTD, lead_cache = forward.lead(self.params, lead_cache, ids_BT, *where, cfg=cfg)
        rows = (ticket.collect(), self.bases, ticket.inverse(ids_BT))
        logits_BV, tail_cache = forward.tail(
            self.params, tail_cache, x_BTD, *where, *rows, last_B, cfg=cfg, layouts=self.layouts
        )
        self._caches = lead_cache, tail_cache
        return logits_BV

    def _prefill(self, run: Running, after: Running | None) -> jax.Array:
        """Logits [1, V] of the next chunk of a prompt. Its rows were asked for a chunk ago, of this
        prompt or of the one before. ``after``: the next prompt.

        The last chunk is padded on the right with its last token: what a pad writes to the cache
        lies behind every real position, so no real token attends to it, and decoding overwrites it
        before its position is reached."""
        began, first = time.perf_counter(), run.filled
        part = run.prompt_ids[first : first + self.chunk]
        ids_1C = np.asarray([part + [part[-1]] * (self.chunk - len(part))], np.int32)
        positions_1C = np.arange(first, first + self.chunk, dtype=np.int32)[None]
        ticket, run.ticket = self._request_chunk(run), None
        last_1 = np.asarray([len(part) - 1], np.int32)
        logits_1V = self._step(ticket, ids_1C, positions_1C, np.int32(run.slot), last_1)
        run.filled += len(part)
        following = run if run.filled < len(run.prompt_ids) else after
        if following:
            self._request_chunk(following)  # read while this chunk computes
        jax.block_until_ready(logits_1V)
        ticket.release()
        self._count("prefill", False, time.perf_counter() - began, ticket.waited, len(part))
        return logits_1V

    def _decode(self, slots: list[Running | None], live: list[Running]) -> np.ndarray:
        """One token, int32 [B], for each live request. Asks for the rows of the step after it as
        soon as its tokens are known."""
        began, tokens_B = time.perf_counter(), [live[0].ids[-1]] * len(slots)
        # an idle slot repeats what a live one feeds, so it needs no row of its own; its cache is
        # written where nobody looks before it is written again
        for run in live:
            tokens_B[run.slot] = run.ids[-1]
        ids_B1 = np.asarray(tokens_B, np.int32)[:, None]
        positions_B1 = np.asarray([[run.position if run else 0] for run in slots], np.int32)
        ticket, self._next = self._next, None
        if ticket and not np.isin(ids_B1, ticket.ids_U).all():  # a request has joined
            ticket.collect()
            ticket.release()
            ticket = None
        ticket = ticket or self._request(ids_B1, self.max_batch)
        logits_BV = self._step(ticket, ids_B1, positions_B1, None, np.zeros(len(slots), np.int32))
        if self.read_ahead:
            k = min(self.read_ahead, self.vocab_size)
            ids_Bk = np.asarray(likeliest(logits_BV, self.vocab_size, k))
            self.source.read_ahead(ids_Bk[[run.slot for run in live]])
        ids_B = self._draw(logits_BV, [run if run and run.ids else None for run in slots])
        ticket.release()
        going = [run.slot for run in live if run.goes_on(ids_B[run.slot])]
        if going:
            self._next = self._request(ids_B[going], self.max_batch)
        sampled = any(run.request.temperature for run in live)
        self._count("decode", sampled, time.perf_counter() - began, ticket.waited, len(live))
        return ids_B

    def _draw(self, logits_BV: jax.Array, runs: list[Running | None]) -> np.ndarray:
        """int32 [B]; waits for the step."""
        if not any(run and run.request.temperature for run in runs):
            return np.asarray(greedy(logits_BV, self.vocab_size))
        all_ = [(run, run.request) for run in (run or IDLE for run in runs)]
        columns = (
            np.asarray([request.seed for _, request in all_], np.uint32),
            np.asarray([run.number for run, _ in all_], np.int32),
            np.asarray([len(run.ids) for run, _ in all_], np.int32),
            np.asarray([request.temperature for _, request in all_], np.float32),
            np.asarray([request.top_p for _, request in all_], np.float32),
        )
        return np.asarray(sample(logits_BV, *columns, vocab_size=self.vocab_size))

    def _make_caches(self, waiting: Sequence[Running]) -> None:
        """Sees to caches that are long enough. What an earlier run left in them is never read: a
        position is written before it is attended to."""
        chunked = lambda run: -(-len(run.prompt_ids) // self.chunk) * self.chunk
        needed = max((max(chunked(run), run.length) for run in waiting), default=1)
        if self.max_length and needed > self.max_length:
            raise UserError(
                f"max_length: {self.max_length} is below {needed}, the tokens of the longest"
                f" request (prompts count in chunks of {self.chunk})"
            )
        if self._caches is None or self._length < needed:
            self._length = next_power(max(self.max_length or needed, LENGTH_STEP))
            cache = empty_cache(self.cfg, self.max_batch, self._length)
            self._caches = forward.split_cache(cache, self.cfg)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt. Raises UserError outside the vocabulary, and for text or nothing without
        a tokenizer."""
        tokenizer = self.tokenizer
        if tokenizer is None and (isinstance(prompt, str) or not len(prompt)):
            raise UserError("prompt: this engine has no tokenizer; give at least one token id")
        if tokenizer is not None and isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"prompt: {prompt!r} is not valid Unicode text; give UTF-8"
                ) from None
            ids = tokenizer.encode(prompt)
        else:
            ids = [int(i) for i in prompt]
        for i in ids:
            if not 0 <= i < self.cfg.vocab_size:
                raise UserError(
                    f"prompt: token id {i} is outside the vocabulary of {self.cfg.vocab_size}; use"
                    " the store's tokenizer"
                )
        if tokenizer is not None and not ids:
            ids = [tokenizer.eos_id]  # documents follow an end of document in training
        return ids

    def logits(self, ids_BT: np.ndarray) -> np.ndarray:
        """Teacher-forced logits_BTV float32 of token ids [B, T] in one pass without a cache."""
        ids_BT = np.asarray([self.encode(ids) for ids in ids_BT], np.int32)
        try:
            ticket = self._request(ids_BT, ids_BT.size)
            rows = (ticket.collect(), self.bases, ticket.inverse(ids_BT))
            logits_BTV = np.asarray(
                forward.all_logits(self.params, ids_BT, *rows, cfg=self.cfg, layouts=self.layouts)
            )
            ticket.release()
            return logits_BTV
        except BaseException:
            self.source.abandon()
            raise

    def _count(self, phase: str, sampled: bool, seconds: float, waited: float, tokens: int) -> None:
        shape, clock = (phase, self._length, sampled), self._clock
        if shape not in self._shapes:  # the first step of a shape compiles it
            self._shapes.add(shape)
            clock[f"{phase}_compile_seconds"] += seconds
            return
        clock[f"{phase}_seconds"] += seconds
        clock[f"{phase}_wait_seconds"] += waited
        clock[f"{phase}_tokens"] += tokens
        clock[f"{phase}_steps"] += 1
        if phase == "decode":
            self._waits.append(waited)

    @property
    def stats(self) -> dict:
        """Speeds over all requests of a batch, seconds that steps waited for rows, and the row
        source's counters.

        The first step of a shape counts as compile time, so a rate is None until a second one ran:
        generate twice to measure."""
        clock, result = self._clock, {}
        for phase in ("prefill", "decode"):
            tokens, seconds = clock[f"{phase}_tokens"], clock[f"{phase}_seconds"]
            result[f"{phase}_tokens_per_s"] = tokens / seconds if seconds else None
        result |= clock
        for q in (50, 99):
            wait = float(np.percentile(self._waits, q)) if self._waits else None
            result[f"decode_wait_p{q}"] = wait
        return result | {"rows": self.source.stats()}

    def reset_stats(self) -> None:
        """Starts the engine's clocks again; the row source's counters go on."""
        self._clock = {f"{phase}_{part}": 0.0 for phase in ("prefill", "decode") for part in CLOCKS}
        self._waits: deque[float] = deque(maxlen=WAITS)
