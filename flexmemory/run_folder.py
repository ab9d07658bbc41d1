"""The run folder: config.json, run.json (revision, versions, data), tokenizer.json, metrics.jsonl,
compile.json, checkpoints/, final_result.json.
"""

import dataclasses
import fcntl
import importlib.metadata
import json
import os
import secrets
import subprocess
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from flexmemory.config import Config, ParallelConfig, get, load_json, to_json
from flexmemory.data.tokenizer import Tokenizer
from flexmemory.errors import UserError
from flexmemory.files import SCRATCH, is_disk_full, write_json, write_text
from flexmemory.models.parameters import path_name
from flexmemory.models.transformer import abstract_params
from flexmemory.parallel import placed

# fields that may change between the start and the resumption of a run: they do not touch parameters
# or batches
FREE = {
    "data.path",
    "train.log_every",
    "train.eval_every",
    "train.eval_tokens",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.tensorboard",
    "parallel.plan",
    "parallel.mesh",
    "parallel.table_memory",
}
# whose versions run.json has
PACKAGES = "flexmemory jax jaxlib flax optax orbax-checkpoint tensorstore grain numpy".split()
LOCK = ".lock"
LOG = "log."  # a log may be there before the run, as `| tee log.txt` makes one


def leaves(config: Config) -> dict:
    """{dotted field: value}"""
    return {
        f"{section.name}.{field.name}": get(config, f"{section.name}.{field.name}")
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, section.name))
    }


def claim(workdir: Path, cfg: Config, data_fingerprint: str, tokenizer: Tokenizer) -> IO:
    """Creates the run folder or checks that it belongs to this config and data; returns the lock
    that keeps others out while it is open.

    Raises UserError naming what differs, another process that trains there, or a folder that cannot
    be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        known = {
            path.name
            for path in workdir.iterdir()
            if not path.name.endswith(SCRATCH) and not path.name.startswith(LOG)
        } - {LOCK}
        if (workdir / "config.json").exists():
            check_same(workdir, cfg, data_fingerprint)
        elif known:
            raise UserError(
                f"workdir: {workdir} is not empty and not a run folder; give a new folder"
            )
        lock = open(workdir / LOCK, "a")  # not "w": what the holder of the lock wrote stays
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(
                f"workdir: {workdir}: another process trains there; wait for it or give another"
                " folder"
            ) from None
        lock.truncate(0)
        lock.write(secrets.token_hex(8))
        lock.flush()
        os.fsync(lock.fileno())  # other hosts read it while it is open
        write_text(workdir / "config.json", to_json(cfg))
        tokenizer.save(workdir)
        if (workdir / "final_result.json").exists() and (workdir / "run.json").exists():
            return lock  # nothing is trained any more: it says what made the run
        write_json(
            workdir / "run.json",
            {
                "data_fingerprint": data_fingerprint,
                "git": git_revision(),
                "device": jax.devices()[0].device_kind,
                "platform": jax.default_backend(),
                "devices": jax.device_count() if cfg.parallel.plan != "single" else 1,
                "processes": jax.process_count(),
                "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            },
        )
    except OSError as error:
        mend = (
            "make room and run the same command again"
            if is_disk_full(error)
            else "give another folder"
        )
        raise UserError(
            f"workdir: {workdir} cannot be written ({error.strerror}); {mend}"
        ) from None
    return lock


def started(workdir: Path) -> str | None:
    """What the last :func:`claim` wrote into the folder, which is different each time; None where
    it cannot be read.
    """
    try:
        return (workdir / LOCK).read_text()
    except OSError:
        return None


def check_same(workdir: Path, cfg: Config, data_fingerprint: str) -> None:
    """Raises UserError where the folder's config or data are not these."""
    old, new = leaves(load_json(workdir / "config.json")), leaves(cfg)
    for name, value in new.items():
        if name not in FREE and old[name] != value:
            raise UserError(
                f"workdir: {workdir} has another config ({name} is {old[name]!r} there,"
                f" {value!r} here); give a new folder or the same config"
            )
    if (workdir / "run.json").exists():
        try:
            known = json.loads((workdir / "run.json").read_bytes())["data_fingerprint"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{workdir / 'run.json'}: not readable; delete it if the data are the same"
            ) from None
        if known != data_fingerprint:
            raise UserError(
                f"workdir: {workdir} was trained on other data (fingerprint {known}, now"
                f" {data_fingerprint}); give the same data or a new folder"
            )


