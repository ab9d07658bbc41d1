"""The slot cache against plain models that look at the whole history: same hits, same rows kept,
never a slot given away.
"""

import math
from collections import OrderedDict, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flexmemory.errors import UserError
from flexmemory.runtime import cache as cache_module
from flexmemory.runtime.cache import HALF_LIFE, LOW, POLICIES, RESCALE, SlotCache

V = 14
ids_lists = st.lists(st.integers(0, V - 1), unique=True, max_size=V)


class AgainstModel(RuleBasedStateMachine):
    """The model knows every use since the start and what is resident; it learns the slot numbers
    from the cache.

    ``slab`` stands for the row data, and ``in_flight`` for the rows that earlier steps still read.
    """

    @initialize(
        policy=st.sampled_from(POLICIES),
        slots=st.integers(0, V + 2),
        counted=st.booleans(),
        window=st.integers(1, 3),
        counts=st.permutations(range(V)),
        low=st.sampled_from([0, 1, 8]),
        rescale=st.sampled_from([0.25, 512]),
    )
    def start(self, policy, slots, counted, window, counts, low, rescale):
        cache_module.LOW, cache_module.RESCALE = (
            low,
            rescale,
        )  # small, so that the rare paths run at this size
        self.policy, self.window = policy, window
        self.counts = np.asarray(counts, np.uint64) if counted or policy == "static" else None
        self.cache = SlotCache(
            slots, V, policy, counts_V=self.counts, window=window if policy == "window" else 0
        )
        self.slots = min(slots, V)
        assert self.cache.slots == self.slots
        self.now = 0
        self.uses: dict[int, list[int]] = {i: [] for i in range(V)}
        self.steps: deque[set[int]] = deque(maxlen=window)
        self.slot_of: dict[int, int] = {}
        self.slab = np.full(self.slots, -1)
        self.step: list[int] = []
        self.in_flight: dict[int, int] = {}  # slot -> id
        self.total = dict.fromkeys(("hits", "misses", "admitted", "evictions"), 0)

    def teardown(self):
        cache_module.LOW, cache_module.RESCALE = LOW, RESCALE

    def use(self, ids):
        self.now += len(ids)
        for place, i in enumerate(ids):
            self.uses[i].append(self.now - place)

    def score(self, i):
        if self.policy == "static":
            return 1 if i in self.members() else 0
        if self.policy in ("lru", "window"):
            return max(self.uses[i], default=0)
        half_life = HALF_LIFE * max(1, self.slots)
        start = (
            0
            if self.counts is None
            else self.counts[i] / self.counts.sum() * half_life / math.log(2)
        )
        return start + sum(2 ** (t / half_life) for t in self.uses[i])

    def members(self):
        return set(np.argsort(self.counts)[::-1][: self.slots].tolist())

    def admit(self, ids, pinned=()):
        """Admits to both; writes what the cache says into the slab."""
        new = [i for i in ids if i not in self.slot_of]
        if self.policy == "static":
            new = [i for i in new if i in self.members()]
        elif self.policy == "window":
            new = [i for i in new if any(i in used for used in self.steps)]
        elif self.policy == "lru" and self.slots:
            self.use([i for i in new if i not in self.step])
        new.sort(key=self.score, reverse=True)
        safe = {*pinned} | {self.slot_of[i] for i in [*self.step, *ids] if i in self.slot_of}
        room = len(set(range(self.slots)) - set(self.slot_of.values()) - safe)
        evictable = sorted(
            (i for i, slot in self.slot_of.items() if slot not in safe), key=self.score
        )
        kept = []
        for i in new:
            if room:
                room -= 1
            elif evictable and self.score(evictable[0]) < self.score(i):
                del self.slot_of[evictable.pop(0)]
                self.total["evictions"] += 1
            else:
                break
            kept.append(i)
        got = self.cache.admit(np.asarray(ids, np.int64), pinned)
        assert got.dtype == np.int32 and got.shape == (len(ids),)
        for i, slot in zip(ids, got.tolist()):
            if i in self.slot_of:
                assert slot == self.slot_of[i]
            elif i in kept:
                assert (
                    0 <= slot < self.slots
                    and slot not in safe
                    and slot not in self.slot_of.values()
                )
                self.slot_of[i] = slot
                self.slab[slot] = i
                self.total["admitted"] += 1
            else:
                assert slot == -1

    @rule(ids=ids_lists, in_flight=st.booleans(), few=st.booleans())
    def one_step(self, ids, in_flight, few):
        """A step; its rows may stay in use during the next ones."""
        got = None
        if few:
            ids = sorted(ids)
            got = self.cache.lookup_few(ids)
            assert got is None or len(got) == len(ids) > 0 and self.policy != "window"
            if got is None and (
                self.policy in ("lru", "static")
                or self.policy == "lfu"
                and cache_module.RESCALE > 1
            ):
                assert not ids or any(i not in self.slot_of for i in ids)
        if got is None:
            asked = np.asarray(ids, np.int64)
            got = self.cache.lookup(asked)
            asked[:] = 0  # the caller's to use again
        got = np.asarray(got, np.int32) if few else got
        assert got.dtype == np.int32
        assert got.tolist() == [self.slot_of.get(i, -1) for i in ids]
        assert self.slab[got[got >= 0]].tolist() == [i for i, slot in zip(ids, got) if slot >= 0]
        self.use(ids)
        self.step = ids
        self.steps.append(set(ids))
        self.total["hits"] += int((got >= 0).sum())
        self.total["misses"] += int((got < 0).sum())
        if self.policy == "window":
            self.slot_of = {
                i: slot for i, slot in self.slot_of.items() if any(i in used for used in self.steps)
            }
        held = {slot: int(self.slab[slot]) for slot in got[got >= 0].tolist()}
        missing = [i for i, slot in zip(ids, got) if slot < 0]
        half = (
            len(missing) // 2
        )  # in two calls: the second must not take the slots of the first either
        for part in (missing[:half], missing[half:]):
            self.admit(part, [*self.in_flight, -1])
            held |= {self.slot_of[i]: i for i in part if i in self.slot_of}
            for slot, i in {**self.in_flight, **held}.items():
                assert self.slab[slot] == i
        self.in_flight = self.in_flight | held if in_flight else held

    @rule(ids=ids_lists)
    def read_ahead(self, ids):
        """Admits ids that this step did not ask for."""
        if (
            self.policy == "lfu" and self.counts is None
        ):  # rows that were never used and never counted are equal: no order among them
            ids = [i for i in ids if self.uses[i]]
        self.admit(ids, list(self.in_flight))
        for slot, i in self.in_flight.items():
            assert self.slab[slot] == i

    @rule()
    def preload(self):
        ids = self.cache.preload_ids()
        assert ids.tolist() == (
            sorted(self.members())
            if self.counts is not None and self.policy in ("static", "lfu")
            else []
        )
        self.admit(ids.tolist(), list(self.in_flight))

    @invariant()
    def consistent(self):
        slots = self.cache.peek(np.arange(V)).tolist()
        assert {i: slot for i, slot in enumerate(slots) if slot >= 0} == self.slot_of
        assert len(set(self.slot_of.values())) == len(self.slot_of)
        stats = self.cache.stats()
        assert stats["resident"] == len(self.slot_of)
        assert {name: stats[name] for name in self.total} == self.total


