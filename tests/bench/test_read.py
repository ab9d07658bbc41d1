"""The read bench measures what it says, on a small table."""

import json

import numpy as np
import pytest

from flexmemory.bench import read
from flexmemory.bench.read import measure
from flexmemory.errors import UserError


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    found = measure(folder, "smoke", sizes=(1, 8), rounds=3)
    assert not list(folder.iterdir())  # the table is gone
    return found


def test_the_report_is_json_with_all_figures(report):
    again = json.loads(json.dumps(report, allow_nan=False))
    assert again["table"]["bytes"] == 16 << 20 and set(again["sizes"]) == {"1", "8"}
    for size in again["sizes"].values():
        for state in ("cold", "warm"):
            assert size[state]["ceiling"]["us"] > 0
            for name in ("auto", "tensorstore"):
                found = size[state][name]
                assert 0 < found["us"] <= found["p99_us"] and found["share"] == pytest.approx(
                    size[state]["ceiling"]["us"] / found["us"], abs=0.01
                )


def test_cold_is_cold_and_warm_is_warm(report):
    if report["machine"]["filesystem"] == "tmpfs":
        pytest.skip("this file system lives in the page cache")
    for size in report["sizes"].values():
        if size["cold"]["cached_pages"] is None:
            pytest.skip("the kernel has no cachestat")
        assert size["cold"]["cached_pages"] == 0 < size["cold"]["wanted_pages"]
        assert size["warm"]["cached_pages"] == size["warm"]["wanted_pages"]


def test_the_report_names_no_place(report, tmp_path):
    assert str(tmp_path.parent) not in json.dumps(report) and "path" not in report["machine"]


def test_ids_do_not_come_twice():
    deal = read._dealer(100, seed=0)
    first = np.concatenate([deal(20), deal(30), deal(50)])
    assert sorted(first) == list(range(100)) and (np.diff(deal(60)) > 0).all()


def test_wrong_bytes_are_refused(tmp_path, monkeypatch):
    class Wrong:
        def __init__(self, real):
            self.stats, self.close, self._read = real.stats, real.close, real.read

        def read(self, ids_U, out_UB):
            self._read(ids_U, out_UB)
            out_UB[-1, -1] ^= 1

    monkeypatch.setattr(
        read,
        "open_reader",
        lambda *args, real=read.open_reader, **kwargs: Wrong(real(*args, **kwargs)),
    )
    with pytest.raises(UserError, match="auto reads other bytes than the files hold"):
        measure(tmp_path, "smoke", sizes=(4,), rounds=1)


def test_more_ids_than_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match="sizes: 1000 ids, the table has 512"):
        measure(tmp_path, "smoke", sizes=(1000,), rounds=1)


def test_the_ram_tier_is_beside_a_copy(report):
    for size in report["sizes"].values():
        assert size["ram"]["over_take"] == pytest.approx(
            size["ram"]["tier"]["us"] / size["ram"]["take"]["us"], rel=0.05
        )
