"""The ``flexmemory`` command: finds the subcommand, turns a user's mistake into one line and exit
code 2.
"""

import gc
import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import absl.logging

from flexmemory.cli.flags import for_user
from flexmemory.errors import UserError, nearest

COMMANDS = {
    "prepare": "text to token shards",
    "train": "train or resume a run",
    "eval": "loss, bits per byte, recall and reasoning of a run, as JSON",
    "export": "fold a run into a TKV store",
    "verify": "prove a store equal to its run",
    "copy": "move a store, verified",
    "generate": "write text with rows read from a store",
    "params": "parameters, FLOPs and bytes of a config",
    "plan": "what each device of a mesh would hold, compute and send",
    "bench": "measure reads, decoding, export, training and table updates, as JSON",
}


def main(argv: list[str] | None = None) -> int:
    command_line = argv is None
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: flexmemory COMMAND [options]\n")
        print("\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items()))
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"error: command {argv[0]!r}: {nearest(argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    start_process()
    if command_line:
        signal.signal(signal.SIGINT, interrupt)
    command = importlib.import_module(f"flexmemory.cli.{argv[0]}")
    try:
        return command.run(argv[1:])
    except UserError as error:
        print(for_user(error, getattr(command, "OPTIONS", None)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        if command_line:
            sys.stdout.flush()
            os._exit(130)  # a normal exit would wait for threads that wait for a server
        return 130
    except BrokenPipeError:
        return unread()


def interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C as everywhere, but not lost: Python drops what is raised in a callback of its garbage
    collector, and JAX has one. There it is raised a moment later.
    """
    if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
    else:
        raise KeyboardInterrupt


def piped(main: Callable[[], int]) -> int:
    """main(), whose output may go to `| head`."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return unread()


def unread() -> int:
    """The exit code where the reader of our output closed it early, as `| head` does; what is still
    to be written goes nowhere.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def start_process() -> None:
    """Settings of a main program: quiet libraries, and compiled programs kept between runs in JAX's
    persistent cache, where JAX_COMPILATION_CACHE_DIR says or else in the user's cache folder;
    JAX_ENABLE_COMPILATION_CACHE=false keeps none. Does not import jax.
    """
    # tracing makes millions of small objects that live on: looking through them takes a tenth of
    # the time
    gc.set_threshold(200_000, 10, 10)
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax reports every save
    # after a damaged checkpoint Orbax leaves its other reads behind, which would be reported one by
    # one at exit
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home has no cache
        return
    name, folder = "JAX_COMPILATION_CACHE_DIR", str(home / "flexmemory" / "xla")
    if jax := sys.modules.get("jax"):
        if not jax.config.jax_compilation_cache_dir:
            jax.config.update(name.lower(), folder)
    elif not os.environ.get(name):
        os.environ[name] = folder  # jax reads it when it is imported


if __name__ == "__main__":
    sys.exit(main())