def git_revision() -> str | None:
    """Commit of the source tree, with "+dirty" when it has changes; None outside a git checkout."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *args],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


class Writer:
    """Appends metrics to metrics.jsonl, one JSON object a line; TensorBoard is a view of the same
    numbers.
    """

    def __init__(self, workdir: Path, resume_step: int, tensorboard: bool):
        self.board = None
        if tensorboard:
            self.board = summary_writer()(str(workdir / "tensorboard"), purge_step=resume_step + 1)
        path = workdir / "metrics.jsonl"
        if path.exists():  # steps after the checkpoint will be run, and written, again
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = (line for line in lines if (_step(line) or resume_step + 1) <= resume_step)
            write_text(path, "".join(line + "\n" for line in kept))
        self.file = open(path, "a", encoding="utf-8")

    def write(self, step: int, numbers: dict) -> None:
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")
        self.file.flush()
        if self.board:
            for name, value in numbers.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()


def summary_writer() -> type:
    """tensorboardX's writer. Raises UserError where it is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "config train.tensorboard: needs tensorboardX; pip install 'flexmemory[tensorboard]'"
        ) from None
    return SummaryWriter


def _step(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # a line cut by a kill
        return None


def read_metrics(workdir: Path) -> list[dict]:
    """Rows of metrics.jsonl in order; a last line cut by a kill is left out."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    return [
        json.loads(line)
        for line in path.read_text(encoding="utf-8").splitlines()
        if _step(line) is not None
    ]


def load_params(
    workdir: Path, step: int | None = None, *, on_host: bool = False
) -> tuple[Config, dict, int]:
    """(config, params, step) of a run folder, the latest checkpoint by default. Raises UserError
    when it is missing or damaged.

    on_host: read NumPy arrays into the host's memory; by default arrays on the device.
    """
    cfg = load_json(Path(workdir) / "config.json")
    steps = complete_steps(workdir)
    if not steps:
        raise UserError(
            f"{workdir}: no finished checkpoint in checkpoints/; train it first (`flexmemory train"
            f" --workdir={workdir}`)"
        )
    if step is not None and step not in steps:
        raise UserError(
            f"{workdir}: has no checkpoint of step {step}; there are {', '.join(map(str, steps))}"
        )
    step = steps[-1] if step is None else step
    params = abstract_params(cfg.model)
    if on_host:  # NumPy arrays that take no memory stand for what is asked for
        wanted = jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), params)
    else:
        wanted = at(params, placed(dataclasses.replace(cfg, parallel=ParallelConfig()), params))
    found = read_checkpoint(workdir, step, {"params": wanted})["params"]
    for (path, leaf), other in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(found)):
        if leaf.shape != other.shape:  # which Orbax compares for arrays on the device alone
            raise UserError(
                f"checkpoint {step} in {workdir} is of another model ({path_name(path)} is"
                f" {other.shape} there, {leaf.shape} here); train it again in a new folder"
            )
    return cfg, found, step


def at(abstract: Any, places: Any) -> Any:
    """Shapes and dtypes with the shardings ``places``."""
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), abstract, places
    )


def complete_steps(workdir: Path) -> list[int]:
    """Steps of the finished checkpoints, ascending; an unfinished save has another name until it is
    whole.
    """
    return sorted(
        int(p.name) for p in (Path(workdir) / "checkpoints").glob("*") if p.name.isdecimal()
    )


def read_checkpoint(workdir: Path, step: int, abstract: dict) -> dict:
    """Items of a checkpoint, shaped and placed as ``abstract`` says. Raises UserError where it is
    damaged.
    """
    from orbax.checkpoint import v1 as ocp  # late: Orbax takes a second to import

    try:
        return ocp.load_checkpointables(
            (Path(workdir) / "checkpoints" / str(step)).absolute(), abstract
        )
    except (MemoryError, jax.errors.JaxRuntimeError):  # a sound checkpoint, too small a machine
        raise
    except Exception as error:  # Orbax and TensorStore raise many types for files cut or gone
        first: BaseException = error  # says what is wrong with the files
        while cause := first.__cause__ or first.__context__:
            first = cause
        reason = next(iter(str(first).strip().splitlines()), type(first).__name__)[:200]
        earlier = [other for other in complete_steps(workdir) if other < step]
        mend = "train it again in a new folder"
        if earlier:
            mend = f"delete checkpoints/{step} to go on from {earlier[-1]}"
        raise UserError(
            f"checkpoint {step} in {workdir} is damaged or of another model ({reason}); {mend}"
        ) from error
