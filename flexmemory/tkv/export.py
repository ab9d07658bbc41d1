"""Export: fold every memory layer over all addresses, shard by shard, into a TKV store.

The unit of work is a shard of every group; host h of n writes the shards k with k mod n = h. Each
host counts what is on the disk in tkv.partial.<host>.json, so a killed export goes on where it
stopped; host 0 prepares the target and at the end writes tkv.json. Learned tables stay in the
host's memory, so they may be larger than the device."""

import contextlib
import dataclasses
import io
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import jax
import numpy as np

from flexmemory.config import Config
from flexmemory.data.tokenizer import Tokenizer
from flexmemory.data.tokenizer import load as load_tokenizer
from flexmemory.errors import UserError
from flexmemory.progress import ProgressLine
from flexmemory.run_folder import load_params
from flexmemory.tkv import arrays, backbone, fold, format, lowrank
from flexmemory.tkv.encoding import CODE_LIMIT, DTYPES, FLOATS
from flexmemory.tkv.format import Group, LayerError, Manifest, Provenance, TokenizerInfo
from flexmemory.tkv.manifest import config_hash, identity, read_manifest, to_bytes
from flexmemory.tkv.storage import target
from flexmemory.tkv.storage.crc import crc32, crc32_of_parts
from flexmemory.tkv.storage.location import File, Location, misfits, open_location, refuse
from flexmemory.tkv.store import load_bases

# shards in memory, on their way out while the next one is computed: of two, both would be checked,
# then both synced
WRITING = 3
# shards of learned rows on their way to a disk, a piece of each in memory: so many keep its queue
# filled
COPYING = 16
AGAIN = "run the same command again"

