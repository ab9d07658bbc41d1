"""A fabricated --out folder with experiment modules of its own: finished, failed, running and
missing runs, all kinds of figures and claims.
"""

import json
import math
import random
from pathlib import Path
from types import ModuleType

from experiments.figure import Figure, Series
from experiments.verdicts import Claim

# variant, pattern, validation loss of seed 0
VARIANTS = [
    ("dense", "dense*4", 2.30),
    ("flex-b1", "flex*4", 2.40),
    ("flex-b3", "flex*4", 2.34),
    ("layers-2c", "dense*2 memoryllm*2", 2.35),
    ("memoryllm", "memoryllm*4", 2.45),
    ("stem", "(stem dense)*2", 2.38),
    ("attn-only", "attn_only*4", 2.70),
]
STEPS = 200


def done(planned: dict, variant: str, loss: float) -> dict:
    overrides = planned["overrides"]
    pattern = overrides["model.pattern"]
    memory = pattern not in ("dense*4", "attn_only*4")
    budget = {
        "mode": "active",
        "knob": "model.d_ff",
        "chosen": {"model.d_ff": 344},
        "target": 262_144,
        "got": 262_000,
        "residual": -0.00055,
    }
    return {
        "name": planned["name"],
        "overrides": overrides,
        "config": {"model": {"pattern": pattern}, "train": {"steps": STEPS}},
        "account": {
            "pattern": pattern,
            "total": 786_432,
            "active": 262_144 if memory else 786_432,
            "total_all": 900_000,
            "flops_per_token": 2_100_000,
            "row_bytes_per_token": 2048 if memory else 0,
            "row_dtype": "float32",
            "table_over_ffn": 2.0 if memory else None,
            "table_bytes": {"float32": 4_194_304 if memory else 0, "int8": 1_048_576},
        },
        "budget": budget if variant == "stem" else None,
        "data_fingerprint": "204885c1dbe474d8",
        "result": {
            "step": STEPS,
            "val_loss": loss,
            "recall_acc": 0.3,
            "tokens": 409_600,
            "train_tokens_per_s": 9000.0,
        },
        "seconds": {"train": 20.0},
    }


def metrics(folder: Path, loss: float, steps: int = STEPS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": s, "loss": loss + 3 / s, "tokens_per_s": 9000.0} for s in range(1, steps + 1, 5)
    ]
    rows += [{"step": s, "val_loss": loss + 2.5 / s} for s in range(50, steps + 1, 50)]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9'
    )  # cut by a kill


def folder(out: Path) -> Path:
    """14 runs: flex-b1-s1 failed, memoryllm-s1 is at step 96, attn-only-s1 has no folder.
    Experiment e9 shares e1's first runs; gone has no file.
    """
    runs = []
    for seed in (0, 1):
        for variant, pattern, loss in VARIANTS:
            experiments = [
                "e1_loss_order",
                "e2_same_runs",
                *["e9_curves"] * (variant in ("dense", "memoryllm")),
                *["s17_broken"] * (variant == "dense"),
            ]
            planned = {
                "name": f"{variant}-s{seed}",
                "experiments": experiments,
                "overrides": {
                    "model.pattern": pattern,
                    "train.seed": seed,
                    "train.steps": STEPS,
                    "prepare.source": "/home/someone/texts",
                },
            }
            runs.append(planned)
            at = out / planned["name"]
            if planned["name"] == "attn-only-s1":
                continue
            metrics(at, loss, steps=100 if planned["name"] == "memoryllm-s1" else STEPS)
            (at / "config.json").write_text(
                json.dumps({"data": {"path": "/home/someone/out/data/01234567"}})
            )
            versions = {"jax": "0.11.1", "flax": "0.12.8"}
            (at / "run.json").write_text(
                json.dumps({"device": "cpu", "platform": "cpu", "git": "abc", "versions": versions})
            )
            if planned["name"] == "flex-b1-s1":
                error = 'File "/home/someone/flexmemory/x.py", line 3\nOSError: disk <full>'
                (at / "failed.json").write_text(
                    json.dumps({"name": planned["name"], "exit": 1, "error": error})
                )
            elif planned["name"] == "memoryllm-s1":
                (at / "log.txt").write_text("compiling\n")
            else:
                loss += 0.02 * seed
                (at / "trained.json").write_text(json.dumps(done(planned, variant, loss)))
                (at / "measures").mkdir()
                (at / "measures" / "alpha.json").write_text(
                    json.dumps(
                        {
                            "seconds": 2.0,
                            "of": [STEPS, loss],
                            "result": {"losses": [loss, loss + 0.1]},
                        }
                    )
                )
    out.mkdir(exist_ok=True)
    names = ["e1_loss_order", "e2_same_runs", "e9_curves", "s17_broken", "gone"]
    (out / "runs.json").write_text(json.dumps({"scale": "cpu", "experiments": names, "runs": runs}))
    return out


def module(doc: str, **names) -> ModuleType:
    made = ModuleType("fabricated", doc)
    made.__dict__.update(names)
    return made


def alpha(trained):
    """A measure of the contract; here its files are there already."""
    raise AssertionError("a report measures nothing")


