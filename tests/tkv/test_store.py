"""A damaged, unfinished or foreign store: one clear error, never a wrong row."""

import json
import shutil

import numpy as np
import pytest
import tokenizers

from flexmemory.errors import UserError
from flexmemory.tkv import format
from flexmemory.tkv.store import open_store

from .making import VOCAB, tree_bytes

SHARD_FILE = "rows/w48/c/1/0/0"


@pytest.fixture
def copy(mixed_store, tmp_path):
    shutil.copytree(mixed_store, tmp_path / "s")
    return tmp_path / "s"


def rewrite_manifest(store, **changes):
    """Changes fields and makes the checksum fit again: what a careless hand or another program might write."""
    content = json.loads((store / "tkv.json").read_text()) | changes
    content.pop("crc32")
    (store / "tkv.json").write_text(json.dumps({**content, "crc32": format.json_crc32(content)}))


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def test_no_store(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no TKV store here"):
            open_store(path)


def test_other_version(copy):
    rewrite_manifest(copy, version=2, flexmemory="9.9")
    with pytest.raises(UserError, match=r"version 2, this flexmemory reads 1.*\(9\.9\)"):
        open_store(copy)


@pytest.mark.parametrize("changes,message", [
    (dict(format="zip"), "not the manifest of a TKV store"),
    (dict(dtype="int8"), "dtype 'int8' is not one of"),
    (dict(shard_rows=63), "shard_rows 63 is not a power of two"),
    (dict(shard_rows="many"), "malformed field"),
    (dict(table_bytes=1), "table_bytes not as the model"),
    (dict(groups=[]), "groups not as the model"),
    (dict(model={"d_modell": 3}), "d_modell: no such field; did you mean 'd_model'"),
    (dict(model={"pattern": "dens"}), "unknown layer 'dens'"),
    (dict(tokenizer=None), "malformed field"),
    (dict(backbone={"dtype": "float32", "files": [{"name": "../../etc/passwd", "bytes": 1, "crc32": 1}]}), "backbone file names"),
    (dict(extra=1), "unknown field extra"),
])
def test_bad_manifest(changes, message, copy):
    rewrite_manifest(copy, **changes)
    with pytest.raises(UserError, match=message):
        open_store(copy)


def test_missing_field(copy):
    content = json.loads((copy / "tkv.json").read_text())
    for name in ("source", "layers", "dtype"):
        less = {k: v for k, v in content.items() if k not in (name, "crc32")}
        (copy / "tkv.json").write_text(json.dumps({**less, "crc32": format.json_crc32(less)}))
        with pytest.raises(UserError, match=name):
            open_store(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff\xfe"])
def test_manifest_that_is_no_json_object(text, copy):
    (copy / "tkv.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match="tkv.json"):
        open_store(copy)


@pytest.mark.parametrize("name", [SHARD_FILE, "checksums/w32/c/4", "backbone/model-00001-of-00001.safetensors", "tokenizer.json"])
def test_missing_file(name, copy):
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        open_store(copy)


def test_missing_metadata(copy):
    (copy / "rows/w32/zarr.json").unlink()
    with pytest.raises(UserError, match="rows/w32/zarr.json: missing"):
        open_store(copy)


@pytest.mark.parametrize("name", [SHARD_FILE, "checksums/w32/c/4", "backbone/model-00001-of-00001.safetensors"])
def test_truncated_file(name, copy):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{name}: .* bytes, .* expected"):
        open_store(copy)


def test_metadata_of_another_shape(copy):
    path = copy / "rows/w32/zarr.json"
    path.write_text(path.read_text().replace("float32", "float64"))
    with pytest.raises(UserError, match="zarr.json: missing or not as the manifest says"):
        open_store(copy)


def test_tokenizer_of_another_store(copy):
    (copy / "tokenizer.json").write_text('{"type": "byte", "version": 1}')  # the same tokenizer in other white space
    open_store(copy)
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<|endoftext|>": 1}, [])).save(str(copy / "tokenizer.json"))
    with pytest.raises(UserError, match="fingerprint .* exported with"):
        open_store(copy)


@pytest.mark.parametrize("id_", [-1, VOCAB, 10**6])
def test_id_outside_the_vocabulary(id_, mixed_store):
    with pytest.raises(UserError, match=f"token id {id_} is outside the store's vocabulary of {VOCAB}"):
        open_store(mixed_store).read_rows([3, id_])


def test_file_lost_after_opening_is_an_error_not_zeros(copy):
    store = open_store(copy)
    shutil.rmtree(copy / "rows/w48/c/1")
    with pytest.raises(UserError, match="rows/w48: cannot be read"):
        store.read_rows([70])
    store.read_rows([1])


def test_a_flipped_byte_anywhere_never_gives_a_wrong_row(copy):
    want = open_store(copy).read_rows(np.arange(VOCAB))
    rng = np.random.default_rng(0)
    raised = 0
    for name, data in tree_bytes(copy).items():
        if name.endswith("zarr.json") or name.startswith("backbone"):
            continue
        for place in rng.integers(0, len(data), 2):
            flip(copy / name, place)
            try:
                got = open_store(copy).read_rows(np.arange(VOCAB))
                for group in want:
                    np.testing.assert_array_equal(got[group], want[group])  # e.g. an unused place of the last checksum file
            except UserError:
                raised += 1
            flip(copy / name, place)
    assert raised >= 40


def test_a_flipped_byte_names_the_token_and_only_it(copy):
    flip(copy / SHARD_FILE, 5 * 4 * 48 * 4 + 17)
    store = open_store(copy)
    with pytest.raises(UserError, match="rows/w48: the rows of token 69 fail their checksum; copy"):
        store.read_rows([60, 69, 80])
    store.read_rows([60, 68, 70])
    open_store(copy, check=False).read_rows([69])  # as asked


def test_damaged_backbone(copy):
    path = copy / "backbone/model-00001-of-00001.safetensors"
    for place in (3, 50, -1):
        flip(path, place)
        with pytest.raises(UserError, match="its checksum is wrong"):
            open_store(copy).backbone()
        flip(path, place)
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        open_store(copy)
