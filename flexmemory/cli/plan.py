"""flexmemory plan --config=configs/memoryllm.py:1b --mesh=data=8,fsdp=32 [--topology=v5e:16x16]
[--memory=80] [--json]

What every device of a mesh would hold, compute and send in a training step, found by compiling the
step for devices that are not there. Compiled by XLA for CPUs: temporaries on an accelerator differ
(bfloat16 products need none in float32, flash attention keeps no scores), collectives hardly. With
--topology the TPU's own compiler says it (libtpu must be installed, a TPU need not be there); what
does not fit it refuses.
"""

import dataclasses
import importlib.util
import json
import math
import os

import jax
from absl import flags
from jax.experimental import topologies

from flexmemory import parallel
from flexmemory.cli.flags import config_of, parse
from flexmemory.errors import UserError
from flexmemory.train.dryrun import HOST, dry_run, expected_rows, on_mesh

SHOWN = 12  # arrays and collectives in the text; JSON has all
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}  # libtpu asks nobody


def run(argv: list[str]) -> int:
    def define(values):
        flags.DEFINE_string(
            "mesh",
            None,
            "sizes of the axes, for example data=8,fsdp=32; config parallel.mesh where left out",
            flag_values=values,
        )
        flags.DEFINE_string(
            "topology",
            None,
            "compile for a TPU slice, for example v5e:16x16 or v5p:4x4x4",
            flag_values=values,
        )
        flags.DEFINE_float(
            "memory", 80.0, "GB of one device", lower_bound=0.001, flag_values=values
        )
        flags.DEFINE_integer(
            "rows",
            None,
            "unique ids of a section of the batch; by Zipf's law where left out",
            lower_bound=1,
            flag_values=values,
        )
        flags.DEFINE_boolean(
            "compile",
            True,
            "also compile the step: temporaries and collectives",
            flag_values=values,
        )
        flags.DEFINE_boolean("json", False, "print JSON", flag_values=values)

    values = parse(argv, define, __doc__)
    cfg = config_of(values)
    if not (values.mesh or cfg.parallel.mesh):
        raise UserError(
            "--mesh: missing; give the sizes of the axes, for example --mesh=data=8,fsdp=32"
        )
    cfg, changed = on_mesh(cfg, values.mesh or cfg.parallel.mesh)
    if not cfg.model.vocab_size:
        raise UserError(
            "config model.vocab_size: 0; give the vocabulary that the data will have"
            " (--config.model.vocab_size=)"
        )
    sizes = parallel.mesh_sizes(cfg.parallel)
    if values.topology and not values.compile:
        raise UserError(
            "--topology: needs the compiler that --nocompile leaves out; give one of the two"
        )
    if (
        values.topology and cfg.model.attention == "auto"
    ):  # which would choose for the machine at hand
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attention="xla"))
    if not values.compile:
        mesh = parallel.abstract_mesh(sizes)
    else:
        mesh = tpu_slice(values.topology, sizes) if values.topology else devices(sizes)
    rows = values.rows or expected_rows(cfg, parallel.sections_of(sizes))
    try:
        made = dry_run(cfg, mesh, rows, values.compile)
    except jax.errors.JaxRuntimeError as error:
        if not values.topology or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"--mesh {cfg.parallel.mesh}: does not fit a device of {values.topology}"
            f" ({str(error).partition('\n')[0]}); give more devices, more train.accum_steps or"
            " model.remat"
        ) from error
    made |= {
        "changed": changed,
        "compiler": (values.topology or "cpu") if values.compile else None,
        "device_memory": int(values.memory * 1e9),
    }
    print(json.dumps(made, indent=1) if values.json else text(made))
    return 0


def devices(sizes: dict[str, int]):
    """A mesh of so many devices of the CPU, made up by XLA. Nothing may have touched a device
    before.
    """
    count = math.prod(sizes.values())
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    if jax.device_count() != count:
        raise RuntimeError(
            f"{jax.device_count()} devices where {count} were asked for: JAX was in use before"
        )
    return parallel.mesh_of(sizes, jax.devices())


def tpu_slice(topology: str, sizes: dict[str, int]):
    """A mesh of the devices of a TPU topology, known to the compiler alone. Raises UserError
    without libtpu, for an unknown name and for another number of devices.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology: needs the TPU compiler; 'pip install jax[tpu]', a TPU is not needed"
        )
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology: {topology!r}: {str(error).partition('\n')[0]}; write for example"
            " v5e:16x16 or v5p:4x4x4"
        ) from error
    if len(found) != math.prod(sizes.values()):
        raise UserError(
            f"--topology: {topology} has {len(found)} devices, --mesh has"
            f" {math.prod(sizes.values())}; give a mesh of {len(found)}"
        )
    return parallel.mesh_of(sizes, found)


def text(made: dict) -> str:
    """The numbers as aligned text."""
    limit = made["device_memory"]
    lines = [
        f"{made['devices']:,} devices,"
        f" {', '.join(f'{axis} {size}' for axis, size in made['mesh'].items())}, plan"
        f" {made['plan']}" + (f", compiled for {made['compiler']}" if made["compiler"] else "")
    ]
    lines += [f"changed for this mesh: {', '.join(made['changed'])}"] if made["changed"] else []
    lines += ["", f"{'bytes of one device':<28}{'GB':>10}"]
    parts = made["bytes"]
    held = sum(size for name, size in parts.items() if name not in ("temporaries", "peak", HOST))
    for name, size in parts.items():
        if name == HOST and not size:
            continue
        lines.append(f"  {name:<26}{size / 1e9:>10.3f}")
    total = parts.get("peak", held)
    lines.append(
        f"  {'fits' if total <= limit else 'DOES NOT FIT':<26}{total / 1e9:>10.3f} of"
        f" {limit / 1e9:g}" + ("" if "peak" in parts else " (without temporaries)")
    )
    lines += ["", f"{'largest arrays of one device':<58}{'shape of the whole':<26}{'GB':>8}  lies"]
    for array in made["arrays"][:SHOWN]:
        shape, mark = (
            "x".join(map(str, array["shape"])),
            "  does not fit alone" if array["bytes"] > limit else "",
        )
        lines.append(
            f"  {array['name']:<56}{shape:<26}{array['bytes'] / 1e9:>8.3f}  {array['spec']}{mark}"
        )
    lines += [
        "",
        (
            f"{made['flops'] / 1e12:,.2f} TFLOP a step on each device; {made['rows_per_section']:,}"
            " rows a section"
        ),
    ]
    if made["collectives"] is not None:
        lines += [
            "",
            f"{'sent in a step, bytes of results on one device':<58}{'times':>8}{'MB':>12}",
        ]
        for row in made["collectives"][:SHOWN]:
            shape = row["shape"] if len(row["shape"]) < 36 else row["shape"][:33] + "..."
            lines.append(
                f"  {row['kind']:<20}{shape:<36}{row['count']:>8,}{row['bytes'] * row['count'] / 1e6:>12,.2f}"
            )
        lines.append(f"  {'all':<64}{made['sent'] / 1e6:>12,.2f}")
    return "\n".join(lines)
