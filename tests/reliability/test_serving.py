"""A store that changes under a running engine, reads that fail in its threads, and the end of the
process.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from tkv.making import tree_bytes

from flexmemory.errors import UserError
from flexmemory.runtime.engine import Engine
from flexmemory.runtime.rows import Budgets
from flexmemory.tkv import store
from flexmemory.tkv.format import shard_file
from flexmemory.tkv.storage import location
from flexmemory.tkv.store import open_store

from . import toy
from .flips import everything

PROMPTS = ["token memory", "far"]
OPTIONS = dict(max_tokens=16, stop_at_eos=False)


def engine(path, rows=2, **options) -> Engine:
    opened = open_store(path)
    return Engine(
        opened,
        Budgets(ram=rows * opened.manifest.bundle_bytes),
        **dict(max_batch=2, chunk=4) | options,
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A store of other weights whose files have the same names and sizes."""
    out = tmp_path_factory.mktemp("other") / "s"
    toy.export_to(out, toy.other_params())
    return out


@pytest.fixture(scope="module")
def texts(stores, other):
    """What the engines of the two stores write; not the same."""
    made = [engine(path).generate(PROMPTS, **OPTIONS) for path in (stores["float32"], other)]
    assert made[0] != made[1]
    return made


@pytest.fixture
def path(stores, tmp_path):
    return shutil.copytree(stores["float32"], tmp_path / "s")


def by_rename(path, other):
    path.rename(f"{path}.old")
    shutil.copytree(other, path)


def by_export(path, other):
    toy.export_to(path, toy.other_params(), overwrite=True)


def by_copying_over(path, other):
    """Into the same files, byte by byte, as cp does."""
    for name, data in tree_bytes(other).items():
        with open(path / name, "r+b") as file:
            file.write(data)
            file.truncate()


REPLACED = [by_rename, by_export, by_copying_over]


@pytest.mark.parametrize("replace", REPLACED)
@pytest.mark.parametrize("when", ["opened", "served", 0, 3, 9])
def test_a_store_replaced_while_it_serves(replace, when, path, other, texts):
    """The old text or one line, never another: whether before the first row, between two calls, or
    after a token.
    """
    serving, seen = engine(path), []
    if when == "served":
        assert serving.generate(PROMPTS, **OPTIONS) == texts[0]
    if isinstance(when, str):
        replace(path, other)

    def on_token(number, token):
        if len(seen) == when:
            replace(path, other)
        seen.append((number, token))

    for _ in range(2):  # and the engine stays one of the old store
        seen.clear()
        try:
            assert serving.generate(PROMPTS, **OPTIONS, on_token=on_token) == texts[0]
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        given = [[token for number, token in seen if number == n] for n in range(2)]
        assert all(texts[0][n].ids[: len(ids)] == ids for n, ids in enumerate(given))
        when = None
    assert engine(path).generate(PROMPTS, **OPTIONS) == texts[1]


@pytest.mark.parametrize("replace,stride", [(by_rename, 1), (by_export, 5)])
def test_a_store_replaced_while_it_is_opened(replace, stride, stores, other, tmp_path, monkeypatch):
    """At every one, or every fifth, of the steps in which a store is opened and read: all of the
    one, all of the other, or one line.
    """
    wholes, seen, number = [everything(stores["float32"]), everything(other)], [], 0
    while True:
        path, left = shutil.copytree(stores["float32"], tmp_path / str(number)), [number]

        def step(function, path=path, left=left):
            def call(*args, **options):
                left[0] -= 1
                if left[0] == -1:
                    with monkeypatch.context() as inner:
                        inner.undo()
                        replace(path, other)
                return function(*args, **options)

            return call

        with monkeypatch.context() as patch:
            for owner, name in (
                (location.LocalLocation, "read"),
                (location.LocalLocation, "sizes"),
                (store, "_open_array"),
                (store, "open_reader"),
            ):
                patch.setattr(owner, name, step(getattr(owner, name)))
            try:
                got = everything(path, backbone=True)
                seen.append(wholes.index(got))  # ValueError: a mixture
            except UserError as error:
                assert "\n" not in str(error) and str(path) in str(error)
                seen.append("refused")
        if left[0] >= 0:
            break
        number += stride
    assert (
        len(seen) > 15 // stride
        and seen[0] == 1
        and seen[-1] == 0
        and seen.count("refused") > 8 // stride
    ), seen


