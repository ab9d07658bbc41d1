"""How many rows a cache has at hand while text is decoded one token at a time, MemoryLLM section
2.3.2 (proposed there, not measured).
"""

import heapq

import numpy as np

from flexmemory.analysis.trained import Trained, not_applicable
from flexmemory.data.pipeline import eval_batches
from flexmemory.data.shards import read_train_counts
from flexmemory.models.accounting import DTYPE_BYTES
from flexmemory.runtime.budget import Text, hit_rate
from flexmemory.runtime.cache import SlotCache

SHARES = (0.01, 0.02, 0.05, 0.10, 0.25, 0.50)  # of V, slots of the cache
POLICIES = ("lru", "lfu", "static")
LONGEST = 16_384  # tokens at most: one costs some 20 microseconds in every cache


def hit_curves(trained: Trained) -> dict:
    """Hit rates of runtime/cache.py's policies over the validation tokens, beside a bound and what
    runtime/budget.py measures on tokens drawn from the counts.

    All caches start empty, so a row's first use is a miss for all of them. static keeps the most
    frequent tokens of the training data alone and lfu starts from their counts. The bound is
    clairvoyant (Belady's MIN): it evicts the row that is used again last, and lets a missed row go
    by where that is the row itself, as static and lfu may too; so no policy can have more hits.
    "expected": with independent tokens, as ``flexmemory generate --plan`` says.

    {"tokens", "different", "cold": share of first uses, "row_bytes": of one token in the compute
    dtype, "points": [{"share": of V, "slots", "bytes", "clairvoyant", "lru", "lfu", "static",
    "expected": {policy: rate}}]}. Tokens are those of the model's evaluation, LONGEST at most.
    """
    if not trained.memory_layers:
        return not_applicable("no memory layer, so no rows to cache")
    counts_V, vocab = read_train_counts(trained.cfg.data.path), trained.val.vocab_size
    tokens, drawn, points = decoded_tokens(trained), Text.draw(counts_V, batch=1), []
    row_bytes = (
        sum(trained.specs[layer].row_width for layer in trained.memory_layers)
        * DTYPE_BYTES[trained.cfg.model.compute_dtype]
    )
    for share in SHARES:
        slots = max(1, round(share * vocab))
        rates = {name: hits(tokens, slots, name, counts_V) / len(tokens) for name in POLICIES}
        expected = {name: hit_rate(drawn, counts_V, slots, name) for name in POLICIES}
        points.append(
            {
                "share": share,
                "slots": slots,
                "bytes": slots * row_bytes,
                "clairvoyant": clairvoyant_hits(tokens, slots) / len(tokens),
                **rates,
                "expected": expected,
            }
        )
    different = len(np.unique(tokens))
    return {
        "applies": True,
        "tokens": len(tokens),
        "different": different,
        "cold": different / len(tokens),
        "row_bytes": row_bytes,
        "points": points,
    }


def decoded_tokens(trained: Trained) -> np.ndarray:
    """Input ids of the evaluation's windows, one after another."""
    cfg = trained.cfg
    batches = eval_batches(
        trained.val,
        seq_len=cfg.data.seq_len,
        batch_size=1,
        max_tokens=min(cfg.train.eval_tokens or LONGEST, LONGEST),
    )
    return np.concatenate([batch["ids"][batch["weight"] > 0] for batch in batches])


def hits(tokens: np.ndarray, slots: int, policy: str, counts_V: np.ndarray) -> int:
    """Lookups of a SlotCache, empty at first, that hit; a missed row is offered to it."""
    counts = counts_V if policy in ("static", "lfu") else None
    cache = SlotCache(slots, len(counts_V), policy, counts_V=counts)
    for token in tokens[:, None]:
        if cache.lookup(token)[0] < 0:
            cache.admit(token)
    return cache.hits


def clairvoyant_hits(tokens: np.ndarray, slots: int) -> int:
    """Hits of the best possible use of the slots: Belady's MIN with the right not to keep a row."""
    count = never = len(tokens)
    next_use, upcoming = np.full(count, never), dict[int, int]()
    for i in range(count - 1, -1, -1):
        next_use[i] = upcoming.get(tokens[i], never)
        upcoming[tokens[i]] = i
    hit_count, resident = 0, set[int]()
    # heap of (-next use, token); uses that are over stay in it, below all that are to come
    latest: list[tuple[int, int]] = []
    for token, again in zip(tokens.tolist(), next_use.tolist(), strict=True):
        if token in resident:
            hit_count += 1
        elif len(resident) == slots:
            if -latest[0][0] <= again:
                continue
            resident.remove(heapq.heappop(latest)[1])
        resident.add(token)
        heapq.heappush(latest, (-again, token))
    return hit_count
