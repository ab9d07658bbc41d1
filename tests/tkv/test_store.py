"""A damaged, unfinished or foreign store: one clear error, never a wrong row."""

import dataclasses
import json
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from flexmemory.errors import UserError
from flexmemory.runtime.forward import served_params
from flexmemory.tkv.manifest import json_crc32
from flexmemory.tkv.store import open_store

from .making import VOCAB, make_store, tree_bytes

SHARD_FILE = "rows/w48/c/1/0/0"
STORES = Path(__file__).parent / "stores"


@pytest.fixture
def copy(mixed_store, tmp_path):
    shutil.copytree(mixed_store, tmp_path / "s")
    return tmp_path / "s"


def rewrite_manifest(store, **changes):
    """Changes fields and makes the checksum fit again: what a careless hand or another program
    might write.
    """
    content = json.loads((store / "tkv.json").read_text()) | changes
    content.pop("crc32")
    (store / "tkv.json").write_text(json.dumps({**content, "crc32": json_crc32(content)}))


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def test_no_store(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no TKV store here"):
            open_store(path)


@pytest.mark.parametrize("version", [1, 3, "2", None])
def test_other_version(version, copy):
    """An older one too: nothing was released yet. One line that says what to do."""
    rewrite_manifest(copy, version=version, flexmemory="9.9")
    with pytest.raises(UserError) as caught:
        open_store(copy)
    assert str(caught.value) == (
        f"{copy}/tkv.json: version {version!r}, this flexmemory reads 2; export the run again or"
        " use the flexmemory that wrote it (9.9)"
    )


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(format="zip"), "not the manifest of a TKV store"),
        (dict(dtype="int3"), "dtype 'int3' is not one of"),
        (
            dict(dtype="int8"),
            "files: rows/w32/c/0/0 is missing",
        ),  # where the shards of encoded rows would lie
        (dict(scale_group=4), "scale_group 4 does not go with dtype float32"),
        (dict(errors=[{"layer": 2}]), "malformed field"),
        (dict(shard_rows=63), "shard_rows 63 is not a power of two"),
        (dict(shard_rows="many"), "malformed field"),
        (dict(table_bytes=1), "table_bytes not as the model"),
        (dict(groups=[]), "groups not as the model"),
        (dict(model={"d_modell": 3}), "d_modell: no such field; did you mean 'd_model'"),
        (dict(model={"pattern": "dens"}), "unknown layer 'dens'"),
        (dict(tokenizer=None), "malformed field"),
        (
            dict(files=[{"name": "tokenizer.json", "bytes": 1, "crc32": 1}]),
            "files: rows/w32/c/0/0/0 is missing",
        ),
        (
            dict(
                files=[{"name": "b", "bytes": 1, "crc32": 1}, {"name": "a", "bytes": 1, "crc32": 1}]
            ),
            "not sorted by name",
        ),
        (dict(extra=1), "unknown field extra"),
    ],
)
def test_bad_manifest(changes, message, copy):
    rewrite_manifest(copy, **changes)
    with pytest.raises(UserError, match=message):
        open_store(copy)


def test_manifest_with_a_foreign_file(copy):
    content = json.loads((copy / "tkv.json").read_text())
    rewrite_manifest(
        copy, files=[{"name": "../../etc/passwd", "bytes": 1, "crc32": 1}, *content["files"]]
    )
    with pytest.raises(UserError, match="files: '../../etc/passwd' is no file of a store"):
        open_store(copy)


def test_backbone_file_names_cannot_leave_the_store(tmp_path):
    shutil.copytree(STORES / "v2", tmp_path / "s")
    content = json.loads((tmp_path / "s/tkv.json").read_text())
    content["files"][0]["name"] = "backbone/../../etc/passwd"
    rewrite_manifest(tmp_path / "s", **content)
    with pytest.raises(UserError, match="is no file of a store"):
        open_store(tmp_path / "s")


def test_ranks_outside_the_width(tmp_path):
    shutil.copytree(STORES / "v2_int4_rank", tmp_path / "s")
    groups = json.loads((tmp_path / "s/tkv.json").read_text())["groups"]
    groups[0]["ranks"][1] = 9
    rewrite_manifest(tmp_path / "s", groups=groups)
    with pytest.raises(UserError, match="groups: rank 9 is not between 1 and the rows' width"):
        open_store(tmp_path / "s")


