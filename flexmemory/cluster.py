"""Several processes as one run: how they find each other, agree before the first step, and stop
together.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from flexmemory.errors import UserError

GO, NO = "go", "no: "  # what process 0 says: all are there; the start is refused, and why


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins this process to the run, before anything touches a device. All None: JAX finds the
    others itself, under SLURM, Open MPI, on a TPU pod, or in Kubernetes.

    coordinator: HOST:PORT of process 0. timeout: seconds to wait for the others. Raises UserError
    naming what is missing.
    """
    given = [
        name
        for name, value in (
            ("coordinator", coordinator),
            ("processes", processes),
            ("process", process),
        )
        if value is not None
    ]
    if given and len(given) < 3:
        missing = sorted({"coordinator", "processes", "process"} - set(given))
        raise UserError(
            f"{', '.join(missing)}: missing beside {'=, '.join(given)}=; give all three, or none"
            " (--distributed alone on a command line) where SLURM, Open MPI, a TPU pod or Kubernetes"
            " starts the processes"
        )
    if given and not 0 <= process < processes:
        raise UserError(
            f"process: {process} is outside 0..{processes - 1} of processes={processes}"
        )
    if given:
        meet(coordinator, processes, process, timeout)
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=timeout)
    except ValueError as error:
        if given:
            raise
        raise UserError(
            f"distributed: JAX does not see what starts the processes here ({error}); give"
            " coordinator=HOST:PORT, processes= and process="
        ) from None


def meet(coordinator: str, processes: int, process: int, timeout: float) -> None:
    """Waits until all processes are there, by a word to process 0 each: JAX's own wait ends the
    program without saying who is missing.

    Raises UserError naming those that have not come within ``timeout`` seconds.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(
            f"coordinator: {coordinator!r} is not HOST:PORT with a port from 1 to 65535"
        )
    end = time.monotonic() + timeout
    if process == 0:
        try:
            # of all interfaces, as JAX does: a host's own name is often its loopback
            listening = socket.create_server(
                ("127.0.0.1" if host == "127.0.0.1" else "", int(port)), backlog=processes
            )
        except OSError as error:
            raise UserError(
                f"coordinator: process 0 cannot listen on {coordinator} ({error.strerror}); give"
                " a free port of its own host"
            ) from None
        with contextlib.ExitStack() as closing:
            closing.enter_context(listening)
            came, callers = {0}, []

            def answer(word: str) -> None:
                for caller in callers:
                    with contextlib.suppress(OSError):  # gone
                        caller.sendall(word.encode())

            def refuse(why: str):
                answer(NO + why)
                raise UserError(why)

            while len(came) < processes:
                listening.settimeout(max(end - time.monotonic(), 0.001))
                try:
                    caller = closing.enter_context(listening.accept()[0])
                except TimeoutError:
                    missing = ", ".join(str(i) for i in range(processes) if i not in came)
                    refuse(
                        f"process {missing} of {processes} did not come to {coordinator} within"
                        f" {timeout} s; see that it runs and can reach it, or give a longer"
                        " timeout="
                    )
                try:
                    caller.settimeout(5)
                    number, theirs = map(int, caller.recv(32).split(b"/"))
                except (ValueError, OSError):  # not one of ours
                    continue
                callers.append(caller)
                if theirs != processes:
                    refuse(
                        f"processes: {processes} on process 0, {theirs} on process {number};"
                        " start all processes with the same"
                    )
                if number in came:
                    refuse(
                        f"process: {number} was given to two processes; number them 0 to"
                        f" {processes - 1}"
                    )
                came.add(number)
            answer(GO)
    else:
        while True:
            try:
                with socket.create_connection(
                    (host, int(port)), timeout=max(end - time.monotonic(), 0.001)
                ) as caller:
                    caller.sendall(f"{process}/{processes}".encode())
                    caller.settimeout(max(end - time.monotonic(), 0.001))
                    word = caller.recv(1024).decode(errors="replace")
                if word == GO:
                    return
                if word.startswith(NO):
                    raise UserError(word.removeprefix(NO))
            except OSError:
                pass
            if time.monotonic() > end:
                raise UserError(
                    f"process {process}: process 0 did not answer on {coordinator} within {timeout}"
                    " s, or others are missing; see that it runs there, or give a longer"
                    " timeout="
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


def together(f: Callable, first_only: bool = False):
    """``f()`` on every process, or on process 0 alone (None elsewhere); an error of any of them is
    raised on all, so that none waits for it in vain.
    """
    result, error = None, None
    if is_first() or not first_only:
        try:
            result = f()
        except Exception as failed:
            error = failed
    for process, said in enumerate(gather(error and str(error))):
        if said is not None:
            raise error or UserError(f"process {process}: {said}")
    return result


def preempted(step: int) -> bool:
    """Has any process of the run been asked to end (SIGTERM)? All answer alike after the same step;
    outside :func:`start` always False.
    """
    return jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step)


def gather(value) -> list:
    """The JSON value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(text))).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]
