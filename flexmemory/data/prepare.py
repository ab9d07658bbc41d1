"""Text to token shards: streaming, in parallel, resumable. The layout is in format.py.

A killed run leaves whole shards and temporary files. The next run with the same arguments reads the
source again, checks that the text of the whole shards is still the same, and tokenises only what
follows; the result is byte for byte that of an uninterrupted run.
"""

from __future__ import annotations

import array
import collections
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from flexmemory import files
from flexmemory.data import format as layout
from flexmemory.data import tokenizer as tokenizer_lib
from flexmemory.data.sources import Document, open_source
from flexmemory.errors import UserError
from flexmemory.progress import ProgressLine

SHARD_TOKENS = (
    1 << 26
)  # 128 MiB of uint16: few files for a large corpus, and little to do again after a kill
CHUNK_BYTES = 1 << 20  # text handed to one thread at a time
MAX_DOCUMENTS_PER_CHUNK = 1024


def prepare(
    source: str,
    tokenizer: str,
    out: str | os.PathLike,
    *,
    val_fraction: float = 0.02,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Makes the dataset `out` from text, or finishes it, or finds it finished and does nothing.

    source: see sources.py.
    tokenizer: `byte`, `bpe:SIZE`, a tokenizer.json, `hf:NAME`; `bpe` is trained on the source.
    out: the directory; made where missing.
    val_fraction: share of the documents for validation, chosen by a hash of (seed, document id);
    0 for none.
    workers: threads that tokenise; every core by default. Does not change the result.
    shard_tokens: a shard ends before the document that would exceed this; a longer document has a
    shard of its own.
    seed: of the split.
    progress: report to stderr.

    Returns:
      The content of index.json.

    Raises UserError: a bad argument, bad text (naming file and line), a directory made with other
    arguments or by something else, changed text.
    """
    out = Path(out)
    workers = _check_arguments(val_fraction, workers, shard_tokens)
    arguments = {
        "source": source,
        "tokenizer": tokenizer,
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "seed": seed,
    }
    _check_directory(out, arguments)
    if (out / layout.INDEX).exists():
        _check_tokenizer_file(out, tokenizer)
        _say(f"{out} is finished already; nothing to do", progress)
        return json.loads((out / layout.INDEX).read_text())

    known = set(out.iterdir()) if out.exists() else None
    try:
        return _prepare(out, arguments, workers, progress)
    except OSError as error:
        if files.is_disk_full(error):
            raise UserError(
                f"out={out}: the disk is full; make room and run the same command again to go on"
            ) from None
        raise UserError(
            f"out={out}: cannot be written ({error.strerror}); name another directory"
        ) from None
    except UserError:
        _forget(out, known)
        raise


def _prepare(out: Path, arguments: dict, workers: int, progress: bool) -> dict:
    opened = open_source(arguments["source"])
    tokenizer, val_fraction = arguments["tokenizer"], arguments["val_fraction"]
    if not (out / layout.ARGUMENTS).exists() and tokenizer.startswith("bpe:"):
        _say(f"training tokenizer {tokenizer}", progress)
    model = _make_tokenizer(out, arguments, lambda: (text for _, text in opened.documents()))
    writers = {
        split: _SplitWriter(out, split, model, arguments["shard_tokens"]) for split in layout.SPLITS
    }
    stream = _tokenised(
        opened.documents(), model, writers, val_fraction, arguments["seed"], workers
    )
    shown = done = 0
    with (
        ProgressLine("tokenise", (opened.size_bytes or 0) / 1e6, "MB", enabled=progress) as line,
        contextlib.closing(stream),
    ):
        for split, text, ids in stream:
            writers[split].add(text, ids)
            done += len(text)
            if done - shown >= CHUNK_BYTES // 4:  # not per document: these may be a few bytes
                shown = done
                line.update(done / 1e6)
        line.update(done / 1e6)
    for writer in writers.values():
        writer.close()
    _check_splits(writers, val_fraction)
    return _finish(out, arguments, model, writers, opened.questions())


def _forget(out: Path, known: set[Path] | None) -> None:
    """Removes what a refused call has made, so that a corrected one can use the directory; a whole
    shard is worth keeping to go on from.
    """
    if not out.exists() or any(
        layout.shard_paths(out, split, 0)[1].exists() for split in layout.SPLITS
    ):
        return
    for path in set(out.iterdir()) - (known or set()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if known is None:
        out.rmdir()


def split_of(doc_id: str, val_fraction: float, seed: int) -> str:
    """`train` or `val`, a pure function of the arguments. Ids like `facts:train/…` say it
    themselves; pieces of one file stay together.
    """
    if val_fraction == 0:
        return "train"
    for split in layout.SPLITS:
        if doc_id.startswith(f"facts:{split}/"):
            return split
    digest = hashlib.sha256(
        f"{seed}\0{doc_id.partition('#')[0]}".encode("utf-8", "surrogateescape")
    ).digest()
    return "val" if int.from_bytes(digest[:8], "little") < val_fraction * 2**64 else "train"


class _SplitWriter:
    """Writes one split's shards. Documents that whole shards already hold are only checked against
    them.
    """

    def __init__(self, out: Path, split: str, model: tokenizer_lib.Tokenizer, shard_tokens: int):
        self.out, self.split, self.model, self.shard_tokens = out, split, model, shard_tokens
        self.dtype = layout.dtype_for(model.vocab_size)
        self.shards: list[dict] = []  # index entries of whole shards, without their document starts
        self._file: io.BufferedWriter | None = None
        (out / split).mkdir(exist_ok=True)
        self._done = self._find_whole_shards()
        self._seen_shard, self._seen_documents, self._seen_text = 0, 0, hashlib.sha256()
        self.documents_done = sum(shard["documents"] for shard in self._done)

    def add(self, text: bytes, ids: np.ndarray | None) -> None:
        """Adds a document of `text` with token `ids`; None where a whole shard holds it already."""
        if ids is None:
            self._check_seen(text)
            return
        if self._file is None or (self._starts and self._tokens + len(ids) + 1 > self.shard_tokens):
            self._close_shard()
            if self.shards and self.shards[-1]["tokens"] + len(ids) + 1 <= self.shard_tokens:
                raise self._changed()  # an earlier run came to the end of the source here
            self._open_shard()
        assert self._file is not None
        self._starts.append(self._tokens)
        content = np.append(ids, self.model.eos_id).astype(self.dtype).tobytes()
        self._file.write(content)
        self._sha.update(content)
        self._text_sha.update(text)
        self._bytes += len(text)
        self._tokens += len(ids) + 1

    def close(self) -> None:
        """Writes the last shard, and refuses whole shards that the source did not fill again."""
        if self._seen_shard < len(self._done):
            raise self._changed()
        self._close_shard()

    def _find_whole_shards(self) -> list[dict]:
        found: list[dict] = []
        while True:
            tokens_path, index_path = layout.shard_paths(self.out, self.split, len(found))
            if not index_path.exists():
                return found
            entry = json.loads(index_path.read_text())
            if (
                not tokens_path.exists()
                or tokens_path.stat().st_size != entry["tokens"] * self.dtype.itemsize
            ):
                raise UserError(
                    f"shard {tokens_path} has not the size that its index says; remove {self.out}"
                    " and prepare it again"
                )
            found.append({key: value for key, value in entry.items() if key != "starts"})

    def _check_seen(self, text: bytes) -> None:
        self._seen_text.update(text)
        self._seen_documents += 1
        entry = self._done[self._seen_shard]
        if self._seen_documents == entry["documents"]:
            if self._seen_text.hexdigest() != entry["text_sha256"]:
                raise self._changed()
            self.shards.append(entry)
            self._seen_shard, self._seen_documents, self._seen_text = (
                self._seen_shard + 1,
                0,
                hashlib.sha256(),
            )

    def _changed(self) -> UserError:
        number = min(self._seen_shard, len(self._done) - 1)
        return UserError(
            f"the source has changed since {self.split} shard {number} of {self.out} was written;"
            f" remove {self.out} and prepare it again"
        )

    def _open_shard(self) -> None:
        path, _ = layout.shard_paths(self.out, self.split, len(self.shards))
        self._file = open(path.with_name(path.name + files.SCRATCH), "wb")
        self._starts, self._tokens, self._bytes = array.array("Q"), 0, 0
        self._sha, self._text_sha = hashlib.sha256(), hashlib.sha256()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        tokens_path, index_path = layout.shard_paths(self.out, self.split, len(self.shards))
        os.replace(tokens_path.with_name(tokens_path.name + files.SCRATCH), tokens_path)
        entry = {
            "file": f"{self.split}/{tokens_path.name}",
            "tokens": self._tokens,
            "documents": len(self._starts),
            "bytes": self._bytes,
            "sha256": self._sha.hexdigest(),
            "text_sha256": self._text_sha.hexdigest(),
        }
        files.write_json(
            index_path, {"version": layout.VERSION, **entry, "starts": self._starts.tolist()}
        )
        self.shards.append({"version": layout.VERSION, **entry})


def _tokenised(
    documents: Iterator[Document],
    model: tokenizer_lib.Tokenizer,
    writers: dict[str, _SplitWriter],
    val_fraction: float,
    seed: int,
    workers: int,
) -> Generator[tuple[str, bytes, np.ndarray | None], None, None]:
    """(split, text, ids) in the documents' order; ids is None for documents of whole shards. A
    bounded number of chunks is in flight.
    """
    left = {split: writer.documents_done for split, writer in writers.items()}

    def placed() -> Iterator[tuple[str, str, bool]]:
        for doc_id, text in documents:
            split = split_of(doc_id, val_fraction, seed)
            done = left[split] > 0
            left[split] -= done
            yield split, text, done

    def work(chunk: list[tuple[str, str, bool]]) -> list[tuple[str, bytes, np.ndarray | None]]:
        fresh = iter(model.encode_batch([text for _, text, done in chunk if not done]))
        return [
            (split, text.encode("utf-8"), None if done else np.array(next(fresh), np.uint32))
            for split, text, done in chunk
        ]

    pending: collections.deque = collections.deque()
    with _one_thread_per_call(), ThreadPoolExecutor(workers) as pool:
        try:
            for chunk in _chunks(placed()):
                pending.append(pool.submit(work, chunk))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _chunks(documents: Iterator[tuple[str, str, bool]]) -> Iterator[list[tuple[str, str, bool]]]:
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document[1])
        if size >= CHUNK_BYTES or len(chunk) == MAX_DOCUMENTS_PER_CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def _one_thread_per_call() -> Iterator[None]:
    """Keeps the tokenizers library's own threads out, so that `workers` is the number of threads; a
    fork warning goes too.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _say(line: str, enabled: bool) -> None:
    if enabled:
        print(line, file=sys.stderr, flush=True)


def _check_arguments(val_fraction: float, workers: int | None, shard_tokens: int) -> int:
    if not 0 <= val_fraction < 1:
        raise UserError(
            f"val_fraction={val_fraction} is outside 0..1; give for example 0.02, or 0 for no"
            " validation split"
        )
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} must be at least 1")
    if shard_tokens < 2:
        raise UserError(f"shard_tokens={shard_tokens} must be at least 2")
    if workers is not None:
        return workers
    # The cores this process may use, where the system can tell.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_directory(out: Path, arguments: dict) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file; name a directory")
    path = out / layout.ARGUMENTS
    if not path.exists():
        strangers = (
            [entry.name for entry in out.iterdir() if not entry.name.endswith(files.SCRATCH)]
            if out.exists()
            else []
        )
        if strangers and strangers != [tokenizer_lib.FILE_NAME]:
            raise UserError(
                f"out={out} holds other files ({sorted(strangers)[0]}, …); name an empty or a new"
                " directory"
            )
        return
    before = json.loads(path.read_text())
    if before.get("version") != layout.VERSION:
        raise UserError(
            f"out={out} was prepared in format version {before.get('version')}, this program writes"
            f" {layout.VERSION}; name a new directory"
        )
    different = [
        f"{key}={before.get(key)!r} then, {value!r} now"
        for key, value in arguments.items()
        if before.get(key) != value
    ]
    if different:
        raise UserError(
            f"out={out} was prepared with other arguments ({'; '.join(different)}); use those, name"
            " a new directory, or remove this one"
        )


