"""Evaluation against slow and plain computations."""

import functools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexmemory.data import tokenizer as tokenizers
from flexmemory.data.shards import read_questions
from flexmemory.evals.perplexity import make_eval_step, perplexity
from flexmemory.evals.questions import answer_accuracy, encode_questions
from flexmemory.models.transformer import build, init_params
from flexmemory.train.loop import resolve


@pytest.fixture(scope="module")
def setup(tiny_config):
    cfg, _, val = resolve(tiny_config("memoryllm flex"))
    return cfg, init_params(cfg.model, 0), val


@functools.partial(jax.jit, static_argnames="cfg")
def padded_logits(params, ids_1T, *, cfg):
    model = build(cfg)(params)
    return model(ids_1T, model.rows(ids_1T[0]), jnp.arange(ids_1T.size)[None])


def logits_of(cfg, params, ids):
    """Of ids alone; what is behind them to fill up one shape, a causal model does not see."""
    ids_1T = np.zeros((1, cfg.data.seq_len), np.int32)
    ids_1T[0, : len(ids)] = ids
    return np.asarray(padded_logits(params, ids_1T, cfg=cfg.model))[0, : len(ids)].astype(
        np.float64
    )


def nll(cfg, params, tokens):
    logits = logits_of(cfg, params, tokens[:-1])
    lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return lse - logits[np.arange(len(tokens) - 1), tokens[1:]]


def test_perplexity_counts_every_validation_token_once(setup):
    cfg, params, val = setup
    t = cfg.data.seq_len
    losses = []
    for shard, count in enumerate(val.shard_tokens):
        for start in range(0, count - 1, t):
            losses.append(nll(cfg, params, val.tokens(shard, start, min(start + t + 1, count))))
    losses = np.concatenate(losses)
    assert len(losses) == sum(val.shard_tokens) - len(val.shard_tokens)
    got = perplexity(cfg, params, val, max_tokens=0)
    assert got["tokens"] == len(losses)
    assert got["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert got["bits_per_byte"] == pytest.approx(
        losses.mean() / math.log(2) * val.n_tokens / val.n_bytes, rel=1e-5
    )
    # a bounded evaluation takes windows at even distances, not the first source of the split alone
    starts = list(range(0, len(losses), t))
    assert len(val.shard_tokens) == 1
    some = np.concatenate([losses[starts[i * len(starts) // 3] :][:t] for i in range(3)])
    assert perplexity(cfg, params, val, max_tokens=3 * t)["loss"] == pytest.approx(
        some.mean(), rel=1e-5
    )


def test_alpha_scales_the_memory(setup):
    cfg, params, val = setup
    zeroed = jax.tree.map(lambda a: a, params)
    for stack in zeroed["memory"]["stacks"].values():
        stack["ffn"]["down"] = np.zeros_like(stack["ffn"]["down"])
    without = perplexity(cfg, zeroed, val)["loss"]
    assert perplexity(cfg, params, val, make_eval_step(cfg, ffn_scale=0.0))[
        "loss"
    ] == pytest.approx(without, rel=1e-6)
    assert perplexity(cfg, params, val)["loss"] != pytest.approx(without, rel=1e-6)


def test_answer_accuracy_is_the_greedy_continuation(setup):
    cfg, params, _ = setup
    tokenizer, questions = tokenizers.load(cfg.data.path), read_questions(cfg.data.path)
    # plant answers that the untrained model does give, so that right and wrong both occur
    planted = []
    for n, question in enumerate(questions[:24]):
        answer = question["answer"]
        if n % 2:
            ids = tokenizer.encode(question["prompt"])
            answer = tokenizer.decode([int(np.argmax(logits_of(cfg, params, ids)[-1]))])
        planted.append(question | {"answer": answer, "kind": "planted" if n % 2 else "as is"})
    expected = []
    for question in planted:
        prompt, answer = tokenizer.encode(question["prompt"]), tokenizer.encode(question["answer"])
        best = np.argmax(logits_of(cfg, params, prompt + answer), axis=-1)
        expected.append(all(best[len(prompt) - 1 + i] == token for i, token in enumerate(answer)))
    assert 0 < sum(expected) < len(expected)
    got = answer_accuracy(cfg, params, tokenizer, planted)
    for task in {q["task"] for q in planted}:
        assert got[f"{task}_acc"] == pytest.approx(
            np.mean([e for e, q in zip(expected, planted, strict=True) if q["task"] == task])
        )
    assert got["kinds"]["planted"] == pytest.approx(np.mean(expected[1::2]))
    assert answer_accuracy(cfg, params, tokenizer, []) == {}


def test_encoded_questions_mark_the_answer(setup):
    cfg, _, _ = setup
    tokenizer, questions = tokenizers.load(cfg.data.path), read_questions(cfg.data.path)
    ids_QT, answer_QT = encode_questions(questions, tokenizer, cfg.data.seq_len)
    for question, ids_T, answer_T in zip(questions, ids_QT, answer_QT, strict=True):
        assert tokenizer.decode(ids_T[1:][answer_T[:-1]].tolist()) == question["answer"]


def test_eval_command(tiny_run):
    _, workdir, final = tiny_run
    command = [
        sys.executable,
        "-m",
        "flexmemory.cli.main",
        "eval",
        f"--workdir={workdir}",
        "--max_tokens=512",
    ]
    got = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert got["loss"] == final["val_loss"]
    assert got["recall_acc"] == final["recall_acc"]
    assert {"perplexity", "bits_per_byte", "reasoning_acc", "kinds", "step"} <= set(got)
