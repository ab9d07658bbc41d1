"""Which of a fixed number of slots holds the row of which address. Bookkeeping alone: the row data
is the caller's.

    slots_U = cache.lookup(ids_U)               # one step: -1 where absent
    slots_M = cache.admit(ids_U[slots_U < 0])   # -1 where not kept; the caller then copies those
    rows into their slots

Every address has a score, and one rule serves all policies: what is admitted takes free slots
first, then the slots of the rows with the lowest scores, and never the slot of a row with a higher
score than its own. A policy is a choice of scores:

static  The K addresses with the highest corpus counts (equal counts: the lower address) are kept,
no others; none is evicted.
lru     The score is the time of the last use. Ids of one step count as used one after the other
        from the last to the first, so the first of the call is the most recent: with sorted ids of
        a BPE vocabulary, the most frequent. Admitting an id that the latest step did not look up
        counts as a use.
lfu     The score is the number of uses, each worth half as much HALF_LIFE * K looked-up ids later.
        It is kept for absent addresses too. So of two addresses used equally often the one used
        later wins, and a row that is read once does not displace one in steady use. With corpus
        counts, the start is as if text of those frequencies had gone before for ever.
window  As lru, but at the end of a lookup the slots of rows not used in the last ``window`` steps,
        this one included, are free again; an id that was not used in them is not kept."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from flexmemory.errors import UserError, nearest

POLICIES = ("static", "lru", "lfu", "window")
HALF_LIFE = 16  # of an lfu use, in looked-up ids per slot
RESCALE = 512  # half-lives after which lfu scores are brought back to the range of a float64
# slots made ready for eviction at once, in square roots of K: looking for them costs O(K), keeping
# them O(their number)
LOW = 8


class SlotCache:
    """See above. slots: K, more than ``addresses`` is cut to it; addresses: V, ids are 0..V-1;
    counts_V: uint64 corpus counts, which static needs, lfu may start from and the others do not
    use; window: steps. Not safe to call from two threads at once.

    Raises UserError for an unknown policy, negative sizes, static without counts, window without
    steps."""

    def __init__(
        self,
        slots: int,
        addresses: int,
        policy: str,
        *,
        counts_V: np.ndarray | None = None,
        window: int = 0,
    ):
        if policy not in POLICIES:
            raise UserError(f"policy: {policy!r}, {nearest(policy, POLICIES)}")
        if slots < 0 or addresses < 0:
            raise UserError(f"slots: {slots} of {addresses} addresses; neither may be negative")
        if policy == "static" and counts_V is None:
            raise UserError(
                "policy: 'static' keeps the most frequent tokens and this store has no counts;"
                " export with counts or choose 'lru'"
            )
        if counts_V is not None and np.shape(counts_V) != (addresses,):
            raise UserError(
                f"counts: shape {np.shape(counts_V)} for {addresses} addresses; take the counts of"
                " the same vocabulary"
            )
        if (window < 1) if policy == "window" else window:
            raise UserError(
                f"window: {window} with policy {policy!r}; give 1 or more steps with 'window' and"
                " none otherwise"
            )
        self.slots, self.policy, self.window = min(slots, addresses), policy, window
        self.hits = self.misses = self.evictions = self.admitted = 0
        self.absent = 0  # ids of the latest lookup that have no slot
        self._slot_V = np.full(addresses, -1, np.int32)
        self._id_K = np.full(self.slots, -1, np.int64)  # -1: free
        self._score_V = np.zeros(addresses)
        # the same memory, quicker for single numbers
        self._slot_of: Any = self._slot_V.data
        self._score_of: Any = self._score_V.data
        self._clock = 0.0  # ids looked up so far
        self._half_life = HALF_LIFE * self.slots
        self._rescale_at = RESCALE * self._half_life
        self._step_ids: np.ndarray | list[int] = []  # of the latest lookup
        # window: (clock before the step, its ids) of the last steps
        self._steps: deque[tuple[float, np.ndarray]] = deque()
        self._pinned_K = np.zeros(self.slots, bool)  # all False between calls
        self._free_K = np.arange(self.slots, dtype=np.int32)[::-1].copy()  # a stack, its top last
        self._free_count = self.slots
        # slots where the lowest scores are: every other resident row scores above _ceiling
        self._low = np.empty(0, np.int32)
        self._ceiling = -np.inf
        self._preload = np.empty(0, np.int64)
        if counts_V is not None and policy in ("static", "lfu"):
            counts_V = np.asarray(counts_V, np.uint64)
            rising_V = np.iinfo(np.uint64).max - counts_V
            self._preload = np.sort(np.argsort(rising_V, kind="stable")[: self.slots])
            if policy == "static":
                self._score_V[self._preload] = 1
            else:  # uses of the past add up to half_life / ln 2
                total = max(1.0, float(counts_V.sum(dtype=np.float64)))
                self._score_V += counts_V / total * (self._half_life / math.log(2))

    def peek(self, ids_U: np.ndarray) -> np.ndarray:
        """slots_U int32, -1 where absent, and no trace in scores or counters. IndexError for an id
        outside the vocabulary."""
        ids_U = np.asarray(ids_U, np.int64)
        if len(ids_U) and np.minimum.reduce(ids_U) < 0:
            raise IndexError(f"id {ids_U.min()} is negative")
        return self._slot_V[ids_U]

    def lookup(self, ids_U: np.ndarray) -> np.ndarray:
        """One step: slots_U int32 of different ids, -1 where absent. Counts hits and misses and
        updates the scores.

        The slots stay those rows' until the next lookup, and after it while they are among the
        pinned slots of admit."""
        ids_U = np.array(ids_U, np.int64)
        self._step_ids = ids_U
        slots_U = self.peek(ids_U)
        # a step that has all its rows is over in microseconds, so it is looked for first
        all_here = len(ids_U) and np.minimum.reduce(slots_U) >= 0
        self.absent = 0 if all_here else int(np.count_nonzero(slots_U < 0))
        self.hits += len(ids_U) - self.absent
        self.misses += self.absent
        before = self._use(ids_U)
        if self.policy == "window":
            self._steps.append((before, ids_U))
            if len(self._steps) > self.window:
                self._expire()
        return slots_U

    def lookup_few(self, ids: list[int]) -> list[int] | None:
        """:meth:`lookup` of a few ascending ids, in a quarter of its time; None, and no trace,
        where that has more to do: an id is absent, steps leave the window, lfu scores want to be
        brought back. The list is kept until the next step."""
        slot_of, policy = self._slot_of, self.policy
        slots = [slot_of[i] for i in ids]
        if -1 in slots or not ids or ids[0] < 0 or policy == "window":
            return None
        if policy == "lfu" and self._clock > self._rescale_at:
            return None
        self._step_ids, self.absent, count = ids, 0, len(ids)
        self.hits += count
        self._clock = time = self._clock + count
        score_of = self._score_of
        if policy == "lru":
            for i in ids:
                score_of[i] = time
                time -= 1
        elif policy == "lfu":
            for i in ids:
                score_of[i] += math.exp2(min(time / self._half_life, 1000))
                time -= 1
        return slots

    def admit(self, ids_M: np.ndarray, pinned_slots: np.ndarray | Sequence[int] = ()) -> np.ndarray:
        """slots_M int32 in which the rows of different ids now belong, -1 where not kept; present
        ones stay where they are.

        Never gives away a slot of the latest lookup's rows, of ids_M themselves or of pinned_slots
        (rows of earlier steps that are still in use; -1 is skipped). Where slots run short, the ids
        with the highest scores are kept."""
        ids_M = np.asarray(ids_M, np.int64)
        if len(np.unique(ids_M)) != len(ids_M):
            raise ValueError("admit: an id occurs twice")
        slots_M, step_ids = self.peek(ids_M), np.asarray(self._step_ids, np.int64)
        new = np.flatnonzero(slots_M < 0)
        if not len(new) or not self.slots:
            return slots_M
        if self.policy == "static":
            new = new[self._score_V[ids_M[new]] > 0]
        elif self.policy == "window":
            new = new[self._score_V[ids_M[new]] > (self._steps[0][0] if self._steps else np.inf)]
        elif self.policy == "lru":
            self._use(ids_M[new[~np.isin(ids_M[new], step_ids)]])
        new = new[np.argsort(-self._score_V[ids_M[new]], kind="stable")]

        pins = np.concatenate([self._slot_V[step_ids], slots_M, np.asarray(pinned_slots, np.int32)])
        pins = pins[pins >= 0]
        self._pinned_K[pins] = True
        free = self._take_free(len(new), len(pins))
        victims = self._victims(len(new) - len(free), len(pins))
        self._pinned_K[pins] = False

        # falling scores against rising ones: the winners come first
        rivals = ids_M[new[len(free) : len(free) + len(victims)]]
        wins = self._score_V[rivals] > self._score_V[self._id_K[victims]]
        victims = victims[: np.count_nonzero(wins)]
        slots = np.concatenate([free, victims])
        new = new[: len(slots)]
        ids = ids_M[new]
        self._slot_V[self._id_K[victims]] = -1
        self._id_K[slots] = ids
        self._slot_V[ids] = slots
        slots_M[new] = slots
        # a victim's slot is in _low already
        low = free[self._score_V[ids[: len(free)]] <= self._ceiling]
        if len(low):
            self._low = np.union1d(self._low, low)
        self.admitted += len(slots)
        self.evictions += len(victims)
        return slots_M

    def preload_ids(self) -> np.ndarray:
        """Ascending ids worth admitting before the first step: the K highest corpus counts for
        static and lfu, else none."""
        return self._preload.copy()

    @property
    def resident(self) -> int:
        """Slots that hold a row."""
        return self.slots - self._free_count

    def stats(self) -> dict:
        names = ("policy", "slots", "resident", "hits", "misses", "admitted", "evictions")
        return {name: getattr(self, name) for name in names}

    def _use(self, ids_U: np.ndarray) -> float:
        """Scores one use of each id; returns the clock before it, below every score of a time that
        it gives."""
        before = self._clock
        self._clock += len(ids_U)
        times_U = np.arange(self._clock, before, -1)
        if self.policy in ("lru", "window"):
            self._score_V[ids_U] = times_U
        elif self.policy == "lfu" and self.slots:
            half_life = self._half_life  # a growing worth of new uses is a fading one of old uses
            if before > self._rescale_at:
                halvings = int(before // half_life)
                self._score_V *= 0.5**halvings
                self._ceiling *= 0.5**halvings
                self._clock -= halvings * half_life
                times_U -= halvings * half_life
            # finite, however long the step
            self._score_V[ids_U] += np.exp2(np.minimum(times_U / half_life, 1000))
        return before

    def _expire(self) -> None:
        """Frees the slots of the rows last used in the oldest step."""
        _, ids = self._steps.popleft()
        ids = ids[(self._slot_V[ids] >= 0) & (self._score_V[ids] <= self._steps[0][0])]
        slots = self._slot_V[ids]
        self._slot_V[ids] = -1
        self._id_K[slots] = -1
        self._free_K[self._free_count : self._free_count + len(slots)] = slots
        self._free_count += len(slots)

    def _take_free(self, count: int, pins: int) -> np.ndarray:
        """Up to ``count`` free slots that are not pinned. A free slot can be pinned: its row
        expired while still in use."""
        start = max(0, self._free_count - count - pins)
        top = self._free_K[start : self._free_count].copy()
        open_ = ~self._pinned_K[top]
        taken = open_ & (np.cumsum(open_) <= count)
        left = top[~taken]
        self._free_K[start : start + len(left)] = left
        self._free_count = start + len(left)
        return top[taken]

    def _victims(self, count: int, pins: int) -> np.ndarray:
        """Up to ``count`` slots of the rows with the lowest scores that are not pinned, lowest
        first.

        Scores only rise, so a row outside _low stays above _ceiling, and only when _low is used up
        are all slots looked at."""
        if count <= 0:
            return np.empty(0, np.int32)
        low = self._low
        ids = self._id_K[low]
        low = low[(ids >= 0) & (self._score_V[ids] <= self._ceiling)]
        open_ = low[~self._pinned_K[low]]
        if len(open_) < count:
            low = np.flatnonzero(self._id_K >= 0).astype(np.int32)
            scores = self._score_V[self._id_K[low]]
            size = max(2 * count + pins, LOW * math.isqrt(self.slots))
            if size < len(low):
                lowest = np.argpartition(scores, size)[:size]
                low, scores = low[lowest], scores[lowest]
            self._ceiling = scores.max(initial=-np.inf)
            open_ = low[~self._pinned_K[low]]
        self._low = low
        scores = self._score_V[self._id_K[open_]]
        if count < len(open_):
            lowest = np.argpartition(scores, count)[:count]
            open_, scores = open_[lowest], scores[lowest]
        return open_[np.argsort(scores)]


def tier_caches(
    addresses: int,
    slots: tuple[int, int],
    policies: tuple[str, str],
    counts_V: np.ndarray | None,
    window: int = 0,
) -> tuple[SlotCache, SlotCache]:
    """The caches (hot, RAM) of a served model. Where both are static, RAM keeps the next most
    frequent rows. ``window``: of a policy ``window``."""

    def cache(slots: int, policy: str, counts_V: np.ndarray | None) -> SlotCache:
        if not slots and policy == "static":
            policy = "lru"  # an empty tier keeps nothing by any policy, and needs no counts
        counts_V = counts_V if policy in ("static", "lfu") else None
        steps = window if policy == "window" else 0
        return SlotCache(slots, addresses, policy, counts_V=counts_V, window=steps)

    hot = cache(slots[0], policies[0], counts_V)
    if hot.policy == policies[1] == "static" and counts_V is not None:
        counts_V = counts_V.copy()
        counts_V[hot.preload_ids()] = 0
    return hot, cache(slots[1], policies[1], counts_V)
