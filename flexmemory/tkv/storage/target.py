"""The target of an export: whose it is, what is on it already, and the step by which it becomes a
store.

Host 0 marks it with its record (``ready`` false), clears what was there, writes what must come
before the rows, and sets ``ready``. The other hosts wait for that. Every record lists shards whose
files are on the disk; a shard in any host's record is done."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator

from flexmemory import files
from flexmemory.errors import UserError
from flexmemory.progress import ProgressLine
from flexmemory.tkv.storage.location import (
    File,
    Location,
    RemoteLocation,
    make_directory,
    misfits,
    refuse,
)

MANIFEST = "tkv.json"  # written last: a directory without it is no store
COPY_MARK = "tkv.partial.copy.json"  # of an unfinished copy
PARTIAL, LOCK = "tkv.partial.", ".lock."  # and the number of the host
# what else a store has at its top
CONTENTS = "rows", "checksums", "backbone", "tokenizer.json", "basis.safetensors", "counts.npy"
# a kill loses the shards of the last seconds, and a long list is not written for every shard
RECORD_SECONDS = 2.0
POLL_SECONDS = 0.5  # between looks at what other hosts have done
OTHER = "another run, step or dtype"

Sums = dict[int, list[float]]  # model layer -> [squared error, squares, largest error]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard of every group, written. sums: {} for plain float32, where nothing is lost."""

    files: list[File]
    sums: Sums

    @classmethod
    def of(cls, content: dict) -> "Shard":
        sums = {int(layer): sums for layer, sums in content["sums"].items()}
        return cls([File(**file) for file in content["files"]], sums)


@dataclasses.dataclass
class Record:
    """tkv.partial.<host>.json. ``with record:`` writes at the end what is not yet written."""

    location: Location
    host: int
    identity: dict  # what must agree for shards of two exports to be the same bytes
    prepared: list[File] = dataclasses.field(default_factory=list)
    shards: dict[int, Shard] = dataclasses.field(default_factory=dict)
    ready: bool = True
    _written: float = dataclasses.field(default_factory=time.monotonic)

    def add(self, number: int, files: list[File], sums: Sums) -> None:
        """Counts a shard whose files are on the disk."""
        self.shards[number] = Shard(files, sums)
        if time.monotonic() - self._written > RECORD_SECONDS:
            self.write()

    def write(self) -> None:
        content = {
            "identity": self.identity,
            "ready": self.ready,
            "prepared": [dataclasses.asdict(file) for file in self.prepared],
            "shards": {str(k): dataclasses.asdict(shard) for k, shard in self.shards.items()},
        }
        if not claim(self.location, partial_file(self.host), json.dumps(content).encode()):
            what = "another process has begun to export there"
            raise UserError(f"out: {self.location.url}: {what}; wait for it or give another place")
        self._written = time.monotonic()

    @classmethod
    def read(cls, location: Location, host: int) -> "Record | None":
        name = partial_file(host)
        try:
            content = json.loads(location.read(name))
            shards = {int(k): Shard.of(shard) for k, shard in content["shards"].items()}
            prepared = [File(**file) for file in content["prepared"]]
            return cls(location, host, content["identity"], prepared, shards, content["ready"])
        except FileNotFoundError:
            return None
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            mend = "delete it and run the same command again"
            raise refuse(location, name, f"not readable ({error!r})", mend) from None

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # the first error is the one to tell
        with contextlib.suppress(*(() if kind is None else (OSError, UserError))):
            self.write()


Resumed = tuple[Record, dict[int, Shard]]  # a host's record, and the shards of all hosts


def claim(location: Location, name: str, data: bytes) -> bool:
    """Writes ``name``. False where another process has written it since: on a remote target, a
    local one is :func:`held`."""
    if isinstance(location, RemoteLocation):
        return location.claim(name, data)
    location.write(name, data)
    return True


@contextlib.contextmanager
def held(location: Location, host: int) -> Iterator[None]:
    """Keeps a second process with the same host number away from a local target; the records do
    so on a remote one."""
    if location.local is None:
        yield
        return
    if location.local.exists() and not location.local.is_dir():
        raise UserError(f"out: {location.url} is a file; give a directory")
    make_directory(location.local)
    path = location.local / f"{LOCK}{host}"
    while True:
        lock = open(path, "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # another file's where the process before has just removed its own
            if os.stat(path).st_ino == os.fstat(lock.fileno()).st_ino:
                break
        except BlockingIOError:
            lock.close()
            mend = "wait for it or give another directory"
            raise UserError(f"out: {location.url}: another process writes there; {mend}") from None
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
    identity: dict,
    host: int,
    known: Callable[[], dict],
    write_first: Callable[[], list[File]],
    overwrite: bool,
    progress: bool,
) -> Resumed | None:
    """This host's record and all shards done so far; or None when the target is this store.

    known: gives the identity of the store that is there. write_first: writes what rows need and
    returns it; host 0 calls it once, on a cleared target."""
    out, elsewhere = f"out: {location.url}", "or another directory"
    if _exists(location, MANIFEST) and not overwrite:
        if known() != identity:
            mend = f"give overwrite=True to replace it, {elsewhere}"
            raise UserError(f"{out} holds a store of {OTHER}; {mend}")
        if host == 0:
            sweep(location)
        return None
    if host > 0:
        return _join(location, identity, host, overwrite, progress)
    record = Record.read(location, 0)
    if record is None:
        if not _exists(location, MANIFEST) and (foreign := _foreign(location)):
            what = f"is not empty and no TKV store (it has {foreign})"
            raise UserError(f"{out} {what}; give a new or empty directory")
    elif record.identity != identity and not overwrite:
        mend = f"give overwrite=True to start again, {elsewhere}"
        raise UserError(f"{out} holds an unfinished export of {OTHER}; {mend}")
    elif _joinable(location, record, identity):
        return _resumed(location, identity, 0, record.prepared)
    # before clearing: a kill in between leaves an unfinished export, not foreign files
    record = Record(location, 0, identity, ready=False)
    record.write()
    clear(location, [name for name in location.names() if name != partial_file(0)])
    record.prepared, record.ready = write_first(), True
    record.write()
    return record, {}


