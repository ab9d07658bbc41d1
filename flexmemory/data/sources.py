"""Text sources: streams of documents, opened from a spec string.

A spec is one source, or several joined by `+`:
`python-stdlib:max_mb=4+facts:people=64+tasks:n=2000`. One source is

  python-stdlib           the running interpreter's own library, .py files in sorted order, without
  site-packages and test suites
  PATH or GLOB            .txt .md .py (a file is a document), .jsonl .jsonl.gz .parquet (a row is a
  document), directories (recursive)
  hf:NAME[:SPLIT]         a dataset of the Hugging Face hub, streamed (needs the datasets extra)
  facts, tasks            synthetic corpora with questions (see facts.py, tasks.py)

followed by `:name=value,name=value`:

  max_mb=N                stop before the document that would exceed N MB (10^6 bytes of UTF-8);
  every source but facts and tasks
  field=NAME              where the text is in .jsonl, .parquet and hf rows (default text)
  undecodable=skip        leave out .txt .md .py files that are not UTF-8 instead of stopping at the
  first one; paths only
  config=NAME             which configuration of an hf dataset
  people= docs= qa= seed= of facts; n= eval= words= length= pairs= seed= of tasks

A spec that is as a whole the name of an existing path is taken as that path. Text files above 1 MiB
are cut at line ends into documents of about that size, so that memory stays bounded. Empty
documents are left out.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import json
import os
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flexmemory.data import facts, tasks
from flexmemory.errors import UserError

Document = tuple[
    str, str
]  # (doc_id, text); the id is stable from run to run, and decides the split

TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
PIECE_BYTES = 1 << 20
STDLIB_SKIPPED = (
    "site-packages",
    "__pycache__",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
)
_SYNTHETIC = {"facts": facts, "tasks": tasks}
_OPTIONS = re.compile(r":([a-z_]+=[^,/]*(?:,[a-z_]+=[^,/]*)*)$")


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents and questions.

    spec: what it was opened from.
    documents: gives a fresh stream of (doc_id, text); the same documents in the same order each
      time. Raises UserError at bad text, and at the end of a stream without any.
    size_bytes: bytes of text to come, at most; None where that is not known.
    questions: gives the questions of the synthetic parts, dicts of at least task, kind, prompt,
    answer, chance.
    """

    spec: str
    documents: Callable[[], Iterator[Document]]
    size_bytes: int | None
    questions: Callable[[], list[dict]]


def open_source(spec: str) -> Source:
    """Opens `spec`; what can be checked without reading the text is checked now.

    Raises UserError: no such file, unknown source or option, missing extra.
    """
    parts = [spec] if os.path.exists(spec) else spec.split("+")
    opened = [_open_part(part) for part in parts]
    if len(opened) == 1:
        return opened[0]

    def documents() -> Iterator[Document]:
        for part in opened:
            yield from part.documents()

    sizes = [part.size_bytes for part in opened]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    return Source(spec, documents, total, lambda: [q for part in opened for q in part.questions()])


def _open_part(part: str) -> Source:
    if not part:
        raise UserError(
            "source is empty; give for example python-stdlib, a path, or several joined by +"
        )
    name, options = part, {}
    if not os.path.exists(part) and (found := _OPTIONS.search(part)):
        name = part[: found.start()]
        options = dict(item.split("=", 1) for item in found.group(1).split(","))
    if name in _SYNTHETIC:
        return _open_synthetic(part, name, options)
    max_bytes = _take_max_bytes(part, options)
    if name == "python-stdlib":
        _refuse_left(part, options)
        root = Path(sysconfig.get_path("stdlib"))
        files = list(_walk(root, (".py",), STDLIB_SKIPPED))
        stream, size = (lambda: _read_stdlib(root, files)), _size(files)
    elif name.startswith("hf:"):
        stream, size = _open_hub(part, name, options), None
    else:
        named = _find_files(part, name)
        field, skip = options.pop("field", "text"), _take_skip(part, options)
        _refuse_left(part, options)
        # Bytes on disk are bytes of text only where a file is text.
        size = (
            _size([file for _, file in named])
            if all(str(file).endswith(TEXT_SUFFIXES) for _, file in named)
            else None
        )
        stream = lambda: (
            document for doc_id, file in named for document in _read_file(doc_id, file, field, skip)
        )
    if max_bytes is not None:
        size = max_bytes if size is None else min(size, max_bytes)
    return Source(part, lambda: _checked(part, stream(), max_bytes), size, list)


