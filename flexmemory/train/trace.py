"""A profiler trace of some steps of a run."""

import contextlib
from pathlib import Path

import jax

from flexmemory.errors import UserError
from flexmemory.train.clock import Clock


class Trace:
    """Writes what jax.profiler sees of ``steps``, numbered from 1 as in metrics.jsonl, into
    ``folder``; a context manager that ends the trace whatever happens. Of a resumed run it traces
    the steps that are left. Starting and writing it are the clock's "profile"."""

    def __init__(self, folder: Path, steps: range, clock: Clock):
        self.folder, self.steps, self.clock, self.running = folder, steps, clock, False

    def begins(self, number: int) -> bool:
        """Is step ``number`` the first one to trace? Then nothing else may be under way."""
        return not self.running and number in self.steps

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """To be held while step ``number`` is called: starts the trace where it is time, and names
        the step in it."""
        if number not in self.steps:
            return contextlib.nullcontext()
        if not self.running:
            with self.clock.span("profile"):
                jax.profiler.start_trace(self.folder)
            self.running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def ends(self, number: int) -> bool:
        """Is step ``number`` the last one to trace? Then wait for it and close the trace."""
        return self.running and number == self.steps[-1]

    def close(self) -> None:
        if self.running:
            self.running = False
            with self.clock.span("profile"):
                jax.profiler.stop_trace()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check(steps: range, total: int) -> None:
    """Raises UserError where ``steps`` are none or not all among 1 to ``total``."""
    if not steps or steps[0] < 1 or steps[-1] > total:
        raise UserError(
            f"profile_steps={steps.start}:{steps.stop - 1}: give FIRST:LAST with 1 <= FIRST <="
            f" LAST <= {total}, the run's train.steps"
        )
