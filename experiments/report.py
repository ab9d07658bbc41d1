"""The report over all experiments of an --out folder: results.json, report.html, report.md,
report.tex and the verdict table.

    python -m experiments.report runs/cpu [runs/gpu ...]

Reads what the runner left: OUT/runs.json (scale, experiments, expected runs),
OUT/<run>/trained.json and measures/ (a finished run), failed.json, run.json, config.json and
metrics.jsonl. It works while runs are still going and says what is missing. Equal inputs give equal
bytes.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from experiments import catalogue, report_page, tables
from experiments import runs as run_list
from experiments.chart import family_of
from experiments.plots import STYLES
from experiments.sweeps import variant_of
from experiments.verdicts import VERDICTS
from flexmemory.cli.main import piped
from flexmemory.errors import UserError
from flexmemory.files import write_text
from flexmemory.run_folder import read_metrics

FAMILIES = tuple(STYLES)  # in the order of tables and legends
LINKED = (
    "config.json",
    "metrics.jsonl",
    "trained.json",
    "log.txt",
)  # of a run folder, where they are there


def collect(out: Path, modules: dict[str, ModuleType] | None = None) -> dict:
    """Everything the report states, from the files of an --out folder; of folders only names are
    kept.

    modules: experiment name -> module, instead of the catalogue's. Returns {"scale", "experiments":
    one :func:`section` each, "expected", "finished", "verdicts": {verdict: count}, "steps":
    distinct ones, "environment", "accounting", "failed", "missing", "runs": {name: files to link}}.
    Raises UserError when ``out`` is no such folder or its runs.json cannot be read.
    """
    out, listed = Path(out), run_list.read(out)
    wanted = dict.fromkeys(
        [
            *listed.experiments,
            *(name for run in listed.runs.values() for name in run["experiments"]),
        ]
    )
    known = {name: load(name, modules) for name in wanted}
    steps, done, failed, missing = run_list.steps(listed), {}, {}, {}
    for name, run in listed.runs.items():
        folder = out / name
        found, failure = (
            finished(out, run, [known[other] for other in run["experiments"]]),
            _read(folder / "failed.json"),
        )
        if found:
            done[name] = found
        elif isinstance(failure, dict):
            failed[name] = {
                "name": name,
                "exit": failure.get("exit"),
                "error": str(failure.get("error") or "no message"),
            }
        else:
            missing[name] = {
                "name": name,
                "step": max((row["step"] for row in read_metrics(folder)), default=None),
                "steps": steps[name],
                "begun": (folder / "log.txt").exists(),
            }
    scale = listed.scale + (f", equal {listed.budget}" if listed.budget else "")
    experiments = [
        section(out, name, known[name], listed, failed, missing) | {"scale": scale}
        for name in listed.experiments
    ]
    claims = [claim for experiment in experiments for claim in experiment["claims"]]
    return _clean(
        {
            "scale": scale,
            "experiments": experiments,
            "expected": len(listed.runs),
            "finished": len(done),
            "verdicts": {
                verdict: sum(claim["verdict"] == verdict for claim in claims)
                for verdict in VERDICTS
            },
            "steps": sorted(set(steps.values())),
            "environment": environment(out, list(listed.runs)),
            "accounting": accounting(list(done.values())),
            "failed": list(failed.values()),
            "missing": list(missing.values()),
            "runs": {
                name: [file for file in LINKED if (out / name / file).exists()]
                for name in listed.runs
            },
        }
    )


def load(name: str, modules: dict[str, ModuleType] | None) -> ModuleType | str:
    """The experiment's module, or in one line why there is none."""
    try:
        return catalogue.load(name) if modules is None else modules[name]
    except KeyError:
        return f"experiment {name!r}: no such file"
    except Exception as error:  # one broken file must not take the report of the others down
        return described(error)


def finished(out: Path, run: dict, needed: list[ModuleType | str]) -> dict | None:
    """As ``run_list.finished`` with the measures of these experiments, also where one cannot be loaded;
    numbers that are not finite are None.
    """
    found = run_list.finished(
        out,
        run,
        {function.__name__ for module in needed for function in getattr(module, "MEASURES", ())},
    )
    return found and _clean(found)


