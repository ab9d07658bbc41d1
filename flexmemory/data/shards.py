"""Reading token shards: memory-mapped, addressed by window. The layout is in format.py."""

import json
import os
from pathlib import Path

import numpy as np

from flexmemory.data import format as layout
from flexmemory.errors import UserError


class TokenShards:
    """One split of a token dataset.

    Window i of length T covers T+1 consecutive tokens of one shard: T inputs and, shifted by one, T
    targets. Windows of a shard begin at 0, T, 2T, …, so that every token but a shard's first is a
    target once, except the fewer than T at the end of each shard.

    data_dir: what `prepare` made.
    split: `train` or `val`.

    n_tokens, n_documents, n_bytes: totals of the split; ends of documents count as tokens, bytes
    are UTF-8 of the text.
    vocab_size, eos_id, dtype: of the ids.
    tokenizer_fingerprint, fingerprint: of the tokenizer and of the whole dataset.
    shard_tokens: tokens of each shard.

    Raises UserError: no dataset, an unfinished one, an unknown version, an empty split, a missing
    or truncated shard.
    """

    def __init__(self, data_dir: str | os.PathLike, split: str):
        self.data_dir, self.split = Path(data_dir), split
        index = read_index(data_dir)
        if split not in index["splits"]:
            raise UserError(f"split={split!r} is unknown; use {' or '.join(layout.SPLITS)}")
        entry = index["splits"][split]
        if not entry["shards"]:
            raise UserError(
                f"data {data_dir} has no {split} split; prepare it with val_fraction above 0"
            )
        self.n_tokens: int = entry["tokens"]
        self.n_documents: int = entry["documents"]
        self.n_bytes: int = entry["bytes"]
        self.vocab_size: int = index["vocab_size"]
        self.eos_id: int = index["eos_id"]
        self.dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self.tokenizer_fingerprint: str = index["tokenizer_fingerprint"]
        self.fingerprint: str = index["fingerprint"]
        self.shard_tokens: tuple[int, ...] = tuple(shard["tokens"] for shard in entry["shards"])
        self._tokens = [self._map(shard) for shard in entry["shards"]]
        self._starts: dict[
            int, np.ndarray
        ] = {}  # document starts by shard, read when first asked for
        self._first_window: dict[
            int, np.ndarray
        ] = {}  # by T: number of the first window of each shard, and of one past the last

    def num_windows(self, seq_len: int) -> int:
        """Number of windows of `seq_len` + 1 tokens.

        Raises UserError: seq_len below 1, or no shard holds seq_len + 1 tokens.
        """
        return int(self._window_numbers(seq_len)[-1])

    def window(self, i: int, seq_len: int) -> np.ndarray:
        """Tokens of window i, int32 [seq_len+1].

        Raises IndexError: i outside 0..num_windows-1.
        """
        shard, start = self._locate(i, seq_len)
        return self.tokens(shard, start, start + seq_len + 1)

    def segments(self, i: int, seq_len: int) -> np.ndarray:
        """Number of the document that each token of window i belongs to, counted from 0 in the
        window, int32 [seq_len+1].

        The id that ends a document belongs to it.
        """
        shard, start = self._locate(i, seq_len)
        return self.token_segments(shard, start, start + seq_len + 1)

    def tokens(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of one shard, int32.

        Raises UserError: an id outside the vocabulary, so the shard is damaged.
        """
        ids = self._tokens[shard][start:stop].astype(np.int32)
        if ids.max(initial=0) >= self.vocab_size:
            place = start + int(ids.argmax())
            raise UserError(
                f"{self.data_dir}: {self.split} shard {shard} is damaged: id {ids.max()} at token"
                f" {place} is outside the vocabulary of {self.vocab_size}; prepare the data again"
            )
        return ids

    def token_segments(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Document numbers of tokens start..stop-1 of one shard, int32, from 0 at `start`."""
        starts = self._document_starts(shard)
        first = np.searchsorted(starts, start, side="right")
        inner = starts[first : np.searchsorted(starts, stop, side="left")]
        segments = np.zeros(stop - start, np.int32)
        segments[inner - start] = 1
        return np.cumsum(segments, dtype=np.int32)

    def _locate(self, i: int, seq_len: int) -> tuple[int, int]:
        numbers = self._window_numbers(seq_len)
        if not 0 <= i < numbers[-1]:
            raise IndexError(f"window {i} is outside 0..{numbers[-1] - 1}")
        shard = int(np.searchsorted(numbers, i, side="right")) - 1
        return shard, (i - int(numbers[shard])) * seq_len

    def _window_numbers(self, seq_len: int) -> np.ndarray:
        if seq_len not in self._first_window:
            if seq_len < 1:
                raise UserError(f"seq_len={seq_len} must be at least 1")
            longest = max(self.shard_tokens) - 1
            if seq_len > longest:
                raise UserError(
                    f"seq_len {seq_len} is longer than the longest {self.split} shard of"
                    f" {self.data_dir}; use at most {longest}, or more text"
                )
            counts = [(tokens - 1) // seq_len for tokens in self.shard_tokens]
            self._first_window[seq_len] = np.cumsum([0, *counts])
        return self._first_window[seq_len]

    def _map(self, shard: dict) -> np.ndarray:
        path = self.data_dir / shard["file"]
        if not path.exists():
            raise UserError(f"shard {path} is missing; prepare {self.data_dir} again")
        size, expected = path.stat().st_size, shard["tokens"] * self.dtype.itemsize
        if size != expected:
            raise UserError(
                f"shard {path} has {size} bytes, its index says {expected}; prepare {self.data_dir}"
                " again"
            )
        return np.memmap(path, self.dtype, "r")

    def _document_starts(self, shard: int) -> np.ndarray:
        if shard not in self._starts:
            path = layout.shard_paths(self.data_dir, self.split, shard)[1]
            try:
                self._starts[shard] = np.array(json.loads(path.read_text())["starts"], np.int64)
            except (OSError, ValueError, KeyError) as error:
                raise UserError(
                    f"shard index {path} cannot be read ({error}); prepare {self.data_dir} again"
                ) from None
        return self._starts[shard]


def read_index(data_dir: str | os.PathLike) -> dict:
    """The content of `data_dir`/index.json.

    Raises UserError: no dataset, an unfinished one, an unreadable index or an unknown version.
    """
    path = Path(data_dir) / layout.INDEX
    if not path.exists():
        if (Path(data_dir) / layout.ARGUMENTS).exists():
            raise UserError(
                f"data {data_dir} is unfinished; run the same prepare command again to finish it"
            )
        raise UserError(
            f"data {data_dir} is no token dataset; make one with: flexmemory prepare --source=..."
            f" --tokenizer=... --out={data_dir}"
        )
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"data {data_dir} has an unreadable index.json ({error}); prepare it again"
        ) from None
    version = index.get("version") if isinstance(index, dict) else None
    if version != layout.VERSION:
        raise UserError(
            f"data {data_dir} has format version {version}, this program reads {layout.VERSION};"
            " prepare it again"
        )
    return index


def read_questions(data_dir: str | os.PathLike) -> list[dict]:
    """The questions of a dataset's synthetic sources (see facts.py, tasks.py); empty where it has
    none.

    Raises UserError: no dataset, or its questions are missing.
    """
    expected = read_index(data_dir)["questions"]
    path = Path(data_dir) / layout.QUESTIONS
    questions = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.exists()
        else []
    )
    if len(questions) != expected:
        raise UserError(
            f"questions {path} hold {len(questions)}, the index says {expected}; prepare {data_dir}"
            " again"
        )
    return questions


def read_train_counts(data_dir: str | os.PathLike) -> np.ndarray:
    """How often each id occurs in the train split, uint64 [V].

    Raises UserError: no dataset, or its counts are missing or of another length.
    """
    vocab_size = read_index(data_dir)["vocab_size"]
    path = Path(data_dir) / layout.COUNTS
    try:
        counts = np.load(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"counts {path} cannot be read ({error}); prepare {data_dir} again"
        ) from None
    if counts.shape != (vocab_size,):
        raise UserError(
            f"counts {path} have shape {counts.shape}, the vocabulary is {vocab_size}; prepare"
            f" {data_dir} again"
        )
    return counts
