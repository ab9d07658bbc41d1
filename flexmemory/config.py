"""Configuration: ml_collections at the border, checked once, frozen dataclasses inside.

The dataclasses below are the only list of fields and defaults. A config file's ``get_config(arg)``
starts from :func:`default_config`, sets what differs and returns the ConfigDict; :func:`from_dict`
turns it into a :class:`Config`.
"""

import dataclasses
import json
import math
import operator
import typing
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flexmemory.errors import UserError, nearest
from flexmemory.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str = ""  # directory written by `flexmemory prepare`
    seq_len: int = 128  # T
    batch_size: int = 16  # B, sequences per optimiser step over all hosts
    document_mask: bool = False  # attend inside a document only


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 200
    seed: int = 0  # parameters and data order
    accum_steps: int = 1  # micro-batches per step
    z_loss: float = 1e-6  # weight of mean(logsumexp^2)
    log_every: int = 10
    eval_every: int = 0  # 0: only at the end
    eval_tokens: int = 65_536  # validation tokens per evaluation; 0: all
    checkpoint_every: int = 0  # 0: only at the end
    keep_checkpoints: int = 2
    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 20
    schedule: str = "cosine"  # cosine | wsd | constant
    decay_fraction: float = 0.2  # wsd: last share of the steps, linear to min_lr
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices; norms never decay
    clip_norm: float = 1.0  # global norm over all parameters that have no clip of their own; 0 off
    # of learned tables: adamw (dense, as the papers) | lazy_adam | rowwise_adagrad (touched rows
    # only)
    table_optimizer: str = "adamw"
    table_lr: float = 1.0  # multiple of lr for learned tables
    table_weight_decay: float = 0.0  # the papers use 0.1: see docs/numerics.md
    table_clip_norm: float = 0.0  # own norm for learned tables; 0 counts them into clip_norm


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    plan: str = "single"  # single (one device) | dp | fsdp | fsdp_tp; see docs/scaling.md
    # sizes of the axes, e.g. "data=8,fsdp=4,tensor=2"; "" gives all devices to fsdp, or in plan dp
    # to data
    mesh: str = ""
    # of tables trained by touched rows, and their moments: device | host (rows go in, rows come
    # out)
    table_memory: str = "device"


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()


