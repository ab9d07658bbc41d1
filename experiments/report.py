"""The report over all experiments of an --out folder.

    python -m experiments.report runs/cpu [runs/gpu ...]

Reads what the runner left: the folder's list of runs, OUT/<run>/trained.json and measures/ (a
finished run), failed.json, run.json, config.json and metrics.jsonl. Writes results.json, which has
all that the report says, and four views of it: report.html, report.md, report.tex, summary.txt. It
works while runs are still going and says what is missing. Equal inputs give equal bytes.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from scipy.ndimage import uniform_filter1d

from experiments import catalogue, page, summary, tables
from experiments import runs as run_list
from experiments.chart import compute_share, family_of, mean_of
from experiments.plots import STYLES
from experiments.runs import read_json
from experiments.sweeps import variant_of
from experiments.verdicts import VERDICTS, Claim, number
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
MEASURED = {
    "tokens": "result.tokens",
    "val_loss": "result.val_loss",
    "bits_per_byte": "result.val_bits_per_byte",
    "recall": "result.recall_acc",
    "reasoning": "result.reasoning_acc",
    "train_tokens_per_s": "result.train_tokens_per_s",
    "decode_resident_tokens_per_s": "measures.decode.resident",
    "decode_disk_tokens_per_s": "measures.decode.offloaded",
}
CURVE_POINTS = 120
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # what no page may hold


def collect(*folders: Path, modules: dict[str, ModuleType] | None = None) -> dict:
    """Everything the report says (docs/formats.md has the keys), from the files of folders of runs;
    of folders only names are kept. The report lies in the first: runs of the others are named by
    where they are from there, their experiments after their folder.

    modules: experiment name -> module, instead of the catalogue's. Raises UserError for what is no
    folder of runs.
    """
    parts = [of_folder(Path(folder), Path(folders[0]), modules) for folder in folders]
    every = lambda key: [item for part in parts for item in part[key]]
    claims = [claim.verdict for entry in every("experiments") for claim in entry["claims"]]
    results = {
        "scale": ", ".join(dict.fromkeys(part["scale"] for part in parts)),
        "experiments": every("experiments"),
        "variants": every("variants"),
        "expected": len(every("runs")),
        "finished": len(every("done")),
        "verdicts": {verdict: claims.count(verdict) for verdict in VERDICTS},
        "steps": sorted(set(every("steps"))),
        "environment": environment(every("environments")),
        "seconds": seconds(every("done")),
        "failed": every("failed"),
        "missing": every("missing"),
        "runs": dict(every("runs")),
    }
    return clean(results)


def of_folder(out: Path, report: Path, modules: dict[str, ModuleType] | None) -> dict:
    """The lists of one folder that :func:`collect` joins, as told in a report in another."""
    listed = run_list.read(out)
    place = Path(os.path.relpath(out, report)).as_posix()
    at, label = ("", "") if place == "." else (f"{place}/", f" in {out.name}")
    names = [*listed.experiments, *(e for run in listed.runs.values() for e in run["experiments"])]
    known = {name: load(name, modules) for name in dict.fromkeys(names)}
    done, failed, missing = {}, {}, {}
    for name, steps in run_list.steps(listed).items():
        run = listed.runs[name]
        failure = read_json(out / name / "failed.json")
        if result := finished(out, run, [known[e] for e in run["experiments"]]):
            done[name] = result
        elif isinstance(failure, dict):
            error = str(failure.get("error") or "no message")
            failed[name] = {"name": at + name, "exit": failure.get("exit"), "error": error}
        else:
            step = max((row["step"] for row in read_metrics(out / name)), default=None)
            begun = (out / name / "log.txt").exists()
            missing[name] = {"name": at + name, "step": step, "steps": steps, "begun": begun}
    scale = listed.scale + (f", equal {listed.budget}" if listed.budget else "")
    experiments, seen = [], {}
    for name in listed.experiments:
        runs = {n: run for n, run in listed.runs.items() if name in run["experiments"]}
        entry = experiment(out, known[name], runs, failed) | {"name": name + label, "scale": scale}
        entry["missing"] = [n for n in runs if n in missing and n not in entry["finished"]]
        for key in ("finished", "failed", "missing"):
            entry[key] = [at + n for n in entry[key]]
        entry["curves"] = seen.get(tuple(runs)) or curves(out, list(runs.values()))
        if runs:
            seen.setdefault(tuple(runs), entry["name"])
        experiments.append(entry)
    return {
        "scale": scale,
        "experiments": experiments,
        "variants": variants(list(done.values())),
        "done": list(done.values()),
        "steps": list(run_list.steps(listed).values()),
        "environments": [read_json(out / name / "run.json") or {} for name in listed.runs],
        "failed": list(failed.values()),
        "missing": list(missing.values()),
        "runs": [
            (at + name, [file for file in LINKED if (out / name / file).exists()])
            for name in listed.runs
        ],
    }


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
    measures = [f.__name__ for module in modules for f in getattr(module, "MEASURES", ())]
    result = run_list.finished(out, run, dict.fromkeys(measures))
    return result and clean(result)


def experiment(out: Path, module: ModuleType | str, listed: dict[str, dict], failed: dict) -> dict:
    """What the report says of one experiment with these runs. ``module`` as :func:`load` returns
    it.
    """
    # another experiment's measures may be missing
    runs = [found for run in listed.values() if (found := finished(out, run, [module]))]
    done, errors = [run["name"] for run in runs], {}
    lost = [name for name in listed if name in failed and name not in done]
    planned = {run_list.seed_of(run["overrides"]) for run in listed.values()}

    def guarded(what: str, work: Callable, default):
        try:
            return work()
        except Exception as error:  # one experiment's mistake does not take the report down
            errors[what] = described(error)
            return default

    def whole(claim: Claim) -> Claim:
        """Names the seeds that are missing in the statistics: diverged, or not done."""
        if not 0 < claim.seeds < len(planned):
            return claim
        few = f"{claim.seeds} of {len(planned)} planned seeds"
        few += f" ({len(lost)} runs failed)" if lost else ""
        return dataclasses.replace(claim, detail="; ".join(filter(None, [claim.detail, few])))

    analysed, claims = {}, []
    if isinstance(module, str):
        errors["file"] = module
    else:
        if runs or not listed:
            analysed = guarded("analyse", lambda: module.analyse(runs), {})
        claims = guarded("claims", lambda: list(map(whole, module.claims(runs))), [])
    return {
        "ids": list(getattr(module, "IDS", ())),
        "source": getattr(module, "SOURCE", ""),
        "question": "" if errors.get("file") else (module.__doc__ or "").strip().split("\n")[0],
        "expected": len(listed),
        "finished": done,
        "failed": lost,
        **{key: analysed.get(key, []) for key in ("rows", "figures", "continuations", "tokens")},
        "claims": claims,
        "seeds": sorted({run["seed"] for run in runs}),
        "errors": errors,
    }


def described(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {tables.last_line(str(error))}"


def environment(runs: list[dict]) -> dict:
    """What the runs' run.json say, field by field; a list of values where the runs differ."""
    seen: dict[str, list] = {}
    for run in runs:
        for key, value in run.items():
            if value not in seen.setdefault(key, []):
                seen[key].append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in sorted(seen.items())}


