"""In-context tasks: everything that the answer needs stands in the prompt, so that no table of
facts can help.

Kinds: `copy` (a random word sequence stands twice; go on with the second), `lookup1` (random pairs;
give a word's partner) and `lookup2` (the partner's partner). Words come from one pool for training
and evaluation; the bindings are fresh in each document, and a checksum of the bindings decides
whether they may be trained on, so that no evaluation context is ever seen in training.

Everything is a pure function of the options; no download.
"""

import dataclasses
import random
import zlib
from collections.abc import Iterator

from flexmemory.errors import UserError

KINDS = ("copy", "lookup1", "lookup2")
_SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")
_HELD_OUT = 16  # one context in so many is kept for evaluation


@dataclasses.dataclass(frozen=True)
class Options:
    """n: training documents; eval: questions in all; words: size of the word pool; length: words of
    a copy; pairs: bindings of a lookup; seed.
    """

    n: int = 2000
    eval: int = 300
    words: int = 64
    length: int = 8
    pairs: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 0 or self.eval < 0:
            raise UserError(f"tasks: n={self.n} and eval={self.eval} are counts; give 0 or more")
        if self.length < 2 or self.pairs < 2:
            raise UserError(
                f"tasks: length={self.length} and pairs={self.pairs} must be at least 2"
            )
        need = max(self.length, 3 * self.pairs)
        if not need <= self.words <= 1000:
            raise UserError(
                f"tasks: words={self.words} is outside {need}..1000, the range for"
                f" length={self.length} and pairs={self.pairs}"
            )


def word_pool(opts: Options) -> tuple[str, ...]:
    """The invented words; all of one length, so that none is the beginning of another."""
    rng = random.Random(f"tasks-words-{opts.seed}")
    pool: dict[str, None] = {}
    while len(pool) < opts.words:
        pool[rng.choice(_SYLLABLES) + rng.choice(_SYLLABLES)] = None
    return tuple(pool)


def documents(opts: Options) -> Iterator[tuple[str, str]]:
    """(doc_id, text) of `n` training documents, the kinds in turn; a lookup document asks for half
    of its words, each with its answer.
    """
    pool = word_pool(opts)
    for i in range(opts.n):
        kind = KINDS[i % len(KINDS)]
        context, asks = _draw(
            random.Random(f"tasks-train-{opts.seed}-{i}"), kind, pool, opts, held_out=False
        )
        asks = asks[-1:] if kind == "copy" else asks[: max(1, opts.pairs // 2)]
        yield f"tasks/{i:07d}", context + "".join(prompt + answer + "\n" for prompt, answer in asks)


def questions(opts: Options) -> list[dict]:
    """Reasoning questions: dicts of task, kind, prompt, answer (one word with its leading space),
    chance.

    `chance` is that of a guess among the context's candidate words: 1/length, or 1/pairs.
    """
    pool = word_pool(opts)
    result = []
    for i in range(opts.eval):
        kind = KINDS[i % len(KINDS)]
        rng = random.Random(f"tasks-eval-{opts.seed}-{i}")
        context, asks = _draw(rng, kind, pool, opts, held_out=True)
        prompt, answer = rng.choice(asks)
        chance = 1 / (opts.length if kind == "copy" else opts.pairs)
        result.append(
            {
                "task": "reasoning",
                "kind": kind,
                "prompt": context + prompt,
                "answer": answer,
                "chance": chance,
            }
        )
    return result


def is_held_out(context: str) -> bool:
    """Whether a context is kept for evaluation; training documents never hold such a one."""
    return zlib.crc32(context.encode()) % _HELD_OUT == 0


def _draw(
    rng: random.Random, kind: str, pool: tuple[str, ...], opts: Options, held_out: bool
) -> tuple[str, list[tuple[str, str]]]:
    while True:
        context, asks = (
            _copy(rng, pool, opts)
            if kind == "copy"
            else _lookup(rng, pool, opts, hops=int(kind[-1]))
        )
        if is_held_out(context) == held_out:
            return context, asks


def _copy(
    rng: random.Random, pool: tuple[str, ...], opts: Options
) -> tuple[str, list[tuple[str, str]]]:
    words = rng.sample(pool, opts.length)
    context = "Say twice: " + " ".join(words) + ".\n"
    # The last prompt with its answer is the whole second round, so training documents need no
    # other.
    return context, [
        ("Again:" + "".join(f" {w}" for w in words[:k]), f" {words[k]}")
        for k in range(1, len(words))
    ]


def _lookup(
    rng: random.Random, pool: tuple[str, ...], opts: Options, hops: int
) -> tuple[str, list[tuple[str, str]]]:
    words = rng.sample(pool, opts.pairs * (hops + 1))
    chains = [words[i : i + hops + 1] for i in range(0, len(words), hops + 1)]
    bindings = [(chain[h], chain[h + 1]) for chain in chains for h in range(hops)]
    rng.shuffle(bindings)
    context = "Given: " + ", ".join(f"{a} to {b}" for a, b in bindings) + ".\n"
    steps = "one step" if hops == 1 else "two steps"
    rng.shuffle(chains)
    return context, [(f"From {chain[0]} {steps}:", f" {chain[-1]}") for chain in chains]