CHOICES = {
    "model.ffn_c_kind": ("swiglu", "square"),
    "model.ffn_c_input": ("post_attn", "parallel"),
    "model.x0_norm": ("rmsnorm", "layernorm"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla", "cudnn"),
    "optimizer.table_optimizer": ("adamw", "lazy_adam", "rowwise_adagrad"),
    "optimizer.schedule": ("cosine", "wsd", "constant"),
    "parallel.plan": ("single", "dp", "fsdp", "fsdp_tp"),
    "parallel.table_memory": ("device", "host"),
}
# 0 <= value < 1; decay_fraction may be 1
SHARES = ("optimizer.b1", "optimizer.b2", "optimizer.decay_fraction")
POSITIVE = (
    "model.d_model",
    "model.n_heads",
    "model.d_ff",
    "data.seq_len",
    "data.batch_size",
    "train.accum_steps",
    "train.log_every",
    "train.keep_checkpoints",
    "optimizer.lr",
    "optimizer.eps",
    "model.rope_base",
    "model.norm_eps",
)
NOT_NEGATIVE = (
    "model.vocab_size",
    "model.n_kv_heads",
    "model.head_dim",
    "model.init_std",
    "model.table_init_std",
    "train.steps",
    "train.z_loss",
    "train.eval_every",
    "train.seed",
    "train.eval_tokens",
    "train.checkpoint_every",
    "optimizer.min_lr",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.table_lr",
    "optimizer.table_weight_decay",
    "optimizer.table_clip_norm",
)


def default_config() -> ConfigDict:
    """The defaults as a ConfigDict: unknown fields and wrong types raise when set."""
    return ConfigDict(dataclasses.asdict(Config())).lock()


def _build(cls: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"config {prefix or 'root'}: {values!r} is not a section with fields")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    checked = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if name not in fields:
            raise UserError(f"config {path}: no such field; {nearest(name, fields)}")
        kind = types[name]
        if dataclasses.is_dataclass(kind):
            checked[name] = _build(kind, value, path + ".")
            continue
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            raise UserError(
                f"config {path}: {value!r} is a {type(value).__name__}, give a {kind.__name__}"
            )
        if kind is float and not math.isfinite(value):
            raise UserError(f"config {path}: {value!r} is not a finite number")
        checked[name] = value
    return cls(**checked)


def get(config: Config, path: str) -> Any:
    """Value of a dotted field, e.g. ``get(config, "model.d_ff")``."""
    return operator.attrgetter(path)(config)


def from_dict(values: ConfigDict | dict) -> Config:
    """Checks a ConfigDict (or nested dict) and freezes it. Raises UserError naming the field."""
    config = _build(Config, values.to_dict() if isinstance(values, ConfigDict) else values, "")
    for path, choices in CHOICES.items():
        if (value := get(config, path)) not in choices:
            raise UserError(f"config {path}: {value!r} is not one of {', '.join(choices)}")
    for path in POSITIVE:
        if (value := get(config, path)) <= 0:
            raise UserError(f"config {path}: {value!r} must be above 0")
    for path in NOT_NEGATIVE:
        if (value := get(config, path)) < 0:
            raise UserError(f"config {path}: {value!r} must not be negative")
    for path in SHARES:
        value = get(config, path)
        if not 0 <= value <= 1 or (value == 1 and path != "optimizer.decay_fraction"):
            raise UserError(f"config {path}: {value!r} is outside 0..1")
    if config.train.seed >= 1 << 32:
        raise UserError(f"config train.seed: {config.train.seed} must be below 2^32")
    if config.optimizer.min_lr > config.optimizer.lr:
        raise UserError(
            f"config optimizer.min_lr: {config.optimizer.min_lr} is above optimizer.lr"
            f" {config.optimizer.lr}"
        )
    if config.parallel.table_memory == "host" and config.optimizer.table_optimizer == "adamw":
        raise UserError(
            "config parallel.table_memory: host with optimizer.table_optimizer=adamw, which reads"
            " and writes whole tables in every step; set lazy_adam or rowwise_adagrad"
        )
    if config.data.batch_size % config.train.accum_steps:
        raise UserError(
            f"config train.accum_steps: {config.train.accum_steps} does not divide data.batch_size"
            f" {config.data.batch_size}"
        )
    from flexmemory.models.blocks import (
        check_model,
    )  # late: imports jax, all else is checked before

    check_model(config.model)
    return config


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def load_json(path: Path) -> Config:
    """Reads a run folder's config.json."""
    try:
        values = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(
            f"no {path}: give the folder of a run that `flexmemory train` wrote"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    return from_dict(values)


def parse_arg(arg: str | None, sizes: dict[str, dict], **defaults: Any) -> tuple[dict, dict]:
    """Splits a config argument such as ``"1b,beta=3"``.

    Returns (settings of the chosen size, values of the named options). ``sizes`` maps a bare word
    to settings; its first entry is the default. ``defaults`` lists the options; a value is
    converted to its default's type, and a tuple is the choices, its first the default.
    """
    size = next(iter(sizes))
    options = {
        name: value[0] if isinstance(value, tuple) else value for name, value in defaults.items()
    }
    for word in filter(None, (arg or "").split(",")):
        name, equals, value = word.partition("=")
        if not equals:
            if name not in sizes:
                raise UserError(f"config argument {name!r}: no such size; {nearest(name, sizes)}")
            size = name
        elif name not in defaults:
            raise UserError(
                f"config argument {name!r}: no such option; {nearest(name, defaults or ['none'])}"
            )
        else:
            if isinstance(defaults[name], tuple) and value not in defaults[name]:
                raise UserError(
                    f"config argument {name}: {value!r}; {nearest(value, defaults[name])}"
                )
            kind = type(options[name])
            words = {"true": True, "false": False, "1": True, "0": False} if kind is bool else None
            try:
                options[name] = words[value.lower()] if words else kind(value)
            except (ValueError, KeyError):
                raise UserError(
                    f"config argument {name}: {value!r} is not a {kind.__name__}"
                ) from None
    return dict(sizes[size]), options
