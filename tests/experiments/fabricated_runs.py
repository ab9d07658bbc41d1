"""Fabricated runs of an experiment: configs and accounts are real, results and measures are drawn,
so that every sweep, analyse and claims of the catalogue runs without a training.
"""

import dataclasses
import functools
import json
import random

from experiments import catalogue
from experiments.budgets import solve
from experiments.sweeps import variant_of, with_fields
from flexmemory.config import Config
from flexmemory.models.accounting import account
from flexmemory.models.blocks import layer_specs


def runs_of(name: str, scale: str) -> list[dict]:
    """Finished runs of a catalogue's experiment, as experiments.report hands them over."""
    module = catalogue.load(name)
    rows = catalogue.sweep_of(module, scale)
    return [run_of(row, [f.__name__ for f in catalogue.measures_of(module)]) for row in rows]


def run_of(row: dict, measures: list[str]) -> dict:
    overrides = {key: value for key, value in row.items() if key != "name"}
    size = int(overrides.get("prepare.tokenizer", "bpe:512").removeprefix("bpe:"))
    fields = {"model.vocab_size": size} | overrides | {"train.seed": 0}
    cfg, budget, numbers = costs_of(json.dumps(fields))
    rng = random.Random(row["name"])
    loss = 2 + rng.random()
    result = scores(rng, loss) | {"step": cfg.train.steps, "val_bits_per_byte": loss / 1.5}
    result |= {"tokens": cfg.train.steps * 2048, "reasoning_chance": 0.1, "recall_chance": 1 / 16}
    return {
        "name": row["name"],
        "variant": variant_of(row["name"]),
        "seed": row.get("train.seed", 0),
        "overrides": overrides,
        "config": dataclasses.asdict(cfg),
        "account": numbers,
        "budget": budget,
        "data_fingerprint": str(overrides.get("prepare.source")) + str(size),
        "result": result | {"train_tokens_per_s": 9000.0},
        "seconds": {"train": 20.0},
        "measures": {name: MEASURES[name](rng, cfg.model, loss, numbers) for name in measures},
    }


@functools.cache
def costs_of(overrides: str) -> tuple[Config, dict | None, dict]:
    """(config, what its budget chose, its account) of overrides as JSON, which seeds share."""
    fields = json.loads(overrides)
    cfg, budget = with_fields(Config(), fields), None
    if "budget" in fields:
        cfg, budget = solve(cfg, fields["budget"])
    return cfg, budget, account(cfg.model, cfg.data.seq_len)


def scores(rng: random.Random, loss: float) -> dict:
    kinds = {kind: 0.6 + 0.4 * rng.random() for kind in ("cloze", "copy", "lookup1", "lookup2")}
    accuracies = {"recall_acc": 0.6 + 0.4 * rng.random(), "reasoning_acc": kinds["copy"]}
    return {"val_loss": loss, "perplexity": 2.7**loss, **accuracies, "kinds": kinds}


def alpha(rng, model, loss, numbers):
    alphas = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    return {"points": [{"alpha": a, **scores(rng, loss + 1 - a)} for a in alphas]}


def drop_layer(rng, model, loss, numbers):
    layers = per_layer(model, lambda spec: spec.row_width or spec.d_ffn)
    rises = [
        {"perplexity_rise": 10 * rng.random(), **scores(rng, loss + rng.random())} for _ in layers
    ]
    return {"whole": scores(rng, loss), "layers": [a | b for a, b in zip(layers, rises)]}


