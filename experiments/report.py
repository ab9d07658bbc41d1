"""The report over all experiments of an --out folder.

    python -m experiments.report runs/cpu [runs/gpu ...]

Reads what the runner left: the folder's list of runs, OUT/<run>/trained.json and measures/ (a
finished run), failed.json, run.json, config.json and metrics.jsonl. Writes results.json, which has
all that the report says, and four views of it: report.html, report.md, report.tex, summary.txt. It
works while runs are still going and says what is missing. Equal inputs give equal bytes.
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

from scipy.ndimage import uniform_filter1d

from experiments import catalogue, page, summary, tables
from experiments import runs as run_list
from experiments.chart import compute_share, family_of
from experiments.plots import STYLES
from experiments.sweeps import variant_of
from experiments.verdicts import VERDICTS, mean_spread, number
from flexmemory.cli.main import piped
from flexmemory.errors import UserError
from flexmemory.files import write_text
from flexmemory.run_folder import read_metrics

FAMILIES = tuple(STYLES)  # in the order of tables and legends
# of a run folder, where they are there
LINKED = ("config.json", "metrics.jsonl", "trained.json", "log.txt")
ACCOUNT = (
    *("pattern", "total", "active", "total_all", "flops_per_token", "row_bytes_per_token"),
    *("row_dtype", "table_over_ffn"),
)
CURVE_POINTS = 120
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # what no page may hold


def collect(out: Path, modules: dict[str, ModuleType] | None = None) -> dict:
    """Everything the report says (docs/formats.md has the keys), from the files of a folder; of
    folders only names are kept.

    modules: experiment name -> module, instead of the catalogue's. Raises UserError when ``out`` is
    no folder of runs.
    """
    out, listed = Path(out), run_list.read(out)
    names = [*listed.experiments, *(e for run in listed.runs.values() for e in run["experiments"])]
    known = {name: load(name, modules) for name in dict.fromkeys(names)}
    steps, done, failed, missing = run_list.steps(listed), {}, {}, {}
    for name, run in listed.runs.items():
        failure = read(out / name / "failed.json")
        if result := finished(out, run, [known[e] for e in run["experiments"]]):
            done[name] = result
        elif isinstance(failure, dict):
            error = str(failure.get("error") or "no message")
            failed[name] = {"name": name, "exit": failure.get("exit"), "error": error}
        else:
            step = max((row["step"] for row in read_metrics(out / name)), default=None)
            begun = (out / name / "log.txt").exists()
            missing[name] = {"name": name, "step": step, "steps": steps[name], "begun": begun}
    scale = listed.scale + (f", equal {listed.budget}" if listed.budget else "")
    experiments, seen = [], {}
    for name in listed.experiments:
        entry = experiment(out, name, known[name], listed, failed, missing) | {"scale": scale}
        runs = [run for run in listed.runs.values() if name in run["experiments"]]
        key = tuple(run["name"] for run in runs)
        entry["curves"] = seen[key] if key in seen else curves(out, runs)
        seen |= {key: name} if key not in seen and runs else {}
        experiments.append(entry)
    claims = [claim["verdict"] for entry in experiments for claim in entry["claims"]]
    results = {
        "scale": scale,
        "experiments": experiments,
        "variants": variants(list(done.values())),
        "expected": len(listed.runs),
        "finished": len(done),
        "verdicts": {verdict: claims.count(verdict) for verdict in VERDICTS},
        "steps": sorted(set(steps.values())),
        "environment": environment(out, list(listed.runs)),
        "seconds": seconds(list(done.values())),
        "failed": list(failed.values()),
        "missing": list(missing.values()),
        "runs": {
            name: [file for file in LINKED if (out / name / file).exists()] for name in listed.runs
        },
    }
    return clean(results)


def load(name: str, modules: dict[str, ModuleType] | None) -> ModuleType | str:
    """The experiment's module, or in one line why there is none."""
    try:
        return catalogue.load(name) if modules is None else modules[name]
    except KeyError:
        return f"experiment {name!r}: no such file"
    except Exception as error:  # one broken file must not take the report of the others down
        return described(error)


def finished(out: Path, run: dict, modules: list[ModuleType | str]) -> dict | None:
    """As ``run_list.finished`` with the measures of these experiments, also where one cannot be
    loaded; numbers that are not finite are None.
    """
    functions = [f for module in modules for f in getattr(module, "MEASURES", ())]
    result = run_list.finished(out, run, {function.__name__ for function in functions})
    return result and clean(result)