def section(
    out: Path,
    name: str,
    experiment: ModuleType | str,
    listed: run_list.RunList,
    failed: dict,
    missing: dict,
) -> dict:
    """What the report says of one experiment.

    {"name", "ids", "source", "question": the docstring's first line, "scale", "expected",
    "finished", "failed", "missing": names, "rows", "figures", "claims", "seeds", "errors":
    {"analyse" | "claims" | "file": last line of what went wrong}}. ``experiment`` as :func:`load`
    returns it.
    """
    names = [run["name"] for run in listed.runs.values() if name in run["experiments"]]
    runs = [
        found for run in names if (found := finished(out, listed.runs[run], [experiment]))
    ]  # another experiment's measures may be missing
    there = {run["name"] for run in runs}
    entry = {
        "name": name,
        "ids": [],
        "source": "",
        "question": "",
        "expected": len(names),
        "finished": [run["name"] for run in runs],
        "failed": [run for run in names if run in failed and run not in there],
        "missing": [run for run in names if run in missing and run not in there],
        "rows": [],
        "figures": [],
        "claims": [],
        "seeds": sorted({run["seed"] for run in runs}),
        "errors": {},
    }
    if isinstance(experiment, str):
        return entry | {"errors": {"file": experiment}}
    entry |= {
        "ids": list(getattr(experiment, "IDS", ())),
        "source": getattr(experiment, "SOURCE", ""),
        "question": (experiment.__doc__ or "").strip().partition("\n")[0],
    }
    analysed = (
        guarded(
            lambda: experiment.analyse(runs) if runs or not names else {},
            "analyse",
            entry["errors"],
        )
        or {}
    )
    figures = (
        guarded(
            lambda: [figure.to_dict() for figure in analysed.get("figures", ())],
            "analyse",
            entry["errors"],
        )
        or []
    )
    claims = (
        guarded(
            lambda: [claim.to_dict() for claim in experiment.claims(runs)],
            "claims",
            entry["errors"],
        )
        or []
    )
    planned = {run_list.seed_of(listed.runs[run]["overrides"]) for run in names}
    for claim in claims:
        if (
            0 < claim["seeds"] < len(planned)
        ):  # a seed that diverged or is not done is missing in the statistics
            lost = f" ({len(entry['failed'])} runs failed)" if entry["failed"] else ""
            claim["detail"] = "; ".join(
                filter(
                    None,
                    [claim["detail"], f"{claim['seeds']} of {len(planned)} planned seeds{lost}"],
                )
            )
    return entry | {"rows": list(analysed.get("rows", ())), "figures": figures, "claims": claims}


def guarded(work: Callable, what: str, errors: dict):
    """work(), or None with the error's last line under ``what``: one experiment's mistake does not
    take the report down.
    """
    try:
        return work()
    except Exception as error:
        errors[what] = described(error)
        return None


def described(error: Exception) -> str:
    return (
        str(error)
        if isinstance(error, UserError)
        else f"{type(error).__name__}: {tables.last_line(str(error))}"
    )


def environment(out: Path, names: list[str]) -> dict:
    """What the runs' run.json say, field by field; a list of values where the runs differ."""
    seen: dict[str, list] = {}
    for name in names:
        for key, value in (_read(out / name / "run.json") or {}).items():
            if value not in seen.setdefault(key, []):
                seen[key].append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in sorted(seen.items())}


