"""Tables in fewer bits and lower rank, against real stores."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from flexmemory.analysis import compress
from flexmemory.analysis.trained import scores
from flexmemory.evals.rows import live_rows, stored_rows
from flexmemory.tkv.export import RowFormat, export_params
from flexmemory.tkv.lowrank import find_bases
from flexmemory.tkv.store import open_store

PATTERN = "memoryllm stem dense flex"


@pytest.fixture(scope="module")
def bases(trained_of):
    trained = trained_of(PATTERN)
    plan = compress._manifest(trained, RowFormat())
    return find_bases(
        trained.params,
        cfg=plan.model,
        groups=plan.groups,
        fold_rows=plan.fold_rows,
        ranks=(32, 88, 32),
        progress=False,
    )


@pytest.mark.parametrize(
    "rows",
    [
        RowFormat(),
        RowFormat(dtype="bfloat16"),
        RowFormat(dtype="int8", scale_group=32),
        RowFormat(dtype="int4"),
        RowFormat(rank=0.7),
    ],
    ids=str,
)
def test_rows_bytes_and_errors_are_those_of_an_export(trained_of, bases, tmp_path, rows):
    trained = trained_of(PATTERN)
    export_params(
        trained.cfg,
        trained.params,
        trained.tokenizer,
        tmp_path / "store",
        run="run",
        step=0,
        progress=False,
        dtype=rows.dtype,
        scale_group=rows.scale_group,
        rank=rows.rank,
    )
    store, ids = open_store(tmp_path / "store"), np.array([0, 399, 7, 7, 123], np.int32)
    rows_of, facts = compress.stored(trained, rows, bases)
    got, want = rows_of(ids), stored_rows(store)(ids)
    assert set(got) == set(want) == {"w32", "w88"}
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], want[name])
    rank_bytes = sum(
        4 * rank * width
        for rank, width in zip(store.manifest.ranks or (), (32, 88, 32), strict=False)
    )
    assert facts["table_bytes"] == store.manifest.table_bytes + rank_bytes
    live = {
        name: np.asarray(
            live_rows(trained.cfg.model, trained.params)(jnp.arange(400))[name], np.float64
        )
        for name in got
    }
    every = {name: np.asarray(rows_of(np.arange(400))[name], np.float64) for name in got}
    error = sum(((every[name] - live[name]) ** 2).sum() for name in live) / sum(
        (live[name] ** 2).sum() for name in live
    )
    assert facts["relative_error"] == pytest.approx(error**0.5, rel=1e-4)


def test_quantised(trained_of):
    trained = trained_of(PATTERN)
    got = compress.quantised(trained)
    json.dumps(got, allow_nan=False)
    points = {(point["dtype"], point["scale_group"]): point for point in got["points"]}
    plain = scores(trained)
    assert (
        points["float32", 0]["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-6)
        and points["float32", 0]["relative_error"] == 0
    )
    whole = 4 * 400 * (32 + 88 + 32)
    assert [
        points[key]["table_bytes"] for key in (("float32", 0), ("bfloat16", 0), ("int8", 0))
    ] == [whole, whole // 2, whole // 4 + 400 * 3 * 4]
    assert points["bfloat16", 0]["saved"] == 0.5
    errors = [
        points[key]["relative_error"]
        for key in (("float32", 0), ("bfloat16", 0), ("int8", 0), ("int4", 32), ("int4", 0))
    ]
    assert errors == sorted(errors)
    assert points["int4", 0]["val_loss"] != plain["val_loss"]


def test_svd(trained_of):
    got = compress.svd(trained_of("memoryllm*2"))
    json.dumps(got, allow_nan=False)
    points = got["points"]
    assert [point["cut"] for point in points] == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert [point["ranks"] for point in points][:2] == [[32, 32], [29, 29]]
    assert points[0]["saved"] == 0 and points[0]["relative_error"] == 0
    assert points[1]["saved"] == pytest.approx(1 - 29 * (400 + 32) / (400 * 32))
    errors = [point["relative_error"] for point in points]
    assert errors == sorted(errors) and errors[1] > 0
    assert points[-1]["val_loss"] != pytest.approx(points[0]["val_loss"], rel=1e-6)


def test_no_table(trained_of):
    assert (
        compress.quantised(trained_of("dense"))["applies"]
        is compress.svd(trained_of("dense"))["applies"]
        is False
    )
