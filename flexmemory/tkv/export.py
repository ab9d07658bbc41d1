"""Export: fold every memory layer over all addresses, block by block, into a TKV store.

A block is one shard of every group. Blocks are written in order and counted in tkv.partial.json, so a killed export goes
on where it stopped; tkv.json appears last, by rename.
"""

import dataclasses
import json
import shutil
import time
import zlib
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts

from flexmemory import files
from flexmemory.config import Config
from flexmemory.data.tokenizer import Tokenizer
from flexmemory.data.tokenizer import load as load_tokenizer
from flexmemory.errors import UserError
from flexmemory.progress import ProgressLine
from flexmemory.tkv import backbone, format
from flexmemory.tkv.fold import fold_range
from flexmemory.tkv.format import Manifest, Source, TokenizerInfo

CONTENTS = ("rows", "checksums", "backbone", format.TOKENIZER)


def export(workdir: str | Path, out: str | Path, *, dtype: str = "float32", step: int | None = None, block_rows: int | None = None,
           overwrite: bool = False, progress: bool = True) -> dict:
    """Writes the TKV store ``out`` from the run folder ``workdir``; an interrupted call is finished by the same call.

    dtype: of the rows, one of float32, bfloat16, float16. step: checkpoint, the latest by default. block_rows: tokens in
    one shard, a power of two; by default about 32 MiB of the widest group. overwrite: replace another store at ``out``.
    Returns {store, table_bytes, backbone_bytes, seconds, rows_per_s, resumed_rows, complete_before}. Raises UserError for
    a missing run, another store or foreign files at ``out``, a bad option, a full disk.
    """
    from flexmemory.train.checkpoint import load_params  # late: Orbax takes a second to import

    check_options(dtype, block_rows)
    config, params, step = load_params(Path(workdir), step)
    tokenizer = load_tokenizer(Path(workdir))
    return export_params(config, params, tokenizer, Path(out), run=Path(workdir).resolve().name, step=step, dtype=dtype,
                         block_rows=block_rows, overwrite=overwrite, progress=progress)


def export_params(config: Config, params: dict, tokenizer: Tokenizer, out: Path, *, run: str, step: int, dtype: str = "float32",
                  block_rows: int | None = None, overwrite: bool = False, progress: bool = True) -> dict:
    """:func:`export` of parameters already loaded (as ``init_params`` gives them); ``run`` and ``step`` name their source."""
    check_options(dtype, block_rows)
    began, model = time.perf_counter(), config.model
    if not model.vocab_size:
        raise UserError("config model.vocab_size: 0; the config.json of a trained run has the vocabulary of its data")
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(f"tokenizer: {tokenizer.vocab_size} ids, the model has {model.vocab_size}; give the tokenizer of the run's data")
    on_device, params = jax.device_put(params), jax.tree.map(np.asarray, params)
    shard_rows = block_rows or format.default_shard_rows(model, dtype)
    manifest = Manifest(
        model=model, dtype=dtype, shard_rows=shard_rows, fold_rows=min(shard_rows, format.FOLD_ROWS),
        tokenizer=TokenizerInfo(tokenizer.fingerprint, tokenizer.eos_id, tokenizer.vocab_size),
        source=Source(run, step, format.config_hash(config), params_crc32(params)))
    backbone_bytes = sum(array.nbytes for array in backbone.tensors(params, model).values())
    needed = manifest.table_bytes + backbone_bytes
    summary = {"store": str(out), "table_bytes": manifest.table_bytes, "backbone_bytes": backbone_bytes}
    try:
        done = prepare_target(out, manifest, overwrite)
        if done is None:
            return {**summary, "seconds": 0.0, "rows_per_s": 0.0, "resumed_rows": model.vocab_size, "complete_before": True}
        resumed = min(done * shard_rows, model.vocab_size)
        needed -= resumed * manifest.bundle_bytes
        if shutil.disk_usage(out).free < needed:
            raise UserError(full_disk(out, needed))
        _write_blocks(out, manifest, on_device, done, progress)
        publish(out, manifest, params, tokenizer)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        if files.is_disk_full(error):
            raise UserError(full_disk(out, needed)) from error
        if isinstance(error, OSError):
            raise UserError(f"--out: {out} cannot be written ({error.strerror})") from error
        raise
    seconds = time.perf_counter() - began
    written = model.vocab_size - resumed if manifest.groups else 0
    return {**summary, "seconds": seconds, "rows_per_s": written / seconds, "resumed_rows": resumed, "complete_before": False}


def check_options(dtype: str, block_rows: int | None) -> None:
    if dtype not in format.DTYPES:
        raise UserError(f"--dtype: {dtype!r} is not one of {', '.join(format.DTYPES)}")
    if block_rows is not None and (block_rows < 1 or block_rows & (block_rows - 1)):
        raise UserError(f"--block_rows: {block_rows} is not a power of two")


