"""Accuracy on the synthetic questions: recall of trained facts, reasoning in the context."""

import functools
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from flexmemory.config import Config
from flexmemory.data.pipeline import places_of, unique_rows
from flexmemory.data.tokenizer import Tokenizer, encode_pair
from flexmemory.errors import UserError
from flexmemory.evals.perplexity import as_argument
from flexmemory.evals.rows import RowsOf, live_rows, make_hidden
from flexmemory.models.config import ModelConfig
from flexmemory.models.memory import Rows
from flexmemory.models.transformer import output_logits
from flexmemory.parallel import batch_loader
from flexmemory.sharding import like, own_sections, sections

BATCH = 32


def encode_questions(
    questions: list[dict], tokenizer: Tokenizer, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [Q, T], answer mask bool [Q, T] over the positions whose *next* token belongs to
    the answer).

    T is the longest question rounded up to 32. Raises UserError when one is longer than ``seq_len``
    or the tokenizer merges a prompt with its answer.
    """
    if not questions:
        return np.zeros((0, 0), np.int32), np.zeros((0, 0), bool)
    pairs = [
        encode_pair(tokenizer, question["prompt"], question["answer"]) for question in questions
    ]
    longest = max(len(p) + len(a) for p, a in pairs)
    if longest > seq_len:
        raise UserError(
            f"config data.seq_len: {seq_len} is shorter than the data's longest question ({longest}"
            " tokens); give at least that"
        )
    length = min(-(-longest // 32) * 32, seq_len)
    ids_QT, answer_QT = (
        np.zeros((len(pairs), length), np.int32),
        np.zeros((len(pairs), length), bool),
    )
    for i, (prompt, answer) in enumerate(pairs):
        ids_QT[i, : len(prompt) + len(answer)] = prompt + answer
        answer_QT[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
    return ids_QT, answer_QT


def answer_accuracy(
    cfg: Config,
    params: dict,
    tokenizer: Tokenizer,
    questions: list[dict],
    ffn_scale: float | jax.Array = 1.0,
    rows_of: RowsOf | None = None,
) -> dict:
    """Share of questions whose every answer token is the argmax under teacher forcing. ``rows_of``
    gives the rows, by default those of ``params``; ffn_scale is that of ``make_eval_step``.

    Returns {"recall_acc", "reasoning_acc", "<task>_chance", "kinds": {kind: accuracy}, "questions":
    count}; {} without questions.
    """
    if not questions:
        return {}
    ids_QT, answer_QT = encode_questions(questions, tokenizer, cfg.data.seq_len)
    rows_of, scale, vocab = (
        rows_of or live_rows(cfg.model, params),
        as_argument(ffn_scale),
        cfg.model.vocab_size,
    )
    backbone = {name: value for name, value in params.items() if name != "memory"}
    put, cut, own = batch_loader(), sections(), own_sections()
    count = -(-BATCH // cut) * cut
    own_sequences = places_of(own, count // cut)
    sizes = (
        min(vocab, count // cut * ids_QT.shape[1]),
    )  # always enough for the unique ids of a batch

    hits = []
    for start in range(0, len(questions), count):
        ids_BT, answer_BT = ids_QT[start : start + count], answer_QT[start : start + count]
        found = len(ids_BT)
        ids_BT, answer_BT = (
            np.pad(a_BT, ((0, count - found), (0, 0))) for a_BT in (ids_BT, answer_BT)
        )
        batch = {
            "targets": ids_BT[own_sequences, 1:],
            "answers": answer_BT[own_sequences, :-1],
            **unique_rows(ids_BT[:, :-1], vocab, sizes, cut, own),
        }
        batch = put(batch)
        hits.append(
            np.asarray(_right(backbone, rows_of(batch["unique_ids"]), batch, scale, cfg=cfg.model))[
                :found
            ]
        )
    by_task, by_kind, chance = defaultdict(list), defaultdict(list), defaultdict(list)
    for question, hit in zip(questions, np.concatenate(hits), strict=True):
        by_task[question["task"]].append(hit)
        by_kind[question["kind"]].append(hit)
        chance[question["task"]].append(question["chance"])
    return {
        **{f"{task}_acc": float(np.mean(h)) for task, h in by_task.items()},
        **{f"{task}_chance": float(np.mean(c)) for task, c in chance.items()},
        "kinds": {kind: float(np.mean(h)) for kind, h in by_kind.items()},
        "questions": len(questions),
    }


@functools.partial(jax.jit, static_argnames="cfg")
def _right(
    params: dict, rows: Rows, batch: dict, ffn_scale: jax.Array | None, *, cfg: ModelConfig
) -> jax.Array:
    """bool [B]: whether every answer token is the argmax."""
    x_BTD, head_DV = make_hidden(cfg)(
        params, rows, batch, ffn_scale=1.0 if ffn_scale is None else ffn_scale
    )
    hit_BT = jnp.argmax(output_logits(x_BTD, head_DV), axis=-1) == batch["targets"]
    return like(jnp.all(hit_BT | ~batch["answers"], axis=-1), P(None))
