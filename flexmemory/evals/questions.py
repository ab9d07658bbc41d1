"""Accuracy on the synthetic questions: recall of trained facts, reasoning in the context."""

from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np

from flexmemory.config import Config
from flexmemory.data.tokenizer import Tokenizer, encode_pair
from flexmemory.errors import UserError
from flexmemory.evals.rows import RowsOf, live_rows
from flexmemory.models.transformer import build

BATCH = 32


def encode_questions(questions: list[dict], tokenizer: Tokenizer, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [Q, T], answer mask bool [Q, T] over the positions whose *next* token belongs to the answer).

    T is the longest question rounded up to 32. Raises UserError when one is longer than ``seq_len`` or
    the tokenizer merges a prompt with its answer.
    """
    if not questions:
        return np.zeros((0, 0), np.int32), np.zeros((0, 0), bool)
    pairs = [encode_pair(tokenizer, question["prompt"], question["answer"]) for question in questions]
    longest = max(len(p) + len(a) for p, a in pairs)
    if longest > seq_len:
        raise UserError(f"config data.seq_len: {seq_len} is shorter than the data's longest question ({longest} tokens); give at least that")
    length = min(-(-longest // 32) * 32, seq_len)
    ids_QT, answer_QT = np.zeros((len(pairs), length), np.int32), np.zeros((len(pairs), length), bool)
    for i, (prompt, answer) in enumerate(pairs):
        ids_QT[i, : len(prompt) + len(answer)] = prompt + answer
        answer_QT[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
    return ids_QT, answer_QT


def answer_accuracy(cfg: Config, params: dict, tokenizer: Tokenizer, questions: list[dict], ffn_scale: float = 1.0,
                    rows_of: RowsOf | None = None) -> dict:
    """Share of questions whose every answer token is the argmax under teacher forcing. ``rows_of`` gives the rows, by default those of ``params``.

    Returns {"recall_acc", "reasoning_acc", "<task>_chance", "kinds": {kind: accuracy}, "questions": count}; {} without questions.
    """
    if not questions:
        return {}
    ids_QT, answer_QT = encode_questions(questions, tokenizer, cfg.data.seq_len)
    rows_of, merge, vocab = rows_of or live_rows(cfg.model, params), build(cfg.model, with_memory=False), cfg.model.vocab_size
    backbone = {name: value for name, value in params.items() if name != "memory"}
    rows = min(vocab, BATCH * ids_QT.shape[1])  # always enough for the unique ids of a batch

    @jax.jit
    def right(params, ids_BT, rows, inverse_BT, answer_BT):
        logits_BTV = merge(params)(ids_BT, rows, inverse_BT, ffn_scale=ffn_scale)
        hit_BT = jnp.argmax(logits_BTV[:, :-1], axis=-1) == ids_BT[:, 1:]
        return jnp.all(hit_BT | ~answer_BT[:, :-1], axis=-1)

    hits = []
    for start in range(0, len(questions), BATCH):
        ids_BT, answer_BT = ids_QT[start : start + BATCH], answer_QT[start : start + BATCH]
        short = BATCH - len(ids_BT)
        ids_BT, answer_BT = np.pad(ids_BT, ((0, short), (0, 0))), np.pad(answer_BT, ((0, short), (0, 0)))
        unique, inverse = np.unique(ids_BT, return_inverse=True)
        unique_R = np.zeros(rows, np.int32)
        unique_R[: len(unique)] = unique
        inverse_BT = inverse.reshape(ids_BT.shape).astype(np.int32)
        hits.append(np.asarray(right(backbone, ids_BT, rows_of(unique_R), inverse_BT, answer_BT))[: BATCH - short])
    hits = np.concatenate(hits)
    by_task, by_kind, chance = defaultdict(list), defaultdict(list), defaultdict(list)
    for question, hit in zip(questions, hits, strict=True):
        by_task[question["task"]].append(hit)
        by_kind[question["kind"]].append(hit)
        chance[question["task"]].append(question["chance"])
    return {**{f"{task}_acc": float(np.mean(h)) for task, h in by_task.items()},
            **{f"{task}_chance": float(np.mean(c)) for task, c in chance.items()},
            "kinds": {kind: float(np.mean(h)) for kind, h in by_kind.items()}, "questions": len(questions)}
