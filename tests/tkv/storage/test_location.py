"""Local locations, URLs and their specs. test_remote.py holds s3 and http to the same contract."""

import errno
import os

import numpy as np
import pytest
import tensorstore as ts

from flexmemory.errors import UserError
from flexmemory.tkv.storage.location import DamagedFile, Patience, open_location


def check_contract(location):
    """What every writable location does."""
    assert location.names() == [] and location.sizes(["tkv.json"]) == {}
    with pytest.raises(FileNotFoundError):
        location.read("rows/w8/c/0")
    location.delete("rows/w8/c/0")  # no error
    location.write("rows/w8/c/0", b"0123456789")
    location.write("rows/w8/c/10", memoryview(b"ab"))
    location.write("rowsy", b"")
    location.write_parts("tkv.json", (part for part in (b"one ", b"two")))
    assert location.read("rows/w8/c/0") == b"0123456789"
    assert [location.read("rows/w8/c/0", *span) for span in ((2, 5), (8,), (9, 10), (3, 3))] == [
        b"234",
        b"89",
        b"9",
        b"",
    ]
    assert location.read("tkv.json") == b"one two" and location.read("rowsy") == b""
    for span in ((8, 11), (20, 21)):
        with pytest.raises(
            DamagedFile, match="rows/w8/c/0: .*; copy the store again or export the run again"
        ):
            location.read("rows/w8/c/0", *span)
    assert location.names() == ["rows/w8/c/0", "rows/w8/c/10", "rowsy", "tkv.json"]
    assert (
        location.names("rows/") == location.names("rows/w8/c/") == ["rows/w8/c/0", "rows/w8/c/10"]
    )
    assert location.names("rows/w8/c/1") == ["rows/w8/c/10"] and location.names("no/") == []
    assert location.names("ro") == ["rows/w8/c/0", "rows/w8/c/10", "rowsy"] and location.names(
        "tkv."
    ) == ["tkv.json"]
    found = location.sizes(["rowsy", "rows/w8", "nothing", "rows/w8/c/0", "tkv.json/x"])
    assert found in ({"rowsy": 0, "rows/w8/c/0": 10}, {"rowsy": None, "rows/w8/c/0": None})
    location.write("rowsy", b"new")
    location.delete("tkv.json")
    assert location.read("rowsy") == b"new" and "tkv.json" not in location.names()
    kvstore = ts.KvStore.open(location.spec("rows/w8")).result()
    assert kvstore.read("c/10").result().value == b"ab"
    assert ts.KvStore.open(location.spec()).result().read("rowsy").result().value == b"new"

    again = bytearray(3)

    def in_the_same_memory():
        for value in b"abc":
            again[:] = bytes([value]) * 3
            yield np.frombuffer(again, np.uint8).reshape(1, 3)

    location.write_parts("rowsy", in_the_same_memory())
    assert location.read("rowsy") == b"aaabbbccc"
    location.write("rowsy", b"new")

    def broken():
        yield b"half"
        raise UserError("the source is damaged")

    with pytest.raises(UserError, match="the source is damaged"):
        location.write_parts("rowsy", broken())
    assert (
        location.read("rowsy") == b"new" and len(location.names()) == 3
    )  # nothing half, no scratch file
    for name in ("", "/etc/passwd", "../x", "rows/../../x", "a//b", "./a", "a/"):
        with pytest.raises(UserError, match="must be relative and stay inside the store"):
            location.read(name)
        with pytest.raises(UserError, match="must be relative and stay inside the store"):
            location.write(name, b"")


def test_local(tmp_path):
    location = open_location(tmp_path / "new" / "store")
    check_contract(location)
    assert (
        location.local == tmp_path / "new" / "store"
        and location.url == str(location.local)
        and location.writable
    )


