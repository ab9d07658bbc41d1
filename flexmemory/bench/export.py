"""`flexmemory bench export`: the export of a table against its two ceilings, the fold's compute and
the disk, measured in the same run.
"""

import contextlib
import errno
import mmap
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexmemory import files
from flexmemory.bench.machine import facts, timed
from flexmemory.config import Config
from flexmemory.data import tokenizer as tokenizers
from flexmemory.models.config import ModelConfig
from flexmemory.models.transformer import init_params
from flexmemory.tkv import fold, format
from flexmemory.tkv.export import export_params

SCALES = {  # models: pattern, D, d_ff, V
    "smoke": {"computed": ("memoryllm*2", 64, 176, 1024)},
    # 512 MiB in float32; the tables are as many bytes with next to nothing to compute: the disk
    # alone
    "cpu": {"computed": ("memoryllm*8", 512, 1368, 32_768), "tables": ("stem*8", 64, 512, 32_768)},
    "gpu": {
        "computed": ("memoryllm*24", 2048, 5464, 128_256),
        "tables": ("stem*8", 2048, 8192, 32_768),
    },
}


def measure(scratch: Path, scale: str, *, rounds: int = 7) -> dict:
    """Exports the models of ``scale`` with random weights under ``scratch``, which lies on the disk
    to measure.
    """
    models = {
        name: measure_model(scratch, *shape, rounds=rounds) for name, shape in SCALES[scale].items()
    }
    return {"bench": "export", "scale": scale, "machine": facts(scratch), "models": models}


def measure_model(
    scratch: Path,
    pattern: str,
    d: int,
    d_ff: int,
    v: int,
    *,
    dtype: str = "float32",
    rounds: int = 7,
) -> dict:
    """Every round takes, in this order: the fold alone (folded and encoded on the device, nothing
    fetched), one file of the same bytes written and synced, the same past the page cache ("direct",
    [] where the file system has no such writes), the export. Medians. The disk's ceiling is the
    faster of the two writes; "share" is the time of the slower of fold and disk over the export's,
    1.0 would be perfect overlap.
    """
    model = ModelConfig(pattern=pattern, vocab_size=v, d_model=d, n_heads=8, d_ff=d_ff)
    tokenizer = tokenizers.build("byte", lambda: iter(()))
    params = init_params(model, 0)
    shard_rows = format.default_shard_rows(model, dtype)
    groups = format.model_groups(model, dtype, shard_rows)
    table_bytes = sum(group.bytes for group in groups)
    bases: fold.Bases = {group.name: () for group in groups}

    def fold_shard(start: int) -> list:
        return fold.start_shard(
            params,
            bases,
            start,
            min(start + shard_rows, v),
            cfg=model,
            layouts=fold.layouts_of(groups),
            fold_rows=min(shard_rows, format.FOLD_ROWS),
        )

    def fold_all() -> None:
        for start in range(0, v, shard_rows):
            jax.block_until_ready(fold_shard(start))

    def export(out: Path) -> None:
        options: dict[str, Any] = dict(run="bench", step=0, dtype=dtype, progress=False)
        export_params(Config(model=model), params, tokenizer, out, **options)

    seconds: dict[str, list[float]] = {"fold": [], "write": [], "direct": [], "export": []}
    writes = {"write": 0, "direct": files.DIRECT} if files.DIRECT else {"write": 0}
    loads = []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        file, out = Path(folder) / "file", Path(folder) / "store"
        jax.block_until_ready(fold_shard(0))  # compiles
        for _ in range(rounds):
            loads.append(os.getloadavg()[0])
            seconds["fold"].append(timed(fold_all))
            for method, flag in writes.items():
                with contextlib.suppress(_Refused):
                    seconds[method].append(_write(file, table_bytes, flag))
                os.remove(file)
                os.sync()
            seconds["export"].append(timed(lambda: export(out)))
            shutil.rmtree(out)
            os.sync()
    median = {name: statistics.median(times) for name, times in seconds.items() if times}
    disk = min(median["write"], median.get("direct", median["write"]))
    return {
        "dtype": dtype,
        "pattern": pattern,
        "d_model": d,
        "d_ff": d_ff,
        "vocab_size": v,
        "table_bytes": table_bytes,
        "shard_rows": shard_rows,
        "load": loads,
        "seconds": seconds,
        "median_seconds": {name: median.get(name) for name in seconds},
        "export_mb_per_s": table_bytes / median["export"] / 1e6,
        "write_mb_per_s": table_bytes / median["write"] / 1e6,
        "share": max(median["fold"], disk) / median["export"],
    }


class _Refused(Exception):
    """The file system has no such writes."""


def _write(path: Path, size: int, flag: int) -> float:
    """Seconds in which a file of ``size`` bytes is written and synced, 32 MiB at a time; ``flag``:
    O_DIRECT or 0.
    """
    memory = mmap.mmap(-1, 32 << 20)  # page-aligned
    memory.write(np.random.default_rng(0).bytes(len(memory)))
    began = time.perf_counter()
    path.touch()
    try:
        descriptor = os.open(path, os.O_WRONLY | flag)
        try:
            at = 0
            while at < size:
                at += os.write(descriptor, memoryview(memory)[: min(len(memory), size - at)])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if flag and error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            raise _Refused from error
        raise
    return time.perf_counter() - began
