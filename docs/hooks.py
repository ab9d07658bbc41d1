"""Pages of the site that are not files under docs/: CONTRIBUTING.md and CHANGELOG.md, the notebook,
and for each room of flexmemory/ a page of its API.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flexmemory"


def api() -> dict[str, str]:
    """{page: markdown}: the modules at the top on one page, then a page for each folder."""
    modules = [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py" and "cli" not in path.parts
    ]
    pages = {}
    for path in modules:
        folders = path.relative_to(PACKAGE).parts[:-1]
        name = folders[0] if folders else "flexmemory"
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        pages.setdefault(f"api/{name}.md", f"# {name}\n")
        pages[f"api/{name}.md"] += f"\n::: {dotted}\n"
    return pages


def on_config(config):
    config.nav.insert(-1, {"API": sorted(api())})


def on_files(files, config):
    pages = api()
    for name in ("CONTRIBUTING", "CHANGELOG"):
        text = (ROOT / f"{name}.md").read_text()
        pages[f"{name.lower()}.md"] = text.replace("](docs/", "](")
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        text, resources = MarkdownExporter().from_filename(path)
        pages[f"notebooks/{path.stem}.md"] = text
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))


def on_page_markdown(markdown, page, config, files):
    """Links as a repository's pages have them, to what is a page of the site."""
    for name in ("CONTRIBUTING", "CHANGELOG"):
        markdown = re.sub(rf"\]\((\.\./)?{name}\.md", f"]({name.lower()}.md", markdown)
    return re.sub(r"(\]\([^)]*)\.ipynb\)", r"\1.md)", markdown)


def on_page_content(html, page, config, files):
    """Names in docstrings without the roles that Sphinx writes before them."""
    return re.sub(r":(func|class|meth|data|mod):(?=<code>)", "", html)
