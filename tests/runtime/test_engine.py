"""The engine: offloaded equals resident bit by bit, cached equals uncached, a batch equals its
members, nothing retraces.
"""

import dataclasses
import gc
from pathlib import Path

import jax
import numpy as np
import pytest
from tkv.making import SHARD, VOCAB, config, make_store, params

from flexmemory.errors import UserError
from flexmemory.models.transformer import build
from flexmemory.runtime import forward
from flexmemory.runtime.cache import POLICIES
from flexmemory.runtime.engine import Engine, Request
from flexmemory.runtime.rows import Budgets
from flexmemory.tkv.store import open_store

PROMPTS = ["def main():", "", "x" * 40, "naïve café"]  # prefill in one and in several chunks of 16
OPTIONS = dict(max_batch=4, chunk=16)


@pytest.fixture(scope="module")
def resident(mixed, tokenizer):
    cfg, weights = mixed
    return Engine.from_params(cfg.model, weights, tokenizer, shard_rows=SHARD, **OPTIONS)


@pytest.fixture
def offloaded(mixed_store):
    return tiered(mixed_store)


def tiered(path, rows=3, **options):
    """An engine with a RAM budget of ``rows`` rows: far below the ids of one chunk."""
    store = open_store(path)
    return Engine(
        store,
        Budgets(ram=rows * store.manifest.bundle_bytes, ram_policy="lru"),
        **OPTIONS | options,
    )


def forced(engine, prompts, monkeypatch, tokens=24):
    """Logits of every step, prefill and decode, by watching the compiled step; and what was
    generated.
    """
    seen, step = [], forward.tail

    def watch(*args, **kwargs):
        logits_BV, cache = step(*args, **kwargs)
        seen.append(np.asarray(logits_BV))
        return logits_BV, cache

    with monkeypatch.context() as patch:
        patch.setattr(forward, "tail", watch)
        made = engine.generate(prompts, tokens, stop_at_eos=False)
    return seen, made


def same_bits(want, got):
    assert len(want[0]) == len(got[0]) and want[1] == got[1]
    for a, b in zip(want[0], got[0], strict=True):
        np.testing.assert_array_equal(a, b)


def test_offloaded_equals_resident_step_by_step(resident, offloaded, monkeypatch):
    want, got = forced(resident, PROMPTS, monkeypatch), forced(offloaded, PROMPTS, monkeypatch)
    same_bits(want, got)
    stats = offloaded.stats["rows"]
    assert (
        stats["ram"]["evictions"] > 30 and stats["ram"]["hits"] > 0 and stats["cold"]["rows"] > 30
    )
    assert len({tuple(g.ids) for g in got[1]}) == 4  # the prompts do lead to different texts


@pytest.mark.parametrize("ram_policy", POLICIES)
@pytest.mark.parametrize("hot_policy", POLICIES)
@pytest.mark.parametrize("read_ahead", [0, 6])
def test_every_tier_policy_gives_the_same_bits(
    ram_policy, hot_policy, read_ahead, resident, mixed, tmp_path_factory, monkeypatch
):
    path = counted_store(mixed, tmp_path_factory)
    bundle = open_store(path).manifest.bundle_bytes
    budgets = Budgets(
        ram=7 * bundle, hot=5 * bundle, ram_policy=ram_policy, hot_policy=hot_policy, window=3
    )
    engine = Engine(path, budgets, read_ahead=read_ahead, **OPTIONS)
    same_bits(forced(resident, PROMPTS, monkeypatch, 12), forced(engine, PROMPTS, monkeypatch, 12))
    stats = engine.stats["rows"]
    assert stats["cold"]["rows"] > 0 and (stats["cold"]["ahead_used"] > 0) == (read_ahead > 0)
    assert (
        stats["hot"]["slots"] == 5
        and stats["ram"]["slots"] == 7
        and stats["hot"]["hits"] + stats["ram"]["hits"] > 0
    )


