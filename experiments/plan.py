"""The plan of a folder of runs: which runs the chosen experiments need, each once, and where each stands. docs/formats.md has the files."""

import dataclasses
import hashlib
import json
from pathlib import Path

from experiments import budgets, catalogue
from experiments.sweeps import PREPARE, differing, variant_of
from flexmemory.config import Config
from flexmemory.errors import UserError, nearest
from flexmemory.files import write_json

FILE = "plan.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """``runs``: {name: {"name", "overrides", "experiments": names of those that need it}}, in the order in which they are to start."""

    scale: str
    experiments: tuple[str, ...]
    runs: dict[str, dict]


def make(names: list[str], scale: str, *, source: str | None = None, seeds: list[int] | None = None, budget: str | None = None) -> Plan:
    """The plan of some experiments. ``source``: other text for all runs; ``seeds``: these alone; ``budget``: see budgets.equalise.

    Raises UserError for an unknown experiment or scale, one name with two meanings, or seeds that the scale has not.
    """
    modules = {catalogue.name_of(module): module for module in map(catalogue.load, names)}
    runs: dict[str, dict] = {}
    for name, module in modules.items():
        rows = catalogue.sweep_of(module, scale)
        rows = budgets.equalise(rows, budget) if budget else rows
        if source:
            rows = [row | {"prepare.source": source} for row in rows]
        if seeds is not None and rows:
            known = sorted({seed_of(row) for row in rows})
            if unknown := [seed for seed in seeds if seed not in known]:
                raise UserError(f"--seeds {unknown[0]}: {name} at this scale has {', '.join(map(str, known))}")
            rows = [row for row in rows if seed_of(row) in seeds]
        for row in rows:
            add(runs, {"name": row["name"], "overrides": {key: value for key, value in row.items() if key != "name"}, "experiments": [name]})
    return Plan(scale, tuple(modules), dict(sorted(runs.items(), key=lambda item: seed_of(item[1]["overrides"]))))


def seed_of(row: dict) -> int:
    return row.get("train.seed", 0)


def add(runs: dict[str, dict], run: dict) -> None:
    """Puts a run among others: one of equal name must be equal. Raises UserError naming what differs."""
    known = runs.setdefault(run["name"], run)
    if known["overrides"] != run["overrides"]:
        key = differing(known["overrides"], run["overrides"])
        raise UserError(
            f"two runs are named {run['name']!r}: {key} is {known['overrides'].get(key)!r} for {', '.join(known['experiments'])} and "
            f"{run['overrides'].get(key)!r} for {', '.join(run['experiments'])}; give one another name, or each experiment its own --out"
        )
    known["experiments"] += [name for name in run["experiments"] if name not in known["experiments"]]


def claim(out: Path, plan: Plan) -> Plan:
    """Creates the folder of the plan or adds the plan to the one that is there; returns what the folder now plans.

    Raises UserError where the folder is something else's, of another scale, or gives a run of equal name another meaning.
    """
    if (out / FILE).exists():
        old = read(out)
        if old.scale != plan.scale:
            raise UserError(f"--out {out}: holds runs of scale {old.scale!r}, not {plan.scale!r}; give a new folder")
        runs = {name: {**run, "experiments": list(run["experiments"])} for name, run in old.runs.items()}
        for run in plan.runs.values():
            add(runs, run)
        plan = Plan(plan.scale, tuple(dict.fromkeys((*old.experiments, *plan.experiments))), runs)
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: not empty and not a folder of runs; give a new one")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FILE, {"scale": plan.scale, "experiments": list(plan.experiments), "runs": list(plan.runs.values())})
    return plan


def read(out: Path) -> Plan:
    """The plan of a folder. Raises UserError where there is none or it cannot be read."""
    try:
        values = json.loads((Path(out) / FILE).read_text())
        return Plan(values["scale"], tuple(values["experiments"]), {run["name"]: run for run in values["runs"]})
    except FileNotFoundError:
        raise UserError(f"{out}: no {FILE}; give the --out of `python -m experiments.run`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{Path(out) / FILE}: not readable ({type(error).__name__}: {error}); delete it and run the experiments again, finished runs are kept"
        ) from None


def run_of(plan: Plan, name: str) -> dict:
    """One run by name. Raises UserError with the nearest names."""
    if name not in plan.runs:
        raise UserError(f"run {name!r}: {nearest(name, plan.runs)}")
    return plan.runs[name]


def data_folder(out: Path, run: dict) -> Path:
    """Where the run's text is: runs with equal arguments of `prepare` share it."""
    arguments = prepare_arguments(run)
    return out / "data" / hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:8]


def prepare_arguments(run: dict) -> dict:
    return {name: run["overrides"][f"prepare.{name}"] for name in PREPARE if f"prepare.{name}" in run["overrides"]}


def finished(out: Path, run: dict, measures: set[str] | None = None) -> dict | None:
    """What done.json says, with variant and seed; None where the run is not done, was made of other overrides, or lacks a measure.

    measures: the names of those that it must have, by default those of the experiments that need it.
    """
    try:
        done = json.loads((out / run["name"] / "done.json").read_text())
        complete = isinstance(done["measures"], dict)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    if (
        not complete
        or done.get("overrides") != run["overrides"]
        or not (set(measures_of(run)) if measures is None else measures) <= set(done["measures"])
    ):
        return None
    return done | {"variant": variant_of(run["name"]), "seed": seed_of(run["overrides"])}


def measures_of(run: dict) -> dict:
    """{function name: function} of all experiments that need the run. Raises UserError where two have one name."""
    made = {}
    for name in run["experiments"]:
        for function in catalogue.measures_of(catalogue.load(name)):
            if made.setdefault(function.__name__, function) is not function:
                raise UserError(f"{name}: two measures are named {function.__name__!r}; rename one")
    return made


def unfinished(out: Path, plan: Plan) -> list[str]:
    return [name for name, run in plan.runs.items() if finished(out, run) is None]


def steps(plan: Plan) -> dict[str, int]:
    """{run: its training steps}"""
    return {name: run["overrides"].get("train.steps", Config().train.steps) for name, run in plan.runs.items()}
