"""Tokenizers: text to token ids and back, with a fingerprint that every later artefact carries.

Specs: `byte` (one id per UTF-8 byte), `bpe:SIZE` (byte-level BPE trained on the corpus), a path to
a `tokenizer.json` of the tokenizers library, `hf:NAME` (fetched from the Hugging Face hub).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import tokenizers

from flexmemory.errors import UserError
from flexmemory.files import write_bytes

FILE_NAME = "tokenizer.json"
EOS = "<|endoftext|>"
# Names under which known tokenizers keep "end of document", most specific first.
EOS_NAMES = (EOS, "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
BYTE_VERSION = 1
BPE_SAMPLE_BYTES = (
    64 << 20
)  # BPE merges barely change after this much text, and training holds its words in memory
BPE_MIN_SIZE = 257  # 256 bytes and the end of document


class Tokenizer:
    """Token ids of text.

    vocab_size: V; every id is in 0..V-1.
    eos_id: the id that ends a document.
    content: bytes of its tokenizer.json.
    fingerprint: first 16 hex digits of the sha256 of the content; equal fingerprints mean equal
    ids for equal text.
    """

    def __init__(
        self, saved: bytes, model: tokenizers.Tokenizer | None, vocab_size: int, eos_id: int
    ):
        self.content = saved
        self._model = model  # None: ids are bytes
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.fingerprint = hashlib.sha256(saved).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. No special token is added, and a special token's name inside the text is
        plain text.
        """
        if self._model is None:
            return list(text.encode("utf-8"))
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, equal to `[encode(t) for t in texts]`; releases the GIL, so that
        threads run in parallel.
        """
        if self._model is None:
            return [list(text.encode("utf-8")) for text in texts]
        return [
            encoding.ids
            for encoding in self._model.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, ends of documents left out. Bytes that are no valid UTF-8 become U+FFFD.

        Raises UserError: an id outside 0..V-1.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(
                    f"token id {i} is outside the vocabulary of {self.vocab_size}; use the"
                    " tokenizer that made the ids"
                )
        ids = [i for i in ids if i != self.eos_id]
        if self._model is None:
            return bytes(ids).decode("utf-8", errors="replace")
        return self._model.decode(ids, skip_special_tokens=True)

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes `directory/tokenizer.json` (whole or not at all) and returns its path."""
        path = Path(directory) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, self.content)
        return path


def build(spec: str, texts: Callable[[], Iterator[str]]) -> Tokenizer:
    """The tokenizer that `spec` names.

    spec: `byte`, `bpe:SIZE`, a path to a tokenizer.json (or to a directory that holds one), or
    `hf:NAME`.
    texts: gives a fresh iterator over the corpus; only `bpe:SIZE` calls it, and reads at most 64
    MiB.

    Raises UserError: unknown spec, bad SIZE, text too small for SIZE, missing or malformed file,
    hub not reachable, no end of document.
    """
    kind, _, rest = spec.partition(":")
    if spec == "byte":
        return _parse(_canonical({"type": "byte", "version": BYTE_VERSION}), origin=spec)
    if kind == "bpe":
        return _parse(_canonical(json.loads(_train_bpe(spec, rest, texts))), origin=spec)
    if kind == "hf":
        return _parse(_canonical(json.loads(_fetch(spec, rest))), origin=spec)
    if os.path.exists(spec):
        return load(spec)
    raise UserError(
        f"tokenizer {spec!r} is no file and no known kind; use byte, bpe:SIZE, hf:NAME or the path"
        " of a tokenizer.json"
    )


