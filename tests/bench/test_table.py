"""The table bench measures what it says, on small tables."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from flexmemory.bench import table


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    found = table.measure(folder, "smoke")
    assert not list(folder.iterdir())
    return found


def test_the_report_is_json_with_all_figures(report):
    again = json.loads(json.dumps(report, allow_nan=False))
    assert (
        set(again["optimizers"]) == {"lazy_adam", "rowwise_adagrad"}
        and again["stream_gb_per_s"] > 0
    )
    for found in again["optimizers"].values():
        assert set(found["sizes"]) == {"256", "1024"} and found["stream_us"] > 0
        assert found["ratio"] == pytest.approx(
            found["sizes"]["1024"]["us"] / found["sizes"]["256"]["us"]
        )
        assert all(size["us"] > 0 and size["move_us"] > 0 for size in found["sizes"].values())
    assert again["optimizers"]["lazy_adam"]["moved_bytes"] == 7 * 2 * 40 * 8 * 4
    assert again["dense"]["speedup"] == pytest.approx(
        again["dense"]["adamw_us"] / again["dense"]["lazy_adam_us"]
    )


def test_the_update_makes_no_table(report):
    for found in report["optimizers"].values():
        assert (
            found["temp_bytes"]["1024"] == found["temp_bytes"]["256"] < found["table_bytes"]["1024"]
        )


def test_the_report_names_no_place(report, tmp_path):
    assert str(tmp_path.parent) not in json.dumps(report)


@pytest.mark.parametrize("v", [64, 5000])
def test_ids_are_distinct_and_of_the_table(v):
    sets = [np.asarray(ids) for ids in table.id_sets(v, 60)]
    assert len(sets) == table.ID_SETS
    for ids in sets:
        assert len(set(ids)) == 60 and 0 <= ids.min() and ids.max() < v and (np.diff(ids) < 0).any()
    if v == 5000:  # Zipf: frequent ids come again, others do not
        assert 5 < len(set(sets[0]) & set(sets[1])) < 55


def test_sparse_and_dense_steps_update_the_same_rows():
    ids = np.asarray([3, 17, 9], np.int32)
    made = {}
    for name, step in (("adamw", table.dense_step), ("lazy_adam", table.sparse_step("lazy_adam"))):
        state = table.fresh_state(name, 2, 20, 4)
        (made[name],) = (
            np.asarray(params["memory"]["stacks"]["stack0"]["table"])
            for params in [step(state, table.gradient(state, 3), ids)[0]]
        )
    np.testing.assert_allclose(made["lazy_adam"], made["adamw"], rtol=1e-5)
    assert set(np.flatnonzero(made["adamw"].any(axis=(0, 2)))) == {3, 9, 17}


def test_arrays_in_huge_pages_keep_their_values():
    array = jnp.arange(2 << 20, dtype=jnp.int32)
    table.huge_pages([array])  # the system may refuse
    np.testing.assert_array_equal(array, np.arange(2 << 20))
