"""One run of a sweep from training to proof: train, fold, verify, generate, time decoding; written to variant.json when all is done."""

import importlib
import json
import time
from pathlib import Path

import jax

from flexmemory.config import Config, default_config, from_dict
from flexmemory.data.shards import read_index
from flexmemory.errors import UserError
from flexmemory.files import write_json
from flexmemory.models.accounting import account
from flexmemory.runtime.engine import Engine
from flexmemory.runtime.rows import Budgets
from flexmemory.tkv.export import export
from flexmemory.tkv.verify import verify
from flexmemory.train.loop import train

DECODE_TOKENS = 48
RAM_BUDGET_SHARE = 0.25  # of the table, so that decoding really reads from disk


def config_with(sets: dict) -> Config:
    """The default config with dotted fields set; an unknown one raises UserError."""
    values = default_config().to_dict()
    for path, value in sets.items():
        section, _, name = path.partition(".")
        if name not in values.get(section, {}):
            raise UserError(f"sweep sets {path!r}: no such config field")
        values[section][name] = value
    return from_dict(values)


def run_variant(out: Path, spec: dict, row: dict) -> dict:
    """All stages of one run, each skipped or resumed where it was already done. Returns and writes what the report needs."""
    workdir, data = out / row["name"], out / "data"
    cfg = config_with(row["sets"] | {"data.path": str(data), "model.vocab_size": read_index(data)["vocab_size"]})
    cfg = importlib.import_module(f"experiments.{spec['experiment']}").fit(cfg, row["axis"])
    final, train_s = stage(workdir, "train", lambda: train(cfg, workdir))
    exported, export_s = stage(workdir, "export", lambda: export(workdir, workdir / "store"))
    proof, verify_s = stage(workdir, "verify", lambda: proved(workdir))
    numbers = account(cfg.model, cfg.data.seq_len)
    budget = int(numbers["table_bytes"]["float32"] * RAM_BUDGET_SHARE)
    decoded, decode_s = stage(workdir, "decode", lambda: {
        "resident": decode(Engine.from_run(workdir, max_batch=1), spec["prompt"]),
        "offloaded": decode(Engine(workdir / "store", Budgets(ram=budget), max_batch=1), spec["prompt"])})
    result = {
        "name": row["name"], "axis": row["axis"], "pattern": row["pattern"], "beta": row["beta"], "c_fraction": row["c_fraction"],
        "seed": row["seed"], "status": "done", "d_ff": cfg.model.d_ff,
        **{key: numbers[key] for key in ("total", "active", "total_all", "active_all", "flops_per_token", "table_over_ffn")},
        "row_bytes_per_token": numbers["row_bytes_per_token"], "table_bytes": numbers["table_bytes"]["float32"],
        **{key: final.get(key) for key in ("val_loss", "val_bits_per_byte", "recall_acc", "recall_chance", "reasoning_acc",
                                           "reasoning_chance", "kinds", "train_tokens_per_s", "mfu", "rows_per_token", "tokens")},
        "flops_saved_share": (final.get("flops") or {}).get("saved_share"),
        "steps": final["step"], "export_s": exported["seconds"],
        **{key: proof[key] for key in ("ok", "rows_max_abs_diff", "logits_max_abs_diff", "logits_max_rel_diff", "greedy_equal")},
        "decode_tps_resident": decoded["resident"]["tokens_per_s"], "decode_tps_offloaded": decoded["offloaded"]["tokens_per_s"],
        "cache_hit_rate": hit_rate(decoded["offloaded"]["rows"]), "prompt": spec["prompt"], "sample": decoded["offloaded"]["text"],
        "seconds": {"train": train_s, "export": export_s, "verify": verify_s, "decode": decode_s},
        "device": jax.devices()[0].device_kind, "platform": jax.default_backend(),
    }
    write_json(workdir / "variant.json", result)
    return result


def proved(workdir: Path) -> dict:
    """The figures of ``flexmemory verify``; a store that is not equal to its run fails the stage."""
    proof = verify(workdir / "store", workdir)
    if not proof["ok"]:
        raise RuntimeError(f"{workdir.name}: the store is not equal to the run: {proof}")
    return proof


def stage(workdir: Path, name: str, function) -> tuple[dict, float]:
    """(result, seconds) of one stage, from stages/<name>.json when it was finished before."""
    path = workdir / "stages" / f"{name}.json"
    if not path.exists():
        began = time.perf_counter()
        result = function()
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"seconds": time.perf_counter() - began, "result": result})
    known = json.loads(path.read_text())
    return known["result"], known["seconds"]


def decode(engine: Engine, prompt: str) -> dict:
    """{"text" greedy, "tokens_per_s" with compilation and prefill left out, "rows" counters of the row source}."""
    text = engine.generate([prompt], max_tokens=DECODE_TOKENS, stop_at_eos=False)[0].text
    return {"text": text, "tokens_per_s": engine.stats["decode_tokens_per_s"], "rows": engine.source.stats()}


def hit_rate(rows: dict) -> float | None:
    """Share of the looked-up rows that RAM had; None in a model without memory layers."""
    looked = rows["ram"]["hits"] + rows["ram"]["misses"]
    return rows["ram"]["hits"] / looked if looked else None
