"""The sharding bench counts what it says, on small tables and made-up devices."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # tests/parallel counts the same traffic of the same lookups


@pytest.fixture(scope="module")
def report():
    done = subprocess.run(
        [sys.executable, "-m", "flexmemory.cli.main", "bench", "sharding", "--scale=smoke"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ours_sends_rows_and_ids_alone(report):
    for size in report["sizes"].values():
        rows = (
            2 * size["unique_ids_per_section"] * 32 * 4 // 2
        )  # to the section and back, half of the columns on each of two tensor devices
        assert (
            rows
            <= size["layouts"]["ours"]["bytes"]
            <= rows + 2 * 4 * size["unique_ids_per_section"] * 4
        )


def test_the_partitioner_sends_more_in_every_plain_layout(report):
    assert report["fake_devices"] and set(report["sizes"]) == {"512", "4096"}
    for size in report["sizes"].values():
        sent = {name: layout["bytes"] for name, layout in size["layouts"].items()}
        assert sent["replicated"] >= size["table_bytes"]
        assert (
            size["partitioner_over_ours"]
            == min(sent["rows"], sent["columns"], sent["replicated"]) / sent["ours"]
            > 2
        )


def test_tables_shrink_as_devices_grow(report):
    growth = report["growth"]
    assert list(growth) == ["1", "2", "4", "8"] and growth["1"]["bytes"] == 0
    assert [growth[n]["table_bytes_per_device"] * int(n) for n in growth] == [512 * 32 * 4] * 4
