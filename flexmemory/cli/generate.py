"""``flexmemory generate``: text from a TKV store alone, its rows read from disk or from a URL."""

import argparse
import json
import re
import sys
import time
from typing import TYPE_CHECKING

from flexmemory.cli.flags import Parser
from flexmemory.errors import UserError

if TYPE_CHECKING:
    from flexmemory.tkv.store import Store

UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30} | {
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}
# what the library calls otherwise than the command line
OPTIONS = {"ram": "ram_budget", "hot": "hot_budget", "ram=None": "ram_budget=all"}


def options() -> Parser:
    from flexmemory.runtime.cache import POLICIES

    policies, default = ", ".join(POLICIES), " (default %(default)s)"
    parser = Parser(
        "flexmemory generate", "Continue prompts with a model whose rows are read from a TKV store."
    )
    add = parser.add_argument
    add("--tkv", required=True, help="the store: a directory, s3://, gs:// or http(s)://")
    more = "give it again for more"
    add("--prompt", action="append", help=f"text to continue; {more}, which run together")
    add("--max_tokens", type=int, default=64, help=default.strip())
    add("--temperature", type=float, default=0.0, help=f"0 takes the likeliest token{default}")
    mass = "draw from the likeliest tokens of this mass"
    add("--top_p", type=float, default=1.0, help=mass + default)
    add("--seed", type=int, default=0, help=f"of the draws{default}")
    stop = f"text that ends the generation; {more}"
    add("--stop", action="append", default=[], help=stop)
    batch = "prompts that run at the same time"
    add("--max_batch", type=int, default=8, help=batch + default)
    ram = (
        "rows kept in memory: a size such as 64MiB, a share of the table such as 5%%, 0 for none,"
        " `all` for the whole table on the device"
    )
    add("--ram_budget", default="64MiB", help=ram + default)
    hot = "rows kept on the device: a size or a share"
    add("--hot_budget", default="0", help=hot + default)
    add("--ram_policy", default="lfu", help=f"which rows stay in memory: {policies}{default}")
    hot = f"which rows stay on the device: {policies}"
    add("--hot_policy", default="static", help=hot + default)
    window = "steps whose rows the policy `window` keeps"
    add("--window", type=int, default=256, help=window + default)
    ahead = "read the rows of this many likely next tokens while the token is drawn"
    add("--read_ahead", type=int, default=0, help=ahead + default)
    add("--no_check", action="store_true", help="do not verify the checksums of rows")
    stats = "print speeds, hits, waits and peak memory as JSON on stderr"
    add("--stats", action="store_true", help=stats)
    plan = "generate nothing: propose budgets from the token counts in the store and measured reads"
    add("--plan", action="store_true", help=plan)
    step = "with --plan: milliseconds of one decode step"
    add("--step_ms", type=float, default=20.0, help=step + default)
    return parser


def run(argv: list[str]) -> int:
    args = options().parse_args(argv)
    if not args.prompt and not args.plan:
        raise UserError("--prompt: missing; give a text to continue, or --plan")
    if args.max_batch < 1:
        raise UserError(f"--max_batch: {args.max_batch} must be above 0")

    from flexmemory.machine import peak_rss
    from flexmemory.runtime.engine import Engine
    from flexmemory.runtime.rows import Budgets
    from flexmemory.tkv.format import next_power
    from flexmemory.tkv.store import open_store

    began = time.perf_counter()
    store = open_store(args.tkv, check=not args.no_check)
    if args.plan:
        return show_budgets(store, args)
    table = store.manifest.table_bytes
    whole = args.ram_budget == "all"
    budgets = Budgets(
        ram=None if whole else parse_bytes("ram_budget", args.ram_budget, table),
        hot=parse_bytes("hot_budget", args.hot_budget, table),
        ram_policy=args.ram_policy,
        hot_policy=args.hot_policy,
        window=args.window,
    )
    max_batch = min(args.max_batch, next_power(len(args.prompt)))
    engine = Engine(store, budgets, progress=True, max_batch=max_batch, read_ahead=args.read_ahead)
    opened = time.perf_counter() - began
    first: list[float] = []

    def on_token(number: int, token: int) -> None:
        if not first:
            first.append(time.perf_counter() - began)

    sampling = (args.max_tokens, args.temperature, args.top_p, args.seed, args.stop)
    if len(args.prompt) == 1:
        # goes out with the first text, so that a refused request prints nothing
        unshown = [args.prompt[0]]

        def show(_: int, piece: str) -> None:
            sys.stdout.write("".join(unshown) + piece)
            sys.stdout.flush()
            unshown.clear()

        engine.generate(args.prompt, *sampling, on_token=on_token, on_text=show)
        print("".join(unshown))
    else:
        generations = engine.generate(args.prompt, *sampling, on_token=on_token)
        for n, (prompt, generation) in enumerate(zip(args.prompt, generations, strict=True), 1):
            print(f"--- {n}\n{prompt}{generation.text}")
    if args.stats:
        times = {"open_seconds": opened, "first_token_seconds": first[0]}
        print(json.dumps(engine.stats | times | {"peak_rss_bytes": peak_rss()}), file=sys.stderr)
    return 0


def show_budgets(store: "Store", args: argparse.Namespace) -> int:
    """Prints what budgets would do, and proposes some."""
    import numpy as np

    from flexmemory.bench.machine import drop_cache
    from flexmemory.models.blocks import layer_specs
    from flexmemory.runtime import budget
    from flexmemory.runtime.forward import first_memory_layer
    from flexmemory.runtime.rows import new_bundles
    from flexmemory.tkv.fold import layouts_of
    from flexmemory.tkv.format import shard_file

    m, groups, folder = store.manifest, store.groups, store.location.local
    counts_V = store.counts()
    if counts_V is None:
        raise UserError(
            f"--plan: {store.location.url} has no counts.npy, so how often tokens occur is not"
            " known; export it again beside the run's data"
        )
    if not groups:
        raise UserError(
            f"--plan: {store.location.url} has no memory layers, so there are no rows to keep"
        )

    def read(ids_U: np.ndarray) -> None:
        store.read_bundles(ids_U, new_bundles(layouts_of(groups), len(ids_U)))

    if folder is not None:  # what is measured is the disk, not the page cache
        drop_cache([folder / shard_file(g, k) for g in groups for k in range(g.shards)])
    specs = layer_specs(store.model)
    result = budget.try_budgets(
        counts_V,
        m.bundle_bytes,
        batch=args.max_batch,
        latency_us=budget.measure_latency(read, m.vocab_size, np.random.default_rng(0)),
        step_ms=args.step_ms,
        overlap_ms=args.step_ms * first_memory_layer(store.model) / len(specs),
        hot_available=parse_bytes("hot_budget", args.hot_budget, m.table_bytes),
        policy=args.ram_policy,
        hot_policy=args.hot_policy,
        window=args.window if "window" in (args.ram_policy, args.hot_policy) else 0,
    )
    print(budget.table(result))
    if args.stats:
        print(json.dumps(result), file=sys.stderr)
    return 0


def parse_bytes(flag: str, text: str, table_bytes: int) -> int:
    """Bytes of "64MiB", "1.5GB", "4096" or "5%" of the table. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*|%)", text)
    if not match or match[2] not in (*UNITS, "%"):
        raise UserError(f"--{flag}: {text!r} is not a size; write for example 64MiB, 1GiB, 5% or 0")
    unit = table_bytes / 100 if match[2] == "%" else UNITS[match[2]]
    return int(float(match[1]) * unit)