def accounting(runs: list[dict]) -> list[dict]:
    """What each variant holds and costs, one entry per distinct model and budget; rates and seconds
    are means over its runs.
    """
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(
            json.dumps([run.get("variant"), run.get("account"), run.get("budget")], sort_keys=True),
            [],
        ).append(run)
    entries = []
    for members in groups.values():
        first, account, budget = (
            members[0],
            members[0].get("account") or {},
            members[0].get("budget") or {},
        )
        results = [run.get("result") or {} for run in members]
        entries.append(
            {
                "variant": first["variant"],
                "family": family_of(account["pattern"]) if account.get("pattern") else "other",
                "n": len(members),
                **{
                    key: account.get(key)
                    for key in (
                        "pattern",
                        "total",
                        "active",
                        "total_all",
                        "flops_per_token",
                        "row_bytes_per_token",
                        "row_dtype",
                        "table_over_ffn",
                    )
                },
                "table_bytes": (account.get("table_bytes") or {}).get(account.get("row_dtype")),
                "budget": (
                    {
                        key: budget.get(key)
                        for key in ("mode", "knob", "chosen", "target", "got", "residual")
                    }
                    if budget
                    else None
                ),
                "tokens": mean([result.get("tokens") for result in results]),
                "train_tokens_per_s": mean(
                    [result.get("train_tokens_per_s") for result in results]
                ),
                "seconds": mean(
                    [sum((run.get("seconds") or {}).values()) or None for run in members]
                ),
            }
        )
    return sorted(
        entries,
        key=lambda e: (
            FAMILIES.index(e["family"]),
            str(e["variant"]),
            str(e["pattern"]),
            -(e["total"] or 0),
        ),
    )


def mean(values: list) -> float | None:
    values = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return statistics.fmean(values) if values else None


def without_folders(text: str) -> str:
    """Text with every absolute path cut to its last part: a report travels, the machine's folders
    do not.
    """
    return re.sub(
        r"(?<![\w.:/])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\\"':,;()]+)+[/\\]([^\s/\\\"':,;()]*)",
        r"…/\1",
        text,
    )


def write(out: Path, *others: Path, modules: dict[str, ModuleType] | None = None) -> dict:
    """Writes results.json, report.html, report.md and report.tex, each whole or not at all; returns
    the results. Raises UserError as `collect`.

    others: further folders, of another scale for example, whose experiments come after those of
    ``out`` on one page, which is written to ``out``.
    """
    out = Path(out)
    results = collect(out, modules)
    drawn = curves(out, results)
    for folder in map(Path, others):
        more = collect(folder, modules)
        rename = {e["name"]: f"{e['name']} in {folder.name}" for e in more["experiments"]}
        drawn |= {
            rename[name]: rename[found] if isinstance(found, str) else found
            for name, found in curves(folder, more).items()
        }
        join(results, moved(more, Path(os.path.relpath(folder, out)).as_posix(), rename))
    page = report_page.page(results, drawn)
    write_text(
        out / "results.json",
        json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    )
    write_text(out / "report.html", page)
    write_text(out / "report.md", tables.markdown(results))
    write_text(out / "report.tex", tables.latex(results))
    return results


def moved(results: dict, place: str, rename: dict[str, str]) -> dict:
    """Results whose runs are named by where they lie as seen from another folder, and whose
    experiments have other names.
    """

    def runs(names):
        return [f"{place}/{name}" for name in names]

    experiments = [
        e
        | {
            "name": rename[e["name"]],
            **{key: runs(e[key]) for key in ("finished", "failed", "missing")},
        }
        for e in results["experiments"]
    ]
    named = {
        key: [run | {"name": f"{place}/{run['name']}"} for run in results[key]]
        for key in ("failed", "missing")
    }
    return (
        results
        | named
        | {
            "experiments": experiments,
            "runs": {f"{place}/{name}": files for name, files in results["runs"].items()},
        }
    )


def join(results: dict, more: dict) -> None:
    """Adds results to others, in place."""
    for key in ("experiments", "accounting", "failed", "missing"):
        results[key] += more[key]
    for key in ("expected", "finished"):
        results[key] += more[key]
    results["scale"] = ", ".join(dict.fromkeys([results["scale"], more["scale"]]))
    results["steps"] = sorted({*results["steps"], *more["steps"]})
    results["verdicts"] = {
        verdict: n + more["verdicts"][verdict] for verdict, n in results["verdicts"].items()
    }
    results["runs"] |= more["runs"]
    for key, value in more["environment"].items():
        known = results["environment"].setdefault(key, value)
        if known != value:
            known, value = (item if isinstance(item, list) else [item] for item in (known, value))
            results["environment"][key] = known + [item for item in value if item not in known]


