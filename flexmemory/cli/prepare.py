"""``flexmemory prepare``: text to token shards."""

import argparse

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
    print(f"{args.out}: vocabulary {index['vocab_size']:,}, questions {index['questions']:,}")
    line = "{:<6}{:>16}{:>14}{:>18}{:>13}{:>8}".format
    print(line("split", "tokens", "documents", "bytes", "bytes/token", "shards"))
    for split, entry in index["splits"].items():
        tokens, documents, size = (entry[key] for key in ("tokens", "documents", "bytes"))
        density = f"{size / tokens:.2f}" if tokens else "-"
        counts = (f"{count:,}" for count in (tokens, documents, size))
        print(line(split, *counts, density, len(entry["shards"])))
    return 0
