"""One flipped bit of one byte of a store, and what comes of it."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tkv.making import tree_bytes

from flexmemory.errors import UserError
from flexmemory.tkv import format
from flexmemory.tkv.manifest import read_manifest
from flexmemory.tkv.storage.location import open_location
from flexmemory.tkv.store import open_store
from flexmemory.tkv.verify import verify_deep

Region = tuple[str, str, int, int]  # file, what of it, first byte, one past the last


def regions(store: Path) -> list[Region]:
    """Every byte of the store, once."""
    manifest, made, files = read_manifest(open_location(store)), [], tree_bytes(store)
    for group in manifest.groups:
        for block in range(group.shards):
            tokens = min(manifest.shard_rows, manifest.vocab_size - block * manifest.shard_rows)
            ends = np.cumsum(
                [tokens * group.bundle_bytes, tokens * 16, (manifest.shard_rows - tokens) * 16, 4]
            ).tolist()
            names = ("rows", "shard index", "shard index, unused places", "shard index, crc32c")
            made += [
                (format.shard_file(group, block), *part) for part in zip(names, [0, *ends], ends)
            ]
            ends = tokens * 4, manifest.shard_rows * 4
            made += [
                (format.checksum_file(group, block), *part)
                for part in zip(("checksums", "checksums, unused places"), [0, *ends], ends)
            ]
    for name, data in files.items():
        if name.endswith(".safetensors"):
            what, header = (
                name.split("/")[0].removesuffix(".safetensors"),
                8 + int.from_bytes(data[:8], "little"),
            )
            ends = 8, header, len(data)
            made += [
                (name, *part)
                for part in zip(
                    (f"{what}, length of header", f"{what}, header", f"{what}, tensors"),
                    [0, *ends],
                    ends,
                )
            ]
        elif not any(name == known for known, *_ in made):
            made.append((name, name.split("/")[-1], 0, len(data)))
    made = [region for region in made if region[2] < region[3]]
    assert sum(end - start for *_, start, end in made) == sum(map(len, files.values()))
    return made


@contextlib.contextmanager
def flipped(path: Path, place: int, bit: int) -> Iterator[None]:
    data = path.read_bytes()
    path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
    try:
        yield
    finally:
        path.write_bytes(data)


def everything(store: Path, backbone: bool = True) -> dict[str, bytes]:
    """All data that the store gives, as bytes."""
    opened = open_store(store)
    try:
        found = {
            f"rows {name}": rows_RLW.tobytes()
            for name, rows_RLW in opened.read_rows(np.arange(opened.manifest.vocab_size)).items()
        }
        found |= {
            f"basis {name} {i}": np.asarray(basis_rW).tobytes()
            for name, basis in opened.bases().items()
            for i, basis_rW in enumerate(basis)
        }
        found |= {
            "counts": opened.counts().tobytes(),
            "tokenizer": opened.tokenizer().fingerprint.encode(),
        }
        if backbone:
            found |= {
                f"backbone {i}": np.asarray(leaf).tobytes()
                for i, leaf in enumerate(leaves(opened.backbone(stacked=False)))
            }
        return found
    finally:
        opened.close()


def leaves(tree) -> list:
    if isinstance(tree, (dict, list)):
        return [
            leaf
            for part in (tree.values() if isinstance(tree, dict) else tree)
            for leaf in leaves(part)
        ]
    return [tree]


def outcomes(
    store: Path, whole: dict[str, bytes], places: list[tuple[Region, int, int]]
) -> tuple[Counter, Counter]:
    """Flips each (region, byte, bit) in turn; fails on a wrong byte of data or an error that is not
    one line which names the place.

    Returns counts of what = (region's name, "refused" or "harmless"), and of what `verify --deep`
    made of it: "found" or "passed". Files other than the manifest and the backbone have no part in
    the backbone, which is then not loaded: it is the slow one.
    """
    reading, deep = Counter(), Counter()
    for (name, what, *_), place, bit in places:
        with flipped(store / name, place, bit):
            backbone = name == "tkv.json" or name.startswith("backbone/")
            try:
                got = everything(store, backbone)
                assert got == {key: whole[key] for key in got}, (name, place, bit)
                reading[what, "harmless"] += 1
            except UserError as error:
                message = str(error)
                assert "\n" not in message and str(store) in message, message
                assert name in message or name.split("/")[1] in message, (name, message)
                reading[what, "refused"] += 1
            try:
                deep[what, "passed" if verify_deep(store, progress=False)["ok"] else "found"] += 1
            except UserError as error:
                assert "tkv.json" in str(error) and "\n" not in str(error)
                deep[what, "found"] += 1
    return reading, deep