def _join(
    location: Location, identity: dict, host: int, overwrite: bool, progress: bool
) -> Resumed:
    """Waits until host 0 has prepared the target for this export."""
    with ProgressLine(f"export: host {host} waits for host 0", 0, "s", enabled=progress) as line:
        began = time.monotonic()
        while True:
            record = Record.read(location, 0)
            if record and _joinable(location, record, identity):
                return _resumed(location, identity, host, record.prepared)
            if record and record.identity != identity and not overwrite:
                what = f"host 0 exports {OTHER} there; give every host the same options"
                raise UserError(f"out: {location.url}: {what}")
            line.update(time.monotonic() - began)
            time.sleep(POLL_SECONDS)


def _joinable(location: Location, record: Record, identity: dict) -> bool:
    return record.identity == identity and record.ready and not _exists(location, MANIFEST)


def _resumed(location: Location, identity: dict, host: int, prepared: list[File]) -> Resumed:
    """The record of an interrupted export, without shards that have lost a file."""
    done, own = shards_done(location, identity), Record.read(location, host)
    lost = {f for f, _ in misfits(location, (f for shard in done.values() for f in shard.files))}
    done = {k: shard for k, shard in done.items() if lost.isdisjoint(shard.files)}
    shards = own.shards if own and own.identity == identity else {}
    kept = {k: shard for k, shard in shards.items() if k in done}
    return Record(location, host, identity, prepared, kept), done


def wait_for_hosts(record: Record, count: int, progress: bool) -> dict[int, Shard]:
    """All ``count`` shards, once every host has recorded its own."""
    label = "export: waiting for other hosts"
    with ProgressLine(label, count, "shards", enabled=progress) as line:
        while True:
            done = shards_done(record.location, record.identity) | record.shards
            if len(done) == count:
                return dict(sorted(done.items()))
            line.update(len(done))
            time.sleep(POLL_SECONDS)


def publish(record: Record, manifest: bytes) -> None:
    """Makes the target a store, if it is still this export's."""
    record.write()
    record.location.write(MANIFEST, manifest)
    sweep(record.location)


def shards_done(location: Location, identity: dict) -> dict[int, Shard]:
    """The shards in the records of all hosts."""
    done: dict[int, Shard] = {}
    for name in location.names(PARTIAL):
        host = name.removeprefix(PARTIAL).removesuffix(".json")
        record = Record.read(location, int(host)) if host.isdecimal() else None
        if record and record.identity == identity:
            done |= record.shards
    return done


def check_space(location: Location, needed: int, mend: str, where: str | None = None) -> None:
    """Raises UserError where a local target's disk has less than ``needed`` bytes free."""
    if location.local is not None and (free := shutil.disk_usage(location.local).free) < needed:
        what = f"{needed:,} bytes are to be written and the disk has {free:,} free"
        raise UserError(f"{where or location.url}: {what}; {mend}")


@contextlib.contextmanager
def one_line_errors(where: str, mend: str) -> Iterator[None]:
    """Errors of the target's folder as one line; those of its files are so already."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{where}: cannot be written ({error.strerror}); {mend}") from error


def bytes_there(location: Location) -> int:
    """Bytes of what an export would clear or go on with; 0 for a remote target."""
    if location.local is None:
        return 0
    contents = [name for name in location.names() if is_content(name)]
    return sum(size or 0 for size in location.sizes(contents).values())


def sweep(location: Location) -> None:
    """Removes what an export or copy, finished or killed, has left beside a store."""
    for name in location.names():
        if _is_private(name):
            location.delete(name)


def clear(location: Location, names: Iterable[str]) -> None:
    """Removes those of ``names`` that are a store's or an unfinished export's. The manifest goes
    first: what is left is no store."""
    location.delete(MANIFEST)
    for name in names:
        if _is_private(name) or is_content(name):
            location.delete(name)
    if location.local is not None:  # empty directories, whose names another layout gives to files
        for name in CONTENTS:
            shutil.rmtree(location.local / name, ignore_errors=True)


def partial_file(host: int) -> str:
    return f"{PARTIAL}{host}.json"


def is_content(name: str) -> bool:
    return name.split("/")[0] in CONTENTS


def _is_private(name: str) -> bool:
    return name.startswith(PARTIAL) or name.endswith(files.SCRATCH)


def _foreign(location: Location) -> str | None:
    """Something that is there and is no part of an export."""
    local = location.local
    names = location.names() if local is None else [path.name for path in local.iterdir()]
    return next((n for n in names if not n.startswith(LOCK) and not _is_private(n)), None)


def _exists(location: Location, name: str) -> bool:
    return name in location.sizes([name])