def _checked(part: str, documents: Iterator[Document], max_bytes: int | None) -> Iterator[Document]:
    """Leaves out empty documents, stops at max_bytes, refuses text that UTF-8 cannot hold and
    streams without any text.
    """
    total = 0
    for doc_id, text in documents:
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError:
            raise UserError(
                f"document {doc_id} holds half of a surrogate pair, which is no character; mend or"
                " remove it"
            ) from None
        if max_bytes is not None and total + size > max_bytes:
            break
        if size:
            total += size
            yield doc_id, text
    if total == 0:
        raise UserError(
            f"source {part!r} holds no text; give one that does"
            + ("" if max_bytes is None else ", or raise max_mb")
        )


def _open_synthetic(part: str, name: str, options: dict[str, str]) -> Source:
    module = _SYNTHETIC[name]
    values = {}
    for field in dataclasses.fields(module.Options):
        if field.name in options:
            kind: Any = type(field.default)
            text = options.pop(field.name)
            try:
                values[field.name] = kind(text)
            except ValueError:
                what = "a whole number" if kind is int else "a number"
                raise UserError(f"source {part!r}: {field.name}={text} must be {what}") from None
    _refuse_left(part, options, known=tuple(f.name for f in dataclasses.fields(module.Options)))
    opts = module.Options(**values)
    return Source(
        part,
        lambda: _checked(part, module.documents(opts), None),
        None,
        lambda: module.questions(opts),
    )


def _take_max_bytes(part: str, options: dict[str, str]) -> int | None:
    text = options.pop("max_mb", None)
    if text is None:
        return None
    try:
        max_bytes = int(float(text) * 1e6)
    except (ValueError, OverflowError):
        max_bytes = 0
    if max_bytes <= 0:
        raise UserError(f"source {part!r}: max_mb={text} must be a number above 0")
    return max_bytes


def _take_skip(part: str, options: dict[str, str]) -> bool:
    value = options.pop("undecodable", "stop")
    if value not in ("stop", "skip"):
        raise UserError(f"source {part!r}: undecodable={value} must be stop or skip")
    return value == "skip"


def _refuse_left(
    part: str,
    options: dict[str, str],
    known: tuple[str, ...] = ("max_mb", "field", "undecodable", "config"),
) -> None:
    if options:
        raise UserError(
            f"source {part!r} has no option {next(iter(options))!r}; options are"
            f" {', '.join(known)}, where the source has use for them"
        )


def _find_files(part: str, name: str) -> list[tuple[str, Path]]:
    """(doc_id, file) of everything that a path or a glob names, sorted; ids inside a directory do
    not depend on where it lies.
    """
    paths = (
        [Path(name)]
        if os.path.exists(name)
        else [Path(p) for p in sorted(glob.glob(name, recursive=True))]
    )
    if not paths:
        raise UserError(
            f"source {part!r}: no such file, and no source of that name; use python-stdlib, facts,"
            " tasks, hf:NAME, a path or a glob"
        )
    named = []
    for path in paths:
        if path.is_dir():
            root = path.resolve()
            named += [
                (f"{root.name}/{file.relative_to(root).as_posix()}", file)
                for file in _walk(root, TEXT_SUFFIXES + ROW_SUFFIXES, ())
            ]
        elif path.name.endswith(TEXT_SUFFIXES + ROW_SUFFIXES):
            named.append((path.as_posix(), path))
        elif len(paths) == 1:
            raise UserError(
                f"source {part!r} is of no known kind; use {' '.join(TEXT_SUFFIXES + ROW_SUFFIXES)}"
                " or a directory of such files"
            )
    if not named:
        raise UserError(
            f"source {part!r} holds no file of a known kind; known are"
            f" {' '.join(TEXT_SUFFIXES + ROW_SUFFIXES)}"
        )
    if any(str(file).endswith(".parquet") for _, file in named):
        _import_extra("pyarrow", part)
    return named


def _walk(root: Path, suffixes: tuple[str, ...], skipped: tuple[str, ...]) -> Iterator[Path]:
    for directory, below, names in os.walk(root):
        below[:] = sorted(b for b in below if b not in skipped and not b.startswith("."))
        for name in sorted(names):
            if name.endswith(suffixes) and not name.startswith("."):
                yield Path(directory, name)


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _read_stdlib(root: Path, files: list[Path]) -> Iterator[Document]:
    for file in files:
        with open(file, "rb") as binary:
            encoding, _ = tokenize.detect_encoding(
                binary.readline
            )  # a Python file may name its own
        yield from _read_text(f"python-stdlib/{file.relative_to(root).as_posix()}", file, encoding)


