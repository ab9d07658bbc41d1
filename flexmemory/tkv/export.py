"""Export: fold every memory layer over all addresses, block by block, into a TKV store.

A block is one shard of every group; host h of n writes the blocks k with k mod n = h. Each host
counts what is on the disk in tkv.partial.<host>.json, so a killed export goes on where it stopped;
host 0 prepares the target and at the end writes tkv.json.
"""

import contextlib
import dataclasses
import io
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import jax
import numpy as np

from flexmemory.config import Config
from flexmemory.data.tokenizer import Tokenizer
from flexmemory.data.tokenizer import load as load_tokenizer
from flexmemory.errors import UserError
from flexmemory.progress import ProgressLine
from flexmemory.tkv import arrays, backbone, fold, format, lowrank
from flexmemory.tkv.encoding import CODE_LIMIT, DTYPES, FLOATS
from flexmemory.tkv.format import File, Group, LayerError, Manifest, Source, TokenizerInfo
from flexmemory.tkv.manifest import config_hash, read_manifest
from flexmemory.tkv.storage import target
from flexmemory.tkv.storage.crc import crc32, crc32_of_parts
from flexmemory.tkv.storage.location import Location, open_location
from flexmemory.tkv.store import load_bases

# blocks in memory, on their way out while the next one is computed: of two, both would be checked,
# then both synced
WRITING = 3
# blocks of learned rows on their way to a disk, a piece of each in memory: so many keep its queue
# filled
COPYING = 16


@dataclasses.dataclass(frozen=True)
class Rows:
    """How rows are stored. ``rank``: columns kept of every layer, a float for a share of its width;
    ``rank_error``: the relative error (Frobenius norm) for which each layer's smallest rank is
    taken instead; ``scale_group``: numbers that share a scale, 0 for a whole record;
    ``block_rows``: tokens in one shard, a power of two, by default about 32 MiB of the widest group
    at full rank.
    """

    dtype: str = "float32"
    scale_group: int = 0
    rank: int | float | None = None
    rank_error: float | None = None
    block_rows: int | None = None


def export(
    workdir: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    host: int | None = None,
    hosts: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **rows,
) -> dict:
    """Writes the TKV store ``out``, a path or URL, from the run folder ``workdir``; an interrupted
    call is finished by the same call.

    rows: fields of :class:`Rows`. step: checkpoint, the latest by default. host, hosts: this
    process's number and how many share the work, by default JAX's processes; host 0 waits for the
    others. overwrite: replace another store at ``out``. Returns the dict of :func:`export_params`.
    Raises UserError for a missing run, another store or foreign files at ``out``, another process
    that exports there, a bad option, rows that are not finite, a full disk.
    """
    from flexmemory.run_folder import load_params

    check_options(Rows(**rows), host, hosts)
    config, params, step = load_params(Path(workdir), step)
    return export_params(
        config,
        params,
        load_tokenizer(Path(workdir)),
        out,
        run=Path(workdir).resolve().name,
        step=step,
        counts_V=read_counts(config),
        host=host,
        hosts=hosts,
        overwrite=overwrite,
        progress=progress,
        **rows,
    )


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
    **rows,
) -> dict:
    """:func:`export` of parameters already loaded (as ``init_params`` gives them); ``run`` and
    ``step`` name their source.

    Returns {store, seconds, rows_per_s, resumed_rows, complete_before, backbone_bytes, and the
    figures of :func:`sizes`}; a host above 0 has no errors yet.
    """
    rows, model, began = Rows(**rows), config.model, time.perf_counter()
    check_options(rows, host, hosts)
    host, hosts = (jax.process_index(), jax.process_count()) if host is None else (host, hosts)
    if not model.vocab_size:
        raise UserError(
            "config model.vocab_size: 0; the config.json of a trained run has the vocabulary of its"
            " data"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"tokenizer: {tokenizer.vocab_size} ids, the model has {model.vocab_size}; give the"
            " tokenizer of the run's data"
        )
    on_device, params = jax.device_put(params), jax.tree.map(np.asarray, params)
    manifest = plan(
        config,
        rows,
        TokenizerInfo(tokenizer.fingerprint, tokenizer.eos_id, tokenizer.vocab_size),
        run,
        step,
        crc32_of(params),
    )
    location = open_location(out)
    backbone_bytes = sum(array.nbytes for array in backbone.tensors(params, model).values())
    with _clear_errors(location), target.held(location, host), ThreadPoolExecutor(1) as aside:
        # what is there is gone on with, or cleared
        _check_space(
            location, manifest.table_bytes // hosts + backbone_bytes - target.bytes_there(location)
        )
        resume = target.prepare(
            location,
            manifest,
            host,
            overwrite,
            lambda: _prepared(location, manifest, on_device, progress),
            progress,
        )
        if resume is None:
            manifest = read_manifest(location)
            return {
                "store": location.url,
                "seconds": 0.0,
                "rows_per_s": 0.0,
                "resumed_rows": model.vocab_size,
                "complete_before": True,
                "backbone_bytes": backbone_bytes,
                **sizes(manifest),
            }
        record, done = resume
        manifest, bases = _with_bases(location, manifest, record.prepared)
        rest = (
            aside.submit(_write_rest, location, manifest, params, tokenizer, counts_V)
            if host == 0
            else None
        )
        mine = range(host, manifest.blocks, hosts)
        todo = [block for block in mine if block not in done]
        _write_blocks(location, manifest, on_device, params, bases, todo, record, progress)
        resumed, written = (
            sum(_block_rows(manifest, block) for block in blocks)
            for blocks in (set(mine) & done.keys(), todo)
        )
        if host == 0:
            blocks = target.wait_for_hosts(location, manifest, record, progress)
            manifest = _publish(location, manifest, record, blocks, rest.result())
    seconds = time.perf_counter() - began
    return {
        "store": location.url,
        "seconds": seconds,
        "rows_per_s": written / seconds,
        "resumed_rows": resumed,
        "complete_before": False,
        "backbone_bytes": backbone_bytes,
        **sizes(manifest),
    }


