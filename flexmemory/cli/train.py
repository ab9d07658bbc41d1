"""flexmemory train --config=configs/flexmemory.py:250m,beta=3 --workdir=runs/x
[--config.train.steps=200]

On many devices: --config.parallel.plan=fsdp [--config.parallel.mesh=data=2,fsdp=8]; on many hosts
the same command on each, with --distributed or --coordinator=HOST:PORT --processes=N --process=I
(docs/scaling.md).
"""

import contextlib
import re
import signal
import sys
from collections.abc import Iterator

from absl import flags

from flexmemory.cli.flags import config_of, parse
from flexmemory.errors import UserError

OPTIONS = {"timeout": "start_timeout"}  # argument of the library: option


def run(argv: list[str]) -> int:
    def define(values):
        flags.DEFINE_string(
            "workdir", None, "run folder; an existing one is resumed", flag_values=values
        )
        flags.DEFINE_boolean(
            "distributed",
            False,
            "one of several processes that SLURM, Open MPI, a TPU pod or Kubernetes started",
            flag_values=values,
        )
        flags.DEFINE_string(
            "coordinator",
            None,
            "HOST:PORT of process 0, where nothing else tells",
            flag_values=values,
        )
        flags.DEFINE_integer("processes", None, "how many processes there are", flag_values=values)
        flags.DEFINE_integer("process", None, "number of this one, from 0", flag_values=values)
        flags.DEFINE_integer(
            "start_timeout", 300, "seconds to wait for the other processes", flag_values=values
        )
        flags.DEFINE_string(
            "profile_steps",
            None,
            "FIRST:LAST, steps (the first is 1) of which to write a profiler trace into"
            " WORKDIR/profile",
            flag_values=values,
        )

    values = parse(argv, define, __doc__)
    if not values.workdir:
        raise UserError("--workdir: missing; give the folder of the run")
    profile_steps = None if values.profile_steps is None else parse_steps(values.profile_steps)
    cfg = config_of(values)
    several = values.distributed or any(
        value is not None for value in (values.coordinator, values.processes, values.process)
    )
    if several:
        from flexmemory.cluster import start

        start(values.coordinator, values.processes, values.process, values.start_timeout)
    from flexmemory.cluster import is_first
    from flexmemory.train.loop import TrainingDiverged, TrainingInterrupted, train

    try:
        with asked_to_stop(() if several else (signal.SIGINT, signal.SIGTERM)) as asked:
            final = train(
                cfg, values.workdir, stop=lambda: bool(asked), profile_steps=profile_steps
            )
    except TrainingDiverged as error:
        if is_first():
            print(f"stopped: {error}", file=sys.stderr)
        return 1
    except TrainingInterrupted as error:
        if is_first():
            print(error, file=sys.stderr)
        return 128 + (asked[0] if asked else signal.SIGTERM)
    rate = final["train_tokens_per_s"]
    if is_first():
        print(
            f"{values.workdir}: step {final['step']}, validation loss {final['val_loss']:.4f} "
            f"({final['val_bits_per_byte']:.4f} bits per byte)"
            + (f", {rate:,.0f} tokens/s" if rate else "")
        )
    return 0


def parse_steps(text: str) -> range:
    """The steps of "FIRST:LAST", both included. Raises UserError where it is not that."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found:
        raise UserError(f"--profile_steps: {text!r} is not FIRST:LAST; write for example 10:12")
    return range(int(found[1]), int(found[2]) + 1)


@contextlib.contextmanager
def asked_to_stop(signals: tuple[int, ...]) -> Iterator[list[int]]:
    """Those of ``signals`` received so far: the first one ends training at a checkpoint, the second
    one ends it at once. Of several processes JAX itself hears SIGTERM, for all of them:
    :func:`flexmemory.cluster.preempted`.
    """
    asked: list[int] = []

    def ask(number, _):
        asked.append(number)
        signal.signal(number, before[number])
        print(" stopping after this step with a checkpoint; again to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in signals}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
