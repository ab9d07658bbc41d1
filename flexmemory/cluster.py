"""Several processes as one run: how they find each other, agree before the first step, and stop
together.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flexmemory.errors import UserError

GO, NO = "go", "no: "  # what process 0 answers: all are there; the start is refused, and why


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins this process to the run, before anything touches a device. All None: JAX finds the
    others itself, under SLURM, Open MPI, on a TPU pod, or in Kubernetes.

    coordinator: HOST:PORT of process 0, an address of its own host. timeout: seconds to wait for
    the others. Raises UserError naming what is missing.
    """
    names = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in names.items() if value is None]
    if missing and len(missing) < 3:
        given = ", ".join(f"{name}=" for name in names if name not in missing)
        raise UserError(
            f"{', '.join(missing)}: missing beside {given}; give all three, or none (--distributed"
            " alone on a command line) where SLURM, Open MPI, a TPU pod or Kubernetes starts the"
            " processes"
        )
    if coordinator is not None and processes is not None and process is not None:
        if not 0 <= process < processes:
            raise UserError(f"process: {process} is outside 0..{processes - 1} of {processes=}")
        meet(coordinator, processes, process, timeout)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=timeout,
            coordinator_bind_address=coordinator,
        )
    except ValueError as error:
        if coordinator is not None:
            raise
        raise UserError(
            f"distributed: JAX does not see what starts the processes here ({error}); give"
            " coordinator=HOST:PORT, processes= and process="
        ) from None


def meet(coordinator: str, processes: int, process: int, timeout: float) -> None:
    """Waits until all processes have said their number to process 0. JAX's own wait aborts the
    program without naming who is missing, and takes processes that were told different counts.

    Raises UserError naming those that have not come within ``timeout`` seconds.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(
            f"coordinator: {coordinator!r} is not HOST:PORT with a port from 1 to 65535"
        )
    address, end = (host, int(port)), time.monotonic() + timeout
    if process:
        return _report(address, f"{process}/{processes}", timeout, end)
    try:
        listening = socket.create_server(address, backlog=processes)
    except OSError as error:
        raise UserError(
            f"coordinator: process 0 cannot listen on {coordinator} ({error.strerror}); give an"
            " address and a free port of its own host"
        ) from None
    with contextlib.ExitStack() as closing:
        closing.enter_context(listening)
        callers: dict[int, socket.socket] = {}
        refusal = None
        while len(callers) < processes - 1 and not refusal:
            listening.settimeout(max(end - time.monotonic(), 0.001))
            try:
                caller = closing.enter_context(listening.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, processes) if i not in callers)
                refusal = (
                    f"process {missing} of {processes} did not come to {coordinator} within"
                    f" {timeout} s; see that it runs and can reach it, or give a longer timeout="
                )
                break
            try:
                caller.settimeout(5)
                number, count = map(int, caller.recv(32).split(b"/"))
            except (ValueError, OSError):  # not one of ours
                continue
            if count != processes:
                refusal = (
                    f"processes: {processes} on process 0, {count} on process {number}; start all"
                    " processes with the same"
                )
            elif number in callers or not number:
                refusal = (
                    f"process: {number} was given to two processes; number them 0 to"
                    f" {processes - 1}"
                )
                callers[-1] = caller
            callers.setdefault(number, caller)
        for caller in callers.values():
            with contextlib.suppress(OSError):  # gone
                caller.sendall((NO + refusal if refusal else GO).encode())
    if refusal:
        raise UserError(refusal)


def _report(address: tuple[str, int], word: str, timeout: float, end: float) -> None:
    """Says ``word`` to process 0 until it answers. Raises UserError at ``end`` or when refused."""
    while True:
        with contextlib.suppress(OSError):
            left = max(end - time.monotonic(), 0.001)
            with socket.create_connection(address, timeout=left) as process_0:
                process_0.sendall(word.encode())
                process_0.settimeout(max(end - time.monotonic(), 0.001))
                answer = process_0.recv(1024).decode(errors="replace")
            if answer == GO:
                return
            if answer.startswith(NO):
                raise UserError(answer.removeprefix(NO))
        if time.monotonic() > end:
            raise UserError(
                f"process {word.partition('/')[0]}: process 0 did not answer on"
                f" {address[0]}:{address[1]} within {timeout} s, or others are missing; see that it"
                " runs there, or give a longer timeout="
            )
        time.sleep(0.1)


def is_first() -> bool:
    """Does this process write logs and results?"""
    return jax.process_index() == 0


def agree(facts: dict) -> None:
    """Raises UserError on every process, naming the fact and both values, where processes were
    started with different ones.
    """
    first, *others = gather(facts)
    for process, other in enumerate(others, 1):
        for name in first:
            if first[name] != other.get(name):
                raise UserError(
                    f"{name}: {first[name]!r} on process 0, {other.get(name)!r} on process"
                    f" {process}; start all processes with the same"
                )


def together(f: Callable[[], Any], first_only: bool = False) -> Any:
    """``f()`` on every process, or on process 0 alone (None elsewhere); an error of any of them is
    raised on all, so that none waits for it in vain.
    """
    result, error = None, None
    if is_first() or not first_only:
        try:
            result = f()
        except Exception as failed:
            error = failed
    for process, message in enumerate(gather(error and str(error))):
        if message is not None:
            raise error or UserError(f"process {process}: {message}")
    return result


def preempted(step: int) -> bool:
    """Has any process of the run been asked to end (SIGTERM)? All answer alike after the same step;
    outside :func:`start` always False.
    """
    return jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step)


def gather(value: Any) -> list:
    """The JSON value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(text))).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]