def check_options(rows: Rows, host: int | None = None, hosts: int | None = None) -> None:
    if rows.dtype not in DTYPES:
        raise UserError(f"--dtype: {rows.dtype!r} is not one of {', '.join(DTYPES)}")
    if rows.scale_group < 0 or (rows.scale_group and rows.dtype in FLOATS):
        raise UserError(
            f"--scale_group: {rows.scale_group} needs --dtype={' or '.join(CODE_LIMIT)}, and is 0"
            " for one scale a row, or above"
        )
    if rows.rank is not None and rows.rank_error is not None:
        raise UserError(
            f"--rank, --rank_error: {rows.rank} and {rows.rank_error} both choose the ranks; give"
            " one of them"
        )
    if rows.rank_error is not None and not 0 < rows.rank_error < 1:
        raise UserError(f"--rank_error: {rows.rank_error} is not above 0 and below 1")
    if rows.block_rows is not None and (
        rows.block_rows < 1 or rows.block_rows & (rows.block_rows - 1)
    ):
        raise UserError(f"--block_rows: {rows.block_rows} is not a power of two")
    if (host is None) != (hosts is None) or (hosts is not None and not 0 <= host < hosts):
        raise UserError(
            f"--host, --hosts: {host} of {hosts}; give both, the first from 0 to one below the"
            " second"
        )


def read_counts(config: Config) -> np.ndarray | None:
    """How often each id occurs in the data of a run; None where they are not at hand or have been
    prepared anew with another vocabulary.
    """
    path = Path(config.data.path) / "train_counts.npy"
    if not config.data.path or not path.is_file():
        return None
    try:
        counts_V = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path}: not readable ({error}); prepare the data again, or move it away to export"
            " without counts"
        ) from None
    return counts_V if counts_V.shape == (config.model.vocab_size,) else None


def plan(
    config: Config, rows: Rows, tokenizer: TokenizerInfo, run: str, step: int, crc32: int
) -> Manifest:
    """The manifest as far as it is known before any row is: without files and errors, and without
    ranks that an error budget will choose.
    """
    model = config.model
    shard_rows = rows.block_rows or format.default_shard_rows(model, rows.dtype)
    groups = format.model_groups(model, rows.dtype, shard_rows)
    if not groups and (rows.rank is not None or rows.rank_error is not None):
        raise UserError("--rank: the model has no memory layer; leave it out")
    return Manifest(
        model=model,
        dtype=rows.dtype,
        shard_rows=shard_rows,
        fold_rows=min(shard_rows, format.FOLD_ROWS),
        tokenizer=tokenizer,
        source=Source(run, step, config_hash(config), crc32),
        scale_group=rows.scale_group,
        ranks=None if rows.rank is None else lowrank.uniform_ranks(groups, rows.rank),
        rank_error=rows.rank_error,
    )


