"""Processes that the tests kill or limit: ``python -m reliability.child kills|hold|full|few|ramfs
ACTION SOURCE TARGET [COUNT]``

ACTION is export, overwrite or copy. kills: does it again and again, killed at random moments, in
targets TARGET/0, TARGET/1, ...; prints how each process ended. hold: does it once, so slowly that
it never ends, and prints a line once TARGET is its own. full: does it on file systems of COUNT
growing sizes mounted on TARGET, until one suffices. few: opens and reads SOURCE with ever fewer
file descriptors. ramfs: reads SOURCE's rows from a ramfs mounted on TARGET, which refuses O_DIRECT.
"""

import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
from tkv.making import tree_bytes

from flexmemory import files
from flexmemory.errors import UserError
from flexmemory.files import allocate
from flexmemory.tkv import format
from flexmemory.tkv.copy import copy
from flexmemory.tkv.manifest import read_manifest
from flexmemory.tkv.storage import target
from flexmemory.tkv.storage.location import open_location
from flexmemory.tkv.storage.reader import open_reader
from flexmemory.tkv.store import open_store

from . import toy
from .flips import everything

SHARDS = {"shard_rows": 64}  # five of each group


def act(action: str, source: Path, out: Path) -> None:
    if action == "copy":
        copy(source, out, progress=False)
    else:
        toy.export_to(out, overwrite=action == "overwrite", **SHARDS)


def slow_down(seconds: float) -> None:
    """Each fsync takes so long: one when a file has its bytes but not its name, one when it has."""
    fsync = os.fsync

    def slowly(descriptor):
        time.sleep(seconds)
        fsync(descriptor)

    os.fsync, target.RECORD_SECONDS = slowly, 3 * seconds


CHANGES = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
}  # among Python's audit events, which come just before the deed


def changes(out: Path, at: int) -> itertools.count:
    """Counts what this process does from now on to files below ``out``. Before number ``at`` it
    kills itself, whatever its other threads do.
    """
    counter, lock, below = itertools.count(), threading.Lock(), str(out)

    def hook(event, args):
        if (
            event in CHANGES
            and isinstance(args[0], str | os.PathLike)
            and os.fspath(args[0]).startswith(below)
        ):
            with lock:
                if next(counter) == at:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return counter


def killed(action: str, source: Path, out: Path, at: int) -> tuple[int, int]:
    """(how the process ended, changes that it made to the target, if it came to its end)"""
    if action == "overwrite":
        shutil.copytree(source, out)
    read, write = os.pipe()
    process = os.fork()
    if not process:
        with contextlib.suppress(BaseException):
            counter = changes(out, at)
            act(action, source, out)
            os.write(write, str(next(counter)).encode())
            os._exit(0)
        os._exit(1)
    os.close(write)
    with open(read) as said:
        made = int(said.read() or 0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), made


def kills(action: str, source: Path, folder: Path, count: int) -> dict:
    """The moments are drawn over the changes that an undisturbed process makes to the target, one
    in each of ``count`` equal parts: a slow machine has the same ones.
    """
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    target.RECORD_SECONDS = 0  # else it is a matter of time how often the record is written
    end, total = killed(action, source, folder / "undisturbed", -1)
    if end:
        raise SystemExit("undisturbed: failed")
    rng, part = (
        random.Random(0),
        0.95 * total / count,
    )  # threads that meet at a new folder make a change more or less
    return {
        "ends": [
            killed(action, source, folder / str(number), int(part * (number + rng.random())))[0]
            for number in range(count)
        ],
        "total": total,
    }


def full(action: str, source: Path, folder: Path, count: int) -> dict:
    """Needs a mount namespace of its own. After each failure the file system grows and the same is
    done again.
    """
    said, finished = [], 0
    for number in range(count):
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={(16 + number) * 4}k", "tmpfs", folder],
            check=True,
        )
        out = folder / "s"
        try:
            act(action, source, out)
            said.append(None)
        except UserError as error:
            said.append(str(error))
            try:
                open_store(out)
                said[-1] = "opened"
            except UserError:
                pass
        subprocess.run(["mount", "-o", "remount,size=4m", folder], check=True)
        act(action, source, out)
        finished += tree_bytes(out) == tree_bytes(source)
        subprocess.run(["umount", folder], check=True)
    return {"said": said, "finished": finished}


def few(source: Path) -> dict:
    """From many descriptors down to none that is free; the limit cannot be raised again by what is
    tested.
    """
    want, outcomes = everything(source), {}
    opened = [open_store(source) for _ in range(24)]  # their shards are not open yet
    for free in range(23, -1, -1):
        taken = {*map(int, os.listdir("/proc/self/fd"))}
        limit = [number for number in range(4096) if number not in taken][
            free
        ]  # a new descriptor takes the lowest number, which must be below
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        for name, read in (
            ("open", lambda: everything(source)),
            ("read", lambda: opened[free].read_rows(range(257))),
        ):
            try:
                got = read()
                right = (
                    got == want
                    if name == "open"
                    else all(want[f"rows {group}"] == rows.tobytes() for group, rows in got.items())
                )
                outcomes[f"{name} {free}"] = "right" if right else "wrong"
            except UserError as error:
                outcomes[f"{name} {free}"] = str(error)
            except BaseException as error:
                outcomes[f"{name} {free}"] = f"TRACEBACK {error!r}"
        opened[free].close()
    return outcomes


def ramfs(source: Path, folder: Path) -> dict:
    """Needs a mount namespace of its own."""
    subprocess.run(["mount", "-t", "ramfs", "ramfs", folder], check=True)
    shutil.copytree(source, folder / "s")
    try:
        os.close(os.open(folder / "s" / "tkv.json", os.O_RDONLY | os.O_DIRECT))
        refused = False
    except OSError:
        refused = True
    stats, manifest = [], read_manifest(open_location(source))
    for group in manifest.groups:
        want, got = (allocate(manifest.vocab_size, group.bundle_bytes) for _ in range(2))
        for place, method, out in ((source, "buffered", want), (folder / "s", "uring", got)):
            reader = open_reader(
                open_location(place), format.records(manifest, group), method=method
            )
            reader.read(np.arange(manifest.vocab_size), out)
            stats.append(reader.stats())
            reader.close()
        assert (want == got).all() and want.any()
    return {"refused": refused, "method": stats[-1]["method"]}


def main() -> None:
    what, action, source, out, *count = sys.argv[1:]
    source, out = Path(source), Path(out)
    if what == "kills":
        print(json.dumps(kills(action, source, out, int(*count))))
    elif what == "full":
        print(json.dumps(full(action, source, out, int(*count))))
    elif what == "few":
        print(json.dumps(few(source)))
    elif what == "ramfs":
        print(json.dumps(ramfs(source, out)))
    else:
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell that runs the tests in the background has it ignored
        slow_down(30)
        process = os.getpid()
        if not os.fork():  # tells when the first file is being written, and ends
            while not any(out.glob(f"*{files.SCRATCH}")):
                time.sleep(0.01)
            print(process, flush=True)
            os._exit(0)
        act(action, source, out)


if __name__ == "__main__":
    main()