def _make_tokenizer(
    out: Path, arguments: dict, texts: Callable[[], Iterator[str]]
) -> tokenizer_lib.Tokenizer:
    if (out / layout.ARGUMENTS).exists():
        _check_tokenizer_file(out, arguments["tokenizer"])
        return tokenizer_lib.load(out)
    model = tokenizer_lib.build(arguments["tokenizer"], texts)
    out.mkdir(parents=True, exist_ok=True)
    model.save(out)
    # From here on the directory is ours; the tokenizer stands before it, so a resumed run never
    # trains another.
    files.write_json(
        out / layout.ARGUMENTS,
        {"version": layout.VERSION, **arguments, "tokenizer_fingerprint": model.fingerprint},
    )
    return model


def _check_tokenizer_file(out: Path, spec: str) -> None:
    """A tokenizer given as a path may have changed under an unchanged name."""
    if spec != "byte" and not spec.startswith(("bpe:", "hf:")):
        now, then = tokenizer_lib.load(spec).fingerprint, tokenizer_lib.load(out).fingerprint
        if now != then:
            raise UserError(
                f"out={out} was prepared with another tokenizer (fingerprint {then}) than {spec}"
                f" holds now ({now}); name a new directory"
            )


def _check_splits(writers: dict[str, _SplitWriter], val_fraction: float) -> None:
    for split, writer in writers.items():
        if not writer.shards and (split == "train" or val_fraction > 0):
            raise UserError(
                f"no document fell to the {split} split at val_fraction={val_fraction}; give more"
                " documents, another seed or val_fraction=0"
            )


