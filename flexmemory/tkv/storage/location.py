"""Where a store lies: a directory, s3://, gs://, or http(s):// (read only). Names of files are
relative, with "/".

All have the same methods. A write appears whole or not at all and is durable when it returns.
Errors are a UserError of one line; an absent file is a FileNotFoundError of :meth:`read`."""

import contextlib
import dataclasses
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import tensorstore as ts

from flexmemory import files
from flexmemory.errors import UserError

REMOTE = {"s3": "s3", "gs": "gcs", "http": "http", "https": "http"}  # scheme: TensorStore's driver
MEND = "copy the store again or export the run again"
NETWORK = "check the network and the server, then run the same command again"


class DamagedFile(UserError):
    """A file that does not hold what it should: here, one that ends too early."""


@dataclasses.dataclass(frozen=True)
class File:
    name: str  # relative to the store
    bytes: int
    crc32: int  # of the whole file


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a remote location repeats requests that failed with 5xx or without an answer."""

    retries: int = 6
    first_delay_s: float = 0.2  # doubled for every further retry
    longest_delay_s: float = 5.0
    timeout_s: float = 300.0  # of one call with its retries: a silent server is given up

    @property
    def resource(self) -> dict:
        delays = {"initial_delay": self.first_delay_s, "max_delay": self.longest_delay_s}
        return {"max_retries": self.retries} | {name: f"{s}s" for name, s in delays.items()}


@dataclasses.dataclass(frozen=True)
class LocalLocation:
    local: Path
    writable = True
    timeout_s = None

    @property
    def url(self) -> str:
        return str(self.local)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start..stop. Raises FileNotFoundError; DamagedFile where the file ends before."""
        path = self.local / checked(name)
        with _local_errors(path, "read"):
            try:
                file = open(path, "rb", buffering=0)
            except NotADirectoryError:
                raise _missing(path) from None
            with file:
                size = os.fstat(file.fileno()).st_size
                end = size if stop is None else stop
                if start < end and end > size:
                    raise DamagedFile(f"{path}: {size} bytes, {end} expected; {MEND}")
                parts, position = [], start
                while position < end:  # the system reads at most 2 GiB at a time
                    parts.append(os.pread(file.fileno(), end - position, position))
                    if not parts[-1]:
                        what = f"ends after {position} bytes, it had {size}"
                        raise DamagedFile(f"{path}: {what}; run the same command again")
                    position += len(parts[-1])
                return b"".join(parts)

    def write(self, name: str, data: Any) -> None:
        """data: bytes or anything with their buffer."""
        self.write_parts(name, [data])

    def write_parts(self, name: str, parts: Iterable) -> None:
        """Writes the parts one by one, none kept. Where the iterator raises, nothing is left."""
        path = self.local / checked(name)
        with _local_errors(path, "written"):
            make_directory(path.parent)
            files.write_parts(path, parts)

    def delete(self, name: str) -> None:
        """No error when there is no such file. Directories that become empty go too."""
        path = self.local / checked(name)
        with _local_errors(path, "deleted"), contextlib.suppress(*ABSENT):
            path.unlink()
            files.sync_directory(path.parent)
        with contextlib.suppress(OSError):  # not empty, or never there
            for folder in path.parents[: len(Path(name).parts) - 1]:
                folder.rmdir()

    def names(self, prefix: str = "") -> list[str]:
        """Sorted names of all files that begin with ``prefix``."""
        folder, names = self.local / prefix.rpartition("/")[0], []
        with _local_errors(folder, "listed"), contextlib.suppress(*ABSENT):
            for place, folders, here in os.walk(folder, onerror=_raise):
                inside = "".join(f"{part}/" for part in Path(place).relative_to(self.local).parts)
                names += [inside + name for name in here if (inside + name).startswith(prefix)]
                folders[:] = [
                    name
                    for name in folders
                    if prefix.startswith(inside + name) or (inside + name).startswith(prefix)
                ]
        return sorted(names)

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """Bytes of each of the files that are there."""
        sizes: dict[str, int | None] = {}
        for name in names:
            path = self.local / checked(name)
            with _local_errors(path, "read"), contextlib.suppress(*ABSENT):
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    sizes[name] = status.st_size
        return sizes

    def spec(self, name: str = "") -> dict:
        """TensorStore's kvstore JSON of the folder ``name``."""
        folder = self.local / checked(name) if name else self.local
        return {"driver": "file", "path": f"{folder.absolute()}/"}

    def wait(self, future: ts.Future | ts.WriteFutures) -> Any:
        """The future's result. Raises RuntimeError with TensorStore's message in one line."""
        return _result(future, None)