# a shard, its bundles by group in the pieces of fold.fetch_shard, its sums
Folded = tuple[int, dict[str, list[np.ndarray]], target.Sums]


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How rows are stored. ``rank``: columns kept of every layer, a float for a share of its width;
    ``rank_error``: the relative error (Frobenius norm) for which each layer's smallest rank is
    taken instead; ``scale_group``: numbers that share a scale, 0 for a whole record;
    ``shard_rows``: tokens in one shard, a power of two, by default about 32 MiB of the widest group
    at full rank."""

    dtype: str = "float32"
    scale_group: int = 0
    rank: int | float | None = None
    rank_error: float | None = None
    shard_rows: int | None = None


def export(
    workdir: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    host: int | None = None,
    hosts: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **rows: Any,
) -> dict:
    """Writes the TKV store ``out``, a path or URL, from the run folder ``workdir``; an interrupted
    call is finished by the same call.

    rows: fields of :class:`RowFormat`. step: checkpoint, the latest by default. host, hosts: this
    process's number and how many share the work, by default JAX's processes; host 0 waits for the
    others. overwrite: replace another store at ``out``. Returns the dict of :func:`export_params`.
    Raises UserError for a missing run, another store or foreign files at ``out``, another process
    that exports there, a bad option, rows that are not finite, a full disk."""
    check_options(RowFormat(**rows), host, hosts)
    config, params, step = load_params(Path(workdir), step, on_host=True)
    tokenizer, run = load_tokenizer(Path(workdir)), Path(workdir).resolve().name
    how = rows | dict(host=host, hosts=hosts, overwrite=overwrite, progress=progress)
    source = dict[str, Any](run=run, step=step, counts_V=read_counts(config))
    return export_params(config, params, tokenizer, out, **source, **how)


def export_params(
    config: Config,
    params: dict,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    run: str,
    step: int,
    counts_V: np.ndarray | None = None,
    host: int | None = None,
    hosts: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **rows: Any,
) -> dict:
    """:func:`export` of parameters already loaded (as ``init_params`` gives them, or NumPy arrays);
    ``run`` and ``step`` name their source.

    Returns {store, seconds, rows_per_s, resumed_rows, complete_before, backbone_bytes, and the
    figures of :func:`sizes`}; a host above 0 has no errors yet."""
    row_format, model, began = RowFormat(**rows), config.model, time.perf_counter()
    check_options(row_format, host, hosts)
    if host is None or hosts is None:
        host, hosts = jax.process_index(), jax.process_count()
    if not model.vocab_size:
        mend = "the config.json of a trained run has the vocabulary of its data"
        raise UserError(f"config model.vocab_size: 0; {mend}")
    if tokenizer.vocab_size > model.vocab_size:
        what = f"{tokenizer.vocab_size} ids, the model has {model.vocab_size}"
        raise UserError(f"tokenizer: {what}; give the tokenizer of the run's data")
    params, on_device = jax.tree.map(np.asarray, params), fold.on_device(params)
    info = TokenizerInfo(tokenizer.fingerprint, tokenizer.eos_id, tokenizer.vocab_size)
    manifest = draft(config, row_format, info, run, step, crc32_of(params))
    location = open_location(out)
    backbone_bytes = sum(array.nbytes for array in backbone.tensors(params, model).values())
    where, resumed, written, complete = f"out: {location.url}", model.vocab_size, 0, True
    with (
        target.one_line_errors(where, f"mend that and {AGAIN}"),
        target.held(location, host),
        ThreadPoolExecutor(1) as aside,
    ):
        # what is there is gone on with, or cleared
        needed = manifest.table_bytes // hosts + backbone_bytes - target.bytes_there(location)
        mend = f"free some and {AGAIN}, or export with dtype=bfloat16"
        target.check_space(location, needed, mend, where)
        known = lambda: identity(read_manifest(location))
        write_first = lambda: _write_basis(location, manifest, on_device, progress)
        how = known, write_first, overwrite, progress
        resume = target.prepare(location, identity(manifest), host, *how)
        if resume is None:
            manifest, seconds = read_manifest(location), 0.0
        else:
            (record, done), complete = resume, False
            manifest, bases = _with_bases(location, manifest, record.prepared)
            writer = Writer(location, manifest, fold.learned_tables(params, model, manifest.groups))
            if host == 0:
                rest = aside.submit(_write_rest, writer, params, tokenizer, counts_V)
            own = range(host, manifest.shards, hosts)
            todo = [shard for shard in own if shard not in done]
            resumed, written = (_rows(manifest, part) for part in ({*own} & done.keys(), todo))
            folded = _folded(manifest, on_device, bases, todo, writer.computed)
            _write_shards(writer, folded, written, record, progress)
            if host == 0:
                shards = target.wait_for_hosts(record, manifest.shards, progress)
                manifest = _publish(record, manifest, shards, rest.result())
            seconds = time.perf_counter() - began
    return {
        "store": location.url,
        "seconds": seconds,
        "rows_per_s": written / seconds if seconds else 0.0,
        "resumed_rows": resumed,
        "complete_before": complete,
        "backbone_bytes": backbone_bytes,
        **sizes(manifest),
    }


def check_options(rows: RowFormat, host: int | None = None, hosts: int | None = None) -> None:
    """Raises UserError for options that make no sense."""
    size, scale_group, rank, budget = rows.shard_rows, rows.scale_group, rows.rank, rows.rank_error
    if rows.dtype not in DTYPES:
        raise UserError(f"dtype: {rows.dtype!r} is not one of {', '.join(DTYPES)}")
    if scale_group < 0 or (scale_group and rows.dtype in FLOATS):
        what = f"{scale_group} needs dtype={' or '.join(CODE_LIMIT)}"
        raise UserError(f"scale_group: {what}, and is 0 for one scale a row, or above")
    if rank is not None and budget is not None:
        what = f"{rank} and {budget} both choose the ranks"
        raise UserError(f"rank, rank_error: {what}; give one of them")
    if budget is not None and not 0 < budget < 1:
        raise UserError(f"rank_error: {budget} is not above 0 and below 1")
    if size is not None and (size < 1 or size & (size - 1)):
        raise UserError(f"shard_rows: {size} is not a power of two")
    if host is hosts is None:
        return
    if host is None or hosts is None or not 0 <= host < hosts:
        mend = "give both, the first from 0 to one below the second"
        raise UserError(f"host, hosts: {host} of {hosts}; {mend}")


def read_counts(config: Config) -> np.ndarray | None:
    """How often each id occurs in the data of a run; None where they are not at hand or have been
    prepared anew with another vocabulary."""
    path = Path(config.data.path) / "train_counts.npy"
    if not config.data.path or not path.is_file():
        return None
    try:
        counts_V = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        mend = "prepare the data again, or move it away to export without counts"
        raise UserError(f"{path}: not readable ({error}); {mend}") from None
    return counts_V if counts_V.shape == (config.model.vocab_size,) else None


def draft(
    config: Config, rows: RowFormat, tokenizer: TokenizerInfo, run: str, step: int, crc32: int
) -> Manifest:
    """The manifest without what the rows decide: files, errors, ranks of an error budget."""
    model = config.model
    shard_rows = rows.shard_rows or format.default_shard_rows(model, rows.dtype)
    groups = format.model_groups(model, rows.dtype, shard_rows)
    if not groups and (rows.rank is not None or rows.rank_error is not None):
        raise UserError("rank: the model has no memory layer; leave it out")
    return Manifest(
        model=model,
        dtype=rows.dtype,
        shard_rows=shard_rows,
        fold_rows=min(shard_rows, format.FOLD_ROWS),
        tokenizer=tokenizer,
        source=Provenance(run, step, config_hash(config), crc32),
        scale_group=rows.scale_group,
        ranks=None if rows.rank is None else lowrank.uniform_ranks(groups, rows.rank),
        rank_error=rows.rank_error,
    )


def _write_basis(location: Location, m: Manifest, params: dict, progress: bool) -> list[File]:
    """Writes what must be there before the first row: the basis of low-rank rows."""
    if m.ranks is None and m.rank_error is None:
        return []
    how = m.groups, m.fold_rows, m.ranks, m.rank_error, progress
    bases = lowrank.find_bases(params, m.model, *how)
    named = {f"layers.{layer}": basis_rW for layer, basis_rW in bases.items()}
    return [backbone.save_tensors(location, format.BASIS, named)]


def _with_bases(
    location: Location, manifest: Manifest, prepared: list[File]
) -> tuple[Manifest, fold.Bases]:
    """The manifest with its ranks, and the bases as every host reads them from the store."""
    file = next(iter(prepared), None)
    if file is not None:
        named, layers = backbone.load_tensors(location, file), format.memory_layers(manifest.model)
        ranks = tuple(len(named[f"layers.{layer}"]) for layer in layers)
        manifest = dataclasses.replace(manifest, ranks=ranks)
    return manifest, load_bases(location, manifest.groups, file)


class Writer:
    """Writes the files of a store; :meth:`write` and :meth:`copy` are called by many threads.
    ``tables``: see :func:`fold.learned_tables`."""

    def __init__(self, location: Location, manifest: Manifest, tables: dict[str, list[np.ndarray]]):
        self.location, self.manifest, self.tables = location, manifest, tables
        self.computed = tuple(group for group in manifest.groups if group.name not in tables)
        self.at_once = WRITING if self.computed or location.local is None else COPYING
        self._turn, self._free = threading.Lock(), SimpleQueue[np.ndarray]()
        copied = [group for group in manifest.groups if group.name in tables]
        for memory_N in fold.copy_memory(copied, self.at_once):
            self._free.put(memory_N)
        self._tails = {g.name: arrays.shard_tails(manifest, g) for g in manifest.groups}

    def file(self, name: str, data: bytes) -> File:
        self.location.write(name, data)
        return File(name, len(data), crc32(data))

    def copy(self, group: Group, shard: int) -> list[File]:
        """:meth:`write` of learned rows, through a piece of memory that all shards use in turn: the
        disk takes fresh memory more slowly."""
        memory_N, m = self._free.get(), self.manifest
        try:
            where = *m.span(shard), m.fold_rows, memory_N
            return self.write(group, shard, fold.copy_shard(self.tables[group.name], group, *where))
        finally:
            self._free.put(memory_N)

    def write(self, group: Group, shard: int, parts: Iterable[np.ndarray]) -> list[File]:
        """Writes one shard and its checksums; both are on the disk when it returns."""
        m, name = self.manifest, format.shard_file(group, shard)
        crc32_S, at, whole = np.zeros(m.shard_rows, "<u4"), 0, 0

        def pieces() -> Iterator[memoryview | bytes]:
            nonlocal at, whole
            for part_RB in parts:
                crc32_S[at : at + len(part_RB)] = format.bundle_crc32(part_RB)
                at, whole = at + len(part_RB), crc32(part_RB, whole)
                yield part_RB.data
            tail = self._tails[group.name][shard == m.shards - 1]
            whole = crc32(tail, whole)
            yield tail

        self.location.write_parts(name, self._in_turn(pieces()))
        return [
            File(name, format.shard_bytes(m, group, shard), whole),
            self.file(format.checksum_file(group, shard), crc32_S.tobytes()),
        ]

    def _in_turn(self, pieces: Iterator) -> Iterator:
        """The pieces, each copied and checked while no other thread does so: one is faster than the
        disk, several wait for the interpreter's lock."""

        def piece() -> Any:
            with self._turn:
                return next(pieces, None)

        return iter(piece, None)