def load(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer saved in `path`, a tokenizer.json or a directory that holds one.

    Raises UserError: the file is missing, malformed, of an unknown version, or names no end of
    document.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        return parse(path.read_bytes(), origin=str(path))
    except FileNotFoundError:
        raise UserError(
            f"tokenizer {path} does not exist; give a tokenizer.json or a directory that holds one"
        ) from None
    except OSError as error:
        raise UserError(
            f"tokenizer {path} is not a readable file ({error}); give a tokenizer.json"
        ) from None


def parse(data: bytes, origin: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json's content; `origin` names it in errors.

    Raises UserError: as `load`.
    """
    try:
        content = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"tokenizer {origin} is not a readable JSON file ({error}); give a tokenizer.json"
        ) from None
    return _parse(_canonical(content), origin)


def encode_pair(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of `prompt`, and ids that `answer` adds when it follows; for scoring an answer under
    teacher forcing.

    Raises UserError: the tokenizer merges across the boundary, so that no token ends where the
    prompt does.
    """
    prompt_ids = tokenizer.encode(prompt)
    both = tokenizer.encode(prompt + answer)
    if both[: len(prompt_ids)] != prompt_ids or len(both) == len(prompt_ids):
        raise UserError(
            f"the tokenizer merges the end of the prompt {prompt[-20:]!r} with the answer"
            f" {answer!r}; start the answer with a space"
        )
    return prompt_ids, both[len(prompt_ids) :]


def _canonical(content: object) -> bytes:
    # Key order and white space must not change the fingerprint.
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )


def _parse(saved: bytes, origin: str) -> Tokenizer:
    content = json.loads(saved)
    if isinstance(content, dict) and content.get("type") == "byte":
        if content.get("version") != BYTE_VERSION:
            raise UserError(
                f"tokenizer {origin} has version {content.get('version')!r}, this program reads"
                f" {BYTE_VERSION}; prepare the data again"
            )
        return Tokenizer(saved, None, vocab_size=257, eos_id=256)
    try:
        model = tokenizers.Tokenizer.from_str(saved.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"tokenizer {origin} is not in the tokenizers library's format ({error}); give its"
            " tokenizer.json"
        ) from None
    model.no_truncation()  # a foreign file may carry both, and either would corrupt the corpus
    model.no_padding()
    model.encode_special_tokens = True  # a document that mentions <|endoftext|> must not end there
    vocab = model.get_vocab(with_added_tokens=True)
    if not vocab:
        raise UserError(f"tokenizer {origin} has an empty vocabulary; give a trained one")
    eos_ids = [vocab[name] for name in EOS_NAMES if name in vocab]
    if not eos_ids:
        raise UserError(
            f"tokenizer {origin} has no end of document; add one of {', '.join(EOS_NAMES)} as a"
            " special token"
        )
    return Tokenizer(saved, model, vocab_size=max(vocab.values()) + 1, eos_id=eos_ids[0])


def _train_bpe(spec: str, size_text: str, texts: Callable[[], Iterator[str]]) -> str:
    if not size_text.isdecimal() or int(size_text) < BPE_MIN_SIZE:
        raise UserError(
            f"tokenizer {spec!r} needs a whole SIZE of at least {BPE_MIN_SIZE}; write for example"
            " bpe:4096"
        )
    size = int(size_text)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS],
        initial_alphabet=sorted(
            tokenizers.pre_tokenizers.ByteLevel.alphabet()
        ),  # all 256 bytes: every text has ids
        show_progress=False,
    )
    model.train_from_iterator(_sample(texts()), trainer)
    if model.get_vocab_size() != size:
        raise UserError(
            f"tokenizer {spec!r} asks for {size} ids, but the text has merges for"
            f" {model.get_vocab_size()} only; use bpe:{model.get_vocab_size()} or more text"
        )
    return model.to_str()


def _sample(texts: Iterator[str]) -> Iterator[str]:
    left = BPE_SAMPLE_BYTES
    for text in texts:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text.encode("utf-8"))


def _fetch(spec: str, name: str) -> str:
    if not name:
        raise UserError(
            f"tokenizer {spec!r} names no repository; write for example hf:openai-community/gpt2"
        )
    try:
        return tokenizers.Tokenizer.from_pretrained(name).to_str()
    except Exception as error:  # the library raises bare Exception
        reason = str(error).split("\n")[0]
        raise UserError(
            f"tokenizer {spec!r} cannot be fetched ({reason}); check the name and the network, or"
            " give the path of its tokenizer.json"
        ) from None
