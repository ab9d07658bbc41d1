"""The target of an export: whose it is, what is on it already, and the step by which it becomes a
store.

Host 0 marks it with its record (``ready`` false), clears what was there, writes what must come
before the rows, and sets ``ready``. The other hosts wait for that. Every record lists blocks whose
files are on the disk; a block in any host's record is done.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator

from flexmemory import files
from flexmemory.errors import UserError
from flexmemory.progress import ProgressLine
from flexmemory.tkv import format
from flexmemory.tkv.format import MANIFEST, File, Manifest
from flexmemory.tkv.manifest import read_manifest, to_json
from flexmemory.tkv.storage.location import Location, make_directory

CONTENTS = ("rows", "checksums", "backbone", format.TOKENIZER, format.BASIS, format.COUNTS)
PARTIAL, LOCK = "tkv.partial.", ".lock."  # and the number of the host
# a kill loses the blocks of the last seconds, and a long list is not written for every block
RECORD_SECONDS = 2.0
POLL_SECONDS = 0.5  # between looks at what other hosts have done


@dataclasses.dataclass(frozen=True)
class Block:
    files: list[File]
    sums: dict[
        int, list[float]
    ]  # model layer -> squared error, squares, largest error; {} for plain float32


class Record:
    """tkv.partial.<host>.json. ``with record:`` writes at the end what is not yet written."""

    def __init__(
        self,
        location: Location,
        host: int,
        identity: dict,
        prepared: list[File] = (),
        blocks: dict[int, Block] = (),
    ):
        self.location, self.host, self.identity = location, host, identity
        self.prepared, self.blocks = list(prepared), dict(blocks)
        self._written = time.monotonic()

    def add(self, block: int, files: list[File], sums: dict[int, list[float]]) -> None:
        """Counts a block whose files are on the disk."""
        self.blocks[block] = Block(files, sums)
        if time.monotonic() - self._written > RECORD_SECONDS:
            self.write()

    def write(self, ready: bool = True) -> None:
        blocks = {
            str(k): {
                "files": [dataclasses.astuple(file) for file in block.files],
                "sums": block.sums,
            }
            for k, block in self.blocks.items()
        }
        content = {
            "identity": self.identity,
            "ready": ready,
            "prepared": [dataclasses.astuple(file) for file in self.prepared],
            "blocks": blocks,
        }
        name, data = format.partial_file(self.host), json.dumps(content).encode()
        if self.location.local is not None:
            self.location.write(name, data)
        elif not self.location.claim(name, data):
            raise UserError(
                f"--out: {self.location.url}: another process has begun to export there; wait for"
                " it or give another place"
            )
        self._written = time.monotonic()

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind, error, trace) -> None:
        with contextlib.suppress(
            *(() if kind is None else (OSError, UserError))
        ):  # the first error is the one to tell
            self.write()


def identity_of(manifest: Manifest) -> dict:
    """What must agree for blocks of two exports to be the same bytes."""
    body = to_json(manifest)
    source = {
        name: value for name, value in body["source"].items() if name != "config_hash"
    }  # logging intervals do not change a row
    names = ("version", "model", "dtype", "shard_rows", "fold_rows", "tokenizer")
    more = {
        "scale_group": manifest.scale_group,
        "rank_error": manifest.rank_error,
        "ranks": manifest.ranks and list(manifest.ranks) if manifest.rank_error is None else None,
    }
    return {name: body[name] for name in names} | more | {"source": source}


@contextlib.contextmanager
def held(location: Location, host: int) -> Iterator[None]:
    """Keeps a second process with the same host number away from a local target. On a remote one
    the records do, see :meth:`Record.write`.
    """
    if location.local is None:
        yield
        return
    if location.local.exists() and not location.local.is_dir():
        raise UserError(f"--out: {location.url} is a file; give a directory")
    make_directory(location.local)
    path = location.local / f"{LOCK}{host}"
    while True:
        lock = open(path, "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (
                os.stat(path).st_ino == os.fstat(lock.fileno()).st_ino
            ):  # else the one before has just removed it
                break
        except BlockingIOError:
            lock.close()
            raise UserError(
                f"--out: {location.url}: another process writes there; wait for it or give another"
                " directory"
            ) from None
        except FileNotFoundError:
            pass
        lock.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def prepare(
    location: Location,
    manifest: Manifest,
    host: int,
    overwrite: bool,
    write_first: Callable[[], list[File]],
    progress: bool,
) -> tuple[Record, dict[int, Block]] | None:
    """This host's record and all blocks done so far, of any host; or None when the target is this
    store already.

    write_first: writes what rows need and returns it; host 0 calls it once, on a cleared target.
    """
    identity = identity_of(manifest)
    if _exists(location, MANIFEST) and not overwrite:
        if identity_of(read_manifest(location)) == identity:
            if host == 0:
                sweep(location)
            return None
        raise UserError(
            f"--out: {location.url} holds a store of another run, step or dtype; give --overwrite"
            " to replace it, or another directory"
        )
    if host > 0:
        return _join(location, identity, host, overwrite, progress)
    known = _read(location, 0)
    if known is None:
        if not _exists(location, MANIFEST) and (foreign := _foreign(location)):
            raise UserError(
                f"--out: {location.url} is not empty and no TKV store (it has {foreign}); give a"
                " new or empty directory"
            )
    elif known["identity"] != identity and not overwrite:
        raise UserError(
            f"--out: {location.url} holds an unfinished export of another run, step or dtype; give"
            " --overwrite to start again, or another directory"
        )
    elif known["identity"] == identity and known["ready"] and not _exists(location, MANIFEST):
        return _resumed(location, identity, 0, known["prepared"])
    record = Record(location, 0, identity)
    record.write(
        ready=False
    )  # before clearing: a kill in between leaves an unfinished export, not foreign files
    _clear(location)
    record.prepared = write_first()
    record.write()
    return record, {}


def _join(
    location: Location, identity: dict, host: int, overwrite: bool, progress: bool
) -> tuple[Record, dict[int, Block]]:
    """Waits until host 0 has prepared the target for this export."""
    with ProgressLine(f"export: host {host} waits for host 0", 0, "s", enabled=progress) as line:
        began = time.monotonic()
        while True:
            known = _read(location, 0)
            if (
                known
                and known["identity"] == identity
                and known["ready"]
                and not _exists(location, MANIFEST)
            ):
                return _resumed(location, identity, host, known["prepared"])
            if known and known["identity"] != identity and not overwrite:
                raise UserError(
                    f"--out: {location.url}: host 0 exports another run, step or dtype there; give"
                    " every host the same options"
                )
            line.update(time.monotonic() - began)
            time.sleep(POLL_SECONDS)


def _resumed(
    location: Location, identity: dict, host: int, prepared: list[File]
) -> tuple[Record, dict[int, Block]]:
    """The record of an interrupted export, without blocks that have lost a file."""
    done, mine = _blocks(location, identity), _read(location, host)
    found = location.sizes([file.name for block in done.values() for file in block.files])
    done = {
        k: block
        for k, block in done.items()
        if all(found.get(file.name, -1) in (None, file.bytes) for file in block.files)
    }
    own = mine["blocks"] if mine and mine["identity"] == identity else {}
    return (
        Record(
            location, host, identity, prepared, {k: block for k, block in own.items() if k in done}
        ),
        done,
    )


def wait_for_hosts(
    location: Location, manifest: Manifest, record: Record, progress: bool
) -> dict[int, Block]:
    """All blocks, once every host has recorded its own."""
    with ProgressLine(
        "export: waiting for other hosts", manifest.blocks, "blocks", enabled=progress
    ) as line:
        while True:
            done = _blocks(location, record.identity) | record.blocks
            if len(done) == manifest.blocks:
                return dict(sorted(done.items()))
            line.update(len(done))
            time.sleep(POLL_SECONDS)


def publish(location: Location, manifest: Manifest, record: Record) -> None:
    """Makes the target a store, if it is still this export's."""
    record.write()
    location.write(MANIFEST, (json.dumps(to_json(manifest), indent=1) + "\n").encode())
    sweep(location)


