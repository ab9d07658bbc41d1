"""Tokenizers: exact round trips, sizes, fingerprints, and what happens to bad ones."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmemory.data import tokenizer as lib
from flexmemory.errors import UserError

TEXTS = [
    "the cat sat on the mat\n" * 40,
    "def f(x):\n    return x + 1\n" * 40,
    "Zoë naïve 東京 🙂 \t\r\n" * 10,
]
BYTE = lib.build("byte", lambda: iter(()))
BPE = lib.build("bpe:300", lambda: iter(TEXTS))


def foreign(tmp_path, special=None, **changes):
    """A word-level tokenizer.json, as another project would hand it over."""
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if special:
        model.add_special_tokens([special])
    if changes.get("truncate"):
        model.enable_truncation(2)
        model.enable_padding(length=8)
    path = tmp_path / "foreign.json"
    model.save(str(path))
    return path


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
@settings(max_examples=60, deadline=None)
@given(text=st.text() | st.binary().map(lambda b: b.decode("utf-8", "replace")))
def test_decode_gives_back_every_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eos_id for i in ids)
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.eos_id]) == text


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.text(), max_size=5))
def test_a_batch_is_its_texts_one_by_one(texts):
    for tokenizer in (BYTE, BPE):
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_byte_ids_are_the_bytes():
    assert (BYTE.vocab_size, BYTE.eos_id) == (257, 256)
    assert BYTE.encode("hé") == [104, 0xC3, 0xA9]
    assert BYTE.decode([0xC3]) == "\ufffd"


def test_a_text_that_names_the_special_token_does_not_end_there():
    text = f"say {lib.EOS} aloud"
    assert BPE.eos_id not in BPE.encode(text)
    assert BPE.decode(BPE.encode(text)) == text


@pytest.mark.parametrize("size", [257, 280, 300])
def test_bpe_has_exactly_the_size_asked_for_and_trains_the_same_twice(size):
    first, second = (lib.build(f"bpe:{size}", lambda: iter(TEXTS)) for _ in range(2))
    assert first.vocab_size == size
    assert first.fingerprint == second.fingerprint


def test_bpe_reads_a_bounded_sample(monkeypatch):
    monkeypatch.setattr(lib, "BPE_SAMPLE_BYTES", 1000)
    taken = []

    def texts():
        for i in range(1000):
            taken.append(i)
            yield f"some text number {i} " * 10

    lib.build("bpe:270", texts)
    assert len(taken) < 20


def test_saved_and_loaded_is_the_same_tokenizer(tmp_path):
    for i, tokenizer in enumerate((BYTE, BPE)):
        path = tokenizer.save(tmp_path / str(i))
        for place in (path, path.parent):
            loaded = lib.load(place)
            assert loaded.fingerprint == tokenizer.fingerprint
            assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
            assert loaded.encode("the cat") == tokenizer.encode("the cat")


def test_fingerprints_differ_with_the_tokenizer_but_not_with_the_layout_of_its_file(tmp_path):
    other = lib.build("bpe:301", lambda: iter(TEXTS))
    assert len({BYTE.fingerprint, BPE.fingerprint, other.fingerprint}) == 3
    path = BPE.save(tmp_path)
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps(dict(reversed(content.items())), indent=4))
    assert lib.load(path).fingerprint == BPE.fingerprint
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    assert lib.load(path).fingerprint != BPE.fingerprint


@pytest.mark.parametrize("name", ["</s>", "<|endoftext|>", "<|end_of_text|>"])
def test_a_foreign_tokenizer_ends_documents_with_its_own_special(tmp_path, name):
    tokenizer = lib.load(foreign(tmp_path, special=name))
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (3, 4)
    assert tokenizer.decode([0, 1, 3]) == "a b"


def test_a_foreign_tokenizer_neither_truncates_nor_pads(tmp_path):
    tokenizer = lib.load(foreign(tmp_path, special="</s>", truncate=True))
    assert tokenizer.encode("a b a b a") == [0, 1, 0, 1, 0]
    assert tokenizer.encode_batch(["a", "a b a"]) == [[0], [0, 1, 0]]


def test_encode_pair_splits_where_the_prompt_ends(tmp_path):
    prompt, answer = lib.encode_pair(BPE, "the cat sat on", " the mat")
    assert prompt == BPE.encode("the cat sat on")
    assert BPE.decode(answer) == " the mat"
    with pytest.raises(UserError, match="start the answer with a space"):
        lib.encode_pair(BPE, "the c", "at")


@pytest.mark.parametrize(
    "spec, names",
    [
        ("bpe:many", ["bpe:many", "bpe:4096"]),
        ("bpe:100", ["bpe:100", "257"]),
        ("bpe:100000", ["100000", "use bpe:"]),
        ("wordpiece", ["wordpiece", "byte, bpe:SIZE, hf:NAME"]),
        ("hf:", ["hf:"]),
    ],
)
def test_a_bad_spec_is_named(spec, names):
    with pytest.raises(UserError) as caught:
        lib.build(spec, lambda: iter(TEXTS))
    assert all(name in str(caught.value) for name in names)
    assert "\n" not in str(caught.value)


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    def fail(name):
        raise Exception("no route to host\nand much more")

    monkeypatch.setattr(
        lib.tokenizers, "Tokenizer", type("Stub", (), {"from_pretrained": staticmethod(fail)})
    )
    with pytest.raises(UserError, match=r"hf:some/name.*no route to host\).*network") as caught:
        lib.build("hf:some/name", lambda: iter(()))
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="does not exist"):
        lib.load(path)
    for content, words in [
        ("{", "JSON"),
        ('{"model": 3}', "format"),
        ('{"type": "byte", "version": 9}', "version 9"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=words) as caught:
            lib.load(path)
        assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="no end of document"):
        lib.load(foreign(tmp_path))


def test_decode_refuses_ids_outside_the_vocabulary():
    for tokenizer in (BYTE, BPE):
        for bad in (-1, tokenizer.vocab_size):
            with pytest.raises(
                UserError, match=f"{bad} is outside the vocabulary of {tokenizer.vocab_size}"
            ):
                tokenizer.decode([1, bad])
