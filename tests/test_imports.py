"""The rooms of flexmemory import one way, down the order of docs/architecture.md, in no circle."""

import ast
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = re.search(
    r"## One way down\n.*?```\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.S
)
FLOOR = {
    room: i for i, line in enumerate(ORDER[1].splitlines()) for room in line.split("#")[0].split()
}


def imports() -> dict[str, set[str]]:
    """{module: modules of flexmemory that it imports}, late imports counted too."""
    paths = sorted((ROOT / "flexmemory").rglob("*.py"))
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    graph = {}
    for path in paths:
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: relative import"
                found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[".".join(path.relative_to(ROOT).with_suffix("").parts)] = found & modules
    return graph


def test_nothing_imports_upwards():
    up = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if module != "flexmemory.__init__" and FLOOR[room(other)] > FLOOR[room(module)]
    ]
    assert not up


def test_no_circle():
    tuple(graphlib.TopologicalSorter(imports()).static_order())  # raises CycleError


def room(module: str) -> str:
    return module.split(".")[1]
