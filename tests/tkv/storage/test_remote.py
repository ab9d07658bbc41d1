"""Stores on s3 (moto's server on loopback) and behind http, with the faults that servers have."""

import logging
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from flexmemory.errors import UserError
from flexmemory.tkv import copy as copying
from flexmemory.tkv import export as export_module
from flexmemory.tkv import fold, verify
from flexmemory.tkv.copy import copy
from flexmemory.tkv.storage.location import DamagedFile, Patience, RemoteLocation, open_location
from flexmemory.tkv.storage.target import COPY_MARK
from flexmemory.tkv.store import open_store
from flexmemory.tkv.verify import verify_deep

from ..making import VOCAB, config, make_store, params, tree_bytes
from .test_location import check_contract

BUCKET = "some-bucket"  # as which a FileServer shows its folder
QUICK = Patience(retries=3, first_delay_s=0.01, longest_delay_s=0.02, timeout_s=20)


@pytest.fixture(scope="session")
def s3_server():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(s3_server, request, monkeypatch):
    """s3:// URL of an empty bucket of the test's own."""
    s3_environment(monkeypatch, s3_server)
    name = "test-" + "".join(c if c.isalnum() else "-" for c in request.node.name.lower()).strip(
        "-"
    )
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{name}", method="PUT")).close()
    return f"s3://{name}"


def s3_environment(monkeypatch, endpoint):
    for name, value in dict(
        AWS_ENDPOINT_URL=endpoint,
        AWS_REGION="us-east-1",
        AWS_ACCESS_KEY_ID="id",
        AWS_SECRET_ACCESS_KEY="secret",
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)