def _write_shards(
    writer: Writer, folded: Iterator[Folded], total: int, record: target.Record, progress: bool
) -> None:
    """Writes shards of ``total`` rows as they are folded: threads check and write the last ones,
    and copy learned rows themselves, while the device computes the next."""
    m, written, began = writer.manifest, 0, time.perf_counter()
    pending: deque[tuple[int, list[Future], target.Sums]] = deque()

    def keep(shard: int, writes: list[Future], sums: target.Sums) -> None:
        record.add(shard, [file for write in writes for file in write.result()], sums)

    def finish(at_most: int) -> None:
        """Waits until ``at_most`` shards are on their way, and records what has arrived."""
        nonlocal written
        while len(pending) > at_most:
            keep(*(arrived := pending.popleft()))
            written += _rows(m, [arrived[0]])
            speed = written * m.bundle_bytes / (time.perf_counter() - began) / 1e6
            line.update(written, f"{speed:,.0f} MB/s")

    with (
        ProgressLine("export", total, "rows", enabled=progress) as line,
        record,
        ThreadPoolExecutor(writer.at_once) as pool,
    ):
        try:
            for shard, bundles, sums in folded:
                finish(writer.at_once - 1)
                writes = [
                    pool.submit(writer.copy, group, shard)
                    if group.name in writer.tables
                    else pool.submit(writer.write, group, shard, bundles[group.name])
                    for group in m.groups
                ]
                pending.append((shard, writes, sums))
                del bundles
            finish(0)
        except BaseException:
            for shard, writes, sums in pending:  # the others in flight arrive all the same
                if not any(write.exception() for write in writes):
                    with contextlib.suppress(OSError, UserError):  # the first error is told
                        keep(shard, writes, sums)
            raise


