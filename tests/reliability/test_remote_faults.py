"""A server that fails while a store behind it is opened or serves: recovered, or one line in
bounded time, and the engine goes on after it.

tests/tkv/test_remote.py tries single reads and writes, copies and exports.
"""

import dataclasses
import shutil
import threading

import pytest

from flexmemory.errors import UserError
from flexmemory.runtime.engine import Engine
from flexmemory.runtime.rows import Budgets
from flexmemory.tkv.storage import location
from flexmemory.tkv.storage.location import Patience, RemoteLocation

from .flips import everything
from .server import Server

KIND = "int8"
PROMPTS = ["token memory", "far"]
OPTIONS = dict(max_tokens=12, stop_at_eos=False)


@pytest.fixture(scope="module")
def web(stores, tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    shutil.copytree(stores[KIND], folder / "bucket-name" / "s")
    server = Server(folder)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    yield server
    server.mend()
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["http", "s3"])
def url(request, web, monkeypatch):
    web.mend()
    web.met = 0
    for name, value in dict(
        AWS_ENDPOINT_URL=web.url,
        AWS_REGION="us-east-1",
        AWS_ACCESS_KEY_ID="id",
        AWS_SECRET_ACCESS_KEY="secret",
    ).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setattr(
        location,
        "Patience",
        lambda: Patience(retries=3, first_delay_s=0.01, longest_delay_s=0.02, timeout_s=20),
    )
    yield f"{web.url}/bucket-name/s" if request.param == "http" else "s3://bucket-name/s"
    web.mend()


@pytest.fixture
def patience_ends_at_silence(web, monkeypatch):
    """Whatever is waited for is given up at the moment when the server holds a request back, and
    not before, however slow the machine is. (tests/tkv/test_remote.py waits for a silent server in
    real time.)
    """
    wait = RemoteLocation.wait

    def until_silent(self, future):
        while not future.done() and not web.silent.wait(0.002):
            pass
        return wait(dataclasses.replace(self, timeout_s=0), future)

    monkeypatch.setattr(RemoteLocation, "wait", until_silent)


@pytest.fixture(scope="module")
def want(stores):
    return everything(stores[KIND])


@pytest.fixture(scope="module")
def text(stores):
    return Engine(stores[KIND], Budgets(ram=0), max_batch=2, chunk=4).generate(PROMPTS, **OPTIONS)


def engine(url):
    return Engine(url, Budgets(ram=0), max_batch=2, chunk=4)


def bounded(call, seconds: float = 20.0):
    """The result or error of ``call`` in a thread of its own, which must come to an end."""
    made = []

    def run():
        try:
            made.append((call(), None))
        except BaseException as error:
            made.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert made, f"still waiting after {seconds} s"
    if made[0][1]:
        raise made[0][1]
    return made[0][0]


@pytest.mark.parametrize("fault", [500, 503, "drop", "half", ("slow", 0.05)], ids=str)
def test_passing_faults_are_recovered(fault, url, web, want, text):
    """Three in a row at every kind of file while a store is opened, and then while it serves."""
    for path in (
        "tkv.json",
        "tokenizer.json",
        "counts",
        "zarr.json",
        "checksums",
        "rows",
        "backbone",
    ):
        web.fault(fault, path, times=3)
        assert bounded(lambda: everything(url)) == want, path
    assert web.met == 3 * 7
    serving = engine(url)
    web.fault(fault, "rows", times=3)
    assert bounded(lambda: serving.generate(PROMPTS, **OPTIONS)) == text
    assert web.met == 3 * 8


LASTING = [404, 403, 503, "drop", "half", "silent"]


FILES = (
    "tkv.json",
    "tokenizer.json",
    "counts",
    "rows/w4/zarr.json",
    "checksums/w8/zarr.json",
    "checksums/w8/c/1",
    "rows/w4/c/0",
    "backbone",
)


@pytest.mark.parametrize("fault", LASTING[:-1], ids=str)
@pytest.mark.parametrize("url,after", [("s3", 0), ("http", 1)], indirect=["url"])
def test_lasting_faults_are_told_when_a_store_is_opened(fault, after, url, web):
    """At every kind of file, from its first or second request on: its size is asked for, then it is
    opened and read.
    """
    for path in FILES:
        web.fault(fault, path, after=after)
        web.met = 0
        try:
            bounded(lambda: everything(url))
            assert not web.met and after, path
        except UserError as error:
            assert web.met and "\n" not in str(error) and str(error).startswith(url), (path, error)
        web.mend()


@pytest.mark.parametrize("url", ["http"], indirect=True)
@pytest.mark.parametrize("path", FILES)
def test_a_silent_server_is_given_up_when_a_store_is_opened(
    path, url, web, patience_ends_at_silence
):
    web.fault("silent", path, after=path != "tkv.json")  # which is asked for once
    with pytest.raises(UserError, match="no answer within 0 s") as caught:
        bounded(lambda: everything(url))
    assert web.met and "\n" not in str(caught.value) and str(caught.value).startswith(url)


@pytest.mark.parametrize("fault", LASTING, ids=str)
def test_lasting_faults_are_told_while_a_store_serves(
    fault, url, web, text, patience_ends_at_silence
):
    """In the middle of a generation; when the server is mended the same engine goes on."""
    serving = engine(url)
    with pytest.raises(UserError, match=f"{url}/rows/w.: cannot be read") as caught:
        bounded(
            lambda: serving.generate(
                PROMPTS,
                **OPTIONS,
                on_token=lambda *_: web.faults or web.fault(fault, "rows/.*/c/0"),
            )
        )
    assert "\n" not in str(caught.value) and web.met
    web.mend()
    if fault == 404:  # what is said to be missing is not asked for again
        serving = engine(url)
    assert bounded(lambda: serving.generate(PROMPTS, **OPTIONS)) == text
