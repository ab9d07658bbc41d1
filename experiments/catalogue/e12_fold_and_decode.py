"""Is the folded table exactly the FFN, and does decoding from it cost less than computing?

MemoryLLM, equations 2.9 and 2.10, and Table 6 (1B, one A100, BF16, sequence 2,048, loading from
storage included): decoding 21.50 ms a token for base, 18.75, 20.28, 21.47 for flex beta 1, 2, 3,
14.42 for MemoryLLM (1.49 times base); batch size, storage and cache are not given. Expected:
equality bit by bit in float32, MemoryLLM faster than base, beta 3 hardly. A small model's step is
mostly overhead and its speed is not judged: `flexmemory bench decode` is the benchmark.

    python -m experiments.run e12 --scale=cpu         # E2's runs
"""

from experiments import scales
from experiments.chart import bars, means
from experiments.measures import decode, fold
from experiments.verdicts import difference, exact_claim, judge, not_run, number

IDS = ("E12",)
SOURCE = "MemoryLLM Eq 2.9-2.10, Table 6"
MEASURES = (fold, decode)
LARGE = 50_000_000  # parameters: the step of a smaller model is mostly overhead


def sweep(scale):
    return scales.sweep(scale, "dense memoryllm flex-b3 flex-b2 flex-b1")


def ms(where):
    return lambda run: 1000 / rate if (rate := number(run, f"measures.decode.{where}")) else None


def analyse(runs):
    rows = means(
        runs,
        "account.active measures.fold.export_s measures.fold.rows_max_abs_diff"
        " measures.fold.logits_max_abs_diff measures.decode.hit_rate",
        table_bytes="account.table_bytes.float32",
        resident_ms=ms("resident"),
        from_disk_ms=ms("offloaded"),
    )
    title = "Decoding one sequence, a quarter of the table in RAM"
    return {"rows": rows, "figures": [bars("decode", title, runs, ms("offloaded"), "ms per token")]}


def bit_by_bit(proof):
    differences = proof["rows_max_abs_diff"], proof["logits_max_abs_diff"]
    return differences == (0, 0) and proof["greedy_equal"]


def stores_claim(text, paper, runs, equal, how):
    """The claim that the store of every model with rows is ``equal`` to it, by ``fold``'s proof."""
    own = [run for run in runs if number(run, "account.row_bytes_per_token")]
    found = [equal(proof) for run in own if (proof := number(run, "measures.fold"))]
    if not found:
        return not_run(text, paper, "needs a finished run")
    seeds = len({run["seed"] for run in runs})
    return exact_claim(text, paper, f"{sum(found)} of {len(found)} {how}", all(found), seeds)


def claims(runs):
    text = "A folded table gives the live model's rows, logits and text exactly"
    paper, how = "exact up to storage precision", "stores bit by bit"
    exact = stores_claim(text, paper, runs, bit_by_bit, how)
    large = [run for run in runs if run["account"]["total"] >= LARGE]
    text = "MemoryLLM decodes faster than a dense model of equal total parameters"
    paper = "14.42 against 21.50 ms (1B, A100)"
    needs = (
        f"dense and memoryllm of {LARGE // 10**6} million parameters; for small models see"
        " flexmemory bench decode"
    )
    speed = difference(large, "memoryllm", "dense", ms("resident"))
    return [exact, judge(text, paper, speed, -1, "ms", needs=needs)]
