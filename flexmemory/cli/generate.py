"""``flexmemory generate``: text from a TKV store alone, its rows read from disk or from a URL."""

import json
import re
import sys
import time

from flexmemory.cli.flags import Parser
from flexmemory.errors import UserError

UNITS = {
    "": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}


def run(argv: list[str]) -> int:
    from flexmemory.runtime.cache import POLICIES

    policies = ", ".join(POLICIES)
    parser = Parser(
        "flexmemory generate", "Continue prompts with a model whose rows are read from a TKV store."
    )
    parser.add_argument(
        "--tkv", required=True, help="the store: a directory, s3://, gs:// or http(s)://"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        help="text to continue; give it again for more, which run together",
    )
    parser.add_argument("--max_tokens", type=int, default=64, help="(default %(default)s)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest token (default %(default)s)",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens of this mass (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default %(default)s)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="text that ends the generation; give it again for more",
    )
    parser.add_argument(
        "--max_batch",
        type=int,
        default=8,
        help="prompts that run at the same time (default %(default)s)",
    )
    parser.add_argument(
        "--ram_budget",
        default="64MiB",
        help=(
            "rows kept in memory: a size such as 64MiB, a share of the table such as 5%%, 0 for "
            "none, `all` for the whole table on the device (default %(default)s)"
        ),
    )
    parser.add_argument(
        "--hot_budget",
        default="0",
        help="rows kept on the device: a size or a share (default %(default)s)",
    )
    parser.add_argument(
        "--ram_policy",
        default="lfu",
        help=f"which rows stay in memory: {policies} (default %(default)s)",
    )
    parser.add_argument(
        "--hot_policy",
        default="static",
        help=f"which rows stay on the device: {policies} (default %(default)s)",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=256,
        help="steps whose rows the policy `window` keeps (default %(default)s)",
    )
    parser.add_argument(
        "--read_ahead",
        type=int,
        default=0,
        help=(
            "read the rows of this many likely next tokens while the token is drawn "
            "(default %(default)s)"
        ),
    )
    parser.add_argument(
        "--no_check", action="store_true", help="do not verify the checksums of rows"
    )
    parser.add_argument(
        "--stats",
        action="store_true",
        help="print speeds, hits, waits and peak memory as JSON on stderr",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help=(
            "generate nothing: propose budgets from the token counts in the store and measured"
            " reads"
        ),
    )
    parser.add_argument(
        "--step_ms",
        type=float,
        default=20.0,
        help="with --plan: milliseconds of one decode step (default %(default)s)",
    )
    args = parser.parse_args(argv)
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
    budgets = Budgets(
        ram=None if args.ram_budget == "all" else parse_bytes("ram_budget", args.ram_budget, table),
        hot=parse_bytes("hot_budget", args.hot_budget, table),
        ram_policy=args.ram_policy,
        hot_policy=args.hot_policy,
        window=args.window,
    )
    engine = Engine(
        store,
        budgets,
        progress=True,
        max_batch=min(args.max_batch, next_power(len(args.prompt))),
        read_ahead=args.read_ahead,
    )
    opened = time.perf_counter() - began
    first: list[float] = []
    options = dict(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop=args.stop,
        on_token=lambda *_: first or first.append(time.perf_counter() - began),
    )
    if len(args.prompt) == 1:
        shown = [
            args.prompt[0]
        ]  # goes out with the first text, so that a refused request prints nothing

        def show(_, piece: str) -> None:
            sys.stdout.write("".join(shown) + piece)
            sys.stdout.flush()
            shown.clear()

        engine.generate(args.prompt, on_text=show, **options)
        print("".join(shown))
    else:
        for number, (prompt, generation) in enumerate(
            zip(args.prompt, engine.generate(args.prompt, **options), strict=True), 1
        ):
            print(f"--- {number}\n{prompt}{generation.text}")
    if args.stats:
        print(
            json.dumps(
                engine.stats
                | {
                    "open_seconds": opened,
                    "first_token_seconds": first[0],
                    "peak_rss_bytes": peak_rss(),
                }
            ),
            file=sys.stderr,
        )
    return 0


def show_budgets(store, args) -> int:
    """Prints what budgets would do, and proposes some."""
    import numpy as np

    from flexmemory.bench.machine import drop_cache
    from flexmemory.files import allocate
    from flexmemory.models.blocks import layer_specs
    from flexmemory.runtime import budget
    from flexmemory.runtime.forward import first_memory_layer
    from flexmemory.tkv.format import shard_file

    counts_V = store.counts()
    if counts_V is None:
        raise UserError(
            f"--plan: {store.location.url} has no counts.npy, so how often tokens occur is not"
            " known; export it again beside the run's data"
        )
    if not store.groups:
        raise UserError(
            f"--plan: {store.location.url} has no memory layers, so there are no rows to keep"
        )

    def read(ids_U: np.ndarray) -> None:
        store.read_bundles(
            ids_U, {group.name: allocate(len(ids_U), group.bundle_bytes) for group in store.groups}
        )

    if store.location.local is not None:  # what is measured is the disk, not the page cache
        drop_cache(
            [
                store.location.local / shard_file(group, k)
                for group in store.groups
                for k in range(group.shards)
            ]
        )
    latency = budget.measure_latency(read, store.manifest.vocab_size, np.random.default_rng(0))
    overlap = args.step_ms * first_memory_layer(store.model) / len(layer_specs(store.model))
    result = budget.try_budgets(
        counts_V,
        store.manifest.bundle_bytes,
        batch=args.max_batch,
        latency_us=latency,
        step_ms=args.step_ms,
        overlap_ms=overlap,
        hot_available=parse_bytes("hot_budget", args.hot_budget, store.manifest.table_bytes),
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
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*|%)", text)
    if not found or found[2] not in (*UNITS, "%"):
        raise UserError(f"--{flag}: {text!r} is not a size; write for example 64MiB, 1GiB, 5% or 0")
    unit = table_bytes / 100 if found[2] == "%" else UNITS[found[2]]
    return int(float(found[1]) * unit)