def test_local_directories_go_with_their_last_file(tmp_path):
    """Else rows/w8/c/0/0/0 of one layout leaves a directory where another wants the file
    rows/w8/c/0/0.
    """
    location = open_location(tmp_path)
    for name in ("rows/w8/c/0/0/0", "rows/zarr.json"):
        location.write(name, b"1")
    location.delete("rows/w8/c/0/0/0")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["rows", "zarr.json"]
    location.delete("rows/zarr.json")
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "code,mend",
    [
        (errno.ENOSPC, "free some space and run the same command again"),
        (errno.EDQUOT, "free some space and run the same command again"),
        (errno.EACCES, "check the permissions of the file and its directory"),
        (errno.EIO, "check the disk and run the same command again"),
    ],
)
def test_local_write_errors(tmp_path, monkeypatch, code, mend):
    location = open_location(tmp_path)
    location.write("tkv.json", b"old")

    def fails(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(
            UserError, match=rf"tkv\.json: cannot be written \({os.strerror(code)}\); {mend}$"
        ) as caught:
            location.write("tkv.json", b"new")
    assert caught.value.__cause__.errno == code  # for callers that know more about the disk
    assert location.names() == ["tkv.json"] and location.read("tkv.json") == b"old"


def test_local_read_errors(tmp_path, monkeypatch):
    location = open_location(tmp_path)
    location.write("rows/0", b"0123")
    with pytest.raises(UserError, match=r"rows: cannot be read \(Is a directory\)"):
        location.read("rows")
    with pytest.raises(UserError, match=r"rows: cannot be deleted \("):
        location.delete("rows")
    short = os.pread
    with monkeypatch.context() as patch:  # the system may return less than asked for
        patch.setattr(
            os,
            "pread",
            lambda descriptor, count, position: short(descriptor, min(count, 3), position),
        )
        assert location.read("rows/0", 0, 4) == b"0123"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda *_: b"")
        with pytest.raises(DamagedFile, match="ends after 0 bytes, it had 4"):
            location.read("rows/0")


def test_urls(tmp_path, monkeypatch):
    for name in (
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ACCESS_KEY_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    assert open_location(f"file://{tmp_path}/a%20b").local == tmp_path / "a b"
    assert (
        open_location("some/store").spec("rows/w8")["path"] == f"{os.getcwd()}/some/store/rows/w8/"
    )
    retries = {"max_retries": 2, "initial_delay": "0.5s", "max_delay": "4.0s"}
    patience = Patience(retries=2, first_delay_s=0.5, longest_delay_s=4.0)
    s3 = open_location("s3://my-bucket/some/store/", patience=patience)
    assert s3.url == "s3://my-bucket/some/store" and s3.local is None and s3.writable
    assert s3.spec("rows/w8") == {
        "driver": "s3",
        "bucket": "my-bucket",
        "path": "some/store/rows/w8/",
        "s3_request_retries": retries,
    }
    assert (
        "path" not in open_location("s3://my-bucket").spec()
        or open_location("s3://my-bucket").spec()["path"] == ""
    )
    gs = open_location(
        "gs://my-bucket/store", patience=patience
    )  # no test server for gs: its spec is all that is tested
    assert (
        gs.spec()
        == {
            "driver": "gcs",
            "bucket": "my-bucket",
            "path": "store/",
            "gcs_request_retries": retries,
        }
        and gs.writable
    )
    ts.KvStore.Spec(gs.spec("rows"))
    http = open_location("https://host.example/a/store", patience=patience)
    assert not http.writable and http.local is None
    assert http.spec("rows") == {
        "driver": "http",
        "base_url": "https://host.example",
        "path": "/a/store/rows/",
        "http_request_retries": retries,
    }
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000/")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    spec = open_location("s3://my-bucket/store").spec()
    assert (spec["endpoint"], spec["aws_region"]) == ("http://127.0.0.1:9000", "eu-west-3")


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "empty path"),
        (
            "ftp://host/store",
            "unknown scheme 'ftp'; known: a local path, file, s3, gs, http, https",
        ),
        ("file://host/store", "not the URL of a local path"),
        ("s3://", "not a URL of a store"),
        ("s3://a/store", "not a URL of a store .*Invalid S3 bucket name"),
        ("https://host/store?key=1", "takes no query"),
        ("https://me:secret@host/store", "takes no query, fragment or password"),
    ],
)
def test_refused_urls(text, message):
    with pytest.raises(UserError, match=message) as caught:
        open_location(text)
    assert "\n" not in str(caught.value)