class FileServer(ThreadingHTTPServer):
    """A directory over http with ranges, as a web server and as S3 would give it; ``faults`` are
    answered first, one per request.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), FileHandler)
        self.folder, self.faults, self.always, self.requests, self.silent_s = (
            folder,
            [],
            None,
            [],
            0.0,
        )
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class FileHandler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def do_GET(self):
        server, path = (
            self.server,
            self.server.folder / self.path.removeprefix(f"/{BUCKET}").lstrip("/"),
        )
        server.requests.append(f"{self.command} {self.path}")
        server.closing.wait(server.silent_s)
        if fault := server.always or (server.faults.pop(0) if server.faults else None):
            return self.answer(
                fault, b"<Error><Code>AccessDenied</Code></Error>" if fault == 403 else b"busy"
            )
        if not path.is_file():
            return self.answer(404, b"")
        data, span = path.read_bytes(), self.headers.get("Range")
        if span is None:
            return self.answer(200, data)
        first, last = span.removeprefix("bytes=").split("-")
        if not first:  # bytes=-N, the last N
            first, last = max(0, len(data) - int(last)), len(data) - 1
        first, last = int(first), min(int(last or len(data) - 1), len(data) - 1)
        if first > last:
            return self.answer(416, b"")
        self.answer(206, data[first : last + 1], f"bytes {first}-{last}/{len(data)}")

    do_HEAD = do_PUT = do_DELETE = do_GET

    def answer(self, status, data, content_range=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"tag"')
        if content_range:
            self.send_header("Content-Range", content_range)
        if self.headers.get("Content-Length", "0") != "0":
            self.rfile.read(int(self.headers["Content-Length"]))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def web(mixed_store):
    """A FileServer of a folder that has the mixed store."""
    server = FileServer(mixed_store.parent)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


def location_of(web, kind, patience=QUICK):
    """The mixed store on the FileServer, by http or as s3."""
    return open_location(url_of(web, kind), patience=patience)


def url_of(web, kind):
    return f"{web.url}/mixed" if kind == "http" else f"s3://{BUCKET}/mixed"


def interrupted(writes, action, monkeypatch):
    """Ctrl-C comes after so many writes to a remote location."""
    write, left = RemoteLocation.write, [writes]

    def count(location, name, data):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(location, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteLocation, "write", count)
        with pytest.raises(KeyboardInterrupt):
            action()


def one_line(caught):
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return True


# ---- s3


def test_s3_keeps_the_contract(bucket):
    check_contract(open_location(f"{bucket}/a/store", patience=QUICK))


def test_s3_whole_bucket(bucket):
    check_contract(open_location(bucket, patience=QUICK))


def test_s3_claims(bucket):
    """The later of two processes takes an object over, and the earlier one learns of it."""
    first, second = (open_location(f"{bucket}/store", patience=QUICK) for _ in range(2))
    assert first.claim("tkv.partial.0.json", b"1") and first.claim("tkv.partial.0.json", b"2")
    assert second.claim("tkv.partial.0.json", b"3")
    assert not first.claim("tkv.partial.0.json", b"4")
    assert second.claim("tkv.partial.0.json", b"5") and first.read("tkv.partial.0.json") == b"5"


def test_s3_without_a_bucket(bucket):
    location = open_location("s3://nobodys-bucket/store", patience=QUICK)
    for action in (
        lambda: location.write("a", b"1"),
        location.names,
        lambda: location.claim("a", b"1"),
    ):
        with pytest.raises(
            UserError, match="s3://nobodys-bucket/store.*; check that the bucket exists"
        ) as caught:
            action()
        assert one_line(caught)
    with pytest.raises(UserError, match="no TKV store here"):
        open_store("s3://nobodys-bucket/store")


def test_copy_to_s3_and_back(mixed_store, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "PART_BYTES", 4096)
    monkeypatch.setattr(copying, "LARGE_BYTES", 4096)  # both ways of sending
    made = copy(mixed_store, f"{bucket}/store", progress=False)
    assert made["copied_files"] == made["files"] - 1
    location = open_location(f"{bucket}/store")
    assert {name: location.read(name) for name in location.names()} == tree_bytes(mixed_store)
    assert copy(mixed_store, f"{bucket}/store", progress=False)["copied_files"] == 0
    copy(f"{bucket}/store", tmp_path / "back", progress=False, deep=True)
    assert tree_bytes(tmp_path / "back") == tree_bytes(mixed_store)
    copy(f"{bucket}/store", f"{bucket}/second", progress=False)
    assert verify_deep(f"{bucket}/second", progress=False)["ok"]


@pytest.mark.parametrize("damage", ["flipped", "shorter", "longer", "missing"])
def test_damage_on_s3(mixed_store, bucket, tmp_path, damage):
    """Refused as a source; mended by a deep copy onto it."""
    name, location = "rows/w48/c/1/0/0", open_location(f"{bucket}/store")
    copy(mixed_store, f"{bucket}/store", progress=False)
    data = location.read(name)
    if damage == "missing":
        location.delete(name)
    else:
        location.write(
            name,
            {
                "flipped": bytes([data[0] ^ 1]) + data[1:],
                "shorter": data[:-1],
                "longer": data + b"0",
            }[damage],
        )
    what = {
        "flipped": "its checksum is wrong",
        "shorter": f"{len(data) - 1} bytes, {len(data)} expected",
        "longer": f"{len(data) + 1} bytes, {len(data)} expected",
        "missing": "missing",
    }[damage]
    with pytest.raises(DamagedFile, match=f"{bucket}/store/{name}: {what}"):
        copy(f"{bucket}/store", tmp_path / "back", progress=False)
    assert not (tmp_path / "back" / "tkv.json").exists()
    assert copy(mixed_store, f"{bucket}/store", progress=False, deep=True)["copied_files"] == 1
    assert location.read(name) == data


def test_interrupted_copy_to_s3(mixed_store, bucket, monkeypatch):
    interrupted(6, lambda: copy(mixed_store, f"{bucket}/store", progress=False), monkeypatch)
    with pytest.raises(UserError, match="store"):
        open_store(f"{bucket}/store")
    made = copy(mixed_store, f"{bucket}/store", progress=False)
    assert made["copied_files"] == made["files"] - 1 - 6
    assert set(open_location(f"{bucket}/store").names()) == set(tree_bytes(mixed_store))


def test_two_copies_to_one_s3_target(mixed_store, bucket, monkeypatch):
    """The later one takes over; the earlier one does not publish."""
    copy_files = copying._copy_files

    def meanwhile(*args):
        other = open_location(f"{bucket}/store")
        assert other.claim(COPY_MARK, b"{}")  # as a copy of another store does
        return copy_files(*args)

    monkeypatch.setattr(copying, "_copy_files", meanwhile)
    with pytest.raises(UserError, match="another process copies there"):
        copy(mixed_store, f"{bucket}/store", progress=False)
    assert "tkv.json" not in open_location(f"{bucket}/store").names()


def test_two_exports_to_one_s3_target(mixed, bucket, monkeypatch):
    """The later one takes over, even when all rows of the earlier one are written; the earlier one
    does not publish.
    """
    publish = export_module._publish

    def stop(*_):
        raise KeyboardInterrupt

    def meanwhile(*args):
        with monkeypatch.context() as patch:
            patch.setattr(
                export_module, "_publish", stop
            )  # the other one has cleared the target and written its rows
            with pytest.raises(KeyboardInterrupt):
                make_store(f"{bucket}/store", *mixed, dtype="bfloat16", overwrite=True)
        return publish(*args)

    monkeypatch.setattr(export_module, "_publish", meanwhile)
    with pytest.raises(UserError, match="another process has begun to export there|missing"):
        make_store(f"{bucket}/store", *mixed)
    assert "tkv.json" not in open_location(f"{bucket}/store").names()
    monkeypatch.setattr(export_module, "_publish", publish)
    make_store(
        f"{bucket}/store", *mixed, dtype="bfloat16"
    )  # the other one goes on where it stopped
    assert verify_deep(f"{bucket}/store", progress=False)["ok"]


def test_open_store_on_s3(mixed_store, bucket):
    copy(mixed_store, f"{bucket}/store", progress=False)
    local, remote = open_store(mixed_store), open_store(f"{bucket}/store")
    ids = np.array([5, 0, VOCAB - 1, 63, 64, 5])
    for name, rows in local.read_rows(ids).items():
        np.testing.assert_array_equal(remote.read_rows(ids)[name], rows)
    for ours, theirs in zip(
        *(map(np.asarray, jax.tree.leaves(store.backbone())) for store in (local, remote))
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert remote.tokenizer().fingerprint == local.tokenizer().fingerprint


def test_wrong_row_on_s3_is_not_handed_out(mixed_store, bucket):
    copy(mixed_store, f"{bucket}/store", progress=False)
    location, name = open_location(f"{bucket}/store"), "rows/w48/c/1/0/0"
    data = bytearray(location.read(name))
    data[3] ^= 1
    location.write(name, data)
    store = open_store(f"{bucket}/store")
    store.read_rows(np.array([0, 65]))
    with pytest.raises(UserError, match="rows/w48: the rows of token 64 fail their checksum"):
        store.read_rows(np.array([0, 64]))


@pytest.mark.parametrize("options", [{}, {"dtype": "int4", "rank": 0.5}])
def test_export_to_s3(mixed, bucket, tmp_path, options):
    cfg, params = mixed
    make_store(f"{bucket}/store", cfg, params, **options)
    make_store(tmp_path / "local", cfg, params, **options)
    location = open_location(f"{bucket}/store")
    assert {name: location.read(name) for name in location.names()} == tree_bytes(
        tmp_path / "local"
    )
    assert verify_deep(f"{bucket}/store", progress=False)["ok"]


def test_learned_rows_for_s3_are_few_shards_in_memory(bucket, tmp_path, monkeypatch):
    """An object is sent whole."""
    cfg, counts, copy_memory = config("stem*2"), [], fold.copy_memory
    monkeypatch.setattr(
        fold,
        "copy_memory",
        lambda groups, count: counts.append(count) or copy_memory(groups, count),
    )
    make_store(f"{bucket}/store", cfg, weights := params(cfg), shard_rows=16)
    make_store(tmp_path / "local", cfg, weights, shard_rows=16)
    assert counts == [export_module.WRITING, export_module.COPYING]
    location = open_location(f"{bucket}/store")
    assert {name: location.read(name) for name in location.names()} == tree_bytes(
        tmp_path / "local"
    )


@pytest.mark.parametrize("writes", [1, 6, 15, 24])
def test_interrupted_export_to_s3(mixed, mixed_store, bucket, monkeypatch, writes):
    cfg, params = mixed
    interrupted(writes, lambda: make_store(f"{bucket}/store", cfg, params), monkeypatch)
    with pytest.raises(UserError, match="store"):
        open_store(f"{bucket}/store")
    make_store(f"{bucket}/store", cfg, params)
    location = open_location(f"{bucket}/store")
    assert {name: location.read(name) for name in location.names()} == tree_bytes(mixed_store)


# ---- http


def test_http(web, mixed_store, tmp_path):
    location = open_location(f"{web.url}/mixed/", patience=QUICK)
    assert location.read("tkv.json") == (mixed_store / "tkv.json").read_bytes()
    assert (
        location.read("tokenizer.json", 3, 9) == (mixed_store / "tokenizer.json").read_bytes()[3:9]
    )
    assert location.sizes(["tkv.json", "nothing"]) == {"tkv.json": None}
    with pytest.raises(FileNotFoundError):
        location.read("nothing")
    with pytest.raises(DamagedFile, match="shorter than expected"):
        location.read("tkv.json", 0, 1 << 20)
    for action in (
        lambda: location.write("a", b""),
        lambda: location.delete("a"),
        lambda: location.claim("a", b""),
    ):
        with pytest.raises(UserError, match="http locations are read only"):
            action()
    with pytest.raises(UserError, match="http cannot list files"):
        location.names()
    with pytest.raises(UserError, match="http locations are read only; copy to"):
        copy(mixed_store, f"{web.url}/new", progress=False)
    copy(f"{web.url}/mixed", tmp_path / "out", progress=False)
    assert tree_bytes(tmp_path / "out") == tree_bytes(mixed_store)
    ids = np.array([0, 64, 5])
    for name, rows in open_store(mixed_store).read_rows(ids).items():
        np.testing.assert_array_equal(open_store(f"{web.url}/mixed").read_rows(ids)[name], rows)


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_busy_server_is_asked_again(web, mixed_store, monkeypatch, kind):
    s3_environment(monkeypatch, web.url)
    location = location_of(web, kind)
    web.faults, web.silent_s = [503, 500, 429 if kind == "s3" else 504], 0.05
    assert location.read("tkv.json") == (mixed_store / "tkv.json").read_bytes()
    assert len(web.requests) == 4


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_server_that_stays_busy(web, monkeypatch, kind):
    s3_environment(monkeypatch, web.url)
    location = location_of(web, kind)
    web.always = 503
    message = (
        r"mixed/tkv\.json: cannot be read \(.*All 3 retry attempts failed.*\); check the network"
        r" and the server"
    )
    with pytest.raises(UserError, match=message) as caught:
        location.read("tkv.json")
    assert one_line(caught) and len(web.requests) == QUICK.retries + 1


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_silent_server(web, monkeypatch, kind):
    s3_environment(monkeypatch, web.url)
    patience = Patience(timeout_s=0.3)
    location = location_of(web, kind, patience)
    web.silent_s = 60
    with pytest.raises(
        UserError, match=r"tkv\.json: cannot be read \(no answer within 0\.3 s\); check the network"
    ):
        location.read("tkv.json")


def test_no_server():
    location = open_location("http://127.0.0.1:9/store", patience=QUICK)
    with pytest.raises(
        UserError,
        match=r"127\.0\.0\.1:9/store/tkv\.json: cannot be read \(.*connect.*\); check the network",
    ) as caught:
        location.read("tkv.json")
    assert one_line(caught)


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_permission_denied(web, monkeypatch, kind):
    s3_environment(monkeypatch, web.url)
    location = location_of(web, kind)
    web.always = 403
    actions = [
        lambda: location.read("tkv.json"),
        lambda: location.read("tkv.json", 3, 5),
        lambda: location.sizes(["tkv.json"]),
    ]
    if kind == "s3":
        actions += [
            lambda: location.write("tkv.json", b"1"),
            lambda: location.delete("tkv.json"),
            location.names,
        ]
    for action in actions:
        web.requests.clear()
        with pytest.raises(
            UserError,
            match=r"mixed/.*permission denied \(.*\); check the credentials and what they allow",
        ) as caught:
            action()
        assert one_line(caught) and len(web.requests) <= 2  # not asked again and again
    with pytest.raises(UserError, match="permission denied"):
        open_store(url_of(web, kind))


def test_server_fails_while_a_store_is_copied(web, mixed_store, tmp_path):
    """Recovered within the call as far as retries go; after that, by the same call."""
    web.faults = [None if k % 3 else 503 for k in range(60)]
    copy(f"{web.url}/mixed", tmp_path / "out", progress=False)
    assert tree_bytes(tmp_path / "out") == tree_bytes(mixed_store)