def counted_store(mixed, tmp_path_factory, made=[]):  # noqa: B006 - one store for all policies
    if not made:
        made.append(tmp_path_factory.mktemp("counted") / "s")
        make_store(
            made[0],
            *mixed,
            counts_V=np.bincount(list("".join(PROMPTS).encode()), minlength=VOCAB).astype(
                np.uint64
            ),
        )
    return made[0]


@pytest.mark.parametrize(
    "options,compute",
    [
        ({"dtype": "int8", "rank": 0.5}, "bfloat16"),
        pytest.param({"dtype": "bfloat16"}, "float32", marks=pytest.mark.slow),
        pytest.param({}, "bfloat16", marks=pytest.mark.slow),
        pytest.param({"dtype": "int4", "scale_group": 8}, "float32", marks=pytest.mark.slow),
        pytest.param({"dtype": "float16", "rank": 0.25}, "float32", marks=pytest.mark.slow),
    ],
)
def test_offloaded_equals_resident_however_rows_are_stored(options, compute, tmp_path, monkeypatch):
    cfg = config("flex stem-dagger", compute_dtype=compute)
    make_store(tmp_path / "s", cfg, params(cfg), **options)
    disk, device = tiered(tmp_path / "s", 1), Engine(tmp_path / "s", Budgets(ram=None), **OPTIONS)
    same_bits(forced(device, PROMPTS, monkeypatch, 6), forced(disk, PROMPTS, monkeypatch, 6))
    ids_BT = np.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(device.logits(ids_BT), disk.logits(ids_BT))


@pytest.mark.parametrize(
    "dtype,compute", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")]
)
def test_folded_from_disk_equals_live_weights(dtype, compute, tokenizer, tmp_path, monkeypatch):
    cfg = config("dense flex stem", compute_dtype=compute)
    make_store(tmp_path / "s", cfg, weights := params(cfg), dtype=dtype)
    live = Engine.from_params(
        cfg.model, weights, tokenizer, dtype=dtype, shard_rows=SHARD, **OPTIONS
    )
    same_bits(
        forced(live, PROMPTS, monkeypatch, 6),
        forced(tiered(tmp_path / "s"), PROMPTS, monkeypatch, 6),
    )


def test_batch_equals_alone(resident, offloaded, monkeypatch):
    """A request's logits do not depend on who else is there, nor on its slot: requests come and go
    in any order.
    """
    many = [PROMPTS[n % 4] + "ab" * (n % 3) for n in range(11)]
    lengths = [1 + 3 * n % 10 for n in range(11)]
    requests = [Request(prompt, length, stop_at_eos=False) for prompt, length in zip(many, lengths)]
    together = resident.run(requests)
    assert [len(g.ids) for g in together] == lengths
    for engine in (resident, offloaded):
        assert engine.run(requests[::-1]) == together[::-1]
        for request, want in zip(requests, together, strict=True):
            assert engine.run([request]) == [want]
    (batch, _), (alone, _) = (
        forced(resident, prompts, monkeypatch) for prompts in (PROMPTS, PROMPTS[:1])
    )
    np.testing.assert_array_equal(batch[0], alone[0])
    steps_together, steps_alone = (
        [logits_BV[0] for logits_BV in seen if len(logits_BV) == 4] for seen in (batch, alone)
    )
    np.testing.assert_array_equal(steps_together[: len(steps_alone)], steps_alone)


def test_a_request_that_ends_gives_its_slot_to_the_next(mixed, resident, tokenizer):
    """While a long request goes on, short ones pass through the other slot: fewer steps than
    batches that wait for their longest.
    """
    cfg, weights = mixed
    engine = Engine.of(cfg.model, weights, resident.source, tokenizer, max_batch=2, chunk=16)
    engine.generate(["warm", "up"], 4)
    engine.reset_stats()
    order = []
    lengths = [21, 5, 5, 5, 5]
    requests = [
        Request(f"prompt {n}", length, stop_at_eos=False) for n, length in enumerate(lengths)
    ]
    made = engine.run(requests, on_token=lambda number, _: order.append(number))
    assert [len(g.ids) for g in made] == lengths
    assert engine.stats["decode_steps"] == 20  # the first token of a request comes from its prefill
    first, last = (
        {n: order.index(n) for n in range(5)},
        {n: len(order) - 1 - order[::-1].index(n) for n in range(5)},
    )
    assert all(first[n + 1] > last[n] for n in (1, 2, 3)) and last[0] == len(order) - 1