def drop_last(rng, model, loss, numbers):
    table, n = numbers["table_bytes"]["bfloat16"], len(layer_specs(model))
    rows = [{"dropped": i, "table_bytes_gone": table * i // n} for i in range(n + 1)]
    rises = [{"perplexity_rise": 1.0 * i, **scores(rng, loss + 0.1 * i)} for i in range(n + 1)]
    return {"table_bytes": table, "points": [a | b for a, b in zip(rows, rises)]}


def clusters(rng, model, loss, numbers):
    found = [{"size": 10 - i, "seen": 5, "examples": ["a", "\n"]} for i in range(4)]
    points = [[rng.random(), rng.random(), rng.randrange(4)] for _ in range(30)]
    return {"layer": 0, "k": 4, "explained": [0.3, 0.2], "clusters": found, "points": points}


def cluster_coefficient(rng, model, loss, numbers):
    keys = ("coefficient", "fresh", "permuted")
    layers = per_layer(model, lambda spec: spec.d_memory)
    return {"layers": [row | {key: rng.random() for key in keys} for row in layers]}


def outliers(rng, model, loss, numbers):
    keys = ("above_3", "above_6", "fresh_above_3", "fresh_above_6")
    layers = per_layer(model, lambda spec: spec.d_memory)
    return {"layers": [row | {"keys": 88} | {key: rng.random() for key in keys} for row in layers]}


def spectra(rng, model, loss, numbers):
    values = {"ranks": [1, 2, 3], "singular_values": [1.0, 0.5, 0.2], "width": 3}
    layers = per_layer(model, lambda spec: spec.row_width)
    return {"layers": [row | values | {"effective_rank": rng.random()} for row in layers]}


def angular(rng, model, loss, numbers):
    layers = per_layer(model, lambda spec: spec.row_width)
    for row in layers:
        row |= {"width": 88, "random_p95": 0.2, "edges": [-1.0, 0.0, 1.0]}
        for key in ("rows", "weighted", "fresh"):
            row[key] = {"p50": 0.1, "p95": rng.random(), "mean": 0.0, "density": [0.4, 0.6]}
    return {"layers": layers}


def unique_growth(rng, model, loss, numbers):
    points = [
        {"tokens": n, "unique": n**0.8, "lowest": n // 2, "highest": n, "values": 9 * n**0.8}
        for n in (1, 2, 4, 8)
    ]
    return {"points": points, "exponent": 0.5 + rng.random() / 3, "factor": 2.0}


def compressed(keys):
    def measure(rng, model, loss, numbers):
        facts = {"table_bytes": 1000, "saved": 0.3, "relative_error": 0.01, "ranks": [1]}
        return {"points": [key | facts | scores(rng, loss + 0.01 * rng.random()) for key in keys]}

    return measure


def hit_curves(rng, model, loss, numbers):
    policies = {"clairvoyant": 0.95, "lfu": 0.85, "static": 0.84, "lru": 0.7}
    points = [
        {"share": share, "slots": int(512 * share), "bytes": 4096, "expected": {"lfu": 0.8}}
        | {policy: rate * (0.5 + share) for policy, rate in policies.items()}
        for share in (0.01, 0.1, 0.25, 0.5)
    ]
    return {"cold": 0.05 + 0.05 * rng.random(), "points": points}


def pruned(rng, model, loss, numbers):
    whole = numbers["active"]
    points = [{"rule": "none", "kept": 1.0, "active": whole, **scores(rng, loss)}]
    for kept in (1 / 8, 2 / 8, 3 / 8, 0.5):
        for rule in ("magnitude", "wanda"):
            active = int(whole * (4 + 8 * kept) / 12)
            points.append(
                {"rule": rule, "kept": kept, "active": active, **scores(rng, loss + 1 - kept)}
            )
    return {"points": points}


def fold(rng, model, loss, numbers):
    diffs = dict.fromkeys(("rows_max_abs_diff", "logits_max_abs_diff", "logits_max_rel_diff"), 0.0)
    return {"export_s": rng.random(), "ok": True, "greedy_equal": True, "table_bytes": 9, **diffs}


def decode(rng, model, loss, numbers):
    rates = {"resident": 900 + rng.random(), "offloaded": 500 + rng.random()}
    return rates | {"hit_rate": 0.8, "prompt": "Question", "text": "is this"}


def training_curve(rng, model, loss, numbers):
    return {"points": [(step, loss + 9 / step + 0.1 * rng.random()) for step in range(1, 200, 5)]}


def per_layer(model, has):
    specs = enumerate(layer_specs(model))
    return [{"layer": layer, "kind": spec.kind} for layer, spec in specs if has(spec)]


ENCODINGS = (("float32", 0), ("bfloat16", 0), ("int8", 0), ("int8", 32), ("int4", 0), ("int4", 32))


def tokens(rng, model, loss, numbers):
    layers = per_layer(model, lambda spec: spec.row_width)
    near = [{"token": " a", "cosine": 0.4}]
    word = {"token": " the", "count": 10, "norms": [rng.random() for _ in layers], "nearest": near}
    return {"tokens": [word]}


MEASURES = {
    "quantised": compressed([{"dtype": dtype, "scale_group": group} for dtype, group in ENCODINGS]),
    "svd": compressed([{"cut": cut} for cut in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)]),
} | {
    function.__name__: function
    for function in (alpha, drop_layer, drop_last, clusters, cluster_coefficient, outliers, spectra)
    + (angular, unique_growth, hit_curves, pruned, fold, decode, tokens)
    + (training_curve,)
}
