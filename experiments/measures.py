"""Measures that need a store or a clock: the fold with its proof, and decoding from the device and
from disk. The others are in flexmemory/analysis.
"""

from pathlib import Path

from flexmemory.analysis.trained import Trained
from flexmemory.models.accounting import account
from flexmemory.run_folder import read_metrics
from flexmemory.runtime.engine import Engine
from flexmemory.runtime.rows import Budgets
from flexmemory.runtime.verify import verify
from flexmemory.tkv.export import export

DECODE_TOKENS = 48
RAM_SHARE = 0.25  # of the table, so that decoding really reads from disk
PROMPT = "Question: Where was"


def fold(trained: Trained) -> dict:
    """The run exported to WORKDIR/store (float32) and compared with the live model: the figures of
    ``flexmemory verify``, seconds and bytes.
    """
    made = export(trained.workdir, store(trained), progress=False)
    proof = verify(store(trained), trained.workdir)
    return {
        "export_s": made["seconds"],
        "table_bytes": account(trained.cfg.model)["table_bytes"]["float32"],
        **{
            key: proof[key]
            for key in (
                "ok",
                "rows_max_abs_diff",
                "logits_max_abs_diff",
                "logits_max_rel_diff",
                "greedy_equal",
            )
        },
    }


def decode(trained: Trained) -> dict:
    """Greedy decoding of 48 tokens, one sequence, with the rows on the device ("resident") and with
    a quarter of them in RAM and all on disk ("offloaded"): tokens/s of both, the share of lookups
    that RAM answered, the text.
    """
    export(trained.workdir, store(trained), progress=False)
    ram = int(account(trained.cfg.model)["table_bytes"]["float32"] * RAM_SHARE)
    resident, _, _ = timed(Engine.from_run(trained.workdir, max_batch=1))
    offloaded, rows, text = timed(Engine(store(trained), Budgets(ram=ram), max_batch=1))
    looked = rows["ram"]["hits"] + rows["ram"]["misses"]
    return {
        "resident": resident,
        "offloaded": offloaded,
        "hit_rate": rows["ram"]["hits"] / looked if looked else None,
        "prompt": PROMPT,
        "text": text,
    }


def store(trained: Trained) -> Path:
    return trained.workdir / "store"


def timed(engine: Engine) -> tuple[float, dict, str]:
    """(tokens/s with compilation and prefill left out, counters of the row source, text)"""
    with engine:
        text = engine.generate([PROMPT], max_tokens=DECODE_TOKENS, stop_at_eos=False)[0].text
        return engine.stats["decode_tokens_per_s"], engine.source.stats(), text


def training_curve(trained: Trained) -> dict:
    """{"points": [(step, training loss)]} as logged."""
    return {
        "points": [
            (row["step"], row["loss"]) for row in read_metrics(trained.workdir) if "loss" in row
        ]
    }