def test_cached_decode_equals_the_full_forward(mixed, resident, monkeypatch):
    cfg, weights = mixed
    _, together = forced(resident, PROMPTS, monkeypatch)
    seen, made = forced(
        resident, PROMPTS[2:3], monkeypatch
    )  # alone: three chunks of prefill, then one step a token
    assert made == together[2:3]
    seen, first = seen[2:], len(made[0].prompt_ids)
    ids_T = np.asarray(made[0].prompt_ids + made[0].ids, np.int32)

    @jax.jit
    def logits(params, ids_T, places_T):
        live = build(cfg.model)(params)
        return live(ids_T[None], live.rows(ids_T), places_T[None])[0]

    want_TV = np.asarray(logits(weights, ids_T, np.arange(len(ids_T), dtype=np.int32)))
    tolerance = 1e-5 * np.abs(want_TV).max()
    for step in range(24):
        np.testing.assert_allclose(seen[step][0], want_TV[first - 1 + step], atol=tolerance)
    np.testing.assert_array_equal(np.argmax(want_TV[first - 1 : -1, :257], -1), made[0].ids)
    np.testing.assert_allclose(resident.logits(ids_T[None])[0], want_TV, atol=tolerance)


def test_nothing_compiles_in_the_steady_state(resident, offloaded):
    for engine in (resident, offloaded):
        engine.generate(PROMPTS, 20)
        engine.generate(PROMPTS, 20, temperature=0.7, top_p=0.9)
    traced, compiled = [], []

    def listen(name, seconds, **_):
        if "backend_compile" in name:
            compiled.append(name)
        if "trace" in name:
            traced.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for engine in (resident, offloaded):
            sizes = forward.lead._cache_size(), forward.tail._cache_size()
            engine.generate(["other", "prompts", "of other lengths" * 2, ""], 23)
            engine.generate(["three", "only", "here"], 5, temperature=2, seed=7)
            assert (forward.lead._cache_size(), forward.tail._cache_size()) == sizes
        assert compiled == [] and traced == []
        jax.jit(lambda x: x + 1)(np.zeros(3))
        assert compiled and traced  # the listener does hear
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_sampling_is_a_function_of_the_seed(resident, offloaded):
    def ids(engine, **options):
        return [g.ids for g in engine.generate(PROMPTS, 20, temperature=1.5, **options)]

    want = ids(resident, seed=3)
    assert ids(resident, seed=3) == want == ids(offloaded, seed=3)
    assert ids(resident, seed=4) != want
    assert ids(resident, seed=3, top_p=0.5) != want
    assert ids(resident, seed=3, top_p=1e-9) == [
        g.ids for g in resident.generate(PROMPTS, 20)
    ]  # only the likeliest is left
    same = resident.generate(["a", "a"], 20, temperature=1.5)
    assert same[0].ids != same[1].ids  # each request draws for itself


def test_stop_at_eos_and_ids_above_the_tokenizers(mixed, tokenizer):
    cfg, weights = mixed
    weights = dict(weights, head=weights["head"] * 0)
    engine = Engine.from_params(cfg.model, weights, tokenizer, shard_rows=SHARD, **OPTIONS)
    weights["head"][:, 258] = 100 * np.sign(
        np.arange(32) - 15
    )  # an id that the tokenizer does not have
    made = engine.generate(["abc"], 4)[0]
    assert made.ids == [0] * 4 and made.stop == "length" and made.text == "\0" * 4
    weights["head"][:, 256] = 1e-6  # the end of document, whichever sign the state has
    head = weights["head"]
    for sign in (1, -1):
        engine = Engine.from_params(
            cfg.model, dict(weights, head=head * sign), tokenizer, shard_rows=SHARD, **OPTIONS
        )
        made = engine.generate(["abc"], 4)[0]
        if made.ids == [256]:
            assert made.stop == "eos" and made.text == ""
            assert engine.generate(["abc"], 4, stop_at_eos=False)[0].ids[0] == 256
            return
    raise AssertionError("one of two opposite heads must prefer the end of document")


