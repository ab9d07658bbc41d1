"""The run folder: config.json, run.json (revision, versions, data), tokenizer.json, metrics.jsonl, checkpoints/, final_result.json."""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
from pathlib import Path

import jax

from flexmemory.config import Config, get, load_json, to_json
from flexmemory.errors import UserError

# fields that may change between the start and the resumption of a run: they do not touch parameters or batches
FREE = {"data.path", "train.log_every", "train.eval_every", "train.eval_tokens", "train.checkpoint_every", "train.keep_checkpoints",
        "train.tensorboard"}


def write_atomic(path: Path, text: str) -> None:
    """Writes a small file so that it is there whole or not at all."""
    scratch = path.with_name(path.name + ".tmp")
    with open(scratch, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def leaves(config: Config) -> dict:
    """{dotted field: value}"""
    return {f"{section.name}.{field.name}": get(config, f"{section.name}.{field.name}")
            for section in dataclasses.fields(config) for field in dataclasses.fields(getattr(config, section.name))}


def claim(workdir: Path, cfg: Config, data_fingerprint: str, data_dir: Path) -> None:
    """Creates the run folder or checks that it belongs to this config and data. Raises UserError naming what differs."""
    workdir.mkdir(parents=True, exist_ok=True)
    if (workdir / "config.json").exists():
        old, new = leaves(load_json(workdir / "config.json")), leaves(cfg)
        for name, value in new.items():
            if name not in FREE and old[name] != value:
                raise UserError(f"--workdir {workdir}: used by another config ({name} is {old[name]!r} there, {value!r} here); "
                                "give a new folder or the same config")
        if (workdir / "run.json").exists():
            known = json.loads((workdir / "run.json").read_text())["data_fingerprint"]
            if known != data_fingerprint:
                raise UserError(f"--workdir {workdir}: trained on other data (fingerprint {known}, {data_dir} has {data_fingerprint}); "
                                "give the same data or a new folder")
    elif any(workdir.iterdir()):
        raise UserError(f"--workdir {workdir}: not empty and not a run folder; give a new folder")
    shutil.copyfile(data_dir / "tokenizer.json", workdir / "tokenizer.json")
    write_atomic(workdir / "config.json", to_json(cfg))
    write_atomic(workdir / "run.json", json.dumps({
        "data_fingerprint": data_fingerprint, "git": git_revision(), "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(), "devices": jax.device_count(),
        "versions": {name: importlib.metadata.version(name) for name in
                     ("flexmemory", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "numpy")}}, indent=2))


def git_revision() -> str | None:
    """Commit of the source tree, with "+dirty" when it has changes; None outside a git checkout."""
    def git(*args):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class Writer:
    """Appends metrics to metrics.jsonl, one JSON object a line; TensorBoard is a view of the same numbers."""

    def __init__(self, workdir: Path, resume_step: int, tensorboard: bool):
        path = workdir / "metrics.jsonl"
        if path.exists():  # steps after the checkpoint will be run, and written, again
            kept = [line for line in path.read_text().splitlines() if _step(line) is not None and _step(line) <= resume_step]
            write_atomic(path, "".join(line + "\n" for line in kept))
        self.file = open(path, "a")
        self.board = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise UserError("config train.tensorboard: needs tensorboardX; pip install 'flexmemory[tensorboard]'") from None
            self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

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
    return [json.loads(line) for line in path.read_text().splitlines() if _step(line) is not None]
