"""Measures that need a store or a clock: the fold with its proof, decoding from the device and from
disk, the rows of some tokens. The others are in flexmemory/analysis.
"""

import contextlib
from pathlib import Path

import numpy as np

from flexmemory.analysis.trained import Trained, not_applicable
from flexmemory.models.accounting import account
from flexmemory.run_folder import read_metrics
from flexmemory.runtime.engine import Engine
from flexmemory.runtime.rows import Budgets
from flexmemory.runtime.verify import verify
from flexmemory.tkv.export import export
from flexmemory.tkv.store import open_store

DECODE_TOKENS = 48
RAM_SHARE = 0.25  # of the table, so that decoding really reads from disk
PROMPTS = ("Question: Where was", "The birthplace of", "def __init__(self,")
PROOF = ("ok", "rows_max_abs_diff", "logits_max_abs_diff", "logits_max_rel_diff", "greedy_equal")
SHOWN_TOKENS, NEAREST = 3, 4
FREQUENT = 4096  # tokens among which the nearest are looked for


def fold(trained: Trained) -> dict:
    """The run exported to WORKDIR/store (float32) and compared with the live model: the figures of
    ``flexmemory verify``, seconds and bytes.
    """
    exported = export(trained.workdir, store(trained), progress=False)
    proof = verify(store(trained), trained.workdir)
    costs = {"export_s": exported["seconds"], "table_bytes": table_bytes(trained)}
    return costs | {key: proof[key] for key in PROOF}


def decode(trained: Trained) -> dict:
    """Greedy decoding of 48 tokens, one sequence at a time, with the rows on the device
    ("resident", the live model's) and with a quarter of them in RAM and all on disk ("offloaded"):
    tokens/s of both over the first prompt, the share of its lookups that RAM answered, all texts.
    """
    export(trained.workdir, store(trained), progress=False)
    ram = int(table_bytes(trained) * RAM_SHARE)
    resident, _, live = timed(Engine.from_run(trained.workdir, max_batch=1))
    offloaded, rows, disk = timed(Engine(store(trained), Budgets(ram=ram), max_batch=1))
    lookups = rows["ram"]["hits"] + rows["ram"]["misses"]
    texts = zip(PROMPTS, disk, live, strict=True)
    return {
        "resident": resident,
        "offloaded": offloaded,
        "hit_rate": rows["ram"]["hits"] / lookups if lookups else None,
        "continuations": [{"prompt": p, "disk": d, "live": v} for p, d, v in texts],
    }


def timed(engine: Engine) -> tuple[float, dict, list[str]]:
    """(tokens/s with compilation and prefill left out, counters of the row source, texts)"""

    def text(prompt):
        return engine.generate([prompt], max_tokens=DECODE_TOKENS, stop_at_eos=False)[0].text

    with engine:
        first = text(PROMPTS[0])
        rate, rows = engine.stats["decode_tokens_per_s"], engine.source.stats()
        return rate, rows, [first, *map(text, PROMPTS[1:])]


def tokens(trained: Trained) -> dict:
    """What the store's table holds of the three most frequent whole words: {"tokens": [{"token",
    "count", "norms": of its row in each memory layer, "nearest": [{"token", "cosine"}]}]}; cosines
    over the rows of all layers together, among the 4,096 most frequent tokens.
    """
    if not trained.memory_layers:
        return not_applicable("no layer has rows")
    export(trained.workdir, store(trained), progress=False)
    with contextlib.closing(open_store(store(trained))) as opened:
        counts_V = opened.counts()
        ids_R = np.argsort(counts_V, kind="stable")[::-1][:FREQUENT]
        ids_R = ids_R[counts_V[ids_R] > 0]
        rows, groups = opened.read_rows(ids_R), opened.groups
    texts = [trained.tokenizer.decode([int(i)]) for i in ids_R]
    words = [r for r, text in enumerate(texts) if text[:1] == " " and text[1:].isalpha()]
    norms = {
        layer: np.linalg.norm(rows[group.name][:, place].astype(np.float64), axis=1)
        for group in groups
        for place, layer in enumerate(group.layers)
    }
    flat_RX = np.concatenate([r.reshape(len(ids_R), -1) for r in rows.values()], axis=1)
    flat_RX = flat_RX / np.linalg.norm(flat_RX, axis=1, keepdims=True)
    found = []
    for r in [r for r in words if len(texts[r]) > 3][:SHOWN_TOKENS]:
        cosines_R = flat_RX @ flat_RX[r]
        near = [n for n in np.argsort(-cosines_R, kind="stable") if n != r][:NEAREST]
        nearest = [{"token": texts[n], "cosine": float(cosines_R[n])} for n in near]
        own = [float(norms[layer][r]) for layer in sorted(norms)]
        count = int(counts_V[ids_R[r]])
        found.append({"token": texts[r], "count": count, "norms": own, "nearest": nearest})
    return {"tokens": found}


def store(trained: Trained) -> Path:
    return trained.workdir / "store"


def table_bytes(trained: Trained) -> int:
    return account(trained.cfg.model)["table_bytes"]["float32"]


def training_curve(trained: Trained) -> dict:
    """{"points": [(step, training loss)]} as logged."""
    rows = read_metrics(trained.workdir)
    return {"points": [(row["step"], row["loss"]) for row in rows if "loss" in row]}
