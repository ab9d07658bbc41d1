"""What a compiled program sends between devices, read from its optimised HLO."""

import math
import re
from collections import Counter

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
OPERATION = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.+?) ({KINDS})(-start)?\(")
CALLED = re.compile(
    r"(?:to_apply|body|calls|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
GROUPS = re.compile(r"replica_groups=\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}")
IOTA_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")


def collectives(hlo: str) -> list[dict]:
    """One dict per collective of the program: {"kind", "shape" of one device's result, "bytes" of
    it, "count" in a run of the program}, largest first.

    ``hlo``: text of ``jax.stages.Compiled.as_text()``. A loop counts as often as XLA knows it to
    run; one that it does not know counts once. What runs in a branch counts as if it were taken.
    Collectives over a single device are no traffic and are left out."""
    bodies, entry = _computations(hlo)
    counts: Counter[tuple[str, str]] = Counter()

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if operation := OPERATION.match(line):
                result, kind, start = operation.groups()
                if not _alone(line):
                    # an asynchronous start gives its operands before its results
                    shapes = ["{}[{}]".format(*array) for array in ARRAY.findall(result)]
                    first = len(shapes) // 2 if start and kind != "all-reduce" else 0
                    counts[kind, " ".join(shapes[first:])] += times
                continue
            trips = TRIPS.search(line)
            inner = times * int(trips[1]) if trips and " while(" in line else times
            for called, branches in CALLED.findall(line):
                for other in [called] if called else branches.split(","):
                    walk(other.strip().lstrip("%"), inner)

    walk(entry, 1)
    rows = [
        {"kind": kind, "shape": shape, "bytes": _bytes(shape), "count": count}
        for (kind, shape), count in counts.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"] * row["count"])


def traffic(rows: list[dict]) -> int:
    """Bytes of all results of all collectives on one device in one run."""
    return sum(row["bytes"] * row["count"] for row in rows)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """({name: lines}, name of the entry)."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", []
    for line in hlo.splitlines():
        if line and not line[0].isspace() and (match := COMPUTATION.match(line)):
            current = bodies.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        else:
            current.append(line)
    return bodies, entry


def _alone(line: str) -> bool:
    """Is every group of the collective one device?"""
    if groups := GROUPS.search(line):
        return all("," not in group for group in re.findall(r"\{([\d,]*)\}", groups[1]))
    iota = IOTA_GROUPS.search(line)
    return iota is not None and int(iota[1]) == 1


def _bytes(shape: str) -> int:
    """Of shapes such as "f32[2,3] bf16[4]"; pred, the one type without a number, takes a byte."""
    total = 0
    for dtype, dims in ARRAY.findall(shape):
        bits = re.search(r"\d+", dtype)
        size = int(bits[0]) // 8 if bits else 1
        total += size * math.prod(int(n) for n in dims.split(",") if n)
    return total