TestAgainstModel = AgainstModel.TestCase
TestAgainstModel.settings = settings(
    max_examples=150, stateful_step_count=25, deadline=None, derandomize=True
)


def run(cache, steps):
    """Lookup and admission of each step; the hits of each."""
    hits = []
    for ids in steps:
        ids = np.asarray(ids, np.int64)
        slots = cache.lookup(ids)
        hits.append(ids[slots >= 0].tolist())
        cache.admit(ids[slots < 0])
    return hits


def resident(cache, addresses):
    return set(np.flatnonzero(cache.peek(np.arange(addresses)) >= 0).tolist())


def zipf_steps(seed, steps, addresses, size):
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, addresses + 1)
    return [np.unique(rng.choice(addresses, size, p=p / p.sum())) for _ in range(steps)]


@pytest.mark.parametrize(("slots", "size"), [(1, 1), (300, 1), (300, 40)])
def test_lru_against_an_ordered_dict(slots, size):
    """Large enough that the lowest scores are taken from the prepared set and that it is made anew
    many times.
    """
    cache, order = SlotCache(slots, 4000, "lru"), OrderedDict()
    steps = zipf_steps(0, 1500, 4000, size)
    expected = []
    for ids in steps:
        ids = ids.tolist()
        expected.append([i for i in ids if i in order])
        for i in reversed(ids):  # the first of the call is the most recent
            order.pop(i, None)
            order[i] = None
            if len(order) > slots:
                order.popitem(last=False)
    assert run(cache, steps) == expected
    assert resident(cache, 4000) == set(order)
    assert cache.stats()["evictions"] > 100