def seconds(runs: list[dict]) -> dict[str, float]:
    """{"train" or a measure: its seconds, summed over the runs}"""
    total = Counter()
    for run in runs:
        total.update(run.get("seconds") or {})
    return dict(total)


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
    proofs = [ok for run in runs if (ok := number(run, "measures.fold.ok")) is not None]
    told = ("mode", "knob", "chosen", "target", "got", "residual")
    return {
        "name": first["variant"],
        "family": family_of(account["pattern"]) if account.get("pattern") else "other",
        "runs": len(runs),
        **{key: account.get(key) for key in ACCOUNT},
        "compute_share": account.get("ffn_widths") and compute_share(first),
        "table_bytes": (account.get("table_bytes") or {}).get(account.get("row_dtype")),
        "budget": {key: budget.get(key) for key in told} if budget else None,
        **{key: mean_of(runs, path)[0] for key, path in MEASURED.items()},
        "equal": all(proofs) if proofs else None,
        "seconds": mean_of(runs, lambda run: sum((run.get("seconds") or {}).values()) or None)[0],
    }


def curves(out: Path, runs: list[dict]) -> list[dict]:
    """The loss curves of the variants of these runs, also of those that are still going: {"family",
    "label", "train", "val"} in the order of the families; a run without a loss has none.
    """
    groups: dict[tuple, list] = {}
    for run in runs:
        if metrics := read_metrics(out / run["name"]):
            # config.json is what a run writes first
            model = (read_json(out / run["name"] / "config.json") or {}).get("model") or {}
            pattern = run["overrides"].get("model.pattern") or model.get("pattern")
            place = FAMILIES.index(family_of(pattern) if pattern else "other")
            groups.setdefault((place, variant_of(run["name"])), []).append(metrics)
    made = [
        {"family": FAMILIES[place], "label": label} | mean_curve(seeds)
        for (place, label), seeds in sorted(groups.items())
    ]
    return [curve for curve in made if curve["train"] or curve["val"]]


def mean_curve(seeds: list[list[dict]]) -> dict:
    """{"train", "val"}, lists of (step, loss), of the metrics of a variant's runs: the mean over
    those seeds that have come furthest; of the training loss a running mean.
    """
    furthest = max(metrics[-1]["step"] for metrics in seeds)
    rows = [row for metrics in seeds if metrics[-1]["step"] == furthest for row in metrics]

    def mean(key: str) -> list[tuple[int, float]]:
        losses: dict[int, list[float]] = {}
        for row in rows:
            if isinstance(row.get(key), int | float) and math.isfinite(row[key]):
                losses.setdefault(row["step"], []).append(row[key])
        return [(step, statistics.fmean(values)) for step, values in sorted(losses.items())]

    return {"train": smooth(mean("loss")), "val": mean("val_loss")}


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
    out, results = Path(out), collect(out, *others, modules=modules)
    results["seconds"] |= seconds or {}
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(out / "results.json", text + "\n")
    write_text(out / "report.html", page.render(results))
    write_text(out / "report.md", tables.markdown(results))
    write_text(out / "report.tex", tables.latex(results))
    write_text(out / "summary.txt", summary.ending(Path(), results) + "\n")
    return results


def clean(value):
    """Strict JSON without the machine: NaN and infinities become None, tuples lists, dataclasses
    dicts, numpy's numbers Python's, absolute paths their last part, control characters U+FFFD.
    """
    if dataclasses.is_dataclass(value):
        value = vars(value)
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