@dataclasses.dataclass(frozen=True, eq=False)
class RemoteLocation:
    """An object store, or a web server, which is read only. Methods as of a local location."""

    url: str  # without "/" at the end
    base: dict  # kvstore JSON of the whole location; its path is empty or ends with "/"
    timeout_s: float
    kvstore: ts.KvStore
    writable: bool
    generations: dict[str, bytes]  # of the objects that this process has claimed
    local = None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is not None and stop <= start:
            return b""
        result = self._read(name, slice(start, stop) if start or stop is not None else None)
        if result.state == "missing":
            raise _missing(f"{self.url}/{name}")
        return result.value

    def write(self, name: str, data: Any) -> None:
        self._write(name, bytes(data))

    def write_parts(self, name: str, parts: Iterable) -> None:
        """The whole is in memory at once: so an object is sent."""
        content = bytearray()
        for part in parts:
            content.extend(part)
        self.write(name, content)

    def claim(self, name: str, data: bytes) -> bool:
        """Writes ``name`` unless another process has written it since this one first claimed it;
        False when that happened.

        The first claim takes the object over whatever it holds, so of several claimants the last to
        come goes on and all others learn of it at their next claim, unless both wrote the same
        bytes (S3 knows an object by its hash). As strict as the server's conditional writes: on an
        S3 endpoint that is not Amazon's, TensorStore compares and writes in two requests."""
        self._check_writable(name)
        before = self.generations.get(name)
        if before is None:
            before = self._read(name, slice(0, 0)).stamp.generation
        after = self._write(name, data, if_equal=before).generation
        if not after:  # TensorStore's "unknown": the condition did not hold, or there is no bucket
            if name not in self.sizes([name]):
                raise refuse(self, name, "cannot be written", "check that the bucket exists")
            return False
        self.generations[name] = after
        return True

    def delete(self, name: str) -> None:
        self._write(name, None, action="deleted")

    def names(self, prefix: str = "") -> list[str]:
        """Raises UserError over http, which cannot list."""
        if not self.writable:
            raise UserError(
                f"{self.url}: http cannot list files; use the s3:// or gs:// URL or a local path"
            )
        first, keys = prefix.encode(), None
        if first:  # UTF-8 never ends in 255
            keys = ts.KvStore.KeyRange(first, first[:-1] + bytes([first[-1] + 1]))
        return sorted(key.decode() for key in self._wait(prefix, "listed", self.kvstore.list(keys)))

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """None for each of the files that are there. It lists nothing: http cannot."""
        asked = {name: self.kvstore.read(checked(name), byte_range=slice(0, 0)) for name in names}
        found = {name: self._wait(name, "read", future) for name, future in asked.items()}
        return {name: None for name, result in found.items() if result.state != "missing"}

    def spec(self, name: str = "") -> dict:
        path = self.base.get("path", "") + (f"{checked(name)}/" if name else "")
        return {**self.base, "path": path}

    def wait(self, future: ts.Future | ts.WriteFutures) -> Any:
        """Raises TimeoutError as well, once the patience is over."""
        return _result(future, self.timeout_s)

    def _check_writable(self, name: str) -> None:
        if not self.writable:
            mend = "write to a local path, s3:// or gs://"
            raise refuse(self, name, "http locations are read only", mend)

    def _read(self, name: str, span: slice | None) -> Any:
        return self._wait(name, "read", self.kvstore.read(checked(name), byte_range=span))

    def _write(self, name: str, data: bytes | None, action: str = "written", **options: Any) -> Any:
        self._check_writable(name)
        return self._wait(name, action, self.kvstore.write(checked(name), data, **options))

    def _wait(self, name: str, action: str, future: ts.Future) -> Any:
        try:
            return self.wait(future)
        except (TimeoutError, RuntimeError) as error:
            raise _remote_error(f"{self.url}/{name}", action, str(error)) from error


Location = LocalLocation | RemoteLocation
ABSENT = FileNotFoundError, NotADirectoryError


def refuse(location: Location, name: str, what: str, mend: str = MEND) -> UserError:
    """The error of one file of a store: what is wrong with it, and what to do."""
    return UserError(f"{location.url}/{name}: {what}; {mend}")


def misfits(
    location: Location, files: Iterable[File], both: str = "{} bytes, {} expected"
) -> list[tuple[File, str]]:
    """(file, "missing" or ``both`` sizes) of the files that have not the bytes they should have;
    where the location knows no sizes, a file that is there is trusted."""
    wanted = {file.name: file for file in files}
    sizes = location.sizes(list(wanted))
    found = [(file, sizes.get(name, -1)) for name, file in wanted.items()]
    return [
        (file, "missing" if size == -1 else both.format(size, file.bytes))
        for file, size in found
        if size not in (None, file.bytes)
    ]


