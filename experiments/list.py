"""The catalogue: python -m experiments.list [--runs=runs/cpu] prints id, source, one line, scales
and the last verdicts.
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments import catalogue
from experiments.verdicts import VERDICTS
from flexmemory.cli.flags import Parser
from flexmemory.cli.main import piped
from flexmemory.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m experiments.list", __doc__)
    runs = "folders of runs whose verdicts to show; default all below runs/"
    parser.add_argument("--runs", type=Path, action="append", help=runs)
    try:
        args = parser.parse_args(argv)
        verdicts = last_verdicts(args.runs or sorted(Path("runs").glob("*")))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table(box=None, pad_edge=False)
    for column in ("name", "source", "question", "scales", "last verdicts"):
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "scales"))
    for name in catalogue.names():
        module = catalogue.load(name)
        question, scales = module.__doc__.strip().splitlines()[0], catalogue.scales_of(module)
        last = verdicts.get(name, "not run")
        table.add_row(name, module.SOURCE, question, " ".join(scales), last)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def last_verdicts(folders: list[Path]) -> dict[str, str]:
    """{experiment: "cpu: 2 reproduced, 1 within noise"} from the newest results.json with it."""
    made: dict[str, str] = {}
    paths = [path for folder in folders if (path := folder / "results.json").exists()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        try:
            for entry in json.loads(path.read_text())["experiments"]:
                found = [claim["verdict"] for claim in entry["claims"]]
                counts = [f"{found.count(v)} {v}" for v in VERDICTS if v in found]
                made[entry["name"]] = f"{entry['scale']}: {', '.join(counts) or 'no claims'}"
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: not the results of experiments; write it again with python -m"
                f" experiments.report {path.parent}"
            ) from None
    return made


if __name__ == "__main__":
    sys.exit(piped(main))