def _folded(
    m: Manifest, params: dict, bases: fold.Bases, todo: list[int], groups: tuple[Group, ...]
) -> Iterator[Folded]:
    """The shards ``todo`` of ``groups``; the device computes the next one meanwhile."""
    how = dict[str, Any](cfg=m.model, layouts=fold.layouts_of(groups), fold_rows=m.fold_rows)
    ahead: tuple[int, list[fold.Part]] | None = None
    for shard in todo:
        parts = fold.start_shard(params, bases, *m.span(shard), **how)
        if ahead is not None:
            yield ahead[0], *fold.fetch_shard(ahead[1], groups)
        ahead = shard, parts
        del parts
    if ahead is not None:
        yield ahead[0], *fold.fetch_shard(ahead[1], groups)


def _write_rest(
    writer: Writer, params: dict, tokenizer: Tokenizer, counts_V: np.ndarray | None
) -> list[File]:
    """Writes all but the rows and the manifest; an export that goes on writes it again."""
    contents = {format.TOKENIZER: tokenizer.content}
    for group in writer.manifest.groups:
        contents |= arrays.zarr_metadata(writer.manifest, group)
    if counts_V is not None:
        contents[format.COUNTS] = npy_bytes(np.asarray(counts_V, np.uint64))
    return [
        *backbone.save(params, writer.manifest.model, writer.location),
        *(writer.file(name, content) for name, content in contents.items()),
    ]


