"""Checkpoints through Orbax: items params, optimizer, data; written asynchronously, complete or not
there at all."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from flexmemory.config import Config
from flexmemory.models.parameters import join, split
from flexmemory.parallel import placed
from flexmemory.run_folder import at, read_checkpoint
from flexmemory.train.step import abstract_state


def open_checkpoints(workdir: Path, keep: int) -> ocp.training.Checkpointer:
    """The run's checkpoints, ``workdir/checkpoints/<step>``; leftovers of an interrupted save are
    removed."""
    return ocp.training.Checkpointer(
        (Path(workdir) / "checkpoints").absolute(),
        cleanup_tmp_directories=True,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
    )


def save(
    checkpoints: ocp.training.Checkpointer, step: int, state: dict, counts: dict[str, float]
) -> None:
    """Starts an asynchronous save of ``state`` (see step.init_state) after ``step`` steps, with the
    loop's own counts.

    The state may be donated as soon as this returns: Orbax has copied it, or holds views that make
    JAX leave the buffers alone."""
    data = {name: np.asarray(value, np.float64) for name, value in counts.items()}
    items = {name: join(state[name]) for name in ("params", "optimizer")}
    items["data"] = data | {"step": np.asarray(step)}
    checkpoints.save_checkpointables_async(step, items)


def restore(checkpoints: ocp.training.Checkpointer, workdir: Path, cfg: Config) -> dict | None:
    """The latest full state with the loop's counts under "data", or None when there is no
    checkpoint. Raises UserError on a damaged one."""
    if checkpoints.latest is None:
        return None
    step, state = checkpoints.latest.step, abstract_state(cfg)
    shardings = placed(cfg, state)
    abstract = {name: join(at(state[name], shardings[name])) for name in ("params", "optimizer")}
    saved = split(read_checkpoint(workdir, step, {**abstract, "data": None}))
    return saved | {"step": jnp.asarray(step, jnp.int32, device=shardings["step"])}
