"""The report of a sweep folder: results.json, report.html and the headline table.

    python -m experiments.report runs/demo

Reads what the runner left: OUT/sweep.json (the expected runs), OUT/<name>/variant.json (a finished run), OUT/<name>/failed.json,
OUT/<name>/run.json and OUT/<name>/metrics.jsonl. It works while runs are still going and says what is missing. Equal inputs give equal bytes.
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

from experiments import report_page
from flexmemory.errors import UserError
from flexmemory.files import write_text
from flexmemory.models.patterns import parse_pattern
from flexmemory.train.run import read_metrics

FAMILIES = ("dense", "layers", "flex", "memoryllm", "stem", "parallel", "attn_only", "other")  # in the order of tables and legends
MEANS = ("total", "active", "total_all", "active_all", "val_loss", "val_bits_per_byte", "recall_acc", "recall_chance", "reasoning_acc",
         "reasoning_chance", "train_tokens_per_s", "rows_per_token", "flops_per_token", "row_bytes_per_token", "table_bytes",
         "table_over_ffn", "export_s", "decode_tps_resident", "decode_tps_offloaded", "cache_hit_rate")


def collect(out: Path) -> dict:
    """Everything the report states, from the files of a sweep folder; of the run folders only names are kept.

    Returns {"experiment", "scale", "source", "tokenizer", "steps", "expected": count, "environment", "variants": one entry per finished
    run with the keys of its variant.json, "summary": one entry per variant over its seeds, "failed", "missing", "unlisted"}.
    Raises UserError when ``out`` is no sweep folder or its sweep.json cannot be read.
    """
    out = Path(out)
    if not out.is_dir():
        raise UserError(f"sweep folder {out}: not there; run `python -m experiments.run cm_ratio --out={out}` first")
    finished = sorted(path.parent.name for path in out.glob("*/variant.json"))
    sweep = {}
    if (out / "sweep.json").exists():
        sweep = _read(out / "sweep.json")
        if not isinstance(sweep, dict) or not isinstance(sweep.get("runs"), list):
            raise UserError(f"sweep folder {out}: sweep.json is not a list of runs; run the sweep again, finished runs are kept")
    elif not finished:
        raise UserError(f"sweep folder {out}: holds neither sweep.json nor a finished run; give the --out of experiments.run")
    expected = [{key: run[key] for key in run if key != "sets"} for run in sweep.get("runs") or [{"name": name} for name in finished]]
    variants, failed, missing = [], [], []
    for run in expected:
        folder = out / run["name"]
        done = _read(folder / "variant.json")
        if isinstance(done, dict):
            variants.append(_clean({**run, **done}))
        elif (folder / "failed.json").exists():
            failure = _read(folder / "failed.json") or {}
            failed.append(_clean({**run, **failure, "stage": failure.get("stage") or f"exit {failure.get('exit', 'code unknown')}",
                                  "error": without_folders(str(failure.get("error") or "no message"))}))
        else:
            metrics = read_metrics(folder)
            missing.append(_clean({**run, "step": metrics[-1]["step"] if metrics else None}))
    listed = {run["name"] for run in expected}
    sweep = {**(sweep.get("data") or {}), **sweep}  # source and tokenizer are prepare's arguments
    steps = sweep.get("steps") or max((run["steps"] for run in variants if run.get("steps")), default=None)
    return {
        "experiment": sweep.get("experiment", out.name), "scale": sweep.get("scale"), "source": without_folders(sweep.get("source")),
        "tokenizer": without_folders(sweep.get("tokenizer")), "steps": steps, "expected": len(expected),
        "environment": environment(out, [v["name"] for v in variants + failed + missing]),
        "variants": variants, "summary": summarise(variants), "failed": failed, "missing": missing,
        "unlisted": [name for name in finished if name not in listed],
    }


def environment(out: Path, names: list[str]) -> dict:
    """What the runs' run.json say, field by field; a list of values where the runs differ."""
    seen: dict[str, list] = {}
    for name in names:
        for key, value in (_read(out / name / "run.json") or {}).items():
            if value not in seen.setdefault(key, []):
                seen[key].append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in sorted(seen.items())}


