"""Eight devices are one device: losses and parameters of 20 steps, the lookup against NumPy, and
what is sent for it.
"""

import pytest

# On a mesh a sum over the batch is a sum of the devices' sums, and a product over a cut axis one of
# parts: float32 rounds them otherwise.
BOUND = 1e-5
ALL, OTHERS = "dense memoryllm flex stem", "stem-gate stem-dagger parallel attn_only"


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "pattern, plan, mesh, table_optimizer, accum, tied",
    [
        ("flex stem", "fsdp", "data=2,fsdp=4", "lazy_adam", 2, "untied"),
        ("memoryllm stem", "fsdp_tp", "data=2,fsdp=2,tensor=2", "rowwise_adagrad", 1, "tied"),
        slow(ALL, "fsdp", "data=2,fsdp=4", "lazy_adam", 2, "untied"),
        slow(ALL, "dp", "data=8", "adamw", 2, "tied"),
        slow(ALL, "fsdp_tp", "data=2,fsdp=2,tensor=2", "rowwise_adagrad", 1, "untied"),
        slow(OTHERS, "fsdp_tp", "fsdp=4,tensor=2", "adamw", 1, "tied"),
    ],
)
def test_twenty_steps_are_those_of_one_device(
    child, pattern, plan, mesh, table_optimizer, accum, tied
):
    found = child(8, "equality", pattern, plan, mesh, table_optimizer, accum, tied)
    assert found["loss"] <= BOUND and found["losses"][-1] < found["losses"][0]
    worst = max(found["params"], key=found["params"].get)
    assert found["params"][worst] <= BOUND, (worst, found["params"][worst])
    assert max(found["metrics"].values()) <= BOUND, found["metrics"]
    cut = {
        name
        for name, spec in found["lies"].items()
        if "data" in spec or "fsdp" in spec or "tensor" in spec
    }
    tables = {name for name in found["lies"] if name.endswith(".table")}
    assert (
        tables - cut <= {name for name in tables if ".sums." in name}
        if "stem" in pattern
        else not tables
    )
    if plan != "dp":  # weights and their moments are cut too
        assert {
            name
            for name in found["lies"]
            if name.endswith((".q", ".o", ".gate", ".up", ".down", "embed", "head"))
        } <= cut


def test_a_mesh_of_one_device_is_no_mesh_to_the_bit(child):
    assert child(8, "unit_mesh")["equal"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan, mesh, table_optimizer",
    [("single", "", "lazy_adam"), ("fsdp", "data=2,fsdp=4", "rowwise_adagrad")],
)
def test_tables_in_the_hosts_memory_train_to_the_same_numbers(child, plan, mesh, table_optimizer):
    found = child(8, "host_memory", plan, mesh, table_optimizer)
    assert found["memory"] == [["device"], ["pinned_host"]]
    assert found["losses"][0] == found["losses"][1] and found["different"] == []


@pytest.mark.parametrize("seed", [0, slow(1)])
def test_lookups_gradients_and_sums_over_sections_are_numpys(child, seed):
    assert child(8, "lookups", seed) == []


def test_a_lookup_sends_rows_and_ids_whatever_the_vocabulary(child):
    small, large = (
        found for _, found in sorted(child(8, "traffic").items(), key=lambda item: int(item[0]))
    )
    assert large["table_bytes"] == 8 * small["table_bytes"]
    for found in (small, large):
        sent = sum(row["bytes"] * row["count"] for row in found["lookup"])
        rows = 2 * 4 * 256 * found["rows"] * 2  # two layers of float32, to the section and back
        ids = 2 * 4 * 8 * found["rows"]  # of all sections, once for each way
        assert rows <= sent <= rows + ids
    assert (
        max(row["bytes"] for row in large["step"]) * 8 < large["table_bytes"]
    )  # nothing of a whole step comes near a table
    scaled = [
        [(row["kind"], row["bytes"] * row["count"] / found["rows"]) for row in found["lookup"]]
        for found in (small, large)
    ]
    assert sorted(scaled[0]) == sorted(scaled[1])


def test_no_device_draws_whole_tables(child):
    found = child(8, "fresh")
    assert (
        found["device"] < found["tables"]
    )  # an eighth of them and, on a CPU, some arrays of that size in between


def test_zipf_ids_load_every_device_alike(child):
    found = child(8, "balance")
    assert found["columns"] <= 1.05 < found["rows"]