@pytest.mark.parametrize("counted", [False, True])
def test_lfu_against_a_naive_model(counted):
    slots, addresses = 200, 2000
    counts = (
        np.random.default_rng(1).permutation(np.arange(addresses, dtype=np.uint64))
        if counted
        else None
    )
    cache = SlotCache(slots, addresses, "lfu", counts_V=counts)
    cache.admit(cache.preload_ids())
    worth = (
        np.zeros(addresses)
        if counts is None
        else counts / counts.sum() * (HALF_LIFE * slots / math.log(2))
    )
    kept = set() if counts is None else set(np.argsort(counts)[-slots:].tolist())
    now, expected = 0, []
    steps = zipf_steps(2, 600, addresses, 30)
    for ids in steps:
        now += len(ids)
        worth[ids] += 2 ** ((now - np.arange(len(ids))) / (HALF_LIFE * slots))
        expected.append([i for i in ids.tolist() if i in kept])
        held = kept & set(ids.tolist())
        for i in sorted(set(ids.tolist()) - kept, key=lambda i: -worth[i]):
            out = min(kept - held, key=lambda j: worth[j]) if len(kept) == slots else None
            if out is None or worth[out] < worth[i]:
                kept.discard(out)
                kept.add(i)
                held.add(i)
    assert run(cache, steps) == expected
    assert resident(cache, addresses) == kept
    assert cache.stats()["evictions"] > 100


def test_lfu_keeps_the_frequent_through_a_burst_and_forgets_them_later():
    cache = SlotCache(4, 1000, "lfu")
    run(cache, [[0, 1, 2, 3]] * 10)
    run(cache, [[i] for i in range(100, 120)])
    assert resident(cache, 1000) == {0, 1, 2, 3}
    run(cache, [[4, 5, 6, 7]] * (20 * HALF_LIFE))
    assert resident(cache, 1000) == {4, 5, 6, 7}


def test_lfu_scores_brought_back_to_range_change_nothing(monkeypatch):
    monkeypatch.setattr(cache_module, "LOW", 1)
    steps = zipf_steps(3, 1500, 500, 12)
    cache = SlotCache(60, 500, "lfu", counts_V=np.arange(500, dtype=np.uint64))
    hits = run(cache, steps)
    assert sum(map(len, steps)) > 5 * 2 * HALF_LIFE * 60
    monkeypatch.setattr(cache_module, "RESCALE", 2)
    again = SlotCache(60, 500, "lfu", counts_V=np.arange(500, dtype=np.uint64))
    assert run(again, steps) == hits and again.stats() == cache.stats()
    assert again._clock < 4 * HALF_LIFE * 60


@given(st.lists(ids_lists, max_size=12), st.integers(1, 4))
def test_window_against_a_deque_of_sets(steps, window):
    cache, last = SlotCache(V, V, "window", window=window), deque(maxlen=window)
    for ids in steps:
        assert run(cache, [ids]) == [[i for i in ids if any(i in used for used in last)]]
        last.append(set(ids))
        assert resident(cache, V) == set().union(*last)


def test_window_without_room_lets_the_oldest_go():
    cache = SlotCache(4, 100, "window", window=3)
    run(cache, [[1, 2], [3, 4], [5]])
    assert resident(cache, 100) == {
        1,
        3,
        4,
        5,
    }  # 2 was used before 1: the first of a call is the most recent