def test_on_token_streams_what_is_returned(resident):
    got: dict[int, list[int]] = {}
    made = resident.generate(
        PROMPTS + ["fifth"],
        7,
        on_token=lambda number, token: got.setdefault(number, []).append(token),
    )
    assert [got[n] for n in range(5)] == [g.ids for g in made]


def test_empty_prompt_starts_from_the_end_of_document(resident):
    assert resident.generate([""], 5)[0].ids == resident.generate([[256]], 5)[0].ids


@pytest.mark.parametrize(
    "call,message",
    [
        (
            lambda e: e.generate([[1, VOCAB]], 4),
            f"token id {VOCAB} is outside the vocabulary of {VOCAB}",
        ),
        (lambda e: e.generate([[-1]], 4), "token id -1 is outside"),
        (lambda e: e.logits([[0, VOCAB]]), "outside the vocabulary"),
        (lambda e: e.generate(["a"], 0), "max_tokens: 0"),
        (lambda e: e.generate(["a"], 1, temperature=-1), "temperature: -1"),
        (lambda e: e.generate(["a"], 1, temperature=float("nan")), "temperature: nan"),
        (lambda e: e.generate(["a"], 1, top_p=0), "top_p: 0"),
        (lambda e: e.generate(["a"], 1, seed=-1), "seed: -1"),
        (lambda e: e.generate("abc", 1), "a list of prompts"),
        (lambda e: e.generate(["a"], 1, stop=["x", ""]), "stop: .*none of them empty"),
        (lambda e: e.run([Request("a", stop="END")]), "stop: 'END'; give a list"),
    ],
)
def test_bad_input(call, message, resident):
    with pytest.raises(UserError, match=message):
        call(resident)


def test_an_engine_without_a_tokenizer_takes_ids(mixed, resident):
    cfg, weights = mixed
    bare = Engine.of(cfg.model, weights, resident.source, None, **OPTIONS)
    assert bare.generate([[5, 6, 7]], 4, stop_at_eos=False)[0].text == ""
    for prompt, options in (("text", {}), ([], {}), ([1], dict(stop_at_eos=True))):
        with pytest.raises(UserError, match="tokenizer"):
            bare.generate([prompt], 4, **options)


def test_stop_texts(resident):
    whole = resident.generate(PROMPTS, 24, stop_at_eos=False)
    stops = [whole[0].text[5:8], whole[2].text[3:5]]
    pieces = [""] * 4

    def show(number, piece):
        pieces[number] += piece

    made = resident.generate(PROMPTS, 24, stop=stops, stop_at_eos=False, on_text=show)
    for number, (got, free) in enumerate(zip(made, whole, strict=True)):
        found = [at for at in (free.text.find(stop) for stop in stops) if at >= 0]
        assert got.text == (free.text[: min(found)] if found else free.text) and got.stop == (
            "stop" if found else "length"
        )
        assert pieces[number] == got.text and free.ids[: len(got.ids)] == got.ids
    assert made[0].stop == made[2].stop == "stop"


def test_each_request_has_its_own_options(resident):
    requests = [
        Request("a", 5, stop_at_eos=False),
        Request("a", 9, temperature=2.0, seed=1, stop_at_eos=False),
        Request("a", 9, temperature=2.0, seed=2, top_p=0.9, stop_at_eos=False),
        Request("a", 5, stop_at_eos=False),
    ]
    made = resident.run(requests)
    assert [len(g.ids) for g in made] == [5, 9, 9, 5] and made[0] == made[3] == resident.run(
        requests[:1]
    )[0]
    assert made[1].ids != made[2].ids
    assert (
        resident.run([dataclasses.replace(r, temperature=0.0) for r in requests[:2]])[1].ids[:5]
        == made[0].ids
    )


