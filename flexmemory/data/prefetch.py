"""The next batches, computed and put on the device by a thread while the accelerator works."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol


class Indexed(Protocol):
    def __getitem__(self, k: int) -> Any: ...


def prefetch(
    batches: Indexed,
    start: int = 0,
    stop: int | None = None,
    depth: int = 2,
    put: Callable[[Any], Any] | None = None,
) -> Prefetch:
    """Iterates over batches[start], batches[start+1], … up to `stop` (never where None), with up to
    `depth` made in advance.

    `put` is called on every batch as soon as it is made, in the background thread:
    `jax.device_put`, with or without a sharding, starts its way to the device there. Close the
    result, or use it in a `with`; an error in making a batch is raised where that batch would have
    come.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1")
    return Prefetch(batches, start, stop, depth, put)


class Prefetch:
    """See `prefetch`."""

    def __init__(
        self,
        batches: Indexed,
        start: int,
        stop: int | None,
        depth: int,
        put: Callable[[Any], Any] | None,
    ):
        self._queue: queue.Queue = queue.Queue(depth)
        self._closed = threading.Event()
        self._ended = False
        self._thread = threading.Thread(
            target=self._produce, args=(batches, start, stop, put), name="prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Prefetch:
        return self

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        kind, content = self._queue.get()
        if kind == "batch":
            return content
        self.close()
        if kind == "error":
            raise content
        raise StopIteration

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread; batches already made are dropped. Safe to call twice."""
        self._ended = True
        self._closed.set()
        while self._thread.is_alive():
            try:  # a thread that waits to put finds room and then sees the flag
                self._queue.get(timeout=0.01)
            except queue.Empty:
                pass
        self._thread.join()

    def _produce(
        self, batches: Indexed, start: int, stop: int | None, put: Callable[[Any], Any] | None
    ) -> None:
        k = start
        try:
            while not self._closed.is_set() and (stop is None or k < stop):
                batch = batches[k]
                self._queue.put(("batch", put(batch) if put else batch))
                k += 1
            self._queue.put(("end", None))
        except BaseException as error:
            self._queue.put(("error", error))