def _prepared(location: Location, manifest: Manifest, params: dict, progress: bool) -> list[File]:
    """Writes what must be there before the first row: the basis of low-rank rows."""
    if manifest.ranks is None and manifest.rank_error is None:
        return []
    bases = lowrank.find_bases(
        params,
        cfg=manifest.model,
        groups=manifest.groups,
        fold_rows=manifest.fold_rows,
        ranks=manifest.ranks,
        rank_error=manifest.rank_error,
        progress=progress,
    )
    return [
        backbone.save_tensors(
            location,
            format.BASIS,
            {f"layers.{layer}": basis_rW for layer, basis_rW in bases.items()},
        )
    ]


def _with_bases(
    location: Location, manifest: Manifest, prepared: list[File]
) -> tuple[Manifest, fold.Bases]:
    """The manifest with its ranks, and the bases as every host reads them from the store."""
    file = next((file for file in prepared if file.name == format.BASIS), None)
    if file is None:
        return manifest, load_bases(location, manifest.groups, None)
    shapes = {name: tensor.shape for name, tensor in backbone.load_tensors(location, file).items()}
    manifest = dataclasses.replace(
        manifest,
        ranks=tuple(shapes[f"layers.{layer}"][0] for layer in format.memory_layers(manifest.model)),
    )
    return manifest, load_bases(location, manifest.groups, file)


def _write_blocks(
    location: Location,
    manifest: Manifest,
    on_device: dict,
    params: dict,
    bases: fold.Bases,
    todo: list[int],
    record: target.Record,
    progress: bool,
) -> None:
    """Folds and writes ``todo``: the device computes the next block while the last ones are checked
    and written by threads, which copy learned rows themselves. on_device, params: the same
    parameters there and on the host.
    """
    groups, tables = manifest.groups, fold.learned_tables(params, manifest.model, manifest.groups)
    computed = tuple(group for group in groups if group.name not in tables)
    at_once = WRITING if computed or location.local is None else COPYING
    total, began = sum(_block_rows(manifest, block) for block in todo), time.perf_counter()
    pending: deque[tuple[int, list[Future], dict]] = deque()
    written = 0

    def finish(at_most: int) -> None:
        """Waits until ``at_most`` blocks are on their way, and records what has arrived."""
        nonlocal written
        while len(pending) > at_most:
            block, writes, sums = pending.popleft()
            record.add(block, [file for write in writes for file in write.result()], sums)
            written += _block_rows(manifest, block)
            line.update(
                written,
                f"{written * manifest.bundle_bytes / (time.perf_counter() - began) / 1e6:,.0f}"
                " MB/s",
            )

    with (
        ProgressLine("export", total, "rows", enabled=progress) as line,
        record,
        ThreadPoolExecutor(at_once) as pool,
    ):
        tails, turn = (
            {group.name: arrays.shard_tails(manifest, group) for group in groups},
            threading.Lock(),
        )
        free = SimpleQueue()
        for memory_N in fold.copy_memory(
            [group for group in groups if group.name in tables], at_once
        ):
            free.put(memory_N)
        try:
            for block, bundles, sums in _folded(manifest, on_device, bases, todo, computed):
                finish(at_once - 1)
                writes = []
                for group in groups:
                    what = (location, manifest, group, block, tails[group.name], turn)
                    if group.name in tables:
                        writes.append(pool.submit(_copy_shard, *what, tables[group.name], free))
                    else:
                        writes.append(pool.submit(_write_shard, *what, bundles[group.name]))
                pending.append((block, writes, sums))
                del bundles
            finish(0)
        except BaseException:
            for block, writes, sums in pending:  # the others in flight arrive all the same
                if not any(write.exception() for write in writes):
                    with contextlib.suppress(
                        OSError, UserError
                    ):  # the first error is the one to tell
                        record.add(
                            block, [file for write in writes for file in write.result()], sums
                        )
            raise


