"""Fictional biographies and questions about them: knowledge that only weights or tables can hold.

Each of `people` invented persons has one value per attribute. Training text states every person's
attributes in `docs` biographies (attributes in random order, each in one of several phrasings) and,
for a share `qa` of the people, also in question and answer form. Recall questions then ask, for
everybody, with no fact in the prompt. One more biography per person, of the same facts, is for
validation: taking a person's only statement out of training would ask for what nobody was told.

Everything is a pure function of the options; no download.
"""

import dataclasses
import random
from collections.abc import Iterator

from flexmemory.errors import UserError

_ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gl",
    "h",
    "j",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "y",
    "z",
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_CODAS = ("l", "n", "r", "s", "sh", "m", "th", "nd", "k", "x")
_MAX_PEOPLE = 1_000_000
_POOL = 16  # values per attribute: guessing is right once in 16


@dataclasses.dataclass(frozen=True)
class Attribute:
    """One relation. Phrasings use {name} and end with {value}, so that each is also a cloze prompt
    once cut there.
    """

    key: str
    question: str
    phrasings: tuple[str, ...]
    values: tuple[str, ...] | None  # None: invented words
    tail: str = ""  # joined to an invented word, " Works" makes "Brelan Works"


ATTRIBUTES = (
    Attribute(
        "birth_city",
        "Where was {name} born?",
        (
            "{name} was born in the city of {value}",
            "{name} first saw the light of day in {value}",
            "The birthplace of {name} is {value}",
        ),
        None,
    ),
    Attribute(
        "employer",
        "Who employs {name}?",
        (
            "{name} works for {value}",
            "{name} is employed by {value}",
            "The employer of {name} is {value}",
        ),
        None,
        " Works",
    ),
    Attribute(
        "profession",
        "What is the profession of {name}?",
        (
            "The profession of {name} is that of {value}",
            "{name} earns a living as {value}",
            "{name} was trained as {value}",
        ),
        (
            "baker",
            "carpenter",
            "chemist",
            "dentist",
            "editor",
            "farmer",
            "gardener",
            "jeweller",
            "lawyer",
            "miner",
            "nurse",
            "painter",
            "sailor",
            "tailor",
            "violinist",
            "welder",
        ),
    ),
    Attribute(
        "favourite_food",
        "What is the favourite food of {name}?",
        (
            "The favourite food of {name} is {value}",
            "{name} likes nothing better than {value}",
            "At home {name} always cooks {value}",
        ),
        (
            "apricots",
            "beans",
            "cabbage",
            "dumplings",
            "eggs",
            "figs",
            "goulash",
            "honey",
            "lentils",
            "mushrooms",
            "noodles",
            "olives",
            "pancakes",
            "rice",
            "soup",
            "trout",
        ),
    ),
    Attribute(
        "birth_year",
        "In which year was {name} born?",
        (
            "{name} was born in the year {value}",
            "The birth year of {name} is {value}",
            "The life of {name} began in {value}",
        ),
        tuple(str(year) for year in range(1951, 1951 + _POOL)),
    ),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """people: number of persons; docs: biographies of each in training; qa: share of the people
    with question and answer documents; seed.
    """

    people: int = 64
    docs: int = 16
    qa: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.people <= _MAX_PEOPLE:
            raise UserError(f"facts: people={self.people} is outside 1..{_MAX_PEOPLE}")
        if self.docs < 1:
            raise UserError(
                f"facts: docs={self.docs} must be at least 1, else nobody is told the facts"
            )
        if not 0 <= self.qa <= 1:
            raise UserError(f"facts: qa={self.qa} is a share; give a number in 0..1")


def people(opts: Options) -> list[tuple[str, dict[str, str]]]:
    """(full name, {attribute key: value}) of each person; full names are distinct."""
    rng = random.Random(f"facts-people-{opts.seed}")
    pools = value_pools(opts)
    seen: set[str] = set()
    result: list[tuple[str, dict[str, str]]] = []
    while len(result) < opts.people:
        name = f"{_word(rng)} {_word(rng)}"
        if name in seen:
            continue
        seen.add(name)
        result.append(
            (name, {attribute.key: rng.choice(pools[attribute.key]) for attribute in ATTRIBUTES})
        )
    return result


def value_pools(opts: Options) -> dict[str, tuple[str, ...]]:
    """The possible values of each attribute; within a pool none is the beginning of another."""
    rng = random.Random(f"facts-pools-{opts.seed}")
    pools = {}
    for attribute in ATTRIBUTES:
        pool = list(attribute.values or ())
        while len(pool) < _POOL:
            word = _word(rng)
            if not any(word.startswith(other) or other.startswith(word) for other in pool):
                pool.append(word)
        pools[attribute.key] = tuple(value + attribute.tail for value in pool)
    return pools


def documents(opts: Options) -> Iterator[tuple[str, str]]:
    """(doc_id, text) of every document, in an order that mixes the people.

    Ids are `facts:train/…` and `facts:val/…`: the split of a fact is not left to chance (see
    `prepare.split_of`).
    """
    everybody = people(opts)
    for d in range(opts.docs + 1):
        split = "train" if d < opts.docs else "val"
        for p, (name, values) in enumerate(everybody):
            rng = random.Random(f"facts-doc-{opts.seed}-{p}-{d}")
            yield f"facts:{split}/{p:06d}/bio{d:03d}", _biography(rng, name, values)
            if d < opts.docs and asks_in_training(p, opts):
                yield f"facts:{split}/{p:06d}/qa{d:03d}", _interview(rng, name, values)


def questions(opts: Options) -> list[dict]:
    """Recall questions: dicts of task, kind, prompt, answer (with its leading space), chance,
    subject, attribute.

    Kinds: `cloze` (a phrasing of the biographies), `qa_seen` (the person's question and answer
    documents are in training), `qa_held_out` (other people's are, this person's are not: the fact
    must be carried over from the biographies).
    """
    result = []
    for p, (name, values) in enumerate(people(opts)):
        rng = random.Random(f"facts-questions-{opts.seed}-{p}")
        for attribute in ATTRIBUTES:
            item = {
                "task": "recall",
                "answer": f" {values[attribute.key]}",
                "chance": 1 / _POOL,
                "subject": name,
                "attribute": attribute.key,
            }
            cloze = _fill(rng.choice(attribute.phrasings), name, "").rstrip()
            kind = "qa_seen" if asks_in_training(p, opts) else "qa_held_out"
            result.append({**item, "kind": "cloze", "prompt": cloze})
            result.append({**item, "kind": kind, "prompt": _question(attribute, name)})
    return result


def asks_in_training(person: int, opts: Options) -> bool:
    """Whether training holds person number `person` in question and answer form; exactly the share
    `qa`, rounded down.
    """
    return int((person + 1) * opts.qa + 1e-9) > int(person * opts.qa + 1e-9)


def _biography(rng: random.Random, name: str, values: dict[str, str]) -> str:
    order = rng.sample(ATTRIBUTES, len(ATTRIBUTES))
    return " ".join(_fill(rng.choice(a.phrasings), name, values[a.key]) + "." for a in order) + "\n"


def _interview(rng: random.Random, name: str, values: dict[str, str]) -> str:
    order = rng.sample(ATTRIBUTES, len(ATTRIBUTES))
    return "".join(f"{_question(a, name)} {values[a.key]}\n" for a in order)


def _question(attribute: Attribute, name: str) -> str:
    return f"Question: {_fill(attribute.question, name, '')} Answer:"


def _fill(template: str, name: str, value: str) -> str:
    return template.replace("{name}", name).replace("{value}", value)


def _word(rng: random.Random) -> str:
    syllables = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2))
    return (syllables + rng.choice(_CODAS)).capitalize()