def experiment(out: Path, name: str, module: ModuleType | str, listed, failed, missing) -> dict:
    """What the report says of one experiment. ``module`` as :func:`load` returns it."""
    names = [run["name"] for run in listed.runs.values() if name in run["experiments"]]
    # another experiment's measures may be missing
    runs = [run for n in names if (run := finished(out, listed.runs[n], [module]))]
    done, errors = [run["name"] for run in runs], {}

    def guarded(what: str, work: Callable, default):
        try:
            return work()
        except Exception as error:  # one experiment's mistake does not take the report down
            errors[what] = described(error)
            return default

    def analyse():
        analysed = module.analyse(runs) if runs or not names else {}
        figures = [figure.to_dict() for figure in analysed.get("figures", ())]
        return analysed | {"rows": list(analysed.get("rows", ())), "figures": figures}

    analysed, claims = {}, []
    if isinstance(module, str):
        errors["file"] = module
    else:
        analysed = guarded("analyse", analyse, {})
        claims = guarded("claims", lambda: [c.to_dict() for c in module.claims(runs)], [])
    lost = [n for n in names if n in failed and n not in done]
    planned = {run_list.seed_of(listed.runs[n]["overrides"]) for n in names}
    for claim in claims:
        # a seed that diverged or is not done is missing in the statistics
        if 0 < claim["seeds"] < len(planned):
            few = f"{claim['seeds']} of {len(planned)} planned seeds"
            few += f" ({len(lost)} runs failed)" if lost else ""
            claim["detail"] = "; ".join(filter(None, [claim["detail"], few]))
    return {
        "name": name,
        "ids": list(getattr(module, "IDS", ())),
        "source": getattr(module, "SOURCE", ""),
        "question": "" if errors.get("file") else (module.__doc__ or "").strip().split("\n")[0],
        "expected": len(names),
        "finished": done,
        "failed": lost,
        "missing": [n for n in names if n in missing and n not in done],
        "rows": analysed.get("rows", []),
        "figures": analysed.get("figures", []),
        "continuations": analysed.get("continuations", []),
        "tokens": analysed.get("tokens", []),
        "claims": claims,
        "seeds": sorted({run["seed"] for run in runs}),
        "errors": errors,
    }


def described(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {tables.last_line(str(error))}"


def environment(out: Path, names: list[str]) -> dict:
    """What the runs' run.json say, field by field; a list of values where the runs differ."""
    seen: dict[str, list] = {}
    for name in names:
        for key, value in (read(out / name / "run.json") or {}).items():
            if value not in seen.setdefault(key, []):
                seen[key].append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in sorted(seen.items())}


def seconds(runs: list[dict]) -> dict[str, float]:
    """{"train" or a measure: its seconds, summed over the runs}"""
    total: dict[str, float] = {}
    for run in runs:
        for what, value in (run.get("seconds") or {}).items():
            total[what] = total.get(what, 0.0) + value
    return total


def variants(runs: list[dict]) -> list[dict]:
    """What each variant holds, reaches and costs, one entry per distinct model and budget; numbers
    that are measured are means over its runs.
    """
    groups: dict[str, list[dict]] = {}
    for run in runs:
        key = json.dumps([run["variant"], run.get("account"), run.get("budget")], sort_keys=True)
        groups.setdefault(key, []).append(run)
    entries = [variant(group) for group in groups.values()]
    return sorted(entries, key=lambda entry: FAMILIES.index(entry["family"]))


def variant(runs: list[dict]) -> dict:
    """One entry of :func:`variants`."""
    first = runs[0]
    account, budget = first.get("account") or {}, first.get("budget")

    def mean(path: str) -> float | None:
        values = [number(run, path) for run in runs]
        return mean_spread([v for v in values if isinstance(v, int | float)])[0]

    proofs = [ok for run in runs if (ok := number(run, "measures.fold.ok")) is not None]
    told = ("mode", "knob", "chosen", "target", "got", "residual")
    times = [sum((run.get("seconds") or {}).values()) or None for run in runs]
    share = account.get("ffn_widths") and compute_share(first)
    return {
        "name": first["variant"],
        "family": family_of(account["pattern"]) if account.get("pattern") else "other",
        "runs": len(runs),
        **{key: account.get(key) for key in ACCOUNT},
        "compute_share": share,
        "table_bytes": (account.get("table_bytes") or {}).get(account.get("row_dtype")),
        "budget": {key: budget.get(key) for key in told} if budget else None,
        "tokens": mean("result.tokens"),
        "val_loss": mean("result.val_loss"),
        "bits_per_byte": mean("result.val_bits_per_byte"),
        "recall": mean("result.recall_acc"),
        "reasoning": mean("result.reasoning_acc"),
        "train_tokens_per_s": mean("result.train_tokens_per_s"),
        "decode_resident_tokens_per_s": mean("measures.decode.resident"),
        "decode_disk_tokens_per_s": mean("measures.decode.offloaded"),
        "equal": all(proofs) if proofs else None,
        "seconds": mean_spread(times)[0],
    }


def curves(out: Path, runs: list[dict]) -> list[dict]:
    """The loss curves of an experiment's runs, also of those that are still going."""
    result = []
    for run in runs:
        if metrics := read_metrics(out / run["name"]):
            # config.json is what a run writes first
            model = (read(out / run["name"] / "config.json") or {}).get("model") or {}
            pattern = run["overrides"].get("model.pattern") or model.get("pattern")
            family = family_of(pattern) if pattern else "other"
            result.append((variant_of(run["name"]), family, metrics))
    return mean_curves(result)


