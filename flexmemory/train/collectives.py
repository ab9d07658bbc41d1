"""What a compiled program sends between devices, read from its optimised HLO."""

import math
import re
from collections import Counter

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
OPERATION = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.+?) ({'|'.join(KINDS)})(-start)?\(")
CALLED = re.compile(
    r"(?:to_apply|body|calls|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


def collectives(hlo: str) -> list[dict]:
    """One dict per collective of the program: {"kind", "shape" of one device's result, "bytes" of
    it, "count" in a run of the program}, largest first.

    ``hlo``: text of ``jax.stages.Compiled.as_text()``. A loop counts as often as XLA knows it to
    run; one that it does not know counts once. What runs in a branch counts as if it were taken.
    Collectives over a single device are no traffic and are left out.
    """
    bodies, entry = _computations(hlo)
    made = Counter()

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            found = OPERATION.match(line)
            if found and not _alone(line):
                made[found[2], _result(found[1], bool(found[3]) and found[2] != "all-reduce")] += (
                    times
                )
            trips = TRIPS.search(line)
            inner = times * int(trips[1]) if trips and " while(" in line else times
            for called, branches in () if found else CALLED.findall(line):
                for other in (
                    [called] if called else [b.strip().lstrip("%") for b in branches.split(",")]
                ):
                    walk(other, inner)

    walk(entry, 1)
    rows = [
        {"kind": kind, "shape": shape, "bytes": _bytes(shape), "count": count}
        for (kind, shape), count in made.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"] * row["count"])


def traffic(rows: list[dict]) -> int:
    """Bytes of all results of all collectives on one device in one run."""
    return sum(row["bytes"] * row["count"] for row in rows)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    bodies, entry, current = {}, "", []
    for line in hlo.splitlines():
        if line and not line[0].isspace() and (found := COMPUTATION.match(line)):
            current = bodies.setdefault(found[1], [])
            entry = found[1] if line.startswith("ENTRY") else entry
        else:
            current.append(line)
    return bodies, entry


def _alone(line: str) -> bool:
    groups = re.search(r"replica_groups=\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}", line)
    if groups:
        return all("," not in group for group in re.findall(r"\{([\d,]*)\}", groups[1]))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
    return bool(iota) and int(iota[1]) == 1


def _result(text: str, with_operands: bool) -> str:
    """Shapes of the result; an asynchronous start gives its operands before them."""
    arrays = ["{}[{}]".format(*found) for found in ARRAY.findall(text)]
    return " ".join(arrays[len(arrays) // 2 :] if with_operands else arrays)


def _bytes(shape: str) -> int:
    return sum(
        BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in ARRAY.findall(shape)
    )
