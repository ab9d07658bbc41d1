"""What FFNs and rows are worth: measures that scale them at evaluation."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from flexmemory.analysis import probes
from flexmemory.analysis.trained import load, scores
from flexmemory.data import tokenizer as tokenizers
from flexmemory.errors import UserError
from flexmemory.evals import perplexity as evaluation
from flexmemory.evals.perplexity import make_eval_step, perplexity
from flexmemory.evals.questions import answer_accuracy
from flexmemory.models.transformer import build


def test_steps_of_one_config_share_programs(trained_of):
    trained = trained_of("flex dense")
    compiled = evaluation._sums._cache_size()
    for scale in (1.0, 0.5, 0.7, np.ones(2), np.zeros(2)):
        perplexity(trained.cfg, trained.params, trained.val, make_eval_step(trained.cfg, scale))
    assert evaluation._sums._cache_size() == compiled + 3


def test_scores_are_those_of_the_final_evaluation(tiny_run, tmp_path):
    _, workdir, final = tiny_run
    shutil.copytree(workdir, tmp_path / "run")
    trained = load(tmp_path / "run")
    got = scores(trained)
    assert (got["val_loss"], got["recall_acc"], got["reasoning_acc"], got["kinds"]) == tuple(
        final[name] for name in ("val_loss", "recall_acc", "reasoning_acc", "kinds")
    )
    assert scores(dataclasses.replace(trained, questions=[]))["recall_acc"] is None
    tokenizers.build("byte", None).save(tmp_path / "run")
    with pytest.raises(UserError, match="prepared again with another tokenizer"):
        load(tmp_path / "run")


def test_alpha(trained_of):
    trained = trained_of("memoryllm flex")
    got = probes.alpha(trained)
    assert [point["alpha"] for point in got["points"]] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    for point in (got["points"][0], got["points"][-1]):
        a = point["alpha"]
        want = perplexity(trained.cfg, trained.params, trained.val, make_eval_step(trained.cfg, a))
        assert point["val_loss"] == pytest.approx(want["loss"], rel=1e-6)
        assert (
            point["kinds"]
            == answer_accuracy(
                trained.cfg, trained.params, trained.tokenizer, trained.questions, a
            )["kinds"]
        )
    assert got["points"][0]["val_loss"] != pytest.approx(got["points"][-1]["val_loss"], rel=1e-6)
    json.dumps(got, allow_nan=False)


def test_answers_depend_on_the_scale(trained_of):
    """A question whose answer the model gives with a scale of 30 and not with 1."""
    trained = trained_of("memoryllm flex")
    merge, length = build(trained.cfg.model), trained.cfg.data.seq_len

    @jax.jit
    def best(ids_1T, scale):
        model = merge(trained.params)
        return model(ids_1T, model.rows(ids_1T[0]), np.arange(length)[None], ffn_scale=scale)[
            0
        ].argmax(-1)

    def given(prompt, scale):
        ids = trained.tokenizer.encode(prompt)
        return int(
            best(np.array([ids + [0] * (length - len(ids))], np.int32), np.float32(scale))[
                len(ids) - 1
            ]
        )

    def asked(question):
        token = given(question["prompt"], 30)
        answer = trained.tokenizer.decode([token])
        return (
            question | {"answer": answer}
            if trained.tokenizer.encode(answer) == [token] != [given(question["prompt"], 1)]
            else None
        )

    question = next(filter(None, map(asked, trained.questions)))
    for scale, right in ((30.0, 1), (np.full(2, 30), 1), (1.0, 0), (np.ones(2), 0)):
        assert (
            answer_accuracy(trained.cfg, trained.params, trained.tokenizer, [question], scale)[
                f"{question['task']}_acc"
            ]
            == right
        )


def test_drops(trained_of):
    trained = trained_of("dense attn_only stem flex")
    one, last = probes.drop_layer(trained), probes.drop_last(trained)
    json.dumps([one, last], allow_nan=False)
    assert [row["layer"] for row in one["layers"]] == [0, 2, 3]
    assert [row["kind"] for row in one["layers"]] == ["dense", "stem", "flex"]
    assert [point["dropped"] for point in last["points"]] == [0, 1, 2, 3]
    assert [point["first"] for point in last["points"]] == [None, 3, 2, 0]
    # rows of width 88 and 32, two bytes a number; a dense layer has none
    assert [point["table_bytes_gone"] for point in last["points"]] == [
        0,
        400 * 32 * 2,
        400 * 120 * 2,
        400 * 120 * 2,
    ]
    assert (
        last["points"][0]["val_loss"] == one["whole"]["val_loss"]
        and last["points"][0]["perplexity_rise"] == 0
    )
    assert last["points"][1]["val_loss"] == one["layers"][-1]["val_loss"]
    without = jax.tree.map(lambda a: a, trained.params)
    without["memory"]["stacks"][
        "stack0" if "ffn" in without["memory"]["stacks"]["stack0"] else "stack1"
    ]["ffn"]["down"] *= 0
    row = one["layers"][-1]
    assert row["val_loss"] == pytest.approx(scores(trained, params=without)["val_loss"], rel=1e-6)
    assert row["perplexity_rise"] == pytest.approx(
        100 * np.expm1(row["val_loss"] - one["whole"]["val_loss"]), abs=1e-3
    )


def test_nothing_to_scale(trained_of):
    for measure in (probes.alpha, probes.drop_layer, probes.drop_last):
        assert measure(trained_of("attn_only"))["applies"] is False
