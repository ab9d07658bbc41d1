"""Synthetic corpora: deterministic, and every question can be answered from where it says."""

import dataclasses
import re

import pytest

from flexmemory.data import facts, tasks
from flexmemory.data import tokenizer as tokenizers

FACTS = facts.Options(people=40, docs=5, qa=0.8, seed=3)
TASKS = tasks.Options(n=300, eval=90, seed=3)


@pytest.mark.parametrize("module, opts", [(facts, FACTS), (tasks, TASKS)])
def test_the_same_options_give_the_same_text_and_another_seed_another(module, opts):
    other = dataclasses.replace(opts, seed=4)
    assert list(module.documents(opts)) == list(module.documents(opts))
    assert module.questions(opts) == module.questions(opts)
    assert list(module.documents(opts)) != list(module.documents(other))
    assert module.questions(opts) != module.questions(other)


@pytest.mark.parametrize("module, opts", [(facts, FACTS), (tasks, TASKS)])
def test_ids_are_distinct_and_questions_have_the_agreed_shape(module, opts):
    ids = [doc_id for doc_id, _ in module.documents(opts)]
    assert len(ids) == len(set(ids))
    for question in module.questions(opts):
        assert (
            question["task"]
            == {"facts": "recall", "tasks": "reasoning"}[module.__name__.split(".")[-1]]
        )
        assert (
            question["answer"].startswith(" ") and question["answer"].strip() in question["answer"]
        )
        assert question["prompt"] == question["prompt"].rstrip()
        assert 0 < question["chance"] < 0.5


@pytest.mark.parametrize("spec", ["byte", "bpe:400"])
def test_answers_begin_where_a_token_begins(spec):
    questions = facts.questions(FACTS) + tasks.questions(TASKS)
    texts = [
        text
        for module, opts in ((facts, FACTS), (tasks, TASKS))
        for _, text in module.documents(opts)
    ]
    tokenizer = tokenizers.build(spec, lambda: iter(texts))
    for question in questions:
        prompt, answer = tokenizers.encode_pair(tokenizer, question["prompt"], question["answer"])
        assert prompt == tokenizer.encode(question["prompt"]) and answer == tokenizer.encode(
            question["answer"]
        )


def train_text_by_person():
    result = {}
    for doc_id, text in facts.documents(FACTS):
        split, person, kind = re.fullmatch(r"facts:(train|val)/(\d+)/(bio|qa)\d+", doc_id).groups()
        result.setdefault((split, int(person), kind), []).append(text)
    return result


def test_every_fact_is_told_in_training_by_every_biography_of_its_person():
    documents = train_text_by_person()
    everybody = facts.people(FACTS)
    assert len({name for name, _ in everybody}) == FACTS.people
    for p, (name, values) in enumerate(everybody):
        biographies = documents["train", p, "bio"]
        assert len(biographies) == FACTS.docs and len(documents["val", p, "bio"]) == 1
        for biography in biographies + documents["val", p, "bio"]:
            assert all(f" {value}." in biography for value in values.values())
            assert biography.count(name) == len(values)
    assert len({documents["train", 0, "bio"][d] for d in range(FACTS.docs)}) == FACTS.docs


def test_recall_questions_ask_for_that_persons_value():
    values = dict(facts.people(FACTS))
    pools = facts.value_pools(FACTS)
    questions = facts.questions(FACTS)
    assert len(questions) == FACTS.people * len(facts.ATTRIBUTES) * 2
    for question in questions:
        assert question["subject"] in question["prompt"]
        assert question["answer"] == " " + values[question["subject"]][question["attribute"]]
        assert question["chance"] == 1 / len(pools[question["attribute"]])


def test_question_form_is_in_training_for_the_seen_people_only():
    documents = train_text_by_person()
    asked = {p for split, p, kind in documents if kind == "qa"}
    assert len(asked) == int(FACTS.people * FACTS.qa)
    assert not any(split == "val" and kind == "qa" for split, _, kind in documents)
    everything = "".join(
        text for (split, _, _), texts in documents.items() if split == "train" for text in texts
    )
    counts = {"cloze": 0, "qa_seen": 0, "qa_held_out": 0}
    for question in facts.questions(FACTS):
        counts[question["kind"]] += 1
        line = question["prompt"] + question["answer"] + "\n"
        if question["kind"] == "qa_seen":
            assert line in everything
        if question["kind"] == "qa_held_out":
            assert question["prompt"] not in everything
    n = len(facts.ATTRIBUTES)
    assert counts == {"cloze": 40 * n, "qa_seen": 32 * n, "qa_held_out": 8 * n}


@pytest.mark.parametrize("qa, expected", [(0, 0), (0.1, 1), (0.8, 8), (1, 10)])
def test_the_share_of_asked_people_is_exact(qa, expected):
    opts = facts.Options(people=10, qa=qa)
    assert sum(facts.asks_in_training(p, opts) for p in range(10)) == expected


def test_no_value_is_the_beginning_of_another():
    for pool in facts.value_pools(FACTS).values():
        assert len(pool) == 16
        assert not any(a != b and a.startswith(b) for a in pool for b in pool)


def solve(prompt):
    """Executes a task from its text alone."""
    if prompt.startswith("Say twice: "):
        first, second = re.fullmatch(r"Say twice: (.*)\.\nAgain:(.*)", prompt).groups()
        return " " + first.split()[len(second.split())]
    given, word, steps = re.fullmatch(
        r"Given: (.*)\.\nFrom (\w+) (one|two) steps?:", prompt
    ).groups()
    partner = dict(pair.split(" to ") for pair in given.split(", "))
    for _ in range({"one": 1, "two": 2}[steps]):
        word = partner[word]
    return " " + word


def test_reasoning_answers_follow_from_the_prompt():
    questions = tasks.questions(TASKS)
    assert {q["kind"] for q in questions} == set(tasks.KINDS) and len(questions) == TASKS.eval
    for question in questions:
        assert solve(question["prompt"]) == question["answer"]


def test_training_documents_are_solved_right_too():
    for _, text in tasks.documents(TASKS):
        context, *lines = text.splitlines()
        for line in lines:
            if line.startswith("Again:"):
                assert line.removeprefix("Again: ") == context.removeprefix(
                    "Say twice: "
                ).removesuffix(".")
            else:
                prompt, answer = line.split(":")
                assert solve(f"{context}\n{prompt}:") == answer


def test_no_evaluation_context_is_trained_on_but_its_words_are():
    train = list(tasks.documents(TASKS))
    trained_contexts = {text.splitlines()[0] for _, text in train}
    words = set(tasks.word_pool(TASKS))
    assert len(words) == TASKS.words
    for question in tasks.questions(TASKS):
        context = question["prompt"].splitlines()[0]
        assert context not in trained_contexts and tasks.is_held_out(context + "\n")
        assert question["answer"].strip() in words
    assert not any(tasks.is_held_out(context + "\n") for context in trained_contexts)
    assert words == {word for _, text in train for word in re.findall(r"\w+", text)} & words
