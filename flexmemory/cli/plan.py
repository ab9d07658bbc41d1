"""flexmemory plan --config=configs/memoryllm.py:1b --mesh=data=8,fsdp=32 [--topology=v5e:16x16]
[--memory=80] [--json]

What every device of a mesh would hold, compute and send in a training step, found by compiling the
step for devices that are not there. Compiled by XLA for CPUs: temporaries on an accelerator differ
(bfloat16 products need none in float32, flash attention keeps no scores), collectives hardly. With
--topology the TPU's own compiler says it (libtpu must be installed, a TPU need not be there); what
does not fit it refuses.
"""

import dataclasses
import json
from typing import Any

from flexmemory.cli.flags import config_of, parse
from flexmemory.errors import UserError

SHOWN = 12  # arrays and collectives in the text; JSON has all
HOST = "tables in the host's memory"  # train/dryrun.py's name; not of a device


def run(argv: list[str]) -> int:
    values = parse(
        argv,
        __doc__,
        mesh=(str, "sizes of the axes, e.g. data=8,fsdp=32; config parallel.mesh where left out"),
        topology=(str, "compile for a TPU slice, for example v5e:16x16 or v5p:4x4x4"),
        memory=(80.0, "GB of one device"),
        rows=(int, "unique ids of a section of the batch; by Zipf's law where left out"),
        compile=(True, "also compile the step: temporaries and collectives"),
        json=(False, "print JSON"),
    )
    if not values.memory > 0:
        raise UserError(f"--memory: {values.memory} must be above 0")
    if values.rows is not None and values.rows < 1:
        raise UserError(f"--rows: {values.rows} must be above 0")
    if values.topology and not values.compile:
        raise UserError(
            "--topology: needs the compiler that --nocompile leaves out; give one of the two"
        )
    mesh = values.mesh or values.config.parallel.mesh
    if not mesh:
        raise UserError(
            "--mesh: missing; give the sizes of the axes, for example --mesh=data=8,fsdp=32"
        )
    cfg = config_of(values)

    from flexmemory import parallel
    from flexmemory.train import dryrun

    cfg, changed = dryrun.on_mesh(cfg, mesh)
    if not cfg.model.vocab_size:
        raise UserError(
            "config model.vocab_size: 0; give the vocabulary that the data will have"
            " (--config.model.vocab_size=)"
        )
    sizes = parallel.mesh_sizes(cfg.parallel)
    if values.topology and cfg.model.attention == "auto":  # would choose for the machine at hand
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, attention="xla"))
    if not values.compile:
        devices: Any = parallel.abstract_mesh(sizes)
    elif values.topology:
        devices = dryrun.tpu_mesh(values.topology, sizes)
    else:
        devices = dryrun.cpu_mesh(sizes)
    rows = values.rows or dryrun.expected_rows(cfg, parallel.sections_of(sizes))
    try:
        result = dryrun.dry_run(cfg, devices, rows, values.compile)
    except RuntimeError as error:  # jax.errors.JaxRuntimeError is one
        if not values.topology or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--mesh {cfg.parallel.mesh}: does not fit a device of {values.topology} ({reason});"
            " give more devices, more train.accum_steps or model.remat"
        ) from error
    result |= {
        "changed": changed,
        "compiler": (values.topology or "cpu") if values.compile else None,
        "device_memory": int(values.memory * 1e9),
    }
    print(json.dumps(result, indent=1) if values.json else text(result))
    return 0


def text(result: dict) -> str:
    """The numbers as aligned text."""
    limit, parts, changed = result["device_memory"], result["bytes"], result["changed"]
    axes = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    compiler = f", compiled for {result['compiler']}" if result["compiler"] else ""
    lines = [f"{result['devices']:,} devices, {axes}, plan {result['plan']}{compiler}"]
    lines += [f"changed for this mesh: {', '.join(changed)}"] if changed else []
    lines += ["", f"{'bytes of one device':<28}{'GB':>10}"]
    shown = {name: size for name, size in parts.items() if size or name != HOST}
    lines += [f"  {name:<26}{size / 1e9:>10.3f}" for name, size in shown.items()]
    total, note = sum(shown.values()) - shown.get(HOST, 0), " (without temporaries)"
    if "peak" in parts:
        total, note = parts["peak"], ""
    fits = "fits" if total <= limit else "DOES NOT FIT"
    lines += [f"  {fits:<26}{total / 1e9:>10.3f} of {limit / 1e9:g}{note}"]
    lines += ["", f"{'largest arrays of one device':<58}{'shape of the whole':<26}{'GB':>8}  lies"]
    for array in result["arrays"][:SHOWN]:
        shape, size = "x".join(map(str, array["shape"])), array["bytes"]
        mark = "  does not fit alone" if size > limit else ""
        lines += [f"  {array['name']:<56}{shape:<26}{size / 1e9:>8.3f}  {array['spec']}{mark}"]
    flops, rows = result["flops"] / 1e12, result["rows_per_section"]
    lines += ["", f"{flops:,.2f} TFLOP a step on each device; {rows:,} rows a section"]
    if result["collectives"] is not None:
        title = "sent in a step, bytes of results on one device"
        lines += ["", f"{title:<58}{'times':>8}{'MB':>12}"]
        for row in result["collectives"][:SHOWN]:
            shape = row["shape"] if len(row["shape"]) < 36 else row["shape"][:33] + "..."
            sent = row["bytes"] * row["count"] / 1e6
            lines += [f"  {row['kind']:<20}{shape:<36}{row['count']:>8,}{sent:>12,.2f}"]
        lines += [f"  {'all':<64}{result['sent'] / 1e6:>12,.2f}"]
    return "\n".join(lines)
