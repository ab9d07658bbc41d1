"""kill -9 at random moments, and two processes at one target: never half a store taken for whole,
and the same command goes on.
"""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tkv.making import tree_bytes

from flexmemory.errors import UserError
from flexmemory.tkv.store import open_store

from . import child, toy


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Path of an undisturbed export."""
    out = tmp_path_factory.mktemp("undisturbed") / "s"
    toy.export_to(out, **child.SHARDS)
    return out


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """The same of other weights: all files have the same names, and all but the manifest the same
    sizes.
    """
    out = tmp_path_factory.mktemp("twin") / "s"
    toy.export_to(out, toy.other_params(), **child.SHARDS)
    return out


def kill(action: str, source: Path, folder: Path, count: int, environment) -> dict:
    words = [
        sys.executable,
        "-m",
        "reliability.child",
        "kills",
        action,
        str(source),
        str(folder),
        str(count),
    ]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def contents(store: Path) -> dict:
    """Files with their bytes and directories, so that nothing left behind is overlooked."""
    return tree_bytes(store) | {
        str(path.relative_to(store)): None for path in store.rglob("*") if path.is_dir()
    }


def is_whole(store: Path) -> bool:
    try:
        open_store(store).close()
    except UserError as error:
        assert re.search(
            "an unfinished (export|copy), not a store|no TKV store here", str(error)
        ), error
        return False
    return True


@pytest.mark.parametrize(
    "action,count",
    [
        ("export", 3),
        ("copy", 2),
        pytest.param("export", 20, marks=pytest.mark.slow),
        pytest.param("overwrite", 4, marks=pytest.mark.slow),
        pytest.param("copy", 5, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(action, count, whole, twin, tmp_path, child_environment):
    found = kill(
        action, twin if action == "overwrite" else whole, tmp_path, count, child_environment
    )
    assert found["ends"] == [-9] * count
    stages = set()
    for number in range(count):
        out = tmp_path / str(number)
        complete = is_whole(out)
        if complete:
            files = {
                name: data
                for name, data in tree_bytes(out).items()
                if not re.match(r"tkv\.partial\.|\.lock\.|.*\.tmp$", name)
            }
            assert files in (
                tree_bytes(whole),
                *[tree_bytes(twin)] * (action == "overwrite"),
            ), number
        stages.add(frozenset(contents(out)))
        child.act(action, whole, out)
        assert contents(out) == contents(whole), number
    assert len(stages) > count // 2  # the moments were different ones


@pytest.mark.parametrize("first", ["export", "copy"])
def test_two_processes_at_one_target(first, whole, tmp_path, child_environment):
    """The second is refused at once, whichever it is. Ctrl-C ends the first, and the second goes
    ahead.
    """
    out = tmp_path / "s"
    words = [sys.executable, "-m", "reliability.child", "hold", first, str(whole), str(out)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=child_environment
    ) as process:
        try:
            assert int(process.stdout.readline()) == process.pid
            before = sorted(tree_bytes(out))
            for second in ("export", "copy"):
                with pytest.raises(
                    UserError, match=f"{out}: another process .* there; wait for it"
                ):
                    child.act(second, whole, out)
            assert process.poll() is None and sorted(tree_bytes(out)) == before
            process.send_signal(signal.SIGINT)
            process.wait(timeout=10)
        finally:
            process.kill()
    assert not list(out.glob(".lock*"))
    child.act(first, whole, out)
    assert contents(out) == contents(whole)