def curves(out: Path, results: dict) -> dict[str, list[dict] | str]:
    """{experiment: its loss curves, or the name of an earlier experiment of the very same runs};
    see :func:`mean_curves`.
    """
    listed = run_list.read(out)
    made, seen = {}, {}
    for experiment in results["experiments"]:
        runs = [run for run in listed.runs.values() if experiment["name"] in run["experiments"]]
        names = tuple(run["name"] for run in runs)
        if names in seen:
            made[experiment["name"]] = seen[names]
            continue
        found = [
            (variant_of(run["name"]), run_family(out, run), metrics)
            for run in runs
            if (metrics := read_metrics(out / run["name"]))
        ]
        made[experiment["name"]] = mean_curves(found)
        seen |= {names: experiment["name"]} if names else {}
    return made


def run_family(out: Path, run: dict) -> str:
    """The family of a run that may still be going: by its config.json, which it writes first."""
    pattern = run["overrides"].get("model.pattern") or (
        (_read(out / run["name"] / "config.json") or {}).get("model") or {}
    ).get("pattern")
    return family_of(pattern) if pattern else "other"


def mean_curves(runs: list[tuple[str, str, list[dict]]]) -> list[dict]:
    """One loss curve per variant from (variant, family, metrics) of runs: the mean over those seeds
    that have come furthest.

    Returns [{"family", "label", "train": [(step, loss)], "val": [(step, loss)]}] in the order of
    the families; a run without a loss has none.
    """
    groups: dict[tuple, list] = {}
    for variant, kind, metrics in runs:
        groups.setdefault((FAMILIES.index(kind), variant), []).append(metrics)
    result = []
    for (place, variant), members in sorted(groups.items(), key=lambda item: item[0]):
        furthest = max(metrics[-1]["step"] for metrics in members)
        curve = {"family": FAMILIES[place], "label": variant}
        for name, key in (("train", "loss"), ("val", "val_loss")):
            losses: dict[int, list[float]] = {}
            for row in (
                row for metrics in members if metrics[-1]["step"] == furthest for row in metrics
            ):
                if isinstance(row.get(key), int | float) and math.isfinite(row[key]):
                    losses.setdefault(row["step"], []).append(row[key])
            curve[name] = [
                (step, statistics.fmean(values)) for step, values in sorted(losses.items())
            ]
        if curve["train"] or curve["val"]:
            result.append(curve)
    return result


def headline(results: dict) -> str:
    """The verdict table as plain text of 120 columns, the counts, and what is missing."""
    lines = [
        tables.plain(results),
        *tables.tally(results).split("; "),
        f"{results['finished']} of {results['expected']} runs finished",
    ]
    lines += [
        f"ERROR    {e['name']} ({what}): {error}"
        for e in results["experiments"]
        for what, error in e["errors"].items()
    ]
    lines += [
        f"FAILED   {run['name']} (exit {run['exit']}): {tables.last_line(run['error'])}"
        for run in results["failed"]
    ]
    waiting = [run["name"] for run in results["missing"] if tables.progress(run) == tables.WAITING]
    lines += [
        f"missing  {run['name']}: {tables.progress(run)}"
        for run in results["missing"]
        if run["name"] not in waiting
    ]
    lines += [f"missing  {len(waiting)} {tables.WAITING}: {', '.join(waiting)}"] if waiting else []
    return "\n".join(
        [lines[0], *(line if len(line) <= 120 else line[:119] + "…" for line in lines[1:])]
    )


def _read(path: Path):
    """The JSON of a file; None when it is absent or cut short."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def _clean(value):
    """Strict JSON without the machine: NaN and infinities become None, tuples lists, numpy's
    numbers Python's, absolute paths their last part, halves of surrogate pairs the replacement
    character.
    """
    if isinstance(value, dict):
        return {_clean(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, str):
        return without_folders(re.sub("[\ud800-\udfff]", "\ufffd", value))
    if hasattr(value, "item") and not isinstance(value, float):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="Writes results.json, report.html, report.md and report.tex.",
    )
    parser.add_argument(
        "out",
        type=Path,
        nargs="+",
        help="--out folders of experiments.run; the page of all is written to the first",
    )
    out, *others = parser.parse_args(argv).out
    try:
        results = write(out, *others)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(headline(results))
    print(
        f"\nreport: {out / 'report.html'}, {out / 'report.md'}, {out / 'report.tex'}; numbers:"
        f" {out / 'results.json'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
