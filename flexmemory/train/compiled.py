"""A step compiled ahead of time, and what XLA says of it: seconds, bytes, its own cost analysis."""

import time
from typing import Any

import jax


def compile_step(step: Any, *args: Any) -> tuple[jax.stages.Compiled, dict]:
    """The jitted ``step`` compiled for ``args``, and its facts:

    seconds: ``lower`` (tracing and lowering) and ``compile`` (XLA, or reading its cache).
    bytes: see :func:`memory`.
    xla_loops_once: ``flops`` and ``bytes_accessed`` of the optimised program on one device, as XLA
    states them: the body of a loop counts once, however often it runs. None where XLA gives none.
    """
    start = time.perf_counter()
    lowered = step.lower(*args)
    lower = time.perf_counter() - start
    compiled = lowered.compile()
    seconds = {"lower": lower, "compile": time.perf_counter() - start - lower}
    cost = compiled.cost_analysis() or {}
    once = {"flops": cost.get("flops"), "bytes_accessed": cost.get("bytes accessed")}
    return compiled, {"seconds": seconds, "bytes": memory(compiled), "xla_loops_once": once}


def memory(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Bytes of a compiled program on its device; None where the backend does not say.

    {"arguments", "outputs", "aliased": outputs that lie in donated arguments, "temporaries",
    "code", "peak": what a call needs, arguments + outputs - aliased + temporaries + code}."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    sizes = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    return sizes | {"peak": sum(sizes.values()) - 2 * sizes["aliased"]}