def test_missing_field(copy):
    content = json.loads((copy / "tkv.json").read_text())
    for name in ("source", "layers", "dtype"):
        less = {k: v for k, v in content.items() if k not in (name, "crc32")}
        (copy / "tkv.json").write_text(json.dumps({**less, "crc32": json_crc32(less)}))
        with pytest.raises(UserError, match=name):
            open_store(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff\xfe"])
def test_manifest_that_is_no_json_object(text, copy):
    (copy / "tkv.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match="tkv.json"):
        open_store(copy)


@pytest.mark.parametrize(
    "name",
    [
        SHARD_FILE,
        "checksums/w32/c/4",
        "backbone/model-00001-of-00001.safetensors",
        "tokenizer.json",
    ],
)
def test_missing_file(name, copy):
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        open_store(copy)


def test_missing_metadata(copy):
    (copy / "rows/w32/zarr.json").unlink()
    with pytest.raises(UserError, match="rows/w32/zarr.json: missing"):
        open_store(copy)


@pytest.mark.parametrize(
    "name", [SHARD_FILE, "checksums/w32/c/4", "backbone/model-00001-of-00001.safetensors"]
)
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


def test_tokenizer_of_another_store(tmp_path):
    """Whatever the manifest says of the file's bytes."""
    shutil.copytree(STORES / "v2", path := tmp_path / "s")
    files = json.loads((path / "tkv.json").read_text())["files"]

    def replace(text):
        (path / "tokenizer.json").write_text(text)
        entry = {"name": "tokenizer.json", "bytes": len(text), "crc32": zlib.crc32(text.encode())}
        rewrite_manifest(path, files=[f if f["name"] != entry["name"] else entry for f in files])

    replace('{"type": "byte", "version": 1}')  # the same tokenizer in other white space
    assert open_store(path).tokenizer().eos_id == 256
    replace(tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<|endoftext|>": 1}, [])).to_str())
    with pytest.raises(UserError, match=f"{path}/tokenizer.json: fingerprint .* exported with"):
        open_store(path)
    replace("{")
    with pytest.raises(
        UserError, match=f"tokenizer {path}/tokenizer.json is not a readable JSON file"
    ):
        open_store(path)


@pytest.mark.parametrize("id_", [-1, VOCAB, 10**6])
def test_id_outside_the_vocabulary(id_, mixed_store):
    with pytest.raises(
        UserError, match=f"token id {id_} is outside the store's vocabulary of {VOCAB}"
    ):
        open_store(mixed_store).read_rows([3, id_])


def test_file_lost_after_opening_is_an_error_not_zeros(copy):
    store = open_store(copy)
    shutil.rmtree(copy / "rows/w48/c/1")
    with pytest.raises(
        UserError, match="rows/w48/c/1/0/0: cannot be read|rows/w48/c/1/0/0: missing"
    ):
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
                    np.testing.assert_array_equal(
                        got[group], want[group]
                    )  # e.g. an unused place of the last checksum file
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


def test_backbone_as_it_is_served(mixed, mixed_store):
    store = open_store(mixed_store)
    cfg = dataclasses.replace(store.model, compute_dtype="bfloat16")
    want, got = (
        served_params(store.backbone(), cfg),
        store.backbone(stacked=False, dtype="bfloat16"),
    )
    assert jax.tree.structure(want) == jax.tree.structure(got)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), want, got)
    assert {
        leaf.dtype.name for path, leaf in jax.tree.leaves_with_path(got) if path[-1].key != "scale"
    } == {"bfloat16"}
    assert got["blocks"]["s1"]["u0"]["attn_norm"]["scale"].dtype == "float32"


def test_counts(mixed, mixed_store, tmp_path):
    assert open_store(mixed_store).counts() is None
    counts_V = np.arange(VOCAB, dtype=np.uint64) ** 3
    make_store(tmp_path / "s", *mixed, counts_V=counts_V)
    found = open_store(tmp_path / "s").counts()
    assert found.dtype == np.uint64 and (found == counts_V).all()
    flip(tmp_path / "s/counts.npy", -3)
    with pytest.raises(UserError, match="counts.npy: its checksum is wrong"):
        open_store(tmp_path / "s").counts()


def test_damaged_basis(tmp_path):
    shutil.copytree(STORES / "v2_int4_rank", tmp_path / "s")
    flip(tmp_path / "s/basis.safetensors", -3)
    store = open_store(tmp_path / "s")
    for use in (store.bases, lambda: store.read_rows([1])):
        with pytest.raises(UserError, match="basis.safetensors: its checksum is wrong"):
            use()


def test_read_bundles_fills_the_callers_arrays(mixed_store):
    store = open_store(mixed_store)
    ids, rows = np.asarray([0, 64, 259]), store.read_rows([0, 64, 259])
    out = {group.name: np.zeros((3, group.bundle_bytes), np.uint8) for group in store.groups}
    store.read_bundles(ids, out)
    for name, bundles_UB in out.items():
        assert bundles_UB.tobytes() == rows[name].tobytes()
    store.read_bundles(np.zeros(0, np.int64), {})
    store.close()