def family(run: dict) -> str:
    """Which colour and marker a run takes: one of FAMILIES. Both ways through the C/M ratio share their ends."""
    axis, pattern = run.get("axis"), str(run.get("pattern"))
    if axis in ("beta", "layers", "end") and run.get("c_fraction") in (0, 1):
        return "dense" if run["c_fraction"] else "memoryllm"
    if axis in ("beta", "layers"):
        return "flex" if axis == "beta" else "layers"
    return next((kind for kind in ("attn_only", "parallel", "stem") if kind in pattern), "other")


def label(run: dict) -> str:
    """The short name of a variant in figures: β=3, 2C+6M (dense and memory layers), an end's family, else the run's name without its seed."""
    kind = family(run)
    if kind in ("dense", "memoryllm"):
        return kind
    if kind == "flex":
        return f"β={run['beta']:g}" if isinstance(run.get("beta"), int | float) else f"β={run.get('beta')}"
    if kind == "layers":
        layers = parse_pattern(run["pattern"], set(re.findall(r"[a-z][\w-]*", run["pattern"])))
        return f"{layers.count('dense')}C+{len(layers) - layers.count('dense')}M"
    return variant_name(run)


def variant_name(run: dict) -> str:
    return re.sub(r"-s\d+$", "", run["name"])


def summarise(variants: list[dict]) -> list[dict]:
    """One entry per (axis, pattern, beta): means over the seeds, ``<key>_std`` (sample standard deviation, None for one seed).

    ``delta_dense`` is the mean of val_loss minus the dense run's *of the same seed*, so that the seeds are paired.
    ``equal`` says whether every store of the variant equals its resident model, None without a store.
    """
    groups: dict[tuple, list[dict]] = {}
    for run in variants:
        groups.setdefault((str(run.get("axis")), str(run.get("pattern")), str(run.get("beta"))), []).append(run)
    dense = {run.get("seed"): run.get("val_loss") for run in variants if family(run) == "dense"}
    summary = []
    for runs in groups.values():
        first, checks = runs[0], [run["ok"] for run in runs if run.get("ok") is not None]
        entry = {"variant": variant_name(first), "label": label(first), "family": family(first),
                 **{key: first.get(key) for key in ("axis", "pattern", "beta", "c_fraction")},
                 "n": len(runs), "seeds": [run.get("seed") for run in runs], "runs": [run["name"] for run in runs]}
        for key in MEANS:
            entry[key], entry[key + "_std"] = mean_std([run.get(key) for run in runs])
        entry["delta_dense"], entry["delta_dense_std"] = mean_std(
            [run["val_loss"] - dense[run.get("seed")] for run in runs
             if run.get("val_loss") is not None and dense.get(run.get("seed")) is not None])
        entry["kinds"] = {kind: mean_std([(run.get("kinds") or {}).get(kind) for run in runs])[0]
                          for kind in sorted({kind for run in runs for kind in run.get("kinds") or {}})}
        entry["equal"] = all(checks) if checks else None
        summary.append(entry)
    return sorted(summary, key=lambda e: (FAMILIES.index(e["family"]), -(e["c_fraction"] or 0), e["variant"]))


def mean_std(values: list) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation) of the values that are there; None where there are too few."""
    values = [value for value in values if value is not None]
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def without_folders(text: str | None) -> str | None:
    """Text with every absolute path cut to its last part: a report travels, the machine's folders do not."""
    return text and re.sub(r"(?<![\w.:/])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\\"':,;()]+)+[/\\]([^\s/\\\"':,;()]*)", r"…/\1", text)


