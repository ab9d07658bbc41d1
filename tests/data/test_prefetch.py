"""What prefetch does with the batches on their way; order, depth, errors and ends are in
test_pipeline.
"""

import threading

import pytest

from flexmemory.data.prefetch import prefetch


def test_put_gets_every_batch_ahead_of_its_use_and_never_in_the_loops_thread():
    threads, second = [], threading.Event()

    def put(batch):
        threads.append(threading.current_thread())
        if batch == 1:
            second.set()
        return -batch

    with prefetch(range(4), stop=4, put=put) as stream:
        assert next(stream) == 0
        assert second.wait(10), "batch 1 is put while batch 0 is in use"
        assert list(stream) == [-1, -2, -3]
    assert len(threads) == 4 and threading.current_thread() not in threads


def test_an_error_in_put_is_raised_where_its_batch_would_come():
    stream = prefetch([1, 0], put=lambda batch: 1 // batch)
    assert next(stream) == 1
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert list(stream) == []