def test_one_stop_text_is_one_text(resident):
    whole = resident.generate(["x" * 40], 24, stop_at_eos=False)[0]
    stop = whole.text[5:8]
    assert (
        resident.generate(["x" * 40], 24, stop=stop, stop_at_eos=False)[0].text
        == whole.text[: whole.text.find(stop)]
    )


@pytest.mark.parametrize(
    "options,message",
    [
        ({"max_batch": 0}, "max_batch: 0 must be 1 or more"),
        ({"chunk": 0}, "chunk: 0 must be 1"),
        ({"max_length": -1}, "max_length: -1"),
        ({"read_ahead": -1}, "read_ahead: -1 must be 0 or more"),
        (
            {"budgets": Budgets(ram=None, hot=9)},
            "hot: 9 bytes beside ram=None",
        ),
        (
            {"budgets": Budgets(ram=None), "read_ahead": 2},
            "read_ahead: 2 with the whole table on the device",
        ),
    ],
)
def test_bad_options(options, message, mixed_store):
    with pytest.raises(UserError, match=message):
        Engine(mixed_store, **options)


def test_a_closed_engine_gives_its_files_back(mixed_store):
    def descriptors():
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()  # engines of earlier tests
    before = descriptors()
    with Engine(mixed_store, **OPTIONS) as engine:
        engine.generate(["abc"], 2)
        assert descriptors() > before
    assert descriptors() == before
    engine = Engine(mixed_store, **OPTIONS)
    engine.generate(["abc"], 2)
    del engine
    gc.collect()
    assert descriptors() == before


def test_a_longer_request_gets_a_longer_cache(mixed, resident, tokenizer):
    cfg, weights = mixed
    engine = Engine.of(cfg.model, weights, resident.source, tokenizer, **OPTIONS)
    short = engine.generate(["abc"], 8, stop_at_eos=False)
    engine.generate(["y" * 100], 40, stop_at_eos=False)
    assert (
        engine.generate(["abc"], 8, stop_at_eos=False) == short
    )  # what an earlier request left in the cache is never seen
    with pytest.raises(
        UserError, match="max_length: 64 is below 113, the tokens of the longest request"
    ):
        Engine.of(
            cfg.model, weights, resident.source, tokenizer, max_length=64, **OPTIONS
        ).generate(["y" * 97], 16)


def test_a_failed_read_ends_the_run_and_not_the_engine(mixed_store):
    engine = tiered(mixed_store)
    want = engine.generate(PROMPTS, 4)
    with pytest.MonkeyPatch.context() as patch:

        def fail(*_):
            raise UserError("rows: damaged")

        patch.setattr(type(engine.source.store), "read_bundles", fail)
        with pytest.raises(UserError, match="damaged"):
            engine.generate(PROMPTS, 4)
    assert engine.generate(PROMPTS, 4) == want


def test_stats(mixed_store):
    engine = Engine(mixed_store, **OPTIONS)
    assert engine.stats["decode_tokens_per_s"] is None
    engine.generate(PROMPTS, 8, stop_at_eos=False)
    stats = engine.stats
    assert (
        stats["prefill_steps"] == 6 - 1
        and stats["prefill_tokens"] == sum(map(len, map(engine.encode, PROMPTS))) - 11
        and stats["prefill_compile_seconds"] > 0 < stats["decode_compile_seconds"]
    )
    assert stats["decode_tokens_per_s"] > 0 and stats["prefill_tokens_per_s"] > 0
    cold = stats["rows"]["cold"]
    assert (
        cold["bytes"] == cold["rows"] * open_store(mixed_store).manifest.bundle_bytes
        and cold["rows"] == stats["rows"]["ram"]["misses"]
    )
    assert cold["read_seconds"] > 0 and stats["decode_wait_p99"] >= stats["decode_wait_p50"] >= 0
    engine.reset_stats()
    engine.generate(PROMPTS, 8, stop_at_eos=False)
    assert engine.stats["decode_tokens"] == 7 * 4 and engine.stats["decode_compile_seconds"] == 0