def test_window_free_and_evicted_slots_in_one_call():
    cache = SlotCache(3, 100, "window", window=2)
    run(cache, [[1, 2, 3], [4, 5]])  # 3 and 2 go, 1 stays and expires in the next step
    cache.lookup(np.asarray([6, 7]))
    assert len(set(cache.admit(np.asarray([6, 7])).tolist())) == 2
    assert resident(cache, 100) == {4, 6, 7}


@pytest.mark.parametrize("policy", ["lru", "lfu", "window"])
def test_a_miss_does_not_evict_a_row_handed_out_in_the_same_step(policy):
    cache = SlotCache(3, 100, policy, window=9 if policy == "window" else 0)
    slab = np.full(3, -1)
    run(cache, [[1, 2, 3]])
    slab[cache.peek([1, 2, 3])] = [1, 2, 3]
    ids = np.asarray([2, 10, 11, 12, 3])
    slots = cache.lookup(ids)
    assert (slots >= 0).tolist() == [True, False, False, False, True]
    for i in (10, 11, 12):  # one at a time: 10 takes the slot of 1, and there is no other to give
        slot = cache.admit(np.asarray([i]))
        assert (slot >= 0).tolist() == [i == 10]
        slab[slot[slot >= 0]] = i
    assert slab[slots[[0, 4]]].tolist() == [2, 3] and slab[cache.peek([10])] == 10


def test_static_is_loaded_once_and_never_evicts():
    counts = np.asarray([5, 0, 9, 5, 1, 5], np.uint64)
    cache = SlotCache(3, 6, "static", counts_V=counts)
    assert cache.preload_ids().tolist() == [0, 2, 3]  # of the equal 0, 3 and 5 the lower ones
    first = cache.admit(cache.preload_ids())
    assert (
        sorted(first) == [0, 1, 2] and cache.admit(cache.preload_ids()).tolist() == first.tolist()
    )
    assert run(cache, [[0, 1, 5], [4, 5], [1, 5], [3, 5]]) == [[0], [], [], [3]]
    assert cache.admit(np.asarray([5, 1])).tolist() == [-1, -1]
    assert cache.stats() == {
        "policy": "static",
        "slots": 3,
        "resident": 3,
        "hits": 2,
        "misses": 7,
        "admitted": 3,
        "evictions": 0,
    }


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [0, 20, 50])
def test_no_slots_and_slots_for_all(policy, slots):
    cache = SlotCache(
        slots,
        20,
        policy,
        counts_V=np.arange(20, dtype=np.uint64),
        window=99 if policy == "window" else 0,
    )
    cache.admit(cache.preload_ids())
    steps = zipf_steps(4, 40, 20, 6)
    run(cache, steps)
    assert len(resident(cache, 20)) == cache.stats()["resident"] <= cache.slots == min(slots, 20)
    seen = sorted(set(np.concatenate(steps).tolist()))
    assert cache.stats()["evictions"] == 0 and run(cache, [seen]) == [seen if slots else []]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlotCache(3, 9, "lifo"), "policy: 'lifo'"),
        (
            lambda: SlotCache(3, 9, "static"),
            "policy: 'static' keeps the most frequent tokens and this store has no counts",
        ),
        (
            lambda: SlotCache(3, 9, "lfu", counts_V=np.zeros(8, np.uint64)),
            r"counts: shape \(8,\) for 9 addresses",
        ),
        (lambda: SlotCache(3, 9, "window"), "window: 0 with policy 'window'"),
        (lambda: SlotCache(3, 9, "lru", window=2), "window: 2 with policy 'lru'"),
        (lambda: SlotCache(-1, 9, "lru"), "slots: -1 of 9 addresses"),
    ],
)
def test_user_errors(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_ids_that_cannot_be():
    cache = SlotCache(3, 9, "lru")
    for ids in ([-1], [9]):
        with pytest.raises(IndexError):
            cache.lookup(np.asarray(ids))
    with pytest.raises(ValueError, match="twice"):
        cache.admit(np.asarray([4, 4]))