def bytes_there(location: Location) -> int:
    """Bytes of what an export would clear or go on with; 0 for a remote target, whose space nobody
    knows.
    """
    if location.local is None:
        return 0
    return sum(
        size or 0
        for size in location.sizes(
            [name for name in location.names() if name.split("/")[0] in CONTENTS]
        ).values()
    )


def sweep(location: Location) -> None:
    """Removes what an export, finished or killed, has left beside a store."""
    for name in location.names():
        if _is_private(name):
            location.delete(name)


def _is_private(name: str) -> bool:
    return name.startswith(PARTIAL) or name.endswith(files.SCRATCH)


def _clear(location: Location) -> None:
    """Removes the contents of a store or an unfinished export, and nothing else. The manifest goes
    first: what is left is no store.
    """
    location.delete(MANIFEST)
    for name in location.names():
        private = _is_private(name) and name != format.partial_file(0)
        if private or name.split("/")[0] in CONTENTS:
            location.delete(name)
    if location.local is not None:  # empty directories, whose names another layout gives to files
        for name in CONTENTS:
            shutil.rmtree(location.local / name, ignore_errors=True)


def _foreign(location: Location) -> str | None:
    """Something that is there and is no part of an export."""
    names = (
        (path.name for path in location.local.iterdir())
        if location.local is not None
        else location.names()
    )
    return next(
        (name for name in names if not name.startswith(LOCK) and not _is_private(name)), None
    )


def _exists(location: Location, name: str) -> bool:
    return name in location.sizes([name])


def _blocks(location: Location, identity: dict) -> dict[int, Block]:
    """The blocks in the records of all hosts."""
    done = {}
    for name in location.names(PARTIAL):
        host = name.removeprefix(PARTIAL).removesuffix(".json")
        known = _read(location, int(host)) if host.isdecimal() else None
        if known and known["identity"] == identity:
            done |= known["blocks"]
    return done


def _read(location: Location, host: int) -> dict | None:
    name = format.partial_file(host)
    try:
        content = json.loads(location.read(name))
        blocks = {
            int(k): Block(
                [File(*file) for file in block["files"]],
                {int(layer): sums for layer, sums in block["sums"].items()},
            )
            for k, block in content["blocks"].items()
        }
        return {
            "identity": content["identity"],
            "ready": bool(content["ready"]),
            "prepared": [File(*file) for file in content["prepared"]],
            "blocks": blocks,
        }
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{location.url}/{name}: not readable ({error!r}); delete it and run the same command"
            " again"
        ) from None
