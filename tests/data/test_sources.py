"""Sources: the exact text of each kind of file, and an error that names the place of bad text."""

import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from flexmemory.data import sources
from flexmemory.errors import UserError


def read(spec):
    return list(sources.open_source(str(spec)).documents())


def texts(spec):
    return [text for _, text in read(spec)]


def write_rows(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_text_files_come_back_exactly(tmp_path):
    content = "\ufefffirst\r\nsecond\rthird\n\n  東京 🙂"
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert texts(tmp_path / "a.txt") == [content]


@pytest.mark.parametrize(
    "content", ["one line\r\n" * 1000, "no line end " * 1000, "x" * 96 + "\r\n" + "y" * 300]
)
def test_large_text_files_are_cut_into_documents_that_join_to_the_file(
    tmp_path, monkeypatch, content
):
    monkeypatch.setattr(sources, "PIECE_BYTES", 97)
    (tmp_path / "a.txt").write_bytes(content.encode())
    documents = read(tmp_path / "a.txt")
    assert "".join(text for _, text in documents) == content
    assert len(documents) > 1 and len({doc_id for doc_id, _ in documents}) == len(documents)
    assert max(len(text) for _, text in documents) <= 2 * 97
    if content.startswith("one line"):
        assert all(text.endswith("\n") for _, text in documents)


def test_rows_of_every_kind(tmp_path):
    rows = [{"text": "one"}, {"text": ""}, {"text": "two\n"}]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "b.jsonl.gz", rows, gzip.open)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["one", "", "two\n"], "n": [1, 2, 3]}), tmp_path / "c.parquet"
    )
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert texts(tmp_path / name) == ["one", "two\n"]
    assert texts(f"{tmp_path}/*.jsonl*") == ["one", "two\n"] * 2


def test_the_text_may_be_in_another_field(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"content": "one"}])
    pyarrow.parquet.write_table(pyarrow.table({"content": ["two"]}), tmp_path / "b.parquet")
    assert texts(f"{tmp_path}/a.jsonl:field=content") == ["one"]
    assert texts(f"{tmp_path}/b.parquet:field=content") == ["two"]


def test_directories_are_read_in_order_and_ids_do_not_depend_on_where_they_lie(tmp_path):
    ids = []
    for place in ("here", "there/deep"):
        root = tmp_path / place / "corpus"
        (root / "sub").mkdir(parents=True)
        (root / ".git").mkdir()
        for name, content in {
            "b.md": "b",
            "a.txt": "a",
            "sub/c.py": "c",
            "d.bin": "no",
            ".git/e.txt": "no",
        }.items():
            (root / name).write_text(content)
        assert texts(root) == ["a", "b", "c"]
        ids.append([doc_id for doc_id, _ in read(root)])
    assert ids[0] == ids[1]