def _publish(
    record: target.Record, manifest: Manifest, shards: dict[int, target.Shard], rest: list[File]
) -> Manifest:
    """Checks that every file is whole, and makes it a store by writing tkv.json."""
    files = [*record.prepared, *rest, *(file for shard in shards.values() for file in shard.files)]
    for file, what in misfits(record.location, files, "{} bytes instead of {}"):
        what, mend = f"{what} although it was written", f"{AGAIN}, and check the disk"
        raise refuse(record.location, file.name, what, mend)
    files.sort(key=lambda file: file.name)
    errors = _errors(manifest, shards)
    manifest = dataclasses.replace(manifest, files=tuple(files), errors=errors)
    target.publish(record, to_bytes(manifest))
    return manifest


def _errors(m: Manifest, shards: dict[int, target.Shard]) -> tuple[LayerError, ...] | None:
    """Errors of the memory layers: the sums of all shards, added in order of shards."""
    errors = []
    for layer in format.memory_layers(m.model):
        sums = [shard.sums[layer] for shard in shards.values() if layer in shard.sums]
        if not sums:
            return None
        error, squares, largest = zip(*sums)
        rms = (sum(error) / sum(squares)) ** 0.5 if sum(squares) else 0.0
        errors.append(LayerError(layer, rms, max(largest)))
    return tuple(errors)


def sizes(manifest: Manifest) -> dict:
    """Bytes of the table beside those of full-rank floats, and what the rows cost in exactness.

    {dtype, scale_group, rank_error, table_bytes, float32_bytes, bfloat16_bytes, basis_bytes,
    layers: [{layer, width, bytes, rank, useful_rank, relative_rms, max_abs}]}; rank None at full
    rank, errors None where there are none (plain float32) or not yet.
    useful_rank: above it, a rank saves nothing."""
    m, v = manifest, manifest.vocab_size
    errors = {error.layer: error for error in m.errors or ()}

    def figures(group: Group, n: int, layer: int) -> dict:
        error = errors.get(layer)
        return {
            "layer": layer,
            "width": group.width,
            "bytes": v * group.layout.record_bytes(n),
            "rank": n if group.ranks else None,
            "useful_rank": lowrank.useful_rank(v, group.width),
            "relative_rms": error and error.relative_rms,
            "max_abs": error and error.max_abs,
        }

    def plain(dtype: str) -> int:
        return sum(group.bytes for group in format.model_groups(m.model, dtype, 1))

    layers = [figures(g, *one) for g in m.groups for one in zip(g.layout.numbers, g.layers)]
    own = {name: getattr(m, name) for name in ("dtype", "scale_group", "rank_error", "table_bytes")}
    return own | {
        "float32_bytes": plain("float32"),
        "bfloat16_bytes": plain("bfloat16"),
        "basis_bytes": sum(4 * g.width * rank for g in m.groups for rank in g.ranks or ()),
        "layers": sorted(layers, key=lambda layer: layer["layer"]),
    }


def crc32_of(params: dict) -> int:
    """CRC-32 over names and bytes of all parameters, in order of their names."""
    return crc32_of_parts(
        part
        for name, array in sorted(backbone.flatten(params), key=lambda item: item[0])
        for part in (name.encode(), np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    )


def npy_bytes(array: np.ndarray) -> bytes:
    """The array in NumPy's npy format 1.0."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _rows(manifest: Manifest, shards: Iterable[int]) -> int:
    spans = map(manifest.span, shards)
    return sum(stop - start for start, stop in spans)
