"""Text → shards: exact, whole or resumable, the same however it was interrupted, and read back as
written.
"""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmemory.cli.prepare import run
from flexmemory.data import prepare as prepare_lib
from flexmemory.data import sources
from flexmemory.data import tokenizer as tokenizers
from flexmemory.data.prepare import prepare, split_of
from flexmemory.data.shards import TokenShards, read_questions, read_train_counts
from flexmemory.errors import UserError

SOURCE = "facts:people=6,docs=3+tasks:n=60,eval=12"
ARGUMENTS = {"val_fraction": 0.1, "shard_tokens": 2000, "progress": False}


def contents(directory):
    """Every file of a dataset, so that two can be compared byte for byte."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("dataset") / "data"
    prepare(SOURCE, "bpe:300", out, **ARGUMENTS)
    return out


@pytest.mark.parametrize("spec", ["byte", "bpe:300"])
def test_the_shards_hold_exactly_the_text(tmp_path, spec):
    index = prepare(SOURCE, spec, tmp_path / "data", **ARGUMENTS)
    assert not [name for name in contents(tmp_path / "data") if name.endswith(".tmp")]
    tokenizer = tokenizers.load(tmp_path / "data")
    expected = {"train": [], "val": []}
    for doc_id, text in sources.open_source(SOURCE).documents():
        expected[split_of(doc_id, 0.1, 0)].append(text)
    for split, texts in expected.items():
        shards = TokenShards(tmp_path / "data", split)
        assert len(shards.shard_tokens) > 1 or split == "val"
        found = []
        for number, count in enumerate(shards.shard_tokens):
            tokens = shards.tokens(number, 0, count)
            assert tokens[-1] == shards.eos_id  # no document goes over the end
            documents = np.split(tokens, np.flatnonzero(tokens == shards.eos_id) + 1)[:-1]
            starts = json.loads(
                (tmp_path / "data" / split / f"shard_{number:05d}.json").read_text()
            )["starts"]
            assert starts == np.cumsum([0, *map(len, documents)])[:-1].tolist()
            found += [tokenizer.decode(document[:-1]) for document in documents]
        assert found == texts
        assert shards.n_documents == len(texts)
        assert shards.n_bytes == sum(len(text.encode()) for text in texts)
        assert shards.n_tokens == sum(shards.shard_tokens) == index["splits"][split]["tokens"]


@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30), min_size=1).filter(any), shard_tokens=st.integers(2, 50)
)
def test_any_text_comes_back(tmp_path_factory, texts, shard_tokens):
    directory = tmp_path_factory.mktemp("any")
    write_texts(directory / "a.jsonl", texts)
    prepare(
        str(directory / "a.jsonl"),
        "byte",
        directory / "data",
        val_fraction=0,
        shard_tokens=shard_tokens,
        progress=False,
    )
    shards, tokenizer = (
        TokenShards(directory / "data", "train"),
        tokenizers.load(directory / "data"),
    )
    tokens = [shards.tokens(i, 0, n) for i, n in enumerate(shards.shard_tokens)]
    assert "".join(tokenizer.decode(t) for t in tokens) == "".join(texts)
    # A shard above the limit is one long document, and no two neighbours would have fitted into
    # one.
    assert all(
        n <= shard_tokens or (t == shards.eos_id).sum() == 1
        for n, t in zip(shards.shard_tokens, tokens, strict=True)
    )


def test_dtype_is_the_smallest_that_holds_the_vocabulary():
    assert [prepare_lib.layout.dtype_for(v).str for v in (257, 65536, 65537)] == [
        "<u2",
        "<u2",
        "<u4",
    ]


def test_counts_are_those_of_the_train_tokens(dataset):
    shards = TokenShards(dataset, "train")
    counts = read_train_counts(dataset)
    tokens = np.concatenate([shards.tokens(i, 0, n) for i, n in enumerate(shards.shard_tokens)])
    assert counts.dtype == np.uint64
    np.testing.assert_array_equal(counts, np.bincount(tokens, minlength=shards.vocab_size))


def test_questions_are_those_of_the_source(dataset):
    assert read_questions(dataset) == sources.open_source(SOURCE).questions()
    assert {question["task"] for question in read_questions(dataset)} == {"recall", "reasoning"}


def test_the_split_depends_on_id_and_seed_only():
    ids = [f"doc {i}" for i in range(4000)]
    val = [i for i in ids if split_of(i, 0.25, 7) == "val"]
    assert 900 < len(val) < 1100
    assert val != [i for i in ids if split_of(i, 0.25, 8) == "val"]
    assert set(val) < {i for i in ids if split_of(i, 0.5, 7) == "val"}  # a larger share only adds
    assert {split_of(i, 0, 7) for i in [*ids, "facts:val/1"]} == {"train"}
    assert (split_of("facts:train/1", 0.9, 0), split_of("facts:val/1", 0.01, 0)) == ("train", "val")


def test_workers_do_not_change_a_byte(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "CHUNK_BYTES", 500)
    for workers in (1, 3):
        prepare(SOURCE, "bpe:300", tmp_path / str(workers), workers=workers, **ARGUMENTS)
        assert contents(tmp_path / str(workers)) == contents(dataset)


def test_a_finished_directory_is_left_alone_and_other_arguments_are_named(dataset):
    before = contents(dataset)
    index = prepare(SOURCE, "bpe:300", dataset, **ARGUMENTS)
    assert index == json.loads(before["index.json"]) and contents(dataset) == before
    for change, names in [
        ({"seed": 5}, ["seed=0", "5 now"]),
        ({"val_fraction": 0.2, "shard_tokens": 9}, ["val_fraction=0.1", "shard_tokens=2000"]),
    ]:
        with pytest.raises(UserError) as caught:
            prepare(SOURCE, "bpe:300", dataset, **(ARGUMENTS | change))
        assert all(name in str(caught.value) for name in names)
    for source, tokenizer, name in [
        ("tasks", "bpe:300", "source="),
        (SOURCE, "byte", "tokenizer="),
    ]:
        with pytest.raises(UserError, match=name):
            prepare(source, tokenizer, dataset, **ARGUMENTS)
    assert contents(dataset) == before


# Kills itself at the n-th file that is put in its place: before it, so that its temporary file is
# all there is.
KILLED = """
import os, signal, sys
from flexmemory.data import prepare as lib
real, left = os.replace, [int(sys.argv[2])]
def replace(a, b):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
os.replace = replace
sizes = dict(val_fraction=0.1, shard_tokens=2000)
lib.prepare(sys.argv[3], "bpe:300", sys.argv[1], progress=False, **sizes)
"""


def kill_at(out, n, source=SOURCE):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(out), str(n), source],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_again_and_again_it_ends_in_the_same_bytes(dataset, tmp_path):
    out = tmp_path / "data"
    for n in (1, 2, 3, 4, 3, 6):  # at the tokenizer, the arguments, a shard, a shard's index, …
        kill_at(out, n)
        with pytest.raises(UserError, match="no token dataset|unfinished"):
            TokenShards(out, "train")
    assert len(list(out.glob("train/*.json"))) >= 3
    tokenised = []
    encode = tokenizers.Tokenizer.encode_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tokenizers.Tokenizer,
            "encode_batch",
            lambda self, texts: tokenised.extend(texts) or encode(self, texts),
        )
        prepare(SOURCE, "bpe:300", out, **ARGUMENTS)
    assert contents(out) == contents(dataset)
    assert len(tokenised) < 0.8 * len(
        list(sources.open_source(SOURCE).documents())
    )  # whole shards are not made again


def test_killed_before_the_index_it_is_unfinished_and_then_finished(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    (tmp_path / "data" / "index.json").unlink()
    with pytest.raises(UserError, match="run the same prepare command again"):
        TokenShards(tmp_path / "data", "train")
    prepare(SOURCE, "bpe:300", tmp_path / "data", **ARGUMENTS)
    assert contents(tmp_path / "data") == contents(dataset)


@pytest.mark.parametrize("change", ["altered", "shorter", "longer"])
def test_a_source_that_changed_under_a_resumed_run_is_refused(tmp_path, change):
    texts = [f"document number {i} " * 5 for i in range(40)]
    arguments = {"val_fraction": 0, "shard_tokens": 500, "progress": False}
    path = write_texts(tmp_path / "a.jsonl", texts)
    prepare(str(path), "byte", tmp_path / "data", **arguments)
    (tmp_path / "data" / "index.json").unlink()
    other = {
        "altered": ["another" + texts[0][7:], *texts[1:]],
        "shorter": texts[:20],
        "longer": [*texts, "more"],
    }[change]
    write_texts(path, other)
    with pytest.raises(UserError, match="the source has changed since train shard"):
        prepare(str(path), "byte", tmp_path / "data", **arguments)


def test_a_tokenizer_that_changed_under_its_name_is_refused(tmp_path):
    source = "tasks:n=40"
    for size in (290, 291):
        texts = [text for _, text in sources.open_source(source).documents()]
        path = tokenizers.build(f"bpe:{size}", lambda texts=texts: iter(texts)).save(tmp_path)
        if size == 290:
            prepare(source, str(path), tmp_path / "data", progress=False, val_fraction=0)
    with pytest.raises(UserError, match="another tokenizer"):
        prepare(source, str(path), tmp_path / "data", progress=False, val_fraction=0)


@pytest.mark.parametrize(
    "arguments, names",
    [
        ({"val_fraction": 1.0}, ["val_fraction=1.0"]),
        ({"val_fraction": -0.1}, ["val_fraction=-0.1"]),
        ({"workers": 0}, ["workers=0"]),
        ({"shard_tokens": 1}, ["shard_tokens=1"]),
        ({"val_fraction": 1e-9}, ["no document fell to the val split", "val_fraction=0"]),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, names):
    with pytest.raises(UserError) as caught:
        prepare("tasks:n=5", "byte", tmp_path / "data", progress=False, **arguments)
    assert all(name in str(caught.value) for name in names)
    assert not (tmp_path / "data" / "index.json").exists()


def test_bad_text_in_the_middle_is_named_and_leaves_no_dataset(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 50 + "{broken\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 51: malformed JSON"):
        prepare(str(tmp_path / "a.jsonl"), "byte", tmp_path / "data", progress=False)
    assert not (tmp_path / "data").exists()
    line = (
        json.dumps({"text": "fine " * 10_000}) + "\n"
    )  # more than is tokenised at a time, so that shards come before the mistake
    (tmp_path / "a.jsonl").write_text(line * 200 + "{broken\n")
    with pytest.raises(UserError, match="a.jsonl, line 201"):
        prepare(
            str(tmp_path / "a.jsonl"),
            "byte",
            tmp_path / "data",
            shard_tokens=100_000,
            progress=False,
        )
    with pytest.raises(
        UserError, match="unfinished"
    ):  # whole shards are kept to go on from, but they are no dataset
        TokenShards(tmp_path / "data", "train")
    (tmp_path / "a.jsonl").write_text(line * 201)
    prepare(
        str(tmp_path / "a.jsonl"), "byte", tmp_path / "data", shard_tokens=100_000, progress=False
    )


def test_it_never_writes_among_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(thesis\.txt"):
        prepare("tasks:n=5", "byte", tmp_path, progress=False)
    with pytest.raises(UserError, match="is a file"):
        prepare("tasks:n=5", "byte", tmp_path / "thesis.txt", progress=False)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def damaged(dataset, tmp_path, damage):
    shutil.copytree(dataset, tmp_path / "data")
    damage(tmp_path / "data")
    return tmp_path / "data"


def set_version(data):
    index = json.loads((data / "index.json").read_text())
    (data / "index.json").write_text(json.dumps(index | {"version": 7}))


@pytest.mark.parametrize(
    "damage, match",
    [
        (
            lambda d: (d / "train/shard_00001.bin").write_bytes(
                (d / "train/shard_00001.bin").read_bytes()[:-2]
            ),
            r"shard_00001\.bin has \d+ bytes",
        ),
        (lambda d: (d / "train/shard_00000.bin").unlink(), r"shard_00000\.bin is missing"),
        (lambda d: (d / "index.json").write_text("{"), r"unreadable index\.json"),
        (lambda d: (d / "index.json").unlink(), "unfinished"),
        (shutil.rmtree, "no token dataset.*flexmemory prepare"),
        (set_version, "format version 7, this program reads 1"),
    ],
)
def test_a_damaged_dataset_is_refused(dataset, tmp_path, damage, match):
    with pytest.raises(UserError, match=match):
        TokenShards(damaged(dataset, tmp_path, damage), "train")


def test_damaged_companions_are_refused(dataset, tmp_path):
    data = damaged(
        dataset,
        tmp_path,
        lambda d: [
            (d / name).unlink()
            for name in ("questions.jsonl", "train_counts.npy", "train/shard_00000.json")
        ],
    )
    for read, match in [
        (read_questions, "questions"),
        (read_train_counts, "counts"),
        (lambda d: TokenShards(d, "train").segments(0, 8), "shard index"),
    ]:
        with pytest.raises(UserError, match=match):
            read(data)


def test_unknown_and_empty_splits_are_refused(tmp_path):
    prepare("tasks:n=5", "byte", tmp_path / "data", val_fraction=0, progress=False)
    with pytest.raises(UserError, match="val_fraction above 0"):
        TokenShards(tmp_path / "data", "val")
    with pytest.raises(UserError, match="train or val"):
        TokenShards(tmp_path / "data", "test")


@pytest.mark.parametrize("seq_len", [1, 7, 64, 1500])
def test_windows_and_segments_are_those_of_the_plain_tokens(dataset, seq_len):
    shards = TokenShards(dataset, "train")
    windows, segments = [], []
    for file in sorted((dataset / "train").glob("*.bin")):
        tokens = np.fromfile(file, "<u2").tolist()
        documents = np.cumsum([0, *(t == shards.eos_id for t in tokens)])[:-1].tolist()
        for start in range(0, len(tokens), seq_len):
            if start + seq_len + 1 <= len(tokens):
                windows.append(tokens[start : start + seq_len + 1])
                segments.append(
                    [d - documents[start] for d in documents[start : start + seq_len + 1]]
                )
    assert shards.num_windows(seq_len) == len(windows)
    for i in range(0, len(windows), 1 + len(windows) // 300):
        assert (
            shards.window(i, seq_len).tolist() == windows[i]
            and shards.window(i, seq_len).dtype == np.int32
        )
        assert (
            shards.segments(i, seq_len).tolist() == segments[i]
            and shards.segments(i, seq_len).dtype == np.int32
        )
    for i in (-1, len(windows)):
        with pytest.raises(IndexError):
            shards.window(i, seq_len)


def test_a_sequence_longer_than_the_shards_says_what_fits(dataset):
    shards = TokenShards(dataset, "train")
    fits = max(shards.shard_tokens) - 1
    assert shards.num_windows(fits) >= 1
    with pytest.raises(UserError, match=f"seq_len {fits + 1} is longer than .*use at most {fits}"):
        shards.num_windows(fits + 1)


def test_the_command_prints_a_table_and_refuses_bad_flags(tmp_path, capsys):
    assert (
        run(
            [
                "--source=tasks:n=50",
                "--tokenizer=byte",
                f"--out={tmp_path}/data",
                "--val_fraction=0.2",
                "--workers=1",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    shards = TokenShards(tmp_path / "data", "train")
    assert f"{shards.n_tokens:,}" in printed and "bytes/token" in printed and "val" in printed
    for flags, match in [
        ([], "--source"),
        (["--source=a", "--tokenizer=byte", "--out=b", "--val_fraction=x"], "val_fraction"),
        (["--sauce=1"], "required|sauce"),
    ]:
        with pytest.raises(UserError, match=match):
            run(flags)


def test_a_refused_source_leaves_nothing_behind(tmp_path):
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    (texts / "z_bad.txt").write_bytes(b"text \xff")
    (texts / "good.txt").write_text("some words\n" * 50)
    with pytest.raises(UserError, match="not UTF-8"):
        prepare(str(texts), "byte", out, val_fraction=0, progress=False)
    assert not out.exists()
    prepare(
        f"{texts}:undecodable=skip", "byte", out, val_fraction=0, progress=False
    )  # the mend that the message names


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(UserError, match="cannot be written|is a file"):
        prepare(str(tmp_path / "a.txt"), "byte", "/dev/null/x", val_fraction=0, progress=False)


def test_an_id_outside_the_vocabulary_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("words " * 50)
    prepare(str(tmp_path / "a.txt"), "byte", tmp_path / "out", val_fraction=0, progress=False)
    shard = tmp_path / "out" / "train" / "shard_00000.bin"
    ids = np.fromfile(shard, "<u2")
    ids[20] = 300
    ids.tofile(shard)
    shards = TokenShards(tmp_path / "out", "train")
    shards.window(0, 8)
    with pytest.raises(UserError, match="id 300 at token 20 is outside the vocabulary of 257"):
        shards.window(2, 8)
