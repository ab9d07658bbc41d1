"""The papers' sizes on 512 devices that are not there: every kind under every plan traces, or is
refused in one line for a known reason.
"""

import jax
import pytest

from experiments.sweeps import with_fields
from flexmemory import parallel
from flexmemory.config import Config, DataConfig, ParallelConfig, TrainConfig
from flexmemory.errors import UserError
from flexmemory.models.blocks import KINDS
from flexmemory.models.transformer import abstract_params
from flexmemory.recipes import MEMORYLLM_SIZES, STEM_SIZES
from flexmemory.train.dryrun import abstract_step
from flexmemory.train.step import make_train_step

MESHES = {"dp": "data=512", "fsdp": "data=16,fsdp=32", "fsdp_tp": "data=8,fsdp=32,tensor=2"}
SIZES = {
    **{
        f"memoryllm {name}": size["model"]
        for name, size in MEMORYLLM_SIZES.items()
        if name != "smoke"
    },
    **{f"stem {name}": size["model"] for name, size in STEM_SIZES.items() if name != "smoke"},
}


def config(pattern: str, size: str, plan: str) -> Config:
    sets = {f"model.{name}": value for name, value in SIZES[size].items()}
    return with_fields(
        Config(),
        sets
        | {
            "model.pattern": pattern,
            "model.compute_dtype": "bfloat16",
            "data.batch_size": 512,
            "data.seq_len": 2048,
            "optimizer.table_optimizer": "lazy_adam",
            "parallel.plan": plan,
            "parallel.mesh": MESHES[plan],
        },
    )


def refused(kind: str, size: str, plan: str) -> str | None:
    """What 512 devices cannot divide: 15 heads by 2, and tables of a width that is no multiple of
    512.
    """
    model = SIZES[size]
    if plan == "fsdp_tp" and model["n_heads"] % 2:
        return "attn"
    if kind.startswith("stem") and model["d_ff"] % 512:
        return "table"
    return None


@pytest.mark.parametrize("plan", MESHES)
@pytest.mark.parametrize("size", SIZES)
def test_steps_of_all_kinds_trace_at_full_size(size, plan):
    for kind in KINDS:
        if why := refused(kind, size, plan):
            cfg = config(kind, size, plan)
            with pytest.raises(
                UserError,
                match=(
                    rf"does not divide [DNW]=\d+ of \S*{why}\S*; the nearest mesh does with \d+,"
                    r" the nearest [DNW] is \d+"
                ),
            ):
                parallel.check(cfg, abstract_params(cfg.model), parallel.mesh_sizes(cfg.parallel))
    kinds = [kind for kind in KINDS if not refused(kind, size, plan)]
    if not kinds:
        return
    cfg = config(" ".join(f"{kind}*2" for kind in kinds), size, plan)
    mesh = parallel.abstract_mesh(parallel.mesh_sizes(cfg.parallel))
    parallel.check(cfg, abstract_params(cfg.model), dict(mesh.shape))
    with jax.sharding.use_abstract_mesh(mesh):
        state, batch = abstract_step(cfg, mesh, rows=256)
        after, metrics = jax.eval_shape(make_train_step(cfg), state, batch)
    for (path, was), now in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(after), strict=True
    ):
        assert (now.shape, now.dtype, now.sharding.spec) == (
            was.shape,
            was.dtype,
            was.sharding.spec,
        ), path
    assert all(value.shape == () for value in metrics.values())


def test_a_parameter_without_a_place_raises():
    with pytest.raises(ValueError, match="parameter blocks.mystery is of no known kind"):
        parallel.state_specs(
            parallel.Plan(), {"blocks": {"mystery": jax.ShapeDtypeStruct((3, 4), "float32")}}
        )


@pytest.mark.parametrize(
    "plan, mesh, devices, match",
    [
        ("dp", "data=3", 8, "'data=3' is for 3 devices, there are 8; the nearest is data=8"),
        (
            "fsdp",
            "data=6,fsdp=4",
            8,
            "'data=6,fsdp=4' is for 24 devices, there are 8; the nearest is data=2,fsdp=4",
        ),
        ("fsdp", "fsdp=16", 8, "the nearest is data=1,fsdp=8"),
        ("fsdp_tp", "data=2,fsdp=8,tensor=3", 4, "the nearest is data=2,fsdp=2,tensor=1"),
        (
            "single",
            "data=8",
            8,
            "axis data of size 8 under plan single, which uses none; set parallel.plan=dp",
        ),
        (
            "fsdp",
            "data=2,fsdp=2,data=4",
            8,
            "axis data twice in 'data=2,fsdp=2,data=4'; give each once",
        ),
        (
            "dp",
            "fsdp=2",
            None,
            "axis fsdp of size 2 under plan dp, which uses data; set parallel.plan=fsdp",
        ),
        ("fsdp", "fdsp=2", None, "'fdsp=2' in 'fdsp=2' is not AXIS=SIZE"),
        ("fsdp", "data=0", None, "'data=0' in 'data=0' is not AXIS=SIZE"),
    ],
)
def test_a_bad_mesh_is_one_line(plan, mesh, devices, match):
    with pytest.raises(UserError, match=match):
        parallel.mesh_sizes(ParallelConfig(plan, mesh), devices)


def test_a_mesh_without_a_plan_is_not_passed_over():
    with pytest.raises(UserError, match="axis data of size 2 under plan single"):
        parallel.make_mesh(ParallelConfig(mesh="data=2"))


def test_the_mesh_takes_all_devices_where_none_is_given():
    assert parallel.mesh_sizes(ParallelConfig("dp"), 8) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert parallel.mesh_sizes(ParallelConfig("fsdp"), 8) == {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize(
    "batch, accum, pieces, mend",
    [
        (
            512,
            64,
            256,
            "8 sequences, which data\\*fsdp=256 does not divide; set train.accum_steps=2",
        ),
        (12, 1, 8, "set data.batch_size=16"),
        (24, 2, 8, "set train.accum_steps=1"),
        (48, 4, 8, "set train.accum_steps=3"),
        (5, 1, 8, "set data.batch_size=8"),
    ],
)
def test_a_batch_that_the_mesh_does_not_divide_is_one_line(batch, accum, pieces, mend):
    cfg = Config(
        data=DataConfig(batch_size=batch),
        train=TrainConfig(accum_steps=accum),
        parallel=ParallelConfig("fsdp", f"fsdp={pieces}"),
    )
    with pytest.raises(UserError, match=mend):
        parallel.check(cfg, {}, {"data": 1, "fsdp": pieces, "tensor": 1})