def open_location(text: str | Path, *, patience: Patience | None = None) -> Location:
    """A path, file:///path, s3://bucket/prefix, gs://bucket/prefix, http(s)://host/path. Touches
    neither disk nor network. Raises UserError for another scheme or a malformed URL.

    s3: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL name another server than Amazon's, AWS_REGION or
    AWS_DEFAULT_REGION the region; credentials come from the environment, the profile files or the
    instance. gs: TENSORSTORE_GCS_HTTP_URL names another server."""
    if isinstance(text, Path) or "://" not in text:
        if not str(text):
            what = "give a directory or a URL such as s3://bucket/prefix"
            raise UserError(f"store '': empty path; {what}")
        return LocalLocation(Path(text))
    parts = urlsplit(text)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise UserError(f"{text}: not the URL of a local path; write file:///path/of/the/store")
        return LocalLocation(Path(unquote(parts.path)))
    if parts.scheme not in REMOTE:
        known = f"a local path, file, {', '.join(REMOTE)}"
        raise UserError(f"{text}: unknown scheme {parts.scheme!r}; known: {known}")
    if parts.query or parts.fragment or "@" in parts.netloc:
        what = "a store's URL takes no query, fragment or password"
        raise UserError(f"{text}: {what}; give scheme://host/path")
    patience = patience or Patience()
    driver, url = REMOTE[parts.scheme], text.rstrip("/")
    try:
        base = {**ts.KvStore.Spec(url).to_json(), f"{driver}_request_retries": patience.resource}
        if base.get("path") and not base["path"].endswith("/"):
            base["path"] += "/"
        if driver == "s3":
            base |= _s3_environment()
        kvstore = ts.KvStore.open(base).result(timeout=patience.timeout_s)
    except ValueError as error:
        mend = "give scheme://bucket/prefix or http(s)://host/path"
        raise UserError(f"{text}: not a URL of a store ({_one_line(error)}); {mend}") from None
    return RemoteLocation(url, base, patience.timeout_s, kvstore, driver != "http", {})


def checked(name: str) -> str:
    """The name itself. Raises UserError for one that would leave the location."""
    parts = name.split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        mend = "the store is damaged, copy it again"
        raise UserError(f"file name {name!r}: must be relative and stay inside the store; {mend}")
    return name


def _s3_environment() -> dict:
    """What the AWS variables say and TensorStore does not read itself."""
    get, found = os.environ.get, dict[str, Any]()
    if endpoint := get("AWS_ENDPOINT_URL_S3") or get("AWS_ENDPOINT_URL"):
        found["endpoint"] = endpoint.rstrip("/")
    if region := get("AWS_REGION") or get("AWS_DEFAULT_REGION"):
        found["aws_region"] = region
    # first in TensorStore's chain too, which would complain of missing profile files on stderr
    if get("AWS_ACCESS_KEY_ID"):
        found["aws_credentials"] = {"type": "environment"}
    return found


def make_directory(path: Path) -> None:
    """mkdir -p whose new names are durable."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        files.sync_directory(folder.parent)


def _raise(error: OSError) -> None:
    raise error


def _missing(path: object) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


@contextlib.contextmanager
def _local_errors(path: Path, action: str) -> Iterator[None]:
    """Errors of the system as a UserError, but for a missing file that was to be read."""
    try:
        yield
    except OSError as error:
        if action == "read" and isinstance(error, FileNotFoundError):
            raise
        if files.is_disk_full(error):
            mend = "free some space and run the same command again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            mend = "check the permissions of the file and its directory"
        else:
            mend = "check the disk and run the same command again"
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be {action} ({reason}); {mend}") from error


def _remote_error(url: str, action: str, reason: str) -> UserError:
    if reason.startswith("OUT_OF_RANGE"):
        return DamagedFile(f"{url}: shorter than expected ({reason}); {MEND}")
    if reason.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")):
        mend = "check the credentials and what they allow"
        return UserError(f"{url}: cannot be {action}, permission denied ({reason}); {mend}")
    bucket = reason.startswith("NOT_FOUND") or "NoSuchBucket" in reason
    mend = "check that the bucket exists" if bucket else NETWORK
    return UserError(f"{url}: cannot be {action} ({reason}); {mend}")


def _result(future: ts.Future | ts.WriteFutures, timeout_s: float | None) -> Any:
    try:
        return future.result(timeout=timeout_s)
    except TimeoutError:
        raise TimeoutError(f"no answer within {timeout_s:g} s") from None
    except (ValueError, RuntimeError, OSError) as error:
        raise RuntimeError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    """TensorStore's message without the response's body and headers."""
    return str(error).strip().partition("\n")[0].split(" [http_response")[0][:240]