def damage(path, token):
    """Flips a bit of a token's row in one group."""
    opened = open_store(path)
    group, (block, place) = opened.groups[1], divmod(token, opened.manifest.shard_rows)
    with open(path / shard_file(group, block), "r+b") as file:
        file.seek(place * group.bundle_bytes)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("read_ahead", [0, 8, 64])
def test_only_a_damaged_row_that_is_needed_matters(read_ahead, path, texts):
    """Rows that are read ahead in vain may be damaged."""
    needed = {token for made in texts[0] for token in made.prompt_ids + made.ids}
    for token in set(range(257)) - needed:
        damage(path, token)
    for rows in (0, 2):
        assert engine(path, rows, read_ahead=read_ahead).generate(PROMPTS, **OPTIONS) == texts[0]
    damage(path, bad := texts[0][0].ids[5])
    serving, said = engine(path, rows=0, read_ahead=read_ahead), []
    for _ in range(2):
        with pytest.raises(
            UserError, match=f"rows/w.: the rows of token {bad} fail their checksum"
        ):
            serving.generate(PROMPTS, **OPTIONS, on_token=lambda *token: said.append(token))
    assert (
        said and said[: len(said) // 2] == said[len(said) // 2 :]
    )  # what came before was given out, both times
    assert (
        len(serving.generate([[next(iter(needed - {bad}))]], 1)[0].ids) == 1
    )  # the engine goes on


def test_two_engines_on_one_store_in_threads(stores, texts):
    """On stores of their own and on one that they share, each with its own caches."""
    shared, made = open_store(stores["float32"]), [None] * 4
    budgets = Budgets(ram=2 * shared.manifest.bundle_bytes)
    opened = [shared, shared, open_store(stores["float32"]), open_store(stores["float32"])]
    engines = [Engine(one, budgets, max_batch=2, chunk=4, read_ahead=4) for one in opened]

    def run(n):
        made[n] = [engines[n].generate(PROMPTS, **OPTIONS) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert made == [[texts[0]] * 4] * 4


GENERATE = """
import functools, sys
from flexmemory.cli import main
from flexmemory.tkv.storage import location
main.start_process = lambda: None
location.Patience = functools.partial(location.Patience, timeout_s=4.0)
sys.exit(main.main())
"""


@pytest.mark.parametrize("silent", [False, True], ids=["local", "silent server"])
def test_generate_interrupted_from_the_keyboard(silent, stores, child_environment):
    """SIGINT ends the process within seconds with one word; where a server is silent, when its time
    is up (here 4 s). For an export and a copy see test_kills.py.
    """
    with silent_server(stores["float32"]) if silent else contextlib.nullcontext() as server:
        words = [
            f"--tkv={server.url}/float32" if silent else f"--tkv={stores['float32']}",
            "--prompt=a",
            "--max_tokens=100000",
            "--ram_budget=0",
        ]
        process = subprocess.Popen(
            [sys.executable, "-c", GENERATE, "generate", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment,
        )
        try:
            if silent:
                while not server.met:
                    assert process.poll() is None, process.stderr.read()
                    time.sleep(0.01)
            else:
                assert process.stdout.read(1), process.stderr.read()  # it has begun
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
        assert (
            process.returncode == 130
            and said.splitlines()[-1] == "interrupted"
            and "Traceback" not in said
        )


@contextlib.contextmanager
def silent_server(path):
    """Serves the store and falls silent after the first rows."""
    from .server import Server

    server = Server(path.parent)
    server.fault("silent", "/rows/.*/c/", after=20)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    try:
        yield server
    finally:
        server.mend()
        server.shutdown()
        server.server_close()
