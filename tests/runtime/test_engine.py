"""The engine: offloaded equals resident bit by bit, cached equals uncached, a batch equals its members, nothing retraces."""

import jax
import numpy as np
import pytest

from flexmemory.errors import UserError
from flexmemory.models.transformer import build
from flexmemory.runtime.engine import Engine, forward_step
from flexmemory.tkv.store import open_store
from tkv.making import SHARD, VOCAB, config, make_store, params

PROMPTS = ["def main():", "", "x" * 40, "naïve café"]  # prefill in one and in several chunks of 16
OPTIONS = dict(max_batch=4, chunk=16)


@pytest.fixture(scope="module")
def resident(mixed, tokenizer):
    cfg, weights = mixed
    return Engine.from_params(cfg.model, weights, tokenizer, block_rows=SHARD, **OPTIONS)


@pytest.fixture
def offloaded(mixed_store):
    store = open_store(mixed_store)
    return Engine.from_store(store, 3 * store.manifest.bundle_bytes, **OPTIONS)  # far below the ids of one chunk


def forced(engine, ids_BT):
    """Logits before each step of greedy decoding, by wrapping the engine's step; and the texts."""
    seen, step = [], engine._step

    def watch(*args):
        logits_BV, cache = step(*args)
        seen.append(np.asarray(logits_BV))
        return logits_BV, cache

    engine._step = watch
    made = engine.generate(ids_BT, 24, stop_at_eos=False)
    engine._step = step
    return seen, made


def test_offloaded_equals_resident_step_by_step(resident, offloaded):
    want, want_texts = forced(resident, PROMPTS)
    got, got_texts = forced(offloaded, PROMPTS)
    assert len(want) == len(got) == 3 + 23
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a, b)
    assert want_texts == got_texts
    rows = offloaded.stats["rows"]
    assert rows["slots"] == 3 and rows["misses"] > 30 and rows["hits"] > 0  # it did evict
    assert len({tuple(g.ids) for g in got_texts}) == 4  # the prompts do lead to different texts