def prepare_target(out: Path, manifest: Manifest, overwrite: bool) -> int | None:
    """Blocks already written by an interrupted export of the same source, or None when ``out`` is this store already."""
    identity, partial = identity_of(manifest), out / format.PARTIAL
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; give a directory")
    if (out / format.MANIFEST).exists():
        if not overwrite:
            if identity_of(format.read_manifest(out)) == identity:
                for leftover in (partial, partial.with_name(partial.name + files.SCRATCH)):  # of a kill after the rename, or before an overwrite
                    leftover.unlink(missing_ok=True)
                return None
            raise UserError(f"--out: {out} holds a store of another run, step or dtype; give --overwrite to replace it, or another directory")
    elif partial.exists():
        found = {} if overwrite else _read_partial(partial)
        if found.get("identity") == identity and found["blocks_done"]:
            return found["blocks_done"]
        if found and found["identity"] != identity:
            raise UserError(f"--out: {out} holds an unfinished export of another run, step or dtype; give --overwrite to start again, "
                            "or another directory")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"--out: {out} is not empty and no TKV store; give a new or empty directory")
    out.mkdir(parents=True, exist_ok=True)
    _record(out, manifest, 0)  # before clearing: a kill in between leaves an unfinished export, not foreign files
    _clear(out)
    return 0


def identity_of(manifest: Manifest) -> dict:
    """What must agree for blocks of two exports to be the same bytes."""
    body = format.to_json(manifest)
    source = {name: value for name, value in body["source"].items() if name != "config_hash"}  # logging intervals do not change a row
    return {name: body[name] for name in ("version", "model", "dtype", "shard_rows", "fold_rows", "tokenizer")} | {"source": source}


def _read_partial(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
        return {"identity": content["identity"], "blocks_done": int(content["blocks_done"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error!r}); give --overwrite to start again") from None


def _record(out: Path, manifest: Manifest, blocks_done: int) -> None:
    files.write_json(out / format.PARTIAL, {"identity": identity_of(manifest), "blocks_done": blocks_done})


def _clear(out: Path) -> None:
    """Removes the contents of a store or an unfinished export, and nothing else. The manifest goes first: what is left is no store."""
    (out / format.MANIFEST).unlink(missing_ok=True)
    for name in CONTENTS:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _write_blocks(out: Path, manifest: Manifest, params: dict, done: int, progress: bool) -> None:
    """Folds and writes blocks done..end; block k+1 is folded while block k is written."""
    arrays = {
        group.name: (
            ts.open(format.rows_spec(out, manifest, group), open=True, create=True).result(),
            ts.open(format.checksums_spec(out, manifest, group), open=True, create=True).result(),
        ) for group in manifest.groups}
    v, size = manifest.vocab_size, manifest.shard_rows
    pending: list[Future] = []
    with ProgressLine("export", v, "rows", enabled=progress, start=done * size) as line:
        for block in range(done, manifest.blocks):
            start, stop = block * size, min((block + 1) * size, v)
            rows = fold_range(params, start, stop, cfg=manifest.model, dtype=manifest.dtype, fold_rows_count=manifest.fold_rows)
            _finish(out, manifest, pending, block, line)
            for name, rows_RLW in rows.items():
                array, checksums = arrays[name]
                pending.append(array[start:stop].write(rows_RLW).commit)
                pending.append(checksums[start:stop].write(format.bundle_crc32(rows_RLW)).commit)
        _finish(out, manifest, pending, manifest.blocks, line)


def _finish(out: Path, manifest: Manifest, pending: list, block: int, line: ProgressLine) -> None:
    """Waits for the writes of the block before ``block`` and records it."""
    if not pending:
        return
    for write in pending:
        write.result()  # on the disk: TensorStore syncs each file
    pending.clear()
    _record(out, manifest, block)
    line.update(min(block * manifest.shard_rows, manifest.vocab_size))


def publish(out: Path, manifest: Manifest, params: dict, tokenizer: Tokenizer) -> None:
    """Writes what is left, checks that every file is whole, and makes ``out`` a store by renaming tkv.json into place."""
    expected = format.expected_files(manifest)
    for leftover in out.rglob("*.__lock"):  # of a killed TensorStore write
        leftover.unlink()
    for name, size in expected.items():
        found = (out / name).stat().st_size if (out / name).exists() else None
        if found != size:
            raise UserError(f"{out / name}: {'missing' if found is None else f'{found} bytes instead of {size}'} although it was written; "
                            "give --overwrite to export again, and check the disk")
    manifest = dataclasses.replace(manifest, backbone=backbone.save(params, manifest.model, out))
    tokenizer.save(out)
    for directory in [out, *(path for path in out.rglob("*") if path.is_dir())]:
        files.sync_directory(directory)
    files.write_json(out / format.MANIFEST, format.to_json(manifest))
    (out / format.PARTIAL).unlink()


def params_crc32(params: dict) -> int:
    """CRC-32 over names and bytes of all parameters, in order of their names."""
    crc = 0
    for name, array in sorted(backbone.flatten(params)):
        crc = zlib.crc32(np.ascontiguousarray(array).data.cast("B") if array.size else b"", zlib.crc32(name.encode(), crc))
    return crc


def full_disk(out: Path, needed: int) -> str:
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    return (f"--out: {out} needs {needed:,} bytes and its disk has {shutil.disk_usage(place).free:,}; free some and run the same command again "
            "(it goes on where it stopped), or export --dtype=bfloat16")
