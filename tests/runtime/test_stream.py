"""Text as it comes: the pieces joined are the text, cut at the first stop text, and never a half
character.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tkv.making import byte_tokenizer

from flexmemory.runtime.stream import TextStream


def decode(ids) -> str:
    return bytes(ids).decode("utf-8", "replace")


def run(text: bytes, stops=()):
    stream, pieces = TextStream(decode, stops), []
    for token in text:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    return stream, pieces + [stream.finish()]


def test_a_character_comes_whole():
    assert run("aé漢b".encode())[1] == ["a", "", "é", "", "", "漢", "b", ""]


def test_a_broken_character_comes_at_the_end():
    assert run(b"a\xc3")[1] == ["a", "", "\ufffd"]


def test_what_may_become_a_stop_text_is_held_back():
    stream, pieces = run(b"one, two; and", ["; end", ", then"])
    assert (
        pieces == ["o", "n", "e", "", "", "", ", tw", "o", "", "", "; a", "n", "d", ""]
        and not stream.stopped
    )


def test_the_first_stop_text_ends_it():
    stream, pieces = run(b"abcabd and more", ["abd", "ca"])
    assert "".join(pieces) == "ab" == stream.text and stream.stopped


def test_a_stop_text_inside_what_a_token_brings():
    pieces = {0: "hello ", 1: "wor", 2: "ld! bye"}
    stream = TextStream(lambda ids: "".join(pieces[i] for i in ids), ["! b"])
    assert [stream.add(0), stream.add(1), stream.add(2), stream.finish()] == [
        "hello ",
        "wor",
        "ld",
        "",
    ] and stream.stopped


@given(st.text("abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_pieces_join_to_the_text_before_the_first_stop(text, stops):
    stream, pieces = run(text.encode(), stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    first = (
        min(
            (text[: min(ends)].find(stop) for stop in stops if stop in text[: min(ends)]),
            default=None,
        )
        if ends
        else None
    )
    assert "".join(pieces) == stream.text == (text if first is None else text[:first])
    assert stream.stopped == bool(ends)


@pytest.mark.parametrize("text", ["plain", "naïve café ☕ 漢字 🎉", ""])
def test_with_a_tokenizer(text):
    tokenizer = byte_tokenizer()
    for ids in (tokenizer.encode(text), [256, *tokenizer.encode(text), 256]):
        stream = TextStream(tokenizer.decode)
        parts = [stream.add(i) for i in ids]
        assert "".join(parts) + stream.finish() == text
        assert not any("\ufffd" in part for part in parts)


def test_bytes_that_are_no_text():
    rng, tokenizer = np.random.default_rng(0), byte_tokenizer()
    for _ in range(200):
        ids = rng.integers(0, 257, rng.integers(0, 12)).tolist()
        stream = TextStream(tokenizer.decode)
        streamed = "".join(stream.add(i) for i in ids)
        assert streamed + stream.finish() == tokenizer.decode(ids) == stream.text, ids
