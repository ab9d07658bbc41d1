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

from flexmemory.cli.flags import config_of, parse
from flexmemory.errors import UserError

OPTIONS = {"timeout": "start_timeout"}  # argument of the library: option


def run(argv: list[str]) -> int:
    values = parse(
        argv,
        __doc__,
        workdir=(str, "run folder; an existing one is resumed"),
        distributed=(
            False,
            "one of several processes that SLURM, Open MPI, a TPU pod or Kubernetes started",
        ),
        coordinator=(str, "HOST:PORT of process 0, where nothing else tells"),
        processes=(int, "how many processes there are"),
        process=(int, "number of this one, from 0"),
        start_timeout=(300, "seconds to wait for the other processes"),
        profile_steps=(
            str,
            "FIRST:LAST, steps (the first is 1) of which to write a profiler trace into"
            " WORKDIR/profile",
        ),
    )
    if not values.workdir:
        raise UserError("--workdir: missing; give the folder of the run")
    profile_steps = None if values.profile_steps is None else parse_steps(values.profile_steps)
    cfg = config_of(values)

    from flexmemory.cluster import is_first, start
    from flexmemory.train.loop import TrainingDiverged, TrainingInterrupted, train

    given = values.coordinator, values.processes, values.process
    several = values.distributed or any(value is not None for value in given)
    if several:
        start(*given, values.start_timeout)
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
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise UserError(f"--profile_steps: {text!r} is not FIRST:LAST; write for example 10:12")
    return range(int(match[1]), int(match[2]) + 1)


@contextlib.contextmanager
def asked_to_stop(signals: tuple[int, ...]) -> Iterator[list[int]]:
    """Those of ``signals`` received so far: the first one ends training at a checkpoint, the second
    one ends it at once. Of several processes JAX itself hears SIGTERM, for all of them:
    :func:`flexmemory.cluster.preempted`.
    """
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(number, before[number])
        print(" stopping after this step with a checkpoint; again to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in signals}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
