"""Checkpoints through Orbax: items params, optimizer, data; written asynchronously, complete or not
there at all.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from flexmemory.config import Config, ParallelConfig, load_json
from flexmemory.errors import UserError
from flexmemory.models.transformer import abstract_params
from flexmemory.parallel import placed
from flexmemory.train.step import abstract_state


def open_checkpoints(workdir: Path, keep: int) -> ocp.training.Checkpointer:
    """The run's checkpoints, ``workdir/checkpoints/<step>``; leftovers of an interrupted save are
    removed.
    """
    return ocp.training.Checkpointer(
        (Path(workdir) / "checkpoints").absolute(),
        cleanup_tmp_directories=True,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
    )


def save(checkpoints, step: int, state: dict, counts: dict[str, float]) -> None:
    """Starts an asynchronous save of ``state`` (see step.init_state) after ``step`` steps, with the
    loop's own counts.

    The state may be donated as soon as this returns: Orbax has copied it, or holds views that make
    JAX leave the buffers alone.
    """
    checkpoints.save_checkpointables_async(
        step,
        {
            "params": state["params"],
            "optimizer": state["optimizer"],
            "data": {
                **{name: np.asarray(value, np.float64) for name, value in counts.items()},
                "step": np.asarray(step),
            },
        },
    )


def restore(checkpoints, workdir: Path, cfg: Config) -> dict | None:
    """The latest full state with the loop's counts under "data", or None when there is no
    checkpoint. Raises UserError on a damaged one.
    """
    if checkpoints.latest is None:
        return None
    step, state = checkpoints.latest.step, abstract_state(cfg)
    places = placed(cfg, state)
    abstract = {name: at(state[name], places[name]) for name in ("params", "optimizer")}
    return {
        **_load(workdir, step, {**abstract, "data": None}),
        "step": jnp.asarray(step, jnp.int32, device=places["step"]),
    }


def load_params(workdir: Path, step: int | None = None) -> tuple[Config, dict, int]:
    """(config, params, step) of a run folder, the latest checkpoint by default. Raises UserError
    when it is missing or damaged.
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
    return (
        cfg,
        _load(
            workdir,
            step,
            {
                "params": at(
                    params, placed(dataclasses.replace(cfg, parallel=ParallelConfig()), params)
                )
            },
        )["params"],
        step,
    )


def at(abstract, places):
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


def _load(workdir: Path, step: int, abstract: dict) -> dict:
    try:
        return ocp.load_checkpointables(
            (Path(workdir) / "checkpoints" / str(step)).absolute(), abstract
        )
    except (
        MemoryError,
        jax.errors.JaxRuntimeError,
    ):  # the checkpoint is sound, the machine too small
        raise
    except (
        Exception
    ) as error:  # orbax and tensorstore raise many types for files that are cut or gone
        while (
            error.__cause__ or error.__context__
        ):  # the first error says what is wrong with the files
            error = error.__cause__ or error.__context__
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        earlier = [other for other in complete_steps(workdir) if other < step]
        mend = (
            f"delete checkpoints/{step} to go on from {earlier[-1]}"
            if earlier
            else "train it again in a new folder"
        )
        raise UserError(
            f"checkpoint {step} in {workdir} is damaged or of another model ({reason}); {mend}"
        ) from error