def test_sources_join_and_a_path_with_a_plus_is_a_path(tmp_path):
    (tmp_path / "c++").mkdir()
    (tmp_path / "c++" / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    assert texts(tmp_path / "c++") == ["a"]
    joined = sources.open_source(f"{tmp_path}/b.txt+tasks:n=2,eval=3+facts:people=1,docs=1")
    ids = [doc_id for doc_id, _ in joined.documents()]
    assert [i.split("/")[0] for i in ids[1:3]] == ["tasks", "tasks"] and ids[3].startswith("facts:")
    assert len(joined.questions()) == 3 + 10


def test_the_standard_library_is_python_without_tests():
    documents = read("python-stdlib:max_mb=1.5")
    ids = [doc_id for doc_id, _ in documents]
    assert len(ids) == len(set(ids)) and len(ids) > 10
    assert all(i.startswith("python-stdlib/") and i.endswith(".py") for i in ids)
    assert not any(part in ("test", "tests", "site-packages") for i in ids for part in i.split("/"))
    assert documents == read("python-stdlib:max_mb=1.5")
    assert "python-stdlib/argparse.py" in ids


def test_max_mb_bounds_the_text_and_the_size_is_known(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("x" * 100)
    assert len(texts(f"{tmp_path}:max_mb=0.00035")) == 3
    assert sources.open_source(str(tmp_path)).size_bytes == 1000
    assert sources.open_source(f"{tmp_path}:max_mb=0.00035").size_bytes == 350
    assert sources.open_source(f"{tmp_path}+facts:people=2").size_bytes is None


def test_half_of_a_surrogate_pair_is_refused_where_it_stands(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2 holds half of a surrogate"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "name, content, names",
    [
        ("a.txt", b"good \xff bad", ["a.txt", "UTF-8", "undecodable=skip"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', ["a.jsonl", "line 3", "malformed JSON"]),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', ["a.jsonl", "line 2", "'text'"]),
        ("a.jsonl", b'{"text": 7}\n', ["a.jsonl", "line 1", "'text'"]),
        ("a.jsonl", b"[1]\n", ["a.jsonl", "line 1", "'text'"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ["a.jsonl", "line 2", "UTF-8"]),
        ("a.jsonl.gz", b"not gzip", ["a.jsonl.gz", "damaged"]),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-12],
            ["a.jsonl.gz", "damaged"],
        ),
        ("a.parquet", b"not parquet", ["a.parquet", "parquet file"]),
        ("a.txt", b"", ["a.txt", "no text"]),
        ("a.jsonl", b'{"text": ""}\n', ["a.jsonl", "no text"]),
        ("a.bin", b"x", ["a.bin", "known kind", ".jsonl"]),
    ],
)
def test_bad_text_is_named(tmp_path, name, content, names):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert all(part in str(caught.value) for part in names) and "\n" not in str(caught.value)


def test_parquet_names_the_row_and_the_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 2"):
        read(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'body', only text"):
        read(f"{tmp_path}/a.parquet:field=body")


def test_undecodable_files_are_left_out_only_when_asked(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n" * 9 + b"\xff")
    (tmp_path / "b.txt").write_text("b")
    assert texts(f"{tmp_path}:undecodable=skip") == ["b"]
    with pytest.raises(UserError, match=r"a\.txt"):
        read(tmp_path)


@pytest.mark.parametrize(
    "spec, names",
    [
        ("/no/such/file.txt", ["/no/such/file.txt", "no such file"]),
        ("python-stdlbi", ["python-stdlbi", "python-stdlib"]),
        ("tasks:n=2+", ["empty"]),
        ("tasks:n=two", ["n=two", "whole number"]),
        ("tasks:m=2", ["'m'", "words"]),
        ("tasks:words=3", ["words=3"]),
        ("facts:people=0", ["people=0"]),
        ("facts:docs=0", ["docs=0"]),
        ("facts:qa=2", ["qa=2"]),
        ("python-stdlib:max_mb=-1", ["max_mb=-1"]),
        ("python-stdlib:undecodable=skip", ["'undecodable'"]),
        ("hf:a:b:c", ["hf:a:b:c", "hf:NAME:SPLIT"]),
        ("tasks:n=0", ["no text"]),
    ],
)
def test_a_bad_spec_is_named(spec, names):
    with pytest.raises(UserError) as caught:
        read(spec)
    assert all(name in str(caught.value) for name in names)


def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    for spec in ("hf:some/name", f"{tmp_path}/a.parquet"):
        with pytest.raises(UserError, match=r"flexmemory\[datasets\]"):
            sources.open_source(spec)


def test_hub_rows_stream(monkeypatch):
    class Stub:
        @staticmethod
        def load_dataset(name, config, split, streaming):
            assert (name, config, split, streaming) == ("some/name", "small", "test", True)
            return iter([{"body": "one"}, {"body": "two"}, {"body": None}])

    monkeypatch.setitem(sys.modules, "datasets", Stub)
    stream = sources.open_source("hf:some/name:test:config=small,field=body").documents()
    assert [next(stream)[1], next(stream)[1]] == ["one", "two"]
    with pytest.raises(UserError, match="row 3.*'body'"):
        next(stream)
