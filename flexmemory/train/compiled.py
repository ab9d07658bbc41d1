"""A step compiled ahead of time, and what XLA says of it: seconds, bytes, FLOPs."""

import math
import time
from collections.abc import Iterator

import jax
from jax.extend import core
from jax.sharding import get_abstract_mesh


def compile_step(step, *args) -> tuple[jax.stages.Compiled, dict]:
    """The jitted ``step`` compiled for ``args``, and its facts:

    seconds: ``lower`` (tracing and lowering), ``compile`` (XLA, or reading its persistent cache)
    and ``analyse`` (counting ``xla_flops``).
    bytes: ``arguments``, ``outputs``, ``aliased`` (outputs that lie in donated arguments),
    ``temporaries``, ``code`` and ``peak``, the memory that a call needs: arguments + outputs -
    aliased + temporaries + code. None where the backend does not say.
    xla_flops: see :func:`xla_flops`; None where XLA gives none, and on a mesh, where it counts what
    every device does by itself once. xla_loops_once: ``flops`` and ``bytes_accessed`` of the
    optimised program as XLA states them, each loop's body counted once whatever its length; None
    likewise.
    """
    times = [time.perf_counter()]
    traced = step.trace(*args)
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    cost, flops = (
        compiled.cost_analysis() or {},
        xla_flops(traced.jaxpr, lowered) if get_abstract_mesh().empty else math.nan,
    )
    times.append(time.perf_counter())
    seconds = {
        name: after - before
        for name, before, after in zip(("lower", "compile", "analyse"), times, times[1:])
    }
    return compiled, {
        "seconds": seconds,
        "bytes": memory(compiled),
        "xla_flops": None if math.isnan(flops) else flops,
        "xla_loops_once": {
            "flops": cost.get("flops"),
            "bytes_accessed": cost.get("bytes accessed"),
        },
    }


def memory(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Bytes of a compiled program on its device, see :func:`compile_step`."""
    said = compiled.memory_analysis()
    if said is None:
        return None
    sizes = {
        "arguments": said.argument_size_in_bytes,
        "outputs": said.output_size_in_bytes,
        "aliased": said.alias_size_in_bytes,
        "temporaries": said.temp_size_in_bytes,
        "code": said.generated_code_size_in_bytes,
    }
    return sizes | {"peak": sum(sizes.values()) - 2 * sizes["aliased"]}


def xla_flops(jaxpr: core.Jaxpr, lowered: jax.stages.Lowered) -> float:
    """FLOPs of a program, which is given twice, by XLA's cost analysis before optimisation, every
    scan's body times its length; NaN where XLA gives none.

    XLA itself counts the body of a loop once, whatever its length, so the bodies of scans are
    lowered and analysed by themselves. Everything that is computed counts, recomputation and the
    masked half of attention too; kernels that XLA does not see into (cuDNN) count as nothing.
    """
    total = _flops(lowered)
    for length, body in _scans(jaxpr):
        lowered_body = jax.jit(core.jaxpr_as_fun(body)).lower(
            *(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in body.in_avals)
        )
        total += length * xla_flops(body, lowered_body) - _flops(lowered_body)
    return total


def _scans(jaxpr: core.Jaxpr) -> Iterator[tuple[int, core.Jaxpr]]:
    """(length, body) of the scans in a program, those inside other scans left out."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation.params["length"], equation.params["jaxpr"]
        else:
            for inner in core.jaxprs_in_params(equation.params):
                yield from _scans(inner)


def _flops(lowered: jax.stages.Lowered) -> float:
    return (lowered.cost_analysis() or {}).get("flops", math.nan)