def _read_file(doc_id: str, file: Path, field: str, skip_undecodable: bool) -> Iterator[Document]:
    try:
        if str(file).endswith(TEXT_SUFFIXES):
            yield from _read_text(doc_id, file, "utf-8", whole=skip_undecodable)
        elif str(file).endswith(".parquet"):
            yield from _read_parquet(doc_id, file, field)
        else:
            yield from _read_json_lines(doc_id, file, field)
    except UnicodeDecodeError as error:
        if not skip_undecodable:
            raise UserError(
                f"file {file} is not UTF-8 ({error.reason}); convert it, or add :undecodable=skip"
                " to the source"
            ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"file {file} is damaged ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(
            f"file {file} cannot be read ({error.strerror or error}); mend or remove it"
        ) from None


def _read_text(doc_id: str, file: Path, encoding: str, whole: bool = False) -> Iterator[Document]:
    if (
        whole
    ):  # decode all of it before the first piece goes out, so that a file is taken or left as one
        with open(file, encoding=encoding, newline="") as lines:
            for _ in lines:
                pass
    # newline="" keeps \r\n as it is: decoding must give back the file's own text.
    with open(file, encoding=encoding, newline="") as stream:
        piece = 0
        while text := stream.read(PIECE_BYTES):
            if len(text) == PIECE_BYTES:
                text += stream.readline(PIECE_BYTES)
            yield (doc_id if piece == 0 else f"{doc_id}#{piece}"), text
            piece += 1


def _read_json_lines(doc_id: str, file: Path, field: str) -> Iterator[Document]:
    opener = gzip.open if str(file).endswith(".gz") else open
    with opener(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(
                    f"file {file}, line {number}: not UTF-8 ({error.reason}); convert the file"
                ) from None
            except ValueError as error:
                raise UserError(
                    f"file {file}, line {number}: malformed JSON ({error}); mend or remove the line"
                ) from None
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise UserError(
                    f"file {file}, line {number}: no text in field {field!r}; mend the line, or"
                    " name the field with :field=NAME"
                )
            yield f"{doc_id}:{number}", row[field]


def _read_parquet(doc_id: str, file: Path, field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        if field not in table.schema_arrow.names:
            raise UserError(
                f"file {file} has no column {field!r}, only {', '.join(table.schema_arrow.names)};"
                " name one with :field=NAME"
            )
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for text in batch.column(0).to_pylist():
                number += 1
                if not isinstance(text, str):
                    raise UserError(
                        f"file {file}, row {number}: no text in column {field!r}; mend the row, or"
                        " name the column with :field=NAME"
                    )
                yield f"{doc_id}:{number}", text
    except pyarrow.ArrowException as error:
        raise UserError(
            f"file {file} is no readable parquet file ({str(error).splitlines()[0]}); fetch it"
            " again"
        ) from None


def _open_hub(part: str, name: str, options: dict[str, str]) -> Callable[[], Iterator[Document]]:
    _, repository, *rest = name.split(":")
    if not repository or len(rest) > 1:
        raise UserError(f"source {part!r} is malformed; write hf:NAME or hf:NAME:SPLIT")
    datasets = _import_extra("datasets", part)
    split = rest[0] if rest else "train"
    field, config = options.pop("field", "text"), options.pop("config", None)
    _refuse_left(part, options)

    def documents() -> Iterator[Document]:
        try:
            rows = datasets.load_dataset(repository, config, split=split, streaming=True)
        except Exception as error:  # hub errors have no common base
            raise UserError(
                f"source {part!r} cannot be opened ({str(error).splitlines()[0]}); check name,"
                " split, config and network"
            ) from None
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get(field), str):
                raise UserError(
                    f"source {part!r}, row {number}: no text in field {field!r}, only"
                    f" {', '.join(row)}; name one with :field=NAME"
                )
            yield f"{name}:{number}", row[field]

    return documents


def _import_extra(module: str, part: str) -> Any:
    try:
        return __import__(module)
    except ImportError:
        raise UserError(
            f"source {part!r} needs {module}; install it with: pip install 'flexmemory[datasets]'"
        ) from None
