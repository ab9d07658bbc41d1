"""The list of a folder's runs: which runs the chosen experiments need, each once, and where each
stands. docs/formats.md has the files.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
from pathlib import Path

from experiments import catalogue
from experiments.sweeps import PREPARE, differing, variant_of
from flexmemory.config import Config
from flexmemory.errors import UserError, nearest
from flexmemory.files import write_json

FILE, LOCK = "runs.json", ".lock"


@dataclasses.dataclass(frozen=True)
class RunList:
    """``runs``: {name: {"name", "overrides", "experiments": names of those that need it}}, in the
    order in which they are to start. ``budget``: what every variant is made to cost alike, see
    budgets.equalise; None: as the experiments have it.
    """

    scale: str
    experiments: tuple[str, ...]
    runs: dict[str, dict]
    budget: str | None = None


def make(
    names: list[str],
    scale: str,
    *,
    source: str | None = None,
    seeds: list[int] | None = None,
    budget: str | None = None,
) -> RunList:
    """The runs of some experiments. ``source``: other text for all runs; ``seeds``: in place of the
    scale's; ``budget``: see budgets.equalise.

    Raises UserError for an unknown experiment or scale, one name with two meanings, or a sweep that
    does not go with ``source`` or ``budget``.
    """
    modules = {catalogue.name_of(module): module for module in map(catalogue.load, names)}
    runs: dict[str, dict] = {}
    for name, module in modules.items():
        rows = catalogue.sweep_of(module, scale)
        if budget:
            from experiments.budgets import equalise  # late: imports jax

            rows = equalise(rows, budget)
        if source and len({row.get("prepare.source") for row in rows}) > 1:
            raise UserError(f"--source: {name} compares texts of its own; leave it out")
        rows = [row | {"prepare.source": source} for row in rows] if source else rows
        for row in rows if seeds is None else reseeded(rows, seeds):
            overrides = {key: value for key, value in row.items() if key != "name"}
            add(runs, {"name": row["name"], "overrides": overrides, "experiments": [name]})
    by_seed = sorted(runs.items(), key=lambda item: seed_of(item[1]["overrides"]))
    return RunList(scale, tuple(modules), dict(by_seed), budget)


def reseeded(rows: list[dict], seeds: list[int]) -> list[dict]:
    """The sweep with these seeds in place of its own."""
    return [
        row
        | {"name": f"{row['name'].removesuffix(f'-s{seed_of(row)}')}-s{seed}", "train.seed": seed}
        for row in rows
        if seed_of(row) == seed_of(rows[0])
        for seed in seeds
    ]


def seed_of(row: dict) -> int:
    return row.get("train.seed", 0)


def add(runs: dict[str, dict], run: dict) -> None:
    """Puts a run among others: one of equal name must be equal. Raises UserError naming what
    differs.
    """
    known = runs.setdefault(run["name"], run)
    if known["overrides"] != run["overrides"]:
        key = differing(known["overrides"], run["overrides"])
        raise UserError(
            f"two runs are named {run['name']!r}: {key} is {known['overrides'].get(key)!r} for"
            f" {', '.join(known['experiments'])} and {run['overrides'].get(key)!r} for"
            f" {', '.join(run['experiments'])}; give one another name, or each experiment its own"
            " --out"
        )
    known["experiments"] = list(dict.fromkeys([*known["experiments"], *run["experiments"]]))


def merged(out: Path, listed: RunList) -> RunList:
    """The list with what the folder has listed already. Where an experiment has lost a variant
    since, that variant's runs are left out (their folders stay).

    Raises UserError where the folder is something else's, of another scale or budget, or gives a
    run of equal name another meaning.
    """
    if not (out / FILE).exists():
        if out.exists() and {path.name for path in out.iterdir()} - {LOCK}:
            raise UserError(f"--out {out}: not empty and not a folder of runs; give a new one")
        return listed
    old = read(out)
    for name in ("scale", "budget"):
        mine, theirs = getattr(listed, name), getattr(old, name)
        if mine != theirs:
            raise UserError(
                f"--out {out}: holds runs of {name} {theirs!r}, not {mine!r}; give a new folder"
            )
    variants = {
        name: {
            variant_of(row["name"]) for row in catalogue.sweep_of(catalogue.load(name), old.scale)
        }
        for name in old.experiments
        if name in catalogue.names()
    }
    runs: dict[str, dict] = {}
    for name, run in old.runs.items():
        needed = [e for e in run["experiments"] if variant_of(name) in variants.get(e, ())]
        if needed:
            runs[name] = run | {"experiments": needed}
    for run in listed.runs.values():
        add(runs, run)
    experiments = dict.fromkeys((*variants, *listed.experiments))
    return RunList(listed.scale, tuple(experiments), runs, listed.budget)


def claim(out: Path, listed: RunList) -> RunList:
    """Creates the folder of the list, or adds the list to the one that is there; returns what the
    folder now lists. Raises UserError as :func:`merged`.
    """
    listed = merged(out, listed)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FILE, vars(listed) | {"runs": list(listed.runs.values())})
    return listed


@contextlib.contextmanager
def locked(out: Path):
    """Keeps other launchers of this machine out of the folder. Raises UserError where one is at
    work.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {out}: another launcher is at work there; wait for it, or give another"
                " folder"
            ) from None
        yield