def _folded(
    manifest: Manifest,
    on_device: dict,
    bases: fold.Bases,
    todo: list[int],
    groups: tuple[Group, ...],
) -> Iterator[tuple[int, dict[str, list[np.ndarray]], dict[int, list[float]]]]:
    """(block, what :func:`fold.fetch_block` gives of ``groups``) of the blocks ``todo``; the device
    computes the next one meanwhile.
    """
    ahead = None
    for block in [*todo, None]:
        parts = (
            None
            if block is None
            else fold.start_block(
                on_device,
                bases,
                *_block_range(manifest, block),
                cfg=manifest.model,
                layouts=fold.layouts_of(groups),
                fold_rows=manifest.fold_rows,
            )
        )
        if ahead is not None:
            yield ahead[0], *fold.fetch_block(ahead[1], groups)
        ahead = (block, parts)


def _copy_shard(
    location: Location,
    manifest: Manifest,
    group: Group,
    block: int,
    tails: tuple[bytes, bytes],
    turn: threading.Lock,
    tables: list[np.ndarray],
    free: SimpleQueue[np.ndarray],
) -> list[File]:
    """:func:`_write_shard` of learned rows, through a piece of memory that all shards use in turn:
    the disk takes fresh memory more slowly.
    """
    memory_N = free.get()
    try:
        parts = fold.copy_block(
            tables, group, *_block_range(manifest, block), manifest.fold_rows, memory_N
        )
        return _write_shard(location, manifest, group, block, tails, turn, parts)
    finally:
        free.put(memory_N)


def _write_shard(
    location: Location,
    manifest: Manifest,
    group: Group,
    block: int,
    tails: tuple[bytes, bytes],
    turn: threading.Lock,
    parts: Iterable[np.ndarray],
) -> list[File]:
    """Writes one shard and its checksums; both are on the disk when it returns."""
    name, crc32_S, at, whole = (
        format.shard_file(group, block),
        np.zeros(manifest.shard_rows, "<u4"),
        0,
        0,
    )

    def pieces() -> Iterator[memoryview]:
        nonlocal at, whole
        for part_RB in parts:
            crc32_S[at : at + len(part_RB)] = format.bundle_crc32(part_RB)
            at, whole = at + len(part_RB), crc32(part_RB, whole)
            yield part_RB.data
        tail = tails[block == manifest.blocks - 1]
        whole = crc32(tail, whole)
        yield tail

    location.write_parts(name, _in_turn(pieces(), turn))
    return [
        File(name, format.shard_bytes(manifest, group, block), whole),
        _write(location, format.checksum_file(group, block), crc32_S.tobytes()),
    ]


def _in_turn(pieces: Iterator[memoryview], turn: threading.Lock) -> Iterator[memoryview]:
    """The pieces, each copied and checked while no other thread does so: one is faster than the
    disk, several wait for the interpreter's lock.
    """
    while True:
        with turn:
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def _write_rest(
    location: Location,
    manifest: Manifest,
    params: dict,
    tokenizer: Tokenizer,
    counts_V: np.ndarray | None,
) -> list[File]:
    """Writes everything beside the rows and the manifest, while rows are written: no record counts
    it, an export that goes on writes it again.
    """
    made = [
        *backbone.save(params, manifest.model, location),
        _write(location, format.TOKENIZER, tokenizer.content),
    ]
    for group in manifest.groups:
        made += [
            _write(location, name, content)
            for name, content in arrays.zarr_metadata(manifest, group).items()
        ]
    if counts_V is not None:
        made.append(_write(location, format.COUNTS, npy_bytes(np.asarray(counts_V, np.uint64))))
    return made


