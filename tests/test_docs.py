"""The pages: what they name exists, they keep to their width, and the notebook runs."""

import json
import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
WRITTEN = [page for page in PAGES if page.parent.name != "experiments_cpu"]  # by people
NOTEBOOK = ROOT / "docs/notebooks/first_memory.ipynb"


def named(page: Path):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_files_that_a_page_names_exist(page):
    paths = re.findall(
        r"`((?:flexmemory|experiments|configs|tests|docs)/[\w/.-]+)[:`]", page.read_text()
    )
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_pages_keep_to_100_columns(page):
    """Tables, and commands that belong on one line, may be longer."""
    lines = page.read_text().splitlines()
    assert not [
        line
        for line in lines
        if len(line) > 100 and line.strip()[0] not in "|[!" and line[0] != " "
    ]


def test_readme_is_short_and_its_demo_fits_a_terminal():
    text = (ROOT / "README.md").read_bytes().decode()
    assert len(text.encode()) <= 8000
    table = re.search(
        r"<!-- demo table: begin -->\n```\n(.*?)```\n<!-- demo table: end -->", text, re.S
    )
    assert max(map(len, table[1].splitlines())) <= 80


def test_citation_and_package_have_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_notebook_is_executed_and_names_no_machine():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any(cell["outputs"] for cell in code)
    assert not re.search(r"(/tmp|/home|/root|/Users|site-packages)\b", json.dumps(code))


@pytest.mark.slow
def test_notebook_runs(monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3").execute()  # may raise
