"""Whatever the code imports is declared in pyproject.toml.

flexmemory/ needs the core dependencies alone. What an extra brings is imported late, in a file that
tells the user which extra it is. experiments/ may also use the extra `experiments`, its peers what
their own requirements.txt has.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# {what is imported: its distribution}, where the names differ
DISTRIBUTIONS = {"absl": "absl-py", "orbax": "orbax-checkpoint", "sklearn": "scikit-learn"}


def names(requirements: list[str]) -> set[str]:
    matches = (re.match(r"[\w-]+", line) for line in requirements)
    return {match[0].lower().replace("_", "-") for match in matches if match}


CORE = names(PROJECT["dependencies"])
EXTRAS = {extra: names(lines) for extra, lines in PROJECT["optional-dependencies"].items()}


def imports(code: str) -> set[tuple[str, bool]]:
    """{(distribution, whether the import is inside a function)}, those of other projects."""
    tree = ast.parse(code)
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    matches = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
        else:
            continue
        for module in modules:
            name = module.split(".")[0]
            if name not in sys.stdlib_module_names and name not in ("flexmemory", "experiments"):
                name = DISTRIBUTIONS.get(name, name.lower().replace("_", "-"))
                matches.add((name, node in late))
    return matches


def undeclared(path: Path) -> list[str]:
    code = path.read_text()
    top = set(CORE)
    if "experiments" in path.parts:
        top |= EXTRAS["experiments"]
    if "peers" in path.parts:
        top |= names((path.parent / "requirements.txt").read_text().splitlines())
    late = top.union(*(EXTRAS[extra] for extra in EXTRAS if f"[{extra}]" in code))
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for name, inside in sorted(imports(code))
        if name not in (late if inside else top)
    ]


@pytest.mark.parametrize("room", ["flexmemory", "experiments"])
def test_every_import_is_declared(room):
    paths = sorted((ROOT / room).rglob("*.py"))
    assert paths and not [line for path in paths for line in undeclared(path)]


def test_the_core_declares_nothing_that_flexmemory_does_not_import():
    used = {
        name
        for path in (ROOT / "flexmemory").rglob("*.py")
        for name, _ in imports(path.read_text())
    }
    assert not CORE - used


def test_the_oldest_versions_tested_are_the_ones_allowed():
    floors = {line.replace(">=", "==") for line in PROJECT["dependencies"]}
    assert floors <= set((ROOT / "tests/constraints-oldest.txt").read_text().split())