def loss_order(runs: list[dict]) -> dict:
    points = {
        variant: [run["result"]["val_loss"] for run in runs if run["variant"] == variant]
        for variant, *_ in VARIANTS
    }
    kinds = dict(
        zip(
            points,
            ("dense", "flex", "flex", "layers", "memoryllm", "stem", "attn_only"),
            strict=True,
        )
    )
    points = {variant: losses for variant, losses in points.items() if losses}
    rows = [
        {
            "variant": variant,
            "family": kinds[variant],
            "seeds": len(losses),
            "val_loss": losses[0],
            "val_loss_std": 0.0123 if len(losses) > 1 else None,
            "equal": True,
            "note": None,
            "words": "the quick brown fox jumps over the lazy dog, token by token",
        }
        for variant, losses in points.items()
    ]
    bars = tuple(
        Series(variant, ((i, losses[0], 0.012),), "bars", kinds[variant])
        for i, (variant, losses) in enumerate(points.items())
    )
    line = tuple((100 * i / 6, losses[0], 0.01) for i, losses in enumerate(points.values()))
    figures = [
        Figure(
            "order",
            "Loss of every variant",
            "Means over seeds; whiskers: <spread>.",
            "",
            "validation loss, nat per token",
            bars,
            ticks=tuple((i, variant) for i, variant in enumerate(points)),
        ),
        Figure(
            "share",
            "Loss against the compute share",
            "Two ways from all memory to all compute.",
            "compute share C of the FFN weights, %",
            "validation loss, nat per token",
            (
                Series("", line, "line", "flex"),
                Series("", tuple((x, y + 0.03) for x, y, _ in line), "line", "layers", dashed=True),
                *(
                    Series(variant, ((x, y, 0.012),), "points", kinds[variant])
                    for (x, y, _), variant in zip(line, points, strict=True)
                ),
            ),
            lines=((2.38, "stem"),),
            noise=0.015,
        ),
    ]
    return {"rows": rows, "figures": figures}


def curves(runs: list[dict]) -> dict:
    rng = random.Random(0)
    policies = tuple(
        Series(
            name,
            tuple((2**i, min(1, base + 0.09 * i)) for i in range(11)),
            "line",
            dashed=name == "clairvoyant",
        )
        for name, base in (("lru", 0.05), ("lfu", 0.06), ("static", 0.11), ("clairvoyant", 0.2))
    )
    cloud = tuple(
        Series(
            f"cluster {c}",
            tuple(
                (math.cos(c) * 4 + rng.gauss(0, 1), math.sin(c) * 4 + rng.gauss(0, 1))
                for _ in range(167)
            ),
            "points",
        )
        for c in range(12)
    )
    names = tuple((i, f"layer {i} of the model") for i in range(24))
    grouped = tuple(
        Series(label, tuple((i, rng.random(), 0.05) for i in range(24)), "bars", family)
        for label, family in (("trained", "memoryllm"), ("fresh", "other"))
    )
    return {
        "rows": [
            {"layer": i, "tokens": i * 1000, "coefficient": rng.gauss(0, 1), "rate": 1e-7 * i}
            for i in range(55)
        ],
        "figures": [
            Figure(
                "hits",
                "Hit rate against the budget",
                "Decoding one token at a time.",
                "rows kept",
                "hit rate",
                policies,
                log_x=True,
                lines=((0.9, "one miss in ten"),),
            ),
            Figure(
                "map",
                "Map of the clusters",
                "Two components of the coefficients.",
                "first component",
                "second component",
                cloud,
            ),
            Figure(
                "layers",
                "Coefficient of each layer",
                "Beside fresh weights.",
                "layer",
                "silhouette",
                grouped,
                ticks=names,
            ),
            Figure(
                "empty",
                "Nothing yet",
                "Not measured.",
                "x",
                "y",
                (Series("none", ((1.0, float("nan")), (float("inf"), 1.0)), "line"),),
            ),
        ],
    }


def boom(runs: list[dict]):
    raise KeyError("what the measure lacks, at /home/someone/flexmemory/x.py")


def modules() -> dict[str, ModuleType]:
    order = [
        Claim(
            "The loss rises from dense to flex to memoryllm",
            "Table 2: 19.73 < 20.70 < 22.08 ppl",
            "dense→memoryllm +0.1500 ± 0.0041 nat",
            "reproduced",
            2,
            "95% interval ± 0.0369",
        ),
        Claim(
            "A β of 3 is as good as dense",
            "+0.97 ppl",
            "+0.0400 ± 0.0200 nat",
            "within noise",
            2,
            "about 5 seeds would decide, 2.5 times the compute",
        ),
        Claim(
            "Layers near the input matter most & <most>", "Fig 9", "−0.0100 nat", "contradicted", 2
        ),
    ]
    return {
        "e1_loss_order": module(
            "Is the loss ordered as the ratio?\n\nMore.",
            IDS=("E1",),
            SOURCE="MemoryLLM Table 2",
            analyse=loss_order,
            claims=lambda runs: order,
        ),
        "e2_same_runs": module(
            "Does the same hold at equal active parameters, where the question is long enough to"
            " need a second line?",
            IDS=("E2",),
            SOURCE="MemoryLLM Fig 9",
            analyse=lambda runs: {"rows": [], "figures": []},
            claims=lambda runs: [
                Claim("All of it", "+2.35 C4 ppl", "", "not run", 0, "needs memoryllm of one seed")
            ],
        ),
        "e9_curves": module(
            "What do caches hit?", IDS=("E9",), SOURCE="§4", analyse=curves, claims=lambda runs: []
        ),
        "s17_broken": module(
            "Broken.", IDS=("S17",), SOURCE="STEM Fig 3", analyse=boom, claims=boom
        ),
    }