def _finish(
    out: Path,
    arguments: dict,
    model: tokenizer_lib.Tokenizer,
    writers: dict[str, _SplitWriter],
    questions: list[dict],
) -> dict:
    np.save(buffer := io.BytesIO(), _count_ids(out, writers["train"]))
    files.write_bytes(out / layout.COUNTS, buffer.getvalue())
    if questions:
        lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
        files.write_bytes(out / layout.QUESTIONS, lines.encode("utf-8"))
    digest = hashlib.sha256(model.fingerprint.encode())
    splits = {}
    for split, writer in writers.items():
        for shard in writer.shards:
            digest.update(f"{split} {shard['tokens']} {shard['sha256']}\n".encode())
        shards = [
            {key: shard[key] for key in ("file", "tokens", "documents", "bytes", "sha256")}
            for shard in writer.shards
        ]
        splits[split] = {
            key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes")
        } | {"shards": shards}
    index = {
        "version": layout.VERSION,
        "fingerprint": digest.hexdigest()[:16],
        "tokenizer_fingerprint": model.fingerprint,
        "vocab_size": model.vocab_size,
        "eos_id": model.eos_id,
        "dtype": layout.dtype_for(model.vocab_size).name,
        "questions": len(questions),
        "splits": splits,
        "arguments": arguments,
    }
    files.write_json(out / layout.INDEX, index)
    return index


def _count_ids(out: Path, writer: _SplitWriter) -> np.ndarray:
    counts = np.zeros(writer.model.vocab_size, np.uint64)
    block = 1 << 22
    for shard in writer.shards:
        tokens = np.memmap(out / shard["file"], writer.dtype, "r")
        for start in range(0, len(tokens), block):
            counts += np.bincount(tokens[start : start + block], minlength=len(counts)).astype(
                np.uint64
            )
    return counts
