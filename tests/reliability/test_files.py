"""Files that are missing, cut, longer, or something else: before a store is opened, and while it is
open.
"""

import os
import shutil

import numpy as np
import pytest
from tkv.making import tree_bytes

from flexmemory.errors import UserError
from flexmemory.tkv.store import open_store

from .flips import everything
from .toy import KINDS, export_to

SHARD = {"float32": "rows/w8/c/1/0/0", "int8": "rows/w8/c/1/0", "int4 rank": "rows/w8/c/1/0"}


def cut(share):
    """To a share of the bytes, or with -n by n bytes."""

    def change(path):
        size = path.stat().st_size
        os.truncate(path, size + share if share < 0 else int(size * share))

    return change


def directory(path):
    path.unlink()
    path.mkdir()


def renamed(path):
    path.rename(path.with_name("other"))


def longer(path):
    with open(path, "ab") as file:
        file.write(b"\0more")


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES = {
    "missing": os.unlink,
    "empty": cut(0),
    "half": cut(0.5),
    "a tenth": cut(0.1),
    "two bytes less": cut(-2),
    "without index crc": cut(-4),
    "longer": longer,
    "a directory": directory,
    "renamed": renamed,
    "a link to nothing": dangling,
}


@pytest.fixture
def store(stores, tmp_path):
    """``store(kind)``: a copy of one's own."""
    made = []

    def copy(kind):
        made.append(tmp_path / f"{len(made)}")
        return shutil.copytree(stores[kind], made[-1])

    return copy


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    return message


def test_every_damage_to_every_file_is_refused_when_the_store_is_opened(stores, store, command):
    kind, tried = "int4 rank", 0  # the kind with all files
    for name in tree_bytes(stores[kind]):
        for damage, change in DAMAGES.items():
            path = store(kind)
            change(path / name)
            message = refusal(lambda: everything(path))
            assert name in message or name == "tkv.json" and str(path) in message, (damage, message)
            tried += 1
            if (
                damage == "empty"
            ):  # what a disk has after a power failure that fsync was not asked about
                code, line = command("generate", f"--tkv={path}", "--prompt=a")
                assert (
                    code == 2
                    and line.startswith("error: ")
                    and "\n" not in line
                    and str(path) in line
                )
                code, line = command("verify", f"--tkv={path}", "--deep")
                assert code == (2 if name == "tkv.json" else 1)
            shutil.rmtree(path)
    assert tried == len(DAMAGES) * len(tree_bytes(stores[kind])) >= 200


@pytest.mark.parametrize("touched", [False, True], ids=["not read yet", "read before"])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_to_a_shard_of_an_open_store(kind, touched, store):
    """Refused where the damage can be seen; the same rows where the file is still held open."""
    refused = 0
    for damage, change in DAMAGES.items():
        path = store(kind)
        opened, ids = open_store(path), np.arange(257)
        want = everything(path, backbone=False)
        if touched:
            opened.read_rows(ids)
        change(path / SHARD[kind])
        try:
            got = {f"rows {name}": rows.tobytes() for name, rows in opened.read_rows(ids).items()}
            assert got == {name: want[name] for name in got}, damage
        except UserError as error:
            assert str(path / SHARD[kind]) in str(error) and "\n" not in str(error), error
            refused += 1
        opened.read_rows(np.arange(100))  # the other shards are served
        opened.close()
    assert refused >= (2 if touched else len(DAMAGES) - 1), refused


def test_files_of_another_store_are_refused(stores, store, tmp_path):
    """A whole file of a store with other weights in the place of each file in turn: right sizes,
    right zarr, wrong content.
    """
    from .toy import other_params

    export_to(tmp_path / "other", other_params(), counts_V=np.arange(257)[::-1])
    want, tried = everything(stores["float32"]), 0
    for name, data in tree_bytes(tmp_path / "other").items():
        path = store("float32")
        if (path / name).read_bytes() == data:
            continue
        (path / name).write_bytes(data)
        refusal(lambda: everything(path))
        tried += 1
    assert tried == 2 * 3 * 2 + 3  # shards and checksums, backbone, counts, manifest
    assert everything(stores["float32"]) == want


def test_shards_and_checksums_of_another_store_together_are_refused(store, tmp_path):
    """They fit each other; the manifest knows better."""
    from .toy import other_params

    export_to(tmp_path / "other", other_params())
    path = store("float32")
    for part in ("rows", "checksums"):
        shutil.rmtree(path / part)
        shutil.copytree(tmp_path / "other" / part, path / part)
    assert f"{path}/checksums/w" in refusal(lambda: open_store(path))
