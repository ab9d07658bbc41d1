"""``flexmemory prepare``: text to token shards."""

import argparse

from rich import box
from rich.console import Console
from rich.table import Table

from flexmemory.cli.flags import Parser
from flexmemory.data import sources
from flexmemory.data.prepare import SHARD_TOKENS, prepare


def run(argv: list[str]) -> int:
    parser = Parser(
        "flexmemory prepare",
        "Turn text into token shards. Run the same command again to go on after an interruption.",
        epilog=sources.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--source", required=True, help="where the text comes from; see below")
    add("--tokenizer", required=True, help="byte, bpe:SIZE, a tokenizer.json, or hf:NAME")
    add("--out", required=True, help="directory of the dataset")
    share = "share of the documents for validation (default %(default)s)"
    add("--val_fraction", type=float, default=0.02, help=share)
    add("--workers", type=int, help="threads that tokenise (default: every core)")
    most = "tokens in a shard, at most (default %(default)s)"
    add("--shard_tokens", type=int, default=SHARD_TOKENS, help=most)
    add("--seed", type=int, default=0, help="of the train/validation split (default %(default)s)")
    args = parser.parse_args(argv)
    index = prepare(**vars(args))
    vocabulary, questions = index["vocab_size"], index["questions"]
    title = f"{args.out}: vocabulary {vocabulary}, questions {questions}"
    table = Table("split", box=box.SIMPLE_HEAD, title=title)
    for name in ("tokens", "documents", "bytes", "bytes/token", "shards"):
        table.add_column(name, justify="right")
    for split, entry in index["splits"].items():
        density = f"{entry['bytes'] / entry['tokens']:.2f}" if entry["tokens"] else "-"
        counts = (f"{entry[key]:,}" for key in ("tokens", "documents", "bytes"))
        table.add_row(split, *counts, density, str(len(entry["shards"])))
    Console().print(table)
    return 0
