"""Seconds by part, and rates, on a clock that the tests move."""

import pytest

from flexmemory.train import clock as clocks
from flexmemory.train.clock import PARTS, Clock, Work, flops

ACCOUNT = {"flops_per_token": 100, "memory_flops_per_row": 60, "row_bytes_per_token": 8}


@pytest.fixture
def time():
    """``time(seconds)`` lets time pass, ``time()`` says how late it is."""
    late = [7.0]

    def pass_(seconds=0.0):
        late[0] += seconds
        return late[0]

    return pass_


def test_the_parts_add_up_to_the_whole(time):
    clock = Clock(time)
    time(1)
    with clock.span("setup"):
        time(2)
        with clock.span("compile"):  # the inner one counts
            time(4)
        time(8)
    with pytest.raises(KeyError), clock.span("eval"):
        time(16)
        raise KeyError
    time(32)
    seconds = clock.seconds()
    assert seconds == dict.fromkeys(PARTS, 0.0) | {
        "step": 33,
        "setup": 10,
        "compile": 4,
        "eval": 16,
    }
    with clock.span("data_wait"):
        time(64)
        assert (
            clock.seconds()["data_wait"] == 64 and seconds["data_wait"] == 0
        )  # also in the middle; what was given stays
    assert sum(clock.seconds().values()) == 127 and clock.working() == 33 + 64


def test_rates_leave_out_what_is_no_training_and_the_first_step_after_a_compilation(
    time, monkeypatch
):
    monkeypatch.setattr(clocks, "peak_flops", lambda: 1000.0)
    clock = Clock(time)
    work = Work(clock, ACCOUNT, tokens_per_step=10, counts={})

    def steps(first, last, seconds, rows):
        for step in range(first, last + 1):
            time(seconds)
            work.count(step, rows)

    with clock.span("compile"):
        time(1000)
    steps(1, 1, 50.0, rows=5)  # the first step is slow
    assert work.rates(1) == {}
    steps(2, 3, 2.0, rows=5)
    with clock.span("eval"):
        time(1000)
    steps(4, 4, 1.0, rows=10)
    assert work.rates(4) == {
        "tokens_per_s": 30 / 5,
        "mfu": pytest.approx(30 / 5 * 3 * (100 + 60 * 20 / 30) / 1000),
        "rows_per_token": 20 / 30,
    }
    with clock.span("compile"):
        time(1000)
    work.interrupt()
    steps(5, 5, 50.0, rows=10)
    steps(6, 6, 1.0, rows=10)
    assert work.rates(6)["tokens_per_s"] == 10
    totals = work.totals(6)
    assert totals["train_tokens_per_s"] == 40 / 6 and totals["rows_per_token"] == 45 / 60
    assert totals["flops"]["counted"] == 60 * 3 * (100 + 60 * 45 / 60)

    # the next start goes on from the checkpoint's counts, also from those of an older program
    again = Work(Clock(time), ACCOUNT, 10, work.counts | {"xla_flops": 30_000.0})
    assert again.totals(6) == totals and again.counts == work.counts


def test_flops_that_deduplication_saved():
    assert flops(ACCOUNT, tokens=10, rows_per_token=0.25) == {
        "counted": 3450,
        "saved": 4800 - 3450,
        "saved_share": pytest.approx(1 - 3450 / 4800),
    }
    assert flops(ACCOUNT, 10, 1.0)["saved_share"] == 0


def test_a_run_of_no_steps_has_no_rates(time):
    assert Work(Clock(time), ACCOUNT, 10, {}).totals(0) == {
        "train_tokens_per_s": None,
        "mfu": None,
        "rows_per_token": None,
        "flops": None,
    }


def test_a_model_without_memory_computes_no_rows(time):
    work = Work(Clock(time), ACCOUNT | {"row_bytes_per_token": 0}, 10, {})
    work.count(1, 400)
    assert work.counts["rows"] == 0 and work.totals(1)["rows_per_token"] == 0
