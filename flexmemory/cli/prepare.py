"""flexmemory prepare: text to token shards."""

from __future__ import annotations

import argparse

from flexmemory.cli.flags import Parser
from flexmemory.data import sources
from flexmemory.data.prepare import SHARD_TOKENS, prepare


def run(argv: list[str]) -> int:
    """Runs the command with its arguments, program and subcommand left out; returns the exit code.

    Raises:
      UserError: bad arguments or bad text.
    """
    args = _parser().parse_args(argv)
    index = prepare(
        args.source,
        args.tokenizer,
        args.out,
        val_fraction=args.val_fraction,
        workers=args.workers,
        shard_tokens=args.shard_tokens,
        seed=args.seed,
    )
    print(f"{args.out}: vocabulary {index['vocab_size']:,}, questions {index['questions']:,}")
    line = "{:<6}{:>16}{:>14}{:>18}{:>13}{:>8}".format
    print(line("split", "tokens", "documents", "bytes", "bytes/token", "shards"))
    for split, entry in index["splits"].items():
        tokens, documents, size = (entry[key] for key in ("tokens", "documents", "bytes"))
        density = f"{size / tokens:.2f}" if tokens else "-"
        counts = (f"{count:,}" for count in (tokens, documents, size))
        print(line(split, *counts, density, len(entry["shards"])))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "flexmemory prepare",
        "Turn text into token shards. Run the same command again to go on after an interruption.",
        epilog=sources.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", required=True, help="where the text comes from; see below")
    parser.add_argument(
        "--tokenizer", required=True, help="byte, bpe:SIZE, a tokenizer.json, or hf:NAME"
    )
    parser.add_argument("--out", required=True, help="directory of the dataset")
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=0.02,
        help="share of the documents for validation (default %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=None, help="threads that tokenise (default: every core)"
    )
    parser.add_argument(
        "--shard_tokens",
        type=int,
        default=SHARD_TOKENS,
        help="tokens in a shard, at most (default %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the train/validation split (default %(default)s)"
    )
    return parser