@pytest.mark.parametrize("dtype,compute", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_offloaded_equals_resident_in_other_dtypes(dtype, compute, tokenizer, tmp_path):
    cfg = config("flex stem-dagger", compute_dtype=compute)
    make_store(tmp_path / "s", cfg, weights := params(cfg), dtype=dtype)
    store = open_store(tmp_path / "s")
    live = Engine.from_params(cfg.model, weights, tokenizer, dtype=dtype, block_rows=SHARD, **OPTIONS)
    disk = Engine.from_store(store, store.manifest.bundle_bytes, **OPTIONS)
    assert live.generate(PROMPTS, 6) == disk.generate(PROMPTS, 6)
    ids_BT = np.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(live.logits(ids_BT), disk.logits(ids_BT))


def test_batch_equals_alone(resident, offloaded):
    together = resident.generate(PROMPTS, 20)
    for engine in (resident, offloaded):
        for prompt, want in zip(PROMPTS, together, strict=True):
            assert engine.generate([prompt], 20) == [want]
    assert resident.generate(PROMPTS[:3], 20) == together[:3]  # 3 run in the shape of 4
    assert resident.generate(PROMPTS + PROMPTS[::-1] + PROMPTS[:1], 20) == together + together[::-1] + together[:1]  # several batches


def test_cached_decode_equals_the_full_forward(mixed, resident):
    cfg, weights = mixed
    seen, made = forced(resident, PROMPTS)
    b, first = 2, len(made[2].prompt_ids)  # the longest: its last token is in the last prefill step
    ids_T = np.asarray(made[b].prompt_ids + made[b].ids, np.int32)

    @jax.jit
    def logits(params, ids_T, places_T):
        live = build(cfg.model)(params)
        return live(ids_T[None], live.rows(ids_T), places_T[None])[0]

    want_TV = np.asarray(logits(weights, ids_T, np.arange(len(ids_T), dtype=np.int32)))
    tolerance = 1e-5 * np.abs(want_TV).max()
    for step in range(24):
        np.testing.assert_allclose(seen[2 + step][b], want_TV[first - 1 + step], atol=tolerance)
    np.testing.assert_array_equal(np.argmax(want_TV[first - 1 : -1, :257], -1), made[b].ids)
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
            sizes = forward_step._cache_size()
            engine.generate(["other", "prompts", "of other lengths" * 2, ""], 23)
            engine.generate(["three", "only", "here"], 5, temperature=2, seed=7)
            assert forward_step._cache_size() == sizes
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
    assert ids(resident, seed=3, top_p=1e-9) == [g.ids for g in resident.generate(PROMPTS, 20)]  # only the likeliest is left
    same = resident.generate(["a", "a"], 20, temperature=1.5)
    assert same[0].ids != same[1].ids  # each request draws for itself


def test_stop_at_eos_and_ids_above_the_tokenizers(mixed, tokenizer):
    cfg, weights = mixed
    weights = dict(weights, head=weights["head"] * 0)
    engine = Engine.from_params(cfg.model, weights, tokenizer, block_rows=SHARD, **OPTIONS)
    weights["head"][:, 258] = 100 * np.sign(np.arange(32) - 15)  # an id that the tokenizer does not have
    made = engine.generate(["abc"], 4)[0]
    assert made.ids == [0] * 4 and made.stop == "length" and made.text == "\0" * 4
    weights["head"][:, 256] = 1e-6  # the end of document, whichever sign the state has
    head = weights["head"]
    for sign in (1, -1):
        engine = Engine.from_params(cfg.model, dict(weights, head=head * sign), tokenizer, block_rows=SHARD, **OPTIONS)
        made = engine.generate(["abc"], 4)[0]
        if made.ids == [256]:
            assert made.stop == "eos" and made.text == ""
            assert engine.generate(["abc"], 4, stop_at_eos=False)[0].ids[0] == 256
            return
    raise AssertionError("one of two opposite heads must prefer the end of document")


def test_on_token_streams_what_is_returned(resident):
    got: dict[int, list[int]] = {}
    made = resident.generate(PROMPTS + ["fifth"], 7, on_token=lambda number, token: got.setdefault(number, []).append(token))
    assert [got[n] for n in range(5)] == [g.ids for g in made]


def test_empty_prompt_starts_from_the_end_of_document(resident):
    assert resident.generate([""], 5)[0].ids == resident.generate([[256]], 5)[0].ids


@pytest.mark.parametrize("call,message", [
    (lambda e: e.generate([[1, VOCAB]], 4), f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
    (lambda e: e.generate([[-1]], 4), "token id -1 is outside"),
    (lambda e: e.logits([[0, VOCAB]]), "outside the vocabulary"),
    (lambda e: e.generate(["a"], 0), "--max_tokens: 0"),
    (lambda e: e.generate(["a"], 1, temperature=-1), "--temperature: -1"),
    (lambda e: e.generate(["a"], 1, temperature=float("nan")), "--temperature: nan"),
    (lambda e: e.generate(["a"], 1, top_p=0), "--top_p: 0"),
    (lambda e: e.generate(["a"], 1, seed=-1), "--seed: -1"),
    (lambda e: e.generate("abc", 1), "a list of prompts"),
])
def test_bad_input(call, message, resident):
    with pytest.raises(UserError, match=message):
        call(resident)


def test_an_engine_without_a_tokenizer_takes_ids(mixed, resident):
    cfg, weights = mixed
    bare = Engine(cfg.model, {k: v for k, v in weights.items() if k != "memory"}, resident.source, None, **OPTIONS)
    assert bare.generate([[5, 6, 7]], 4, stop_at_eos=False)[0].text == ""
    for prompt, options in (("text", {}), ([], {}), ([1], dict(stop_at_eos=True))):
        with pytest.raises(UserError, match="tokenizer"):
            bare.generate([prompt], 4, **options)


def test_stats(mixed_store):
    engine = Engine.from_store(mixed_store, **OPTIONS)
    assert engine.stats["decode_tokens_per_s"] is None
    engine.generate(PROMPTS, 8, stop_at_eos=False)
    stats = engine.stats
    assert stats["decode_tokens"] == 6 * 4 and stats["prefill_tokens"] == 40 - 16 and stats["compile_seconds"] > 0
    assert stats["decode_tokens_per_s"] > 0 and stats["prefill_tokens_per_s"] > 0
    assert stats["rows"]["bytes_read"] == stats["rows"]["misses"] * open_store(mixed_store).manifest.bundle_bytes
    assert stats["rows"]["wait_seconds"] > 0
    engine.reset_stats()
    engine.generate(PROMPTS, 8, stop_at_eos=False)
    assert engine.stats["decode_tokens"] == 7 * 4 and engine.stats["compile_seconds"] == 0