def mean_curves(runs: list[tuple[str, str, list[dict]]]) -> list[dict]:
    """One loss curve per variant from (variant, family, metrics) of runs: the mean over those seeds
    that have come furthest; of the training loss a running mean.

    Returns [{"family", "label", "train": [(step, loss)], "val": [(step, loss)]}] in the order of
    the families; a run without a loss has none.
    """
    groups: dict[tuple, list] = {}
    for name, family, metrics in runs:
        groups.setdefault((FAMILIES.index(family), name), []).append(metrics)
    result = []
    for (place, label), members in sorted(groups.items(), key=lambda item: item[0]):
        furthest = max(metrics[-1]["step"] for metrics in members)
        rows = [row for m in members if m[-1]["step"] == furthest for row in m]
        curve = {"family": FAMILIES[place], "label": label}
        for name, key in (("train", "loss"), ("val", "val_loss")):
            losses: dict[int, list[float]] = {}
            for row in rows:
                if isinstance(row.get(key), int | float) and math.isfinite(row[key]):
                    losses.setdefault(row["step"], []).append(row[key])
            curve[name] = [(step, statistics.fmean(ys)) for step, ys in sorted(losses.items())]
        curve["train"] = smooth(curve["train"])
        if curve["train"] or curve["val"]:
            result.append(curve)
    return result


def smooth(points: list, share: float = 0.08) -> list[tuple[int, float]]:
    """Running mean over a share of the points, thinned to 120 at most."""
    if len(points) < 2 / share:
        return points
    steps, losses = zip(*points, strict=True)
    means = uniform_filter1d(losses, int(share * len(losses)), mode="nearest")
    every = math.ceil(len(points) / CURVE_POINTS)
    return [(step, round(float(y), 5)) for step, y in zip(steps, means, strict=True)][::every]


def write(
    out: Path,
    *others: Path,
    modules: dict[str, ModuleType] | None = None,
    seconds: dict[str, float] | None = None,
) -> dict:
    """Writes results.json and its views, each whole or not at all; returns the results. Raises
    UserError as :func:`collect`.

    others: further folders, of another scale for example, whose experiments come after those of
    ``out``; the report is written to ``out``. seconds: of the launcher, see summary.times.
    """
    out = Path(out)
    results = collect(out, modules)
    for folder in map(Path, others):
        join(results, moved(collect(folder, modules), os.path.relpath(folder, out), folder.name))
    results["seconds"] |= seconds or {}
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(out / "results.json", text + "\n")
    write_text(out / "report.html", page.render(results))
    write_text(out / "report.md", tables.markdown(results))
    write_text(out / "report.tex", tables.latex(results))
    write_text(out / "summary.txt", summary.ending(Path(), results) + "\n")
    return results


def moved(results: dict, place: str, label: str) -> dict:
    """Results whose runs are named by where they lie as seen from another folder, and whose
    experiments are named after their own.
    """
    at = lambda name: f"{Path(place).as_posix()}/{name}"
    for e in results["experiments"]:
        e["name"] += f" in {label}"
        e |= {key: list(map(at, e[key])) for key in ("finished", "failed", "missing")}
        if isinstance(e["curves"], str):
            e["curves"] += f" in {label}"
    for run in results["failed"] + results["missing"]:
        run["name"] = at(run["name"])
    return results | {"runs": {at(name): files for name, files in results["runs"].items()}}


def join(results: dict, more: dict) -> None:
    """Adds results to others, in place."""
    for key in ("experiments", "variants", "failed", "missing", "expected", "finished"):
        results[key] += more[key]
    results["scale"] = ", ".join(dict.fromkeys([results["scale"], more["scale"]]))
    results["steps"] = sorted({*results["steps"], *more["steps"]})
    results["runs"] |= more["runs"]
    for key in ("verdicts", "seconds"):
        sums, terms = results[key], more[key]
        results[key] = {name: sums.get(name, 0) + terms.get(name, 0) for name in sums | terms}
    for key, value in more["environment"].items():
        known = results["environment"].setdefault(key, value)
        if known != value:
            known, value = (item if isinstance(item, list) else [item] for item in (known, value))
            results["environment"][key] = known + [item for item in value if item not in known]


def read(path: Path):
    """The JSON of a file; None when it is absent or cut short."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def clean(value):
    """Strict JSON without the machine: NaN and infinities become None, tuples lists, numpy's
    numbers Python's, absolute paths their last part, control characters U+FFFD.
    """
    if isinstance(value, dict):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, str):
        return without_folders(CONTROL.sub("\ufffd", value))
    if hasattr(value, "item") and not isinstance(value, float):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def without_folders(text: str) -> str:
    """Text with every absolute path cut to its last part: a report travels, a machine's folders do
    not.
    """
    path = r"(?<![\w.:/])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\\"':,;()]+)+[/\\]([^\s/\\\"':,;()]*)"
    return re.sub(path, r"…/\1", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m experiments.report", description=__doc__)
    help = "--out folders of experiments.run; the report on all is written to the first"
    parser.add_argument("out", type=Path, nargs="+", help=help)
    out, *others = parser.parse_args(argv).out
    try:
        results = write(out, *others)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary.ending(out, results))
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