def write(out: Path) -> dict:
    """Writes OUT/results.json and OUT/report.html, each whole or not at all, and returns the results. Raises UserError as `collect`."""
    out = Path(out)
    results = collect(out)
    metrics = {run["name"]: (run, read_metrics(out / run["name"])) for run in results["variants"] + results["failed"] + results["missing"]}
    page = report_page.page(results, curves([pair for pair in metrics.values() if pair[1] and "axis" in pair[0]]))
    write_text(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(out / "report.html", page)
    return results


def curves(runs: list[tuple[dict, list[dict]]]) -> list[dict]:
    """One loss curve per variant from (run, its metrics): the mean over those seeds that have come furthest.

    Returns [{"family", "label", "train": [(step, loss)], "val": [(step, loss)]}] in the order of the tables.
    """
    groups: dict[tuple, list] = {}
    for run, metrics in runs:
        groups.setdefault((FAMILIES.index(family(run)), -(run.get("c_fraction") or 0), label(run)), []).append(metrics)
    result = []
    for (place, _, text), members in sorted(groups.items()):
        furthest = max(metrics[-1]["step"] for metrics in members)
        curve = {"family": FAMILIES[place], "label": text}
        for name, key in (("train", "loss"), ("val", "val_loss")):
            losses: dict[int, list[float]] = {}
            for row in (row for metrics in members if metrics[-1]["step"] == furthest for row in metrics):
                if isinstance(row.get(key), int | float) and math.isfinite(row[key]):
                    losses.setdefault(row["step"], []).append(row[key])
            curve[name] = [(step, statistics.fmean(values)) for step, values in sorted(losses.items())]
        result.append(curve)
    return result


def headline(results: dict) -> str:
    """The headline table as plain text, for a terminal of about 120 columns."""
    short = report_page.SHORT
    head = ("variant", "C/M", "n", "total", "active", "val loss", "Δ dense", "bits/B", "recall", "reason", "train t/s", "table", "decode t/s", "= disk")
    rows = []
    for e in results["summary"]:
        decode = f"{short['rate'](e['decode_tps_resident'])} / {short['rate'](e['decode_tps_offloaded'])}"
        rows.append((e["variant"], short["ratio"](e["c_fraction"]), str(e["n"]), short["count"](e["total"]), short["count"](e["active"]),
                     short["loss"](e["val_loss"]) + (f" ±{e['val_loss_std']:.3f}" if e["val_loss_std"] is not None else ""),
                     short["signed"](e["delta_dense"]), short["loss"](e["val_bits_per_byte"]), short["share"](e["recall_acc"]),
                     short["share"](e["reasoning_acc"]), short["rate"](e["train_tokens_per_s"]), short["bytes"](e["table_bytes"]),
                     decode, {True: "yes", False: "NO", None: "–"}[e["equal"]]))
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
             for row in [head, *rows]]
    lines.insert(1, "─" * max(map(len, lines)))
    chances = [f"{task} {report_page.chance(results['summary'], task)}" for task in ("recall", "reasoning")
               if report_page.chance(results["summary"], task)]
    if chances:
        lines.append("chance: " + ", ".join(chances) + "; decode: resident / tables on disk")
    if results["summary"] and max(e["n"] for e in results["summary"]) == 1:
        lines.append("one seed: differences in loss below about 0.015 nat decide nothing")
    lines += [f"FAILED   {run['name']} ({run['stage']}): {run['error'].strip().splitlines()[-1]}" for run in results["failed"]]
    lines += [f"missing  {run['name']}: {report_page.progress(run, results['steps'])}" for run in results["missing"]]
    return "\n".join(lines)


def _read(path: Path):
    """The JSON of a file; None when it is absent or cut short."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def _clean(value):
    """NaN and infinities become None, so that results.json is strict JSON."""
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description="Writes results.json and report.html of a sweep folder.")
    parser.add_argument("out", type=Path, help="the sweep folder, the --out of experiments.run")
    out = parser.parse_args(argv).out
    try:
        results = write(out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(headline(results))
    print(f"\n{len(results['variants'])} of {results['expected']} runs; report: {out / 'report.html'}, numbers: {out / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