def _publish(
    location: Location,
    manifest: Manifest,
    record: target.Record,
    blocks: dict[int, target.Block],
    rest: list[File],
) -> Manifest:
    """Checks that every file is whole, and makes it a store by writing tkv.json."""
    made = [*record.prepared, *rest, *(file for block in blocks.values() for file in block.files)]
    found = location.sizes([file.name for file in made])
    for file in made:
        if found.get(file.name, -1) not in (None, file.bytes):
            what = (
                f"{found[file.name]} bytes instead of {file.bytes}"
                if file.name in found
                else "missing"
            )
            raise UserError(
                f"{location.url}/{file.name}: {what} although it was written; run the same command"
                " again, and check the disk"
            )
    manifest = dataclasses.replace(
        manifest,
        files=tuple(sorted(made, key=lambda file: file.name)),
        errors=_errors(manifest, blocks),
    )
    target.publish(location, manifest, record)
    return manifest


def _write(location: Location, name: str, data: bytes) -> File:
    location.write(name, data)
    return File(name, len(data), crc32(data))


def _errors(manifest: Manifest, blocks: dict[int, target.Block]) -> tuple[LayerError, ...] | None:
    """Errors of the memory layers from the sums of all blocks, added in order of blocks whoever
    wrote them.
    """
    made = []
    for layer in format.memory_layers(manifest.model):
        sums = [block.sums[layer] for block in blocks.values() if layer in block.sums]
        if not sums:
            return None
        error, squares = (sum(block[i] for block in sums) for i in (0, 1))
        made.append(
            LayerError(
                layer, (error / squares) ** 0.5 if squares else 0.0, max(block[2] for block in sums)
            )
        )
    return tuple(made)


def sizes(manifest: Manifest) -> dict:
    """Bytes of the table beside those of full-rank floats, and what the rows cost in exactness.

    {dtype, scale_group, rank_error, table_bytes, float32_bytes, bfloat16_bytes, basis_bytes,
    layers: [{layer, width, bytes, rank, useful_rank, relative_rms, max_abs}]}; rank None at full
    rank, errors None where there are none (plain float32) or not yet.
    useful_rank: above it, a rank saves nothing.
    """
    v, model = manifest.vocab_size, manifest.model
    errors = {error.layer: error for error in manifest.errors or ()}
    layers = []
    for group in manifest.groups:
        for place, layer in enumerate(group.layers):
            n, error = group.layout.numbers[place], errors.get(layer)
            layers.append(
                {
                    "layer": layer,
                    "width": group.width,
                    "bytes": v * group.layout.record_bytes(n),
                    "rank": n if group.layout.ranks else None,
                    "useful_rank": lowrank.useful_rank(v, group.width),
                    "relative_rms": error and error.relative_rms,
                    "max_abs": error and error.max_abs,
                }
            )
    basis = sum(4 * layer["width"] * layer["rank"] for layer in layers if layer["rank"])
    plain = {
        f"{dtype}_bytes": sum(group.bytes for group in format.model_groups(model, dtype, 1))
        for dtype in ("float32", "bfloat16")
    }
    return {
        "dtype": manifest.dtype,
        "scale_group": manifest.scale_group,
        "rank_error": manifest.rank_error,
        "table_bytes": manifest.table_bytes,
        **plain,
        "basis_bytes": basis,
        "layers": sorted(layers, key=lambda layer: layer["layer"]),
    }


def crc32_of(params: dict) -> int:
    """CRC-32 over names and bytes of all parameters, in order of their names."""
    named = sorted(backbone.flatten(params))
    return crc32_of_parts(
        part
        for name, array in named
        for part in (name.encode(), np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    )


def npy_bytes(array: np.ndarray) -> bytes:
    """The array in NumPy's npy format 1.0."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _block_range(manifest: Manifest, block: int) -> tuple[int, int]:
    return block * manifest.shard_rows, min((block + 1) * manifest.shard_rows, manifest.vocab_size)


def _block_rows(manifest: Manifest, block: int) -> int:
    start, stop = _block_range(manifest, block)
    return stop - start


def _check_space(location: Location, needed: int) -> None:
    if location.local is not None and (free := shutil.disk_usage(location.local).free) < needed:
        raise UserError(
            f"--out: {location.url} needs {needed:,} bytes and its disk has {free:,}; free some and"
            " run the same command again, or export --dtype=bfloat16"
        )


@contextlib.contextmanager
def _clear_errors(location: Location) -> Iterator[None]:
    """Errors of the target's folder as one line; those of its files are so already."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--out: {location.url} cannot be written ({error.strerror}); mend that and run the"
            " same command again"
        ) from error