def read(out: Path) -> RunList:
    """The list of a folder. Raises UserError where there is none or it cannot be read."""
    try:
        values = json.loads((Path(out) / FILE).read_text())
        runs = {run["name"]: run for run in values["runs"]}
        return RunList(**values | {"experiments": tuple(values["experiments"]), "runs": runs})
    except FileNotFoundError:
        raise UserError(
            f"{out}: no {FILE}; give the --out of `python -m experiments.run`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{Path(out) / FILE}: not readable ({type(error).__name__}: {error}); put it back, or"
            " give a new folder"
        ) from None


def run_of(listed: RunList, name: str) -> dict:
    """One run by name. Raises UserError with the nearest names."""
    if name not in listed.runs:
        raise UserError(f"run {name!r}: {nearest(name, listed.runs)}")
    return listed.runs[name]


def data_folder(out: Path, run: dict) -> Path:
    """Where the run's text is: runs with equal arguments of `prepare` share it."""
    arguments = json.dumps(prepare_arguments(run), sort_keys=True)
    return out / "data" / hashlib.sha256(arguments.encode()).hexdigest()[:8]


def prepare_arguments(run: dict) -> dict:
    given = {name: run["overrides"].get(f"prepare.{name}") for name in PREPARE}
    return {name: value for name, value in given.items() if value is not None}


def finished(out: Path, run: dict, measures: set[str] | None = None) -> dict | None:
    """What is known of a run that is trained and measured: trained.json with "measures", "variant"
    and "seed"; else None, also where it was made of other overrides.

    measures: the names of those that it must have, by default those of all experiments that need
    it.
    """
    folder, known = out / run["name"], {}
    try:
        trained = json.loads((folder / "trained.json").read_text())
        if trained["overrides"] != run["overrides"]:
            return None
        for name in measures_of(run) if measures is None else measures:
            measure = json.loads((folder / "measures" / f"{name}.json").read_text())
            if measure["of"] != identity(trained["result"]):
                return None
            known[name], trained["seconds"][name] = measure["result"], measure["seconds"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    names = {"variant": variant_of(run["name"]), "seed": seed_of(run["overrides"])}
    return trained | {"measures": known} | names


def identity(result: dict) -> list:
    """What tells one training's model from another's: a measure belongs to one of them."""
    return [result["step"], result["val_loss"]]


def measures_of(run: dict) -> dict:
    """{function name: function} of all experiments that need the run. Raises UserError where two
    have one name.
    """
    made = {}
    for name in run["experiments"]:
        for function in catalogue.measures_of(catalogue.load(name)):
            if made.setdefault(function.__name__, function) is not function:
                raise UserError(f"{name}: two measures are named {function.__name__!r}; rename one")
    return made


def unfinished(out: Path, listed: RunList) -> list[str]:
    return [name for name, run in listed.runs.items() if finished(out, run) is None]


def steps(listed: RunList) -> dict[str, int]:
    """{run: its training steps}"""
    default = Config().train.steps
    return {name: run["overrides"].get("train.steps", default) for name, run in listed.runs.items()}


def read_json(path: Path):
    """The JSON of a file; None where it is absent or cut short."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def forget(folder: Path) -> None:
    """A run's end, where it is to be done again."""
    for name in ("failed.json", "done.json"):
        (folder / name).unlink(missing_ok=True)


def save_failure(folder: Path, code: int, error: str) -> None:
    """Writes a run's failed.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "failed.json", {"name": folder.name, "exit": code, "error": error})
