"""Generation with rows handed in: chunked prefill, KV-cache decode, requests that come and go in
fixed slots.

The compiled steps are functions of (parameters, cache, tokens, rows) in fixed shapes; where the
rows come from is the row source's business. So a resident and an offloaded engine run the same
programs, and equal rows give equal bits.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from flexmemory.data.tokenizer import Tokenizer
from flexmemory.errors import UserError
from flexmemory.models.config import ModelConfig
from flexmemory.models.transformer import empty_cache
from flexmemory.runtime import forward
from flexmemory.runtime.rows import Budgets, ResidentRows, RowSource, Ticket
from flexmemory.runtime.sampling import greedy, likeliest, sample
from flexmemory.runtime.stream import TextStream
from flexmemory.runtime.tiers import TieredRows
from flexmemory.tkv.format import FOLD_ROWS, default_shard_rows, model_groups, next_power
from flexmemory.tkv.store import Store, open_store

MAX_BATCH = 8
CHUNK = 64  # prompt tokens in one prefill step
LENGTH_STEP = (
    64  # smallest cache; lengths are powers of two above it, so that few shapes are compiled
)
WAITS = 1 << 16  # decode steps whose waits are remembered


@dataclasses.dataclass(frozen=True)
class Request:
    """What to continue and how. ``prompt``: text or token ids; an empty one starts after an end of
    document.

    temperature 0 takes the likeliest token. stop: texts that end the generation and are not part of
    it.
    """

    prompt: str | Sequence[int]
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_at_eos: bool = True


@dataclasses.dataclass(frozen=True)
class Generation:
    """One finished request. ``ids`` are the new tokens, the end of document included where it came;
    ``text`` ends before a stop text.
    """

    text: str
    ids: list[int]
    prompt_ids: list[int]
    stop: str  # eos | length | stop


@dataclasses.dataclass
class Running:
    """A request in a slot of the batch."""

    number: int
    request: Request
    prompt_ids: list[int]
    stream: TextStream | None
    filled: int = 0  # prompt tokens in the cache
    ticket: Ticket | None = None  # rows of the next prompt chunk
    ids: list[int] = dataclasses.field(default_factory=list)

    @property
    def position(self) -> int:
        """Where the next token goes into the cache."""
        return (
            self.filled
            if self.filled < len(self.prompt_ids)
            else len(self.prompt_ids) + len(self.ids) - 1
        )


class Engine:
    """A model that generates from a TKV store: ``Engine(store, Budgets(ram=1 <<
    30)).generate(prompts, 64)``.

    max_batch: slots for requests that run together; chunk: prompt tokens in one prefill step;
    max_length: of prompt and generation together, 0 to follow the requests (a longer one than any
    before compiles the steps again); read_ahead: this many of the likeliest next tokens have their
    rows read while the token is drawn; check: verify the checksum of every row that is read, for a
    store given by its place. ``close`` gives files and threads back, as does leaving a ``with``
    block.
    """

    _own: Store | None = None  # a store that was opened here, to be closed here

    def __init__(
        self,
        store: str | Path | Store,
        budgets: Budgets = Budgets(),
        *,
        check: bool = True,
        progress: bool = False,
        **options,
    ):  # noqa: B008
        if budgets.ram is None and budgets.hot:
            raise UserError(
                f"--hot_budget: {budgets.hot} bytes beside --ram_budget=all, which has the whole"
                " table on the device; give 0"
            )
        if not isinstance(store, Store):
            store = self._own = open_store(store, check=check)
        source = (
            ResidentRows.from_store(store, progress)
            if budgets.ram is None
            else TieredRows(store, budgets, progress)
        )
        self._start(
            store.model,
            store.backbone(stacked=False, dtype=store.model.compute_dtype),
            source,
            store.tokenizer(),
            **options,
        )

    @classmethod
    def of(
        cls,
        cfg: ModelConfig,
        params: dict,
        source: RowSource,
        tokenizer: Tokenizer | None,
        **options,
    ) -> "Engine":
        """An engine of its parts. params: the params dict, ``memory`` is not needed. Without a
        tokenizer prompts are ids.
        """
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
        **options,
    ) -> "Engine":
        """An engine on live parameters, folded into device memory with rows of the float ``dtype``.
        Equal bits to a store of the same dtype and ``shard_rows`` exported on the same backend.
        """
        shard_rows = shard_rows or default_shard_rows(cfg, dtype)
        groups = model_groups(cfg, dtype, shard_rows)
        source = ResidentRows.from_params(
            cfg, params, groups, {group.name: () for group in groups}, min(shard_rows, FOLD_ROWS)
        )
        return cls.of(cfg, params, source, tokenizer, **options)

    @classmethod
    def from_run(
        cls, workdir: str | Path, *, step: int | None = None, dtype: str = "float32", **options
    ) -> "Engine":
        """An engine on a run folder's checkpoint, the latest by default."""
        from flexmemory.data.tokenizer import load
        from flexmemory.run_folder import load_params

        config, params, _ = load_params(Path(workdir), step)
        return cls.from_params(config.model, params, load(Path(workdir)), dtype=dtype, **options)

    def close(self) -> None:
        self.source.close()
        if self._own:
            self._own.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
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
    ):
        """params: in the served form."""
        self.cfg, self.source, self.tokenizer = cfg, source, tokenizer
        for name, value, least in (
            ("max_batch", max_batch, 1),
            ("chunk", chunk, 1),
            ("max_length", max_length, 0),
            ("read_ahead", read_ahead, 0),
        ):
            if value < least:
                raise UserError(f"--{name}: {value} must be {least} or more")
        self.params = params
        self.bases = jax.device_put(source.bases)
        self.max_batch, self.chunk, self.max_length, self.read_ahead = (
            max_batch,
            chunk,
            max_length,
            read_ahead,
        )
        self.vocab_size = min(cfg.vocab_size, tokenizer.vocab_size) if tokenizer else cfg.vocab_size
        if read_ahead and not isinstance(source, TieredRows):
            raise UserError(
                f"--read_ahead: {read_ahead} with the whole table on the device; nothing is read"
                " there, give 0"
            )
        self._cache: tuple[dict, dict] | None = None
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
        on_token: Callable[[int, int], None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """Continues each prompt by up to ``max_tokens`` tokens; :meth:`run` with the same options
        for all.
        """
        if isinstance(prompts, str):
            raise UserError("prompts: give a list of prompts, not one text")
        stop = (stop,) if isinstance(stop, str) else stop
        requests = [
            Request(prompt, max_tokens, temperature, top_p, seed, tuple(stop), stop_at_eos)
            for prompt in prompts
        ]
        return self.run(requests, on_token, on_text)

    def run(
        self,
        requests: Sequence[Request],
        on_token: Callable[[int, int], None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """Runs the requests, ``max_batch`` at a time: one that ends gives its slot to the next.

        on_token(request number, token id) and on_text(request number, piece of text) are called as
        they appear; the pieces of a request joined are its text. A draw depends on (seed, number of
        the request, its text) alone. Raises UserError for a bad option or a prompt outside the
        vocabulary, before anything runs.
        """
        waiting = deque(
            Running(
                n,
                r,
                self._checked(r),
                TextStream(self.tokenizer.decode, r.stop) if self.tokenizer else None,
            )
            for n, r in enumerate(requests)
        )
        try:
            return self._run(waiting, on_token, on_text)
        except BaseException:
            self.source.abandon()
            raise

    def _run(self, waiting: deque[Running], on_token, on_text) -> list[Generation]:
        made: list[Generation | None] = [None] * len(waiting)
        lead_cache, tail_cache = self._take_cache(waiting)
        slots: list[Running | None] = [None] * self.max_batch
        following: Ticket | None = None  # rows of the next decode step

        def accept(b: int, token: int) -> None:
            run = slots[b]
            run.ids.append(token)
            piece = run.stream.add(token) if run.stream else ""
            ended = (
                "eos"
                if run.request.stop_at_eos and token == self.tokenizer.eos_id
                else (
                    "stop"
                    if run.stream and run.stream.stopped
                    else "length"
                    if len(run.ids) == run.request.max_tokens
                    else ""
                )
            )
            if on_token:
                on_token(run.number, token)
            if ended and run.stream:
                piece += run.stream.finish()
                ended = "stop" if run.stream.stopped and ended == "length" else ended
            if on_text and piece:
                on_text(run.number, piece)
            if ended:
                made[run.number] = Generation(
                    run.stream.text if run.stream else "", run.ids, run.prompt_ids, ended
                )
                slots[b] = None

        while waiting or any(slots):
            for b in range(self.max_batch):
                if slots[b] is None and waiting:
                    slots[b] = waiting.popleft()
            filling = sorted(
                (b for b, run in enumerate(slots) if run and run.filled < len(run.prompt_ids)),
                key=lambda b: slots[b].number,
            )
            if filling:
                b = filling[0]
                after = slots[filling[1]] if len(filling) > 1 else None
                logits_1V, lead_cache, tail_cache = self._prefill(
                    b, slots[b], after, lead_cache, tail_cache
                )
                if slots[b].filled == len(slots[b].prompt_ids):
                    accept(b, int(self._draw(logits_1V, [slots[b]])[0]))
            live = [b for b, run in enumerate(slots) if run and run.ids]
            if live:
                ids_B, following, lead_cache, tail_cache = self._decode(
                    slots, live, following, lead_cache, tail_cache
                )
                for b in live:
                    accept(b, int(ids_B[b]))
        if following is not None:  # read for a step that did not come
            following.collect()
            following.release()
        self._cache = lead_cache, tail_cache
        return made

    def _request_chunk(self, run: Running) -> None:
        """Asks for the rows of a prompt's next chunk, once."""
        run.ticket = run.ticket or self.source.request(
            np.unique(run.prompt_ids[run.filled : run.filled + self.chunk]),
            self._places(self.chunk),
        )

    def _places(self, tokens: int) -> int:
        return min(tokens, self.cfg.vocab_size)

    def _prefill(
        self, b: int, run: Running, after: Running | None, lead_cache: dict, tail_cache: dict
    ):
        """The next chunk of a prompt; its rows were asked for a chunk ago, of this prompt or of the
        one before. ``after``: the next prompt.

        The last chunk is padded on the right with its last token: what a pad writes to the cache
        lies behind every real position, so no real token attends to it, and decoding overwrites it
        before its position is reached.
        """
        began, first = time.perf_counter(), run.filled
        part = run.prompt_ids[first : first + self.chunk]
        ids_1C = np.asarray([part + [part[-1]] * (self.chunk - len(part))], np.int32)
        positions_1C = np.arange(first, first + self.chunk, dtype=np.int32)[None]
        self._request_chunk(run)
        (ticket, run.ticket), slot = (run.ticket, None), np.int32(b)
        x_1CD, lead_cache = forward.lead(
            self.params, lead_cache, ids_1C, positions_1C, slot, cfg=self.cfg
        )
        stored = ticket.collect()
        logits_1V, tail_cache = forward.tail(
            self.params,
            tail_cache,
            x_1CD,
            positions_1C,
            slot,
            stored,
            self.bases,
            _inverse(ticket, ids_1C),
            np.asarray([len(part) - 1], np.int32),
            cfg=self.cfg,
            layouts=self.source.layouts,
        )
        run.filled += len(part)
        following = run if run.filled < len(run.prompt_ids) else after
        if following:
            self._request_chunk(following)  # read while this chunk computes
        jax.block_until_ready(logits_1V)
        ticket.release()
        self._count(
            "prefill",
            (cache_length(tail_cache or lead_cache),),
            time.perf_counter() - began,
            ticket.waited,
            len(part),
        )
        return logits_1V, lead_cache, tail_cache

    def _decode(
        self,
        slots: list[Running | None],
        live: list[int],
        ticket: Ticket | None,
        lead_cache: dict,
        tail_cache: dict,
    ):
        """One token for each live request. Returns also the rows of the step after it, asked for as
        soon as its tokens are known.
        """
        began = time.perf_counter()
        # an idle slot repeats what a live one feeds, so it needs no row of its own; its cache is
        # written where nobody looks before it is written again
        ids_B1 = np.asarray(
            [[(run if b in live else slots[live[0]]).ids[-1]] for b, run in enumerate(slots)],
            np.int32,
        )
        positions_B1 = np.asarray([[run.position if run else 0] for run in slots], np.int32)
        needed = np.unique(ids_B1)
        if ticket is not None and not np.isin(needed, ticket.ids_U).all():  # a request has joined
            ticket.collect()
            ticket.release()
            ticket = None
        ticket = ticket or self.source.request(needed, self._places(self.max_batch))
        x_B1D, lead_cache = forward.lead(
            self.params, lead_cache, ids_B1, positions_B1, None, cfg=self.cfg
        )
        stored = ticket.collect()
        logits_BV, tail_cache = forward.tail(
            self.params,
            tail_cache,
            x_B1D,
            positions_B1,
            None,
            stored,
            self.bases,
            _inverse(ticket, ids_B1),
            np.zeros(len(slots), np.int32),
            cfg=self.cfg,
            layouts=self.source.layouts,
        )
        if self.read_ahead:
            self.source.read_ahead(
                np.asarray(
                    likeliest(logits_BV, self.vocab_size, min(self.read_ahead, self.vocab_size))
                )[live]
            )
        ids_B = self._draw(logits_BV, [run if b in live else None for b, run in enumerate(slots)])
        ticket.release()
        going = [
            b
            for b in live
            if len(slots[b].ids) + 1 < slots[b].request.max_tokens
            and not (slots[b].request.stop_at_eos and ids_B[b] == self.tokenizer.eos_id)
        ]
        following = (
            self.source.request(np.unique(ids_B[going]), self._places(self.max_batch))
            if going
            else None
        )
        sampled = any(slots[b].request.temperature for b in live)
        self._count(
            "decode",
            (cache_length(tail_cache or lead_cache), sampled),
            time.perf_counter() - began,
            ticket.waited,
            len(live),
        )
        return ids_B, following, lead_cache, tail_cache

    def _draw(self, logits_BV: jax.Array, runs: list[Running | None]) -> np.ndarray:
        """int32 [B]; waits for the step."""
        if not any(run and run.request.temperature for run in runs):
            return np.asarray(greedy(logits_BV, self.vocab_size))
        idle = Running(0, Request(""), [], None)
        of = [(run or idle).request for run in runs]
        return np.asarray(
            sample(
                logits_BV,
                np.asarray([r.seed for r in of], np.uint32),
                np.asarray([(run or idle).number for run in runs], np.int32),
                np.asarray([len((run or idle).ids) for run in runs], np.int32),
                np.asarray([r.temperature for r in of], np.float32),
                np.asarray([r.top_p for r in of], np.float32),
                vocab_size=self.vocab_size,
            )
        )

    def _take_cache(self, waiting: Sequence[Running]) -> tuple[dict, dict]:
        """The cache of the run before, or a longer one. What is in it is never read: a position is
        written before it is attended to.
        """
        needed = max(
            (
                max(
                    -(-len(run.prompt_ids) // self.chunk) * self.chunk,
                    len(run.prompt_ids) + run.request.max_tokens,
                )
                for run in waiting
            ),
            default=1,
        )
        if self.max_length and needed > self.max_length:
            raise UserError(
                f"--max_length: {self.max_length} is below {needed}, the tokens of the longest"
                f" request (prompts count in chunks of {self.chunk})"
            )
        if self._cache is None or cache_length(self._cache) < needed:
            length = next_power(max(self.max_length or needed, LENGTH_STEP))
            self._cache = forward.split_cache(
                empty_cache(self.cfg, self.max_batch, length), self.cfg
            )
        taken, self._cache = self._cache, None  # its buffers are donated to the steps
        return taken

    def _checked(self, request: Request) -> list[int]:
        """Ids of the prompt. Raises UserError."""
        if request.max_tokens < 1:
            raise UserError(f"--max_tokens: {request.max_tokens} must be above 0")
        if not request.temperature >= 0:
            raise UserError(f"--temperature: {request.temperature} must not be negative")
        if not 0 < request.top_p <= 1:
            raise UserError(f"--top_p: {request.top_p} must be above 0 and at most 1")
        if not 0 <= request.seed < 1 << 32:
            raise UserError(f"--seed: {request.seed} must be in 0..{(1 << 32) - 1}")
        if isinstance(request.stop, str) or not all(request.stop):
            raise UserError(f"--stop: {request.stop!r}; give a list of texts, none of them empty")
        ids = self.encode(request.prompt)
        if self.tokenizer is None and (request.stop_at_eos or request.stop):
            raise UserError(
                "stop_at_eos: an engine without a tokenizer does not know the end of document; give"
                " stop_at_eos=False and no stop text"
            )
        return ids

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt. Raises UserError outside the vocabulary, and for text or nothing without
        a tokenizer.
        """
        if self.tokenizer is None and (isinstance(prompt, str) or not len(prompt)):
            raise UserError("--prompt: this engine has no tokenizer; give at least one token id")
        if isinstance(prompt, str) and not prompt.isascii():
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"--prompt: {prompt!r} is not valid Unicode text; give UTF-8"
                ) from None
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        for i in ids:
            if not 0 <= i < self.cfg.vocab_size:
                raise UserError(
                    f"--prompt: token id {i} is outside the vocabulary of {self.cfg.vocab_size};"
                    " use the store's tokenizer"
                )
        return ids or [self.tokenizer.eos_id]  # documents follow an end of document in training

    def logits(self, ids_BT: np.ndarray) -> np.ndarray:
        """Teacher-forced logits_BTV float32 of token ids [B, T] in one pass without a cache."""
        ids_BT = np.asarray([self.encode(ids) for ids in ids_BT], np.int32)
        try:
            ticket = self.source.request(np.unique(ids_BT), self._places(ids_BT.size))
            stored = ticket.collect()
            made = np.asarray(
                forward.all_logits(
                    self.params,
                    ids_BT,
                    stored,
                    self.bases,
                    _inverse(ticket, ids_BT),
                    cfg=self.cfg,
                    layouts=self.source.layouts,
                )
            )
            ticket.release()
            return made
        except BaseException:
            self.source.abandon()
            raise

    def _count(self, phase: str, shape: tuple, seconds: float, waited: float, tokens: int) -> None:
        clock = self._clock
        if (phase, *shape) not in self._shapes:  # the first step of a shape compiles it
            self._shapes.add((phase, *shape))
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
        generate twice to measure.
        """
        clock = self._clock
        rates = {
            f"{phase}_tokens_per_s": (
                clock[f"{phase}_tokens"] / clock[f"{phase}_seconds"]
                if clock[f"{phase}_seconds"]
                else None
            )
            for phase in ("prefill", "decode")
        }
        waits = {
            f"decode_wait_p{q}": float(np.percentile(self._waits, q)) if self._waits else None
            for q in (50, 99)
        }
        return {**rates, **clock, **waits, "rows": self.source.stats()}

    def reset_stats(self) -> None:
        """Starts the engine's clocks again; the row source's counters go on."""
        parts = ("compile_seconds", "seconds", "wait_seconds", "tokens", "steps")
        self._clock = {f"{phase}_{part}": 0.0 for phase in ("prefill", "decode") for part in parts}
        self._waits: deque[float] = deque(maxlen=WAITS)


def _inverse(ticket: Ticket, ids_BT: np.ndarray) -> np.ndarray:
    """int32 [B, T], the place of each token's row."""
    return ticket.places_U[np.searchsorted(ticket.ids_U, ids_BT)]


def cache_length(cache) -> int:
    """S of a KV cache."""
    return jax.tree.leaves(cache)[0].shape[2]
