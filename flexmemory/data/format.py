"""Names of the token dataset, shared by the writer (prepare.py) and the reader (shards.py).

tokenizer.json                 the tokenizer
prepare.json                   what was asked for; written first
train/shard_00000.bin          tokens, flat, little-endian uint16 or uint32; each document is its
tokens and one end-of-document id
train/shard_00000.json         counts, document starts, digests; written after its .bin, so its
presence means a whole shard
val/…                          the same
train_counts.npy               uint64 [V], how often each id occurs in train
questions.jsonl                one question of a synthetic source per line; absent without such a
source
index.json                     totals, shards, fingerprints; written last, so a directory without it
is no dataset
"""

from pathlib import Path

import numpy as np

VERSION = 1
SPLITS = ("train", "val")
INDEX = "index.json"
ARGUMENTS = "prepare.json"
COUNTS = "train_counts.npy"
QUESTIONS = "questions.jsonl"


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32, little-endian, that holds ids 0..V-1."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_paths(directory: Path, split: str, number: int) -> tuple[Path, Path]:
    """Paths of a shard's tokens and of its index."""
    stem = directory / split / f"shard_{number:05d}"
    return stem.with_suffix(".bin"), stem.with_suffix(".json")
