"""``flexmemory bench``: measurements as JSON, with the limits of the same machine measured in the
same run.

A bench is a module of flexmemory.bench with ``measure(scratch, scale, **own) -> dict``; ``own`` are
the options of OPTIONS_OF. Where it has ``CONFIGS``, a Config for each scale, it takes
--config=FILE[:ARG] and --config.SECTION.FIELD=VALUE instead of or on top of it.
"""

import dataclasses
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from flexmemory import files
from flexmemory.cli.flags import Parser, check_override, config_of, parse
from flexmemory.config import Config
from flexmemory.errors import UserError, nearest

BENCHES = {
    "read": "gathers of rows from a store: cold, page cache, TensorStore, RAM, against the disk and"
    " memcpy",
    "decode": "tokens/s offloaded against resident, memoryllm against dense; waits, peak memory,"
    " time to the first token",
    "export": "writing a store against the disk's sequential write and the fold alone",
    "train": "tokens/s of training steps of several kinds in turn, against the matmul; rows per"
    " token, memory, compile time",
    "table": "the update of learned tables against the size of the vocabulary",
    "sharding": "bytes between devices of a sharded table's lookup, ours against the partitioner's",
}
OPTIONS_OF: dict[str, dict[str, dict[str, Any]]] = {
    "train": {
        "--kinds": dict(
            help="layer kinds with options, KIND[:naive][:BETA][:TABLE_OPTIMIZER], with commas"
            " (default: dense, memoryllm with and without naive, attn_only and flex:3)"
        ),
        "--data": dict(
            help="folder of `flexmemory prepare` to take ids from (default: the config's data.path;"
            " without one a Zipf law)"
        ),
        "--config": dict(
            help="FILE or FILE:ARG, instead of the scale's own; --config.SECTION.FIELD=VALUE"
            " changes either"
        ),
    },
    "sharding": {
        "--devices": dict(
            type=int,
            default=8,
            help="devices to use; where JAX sees a CPU alone it is made into so many (default"
            " %(default)s)",
        )
    },
}
SCALES = ("smoke", "cpu", "gpu")


def run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: flexmemory bench NAME [--scale=cpu] [--dir=FOLDER] [--out=FILE]\n")
        print("\n".join(f"  {name:<8}{what}" for name, what in BENCHES.items()))
        return 0 if argv else 2
    name = argv[0]
    if name not in BENCHES:
        raise UserError(f"bench {name!r}: {nearest(name, BENCHES)}")
    own = OPTIONS_OF.get(name, {})
    parser = Parser(f"flexmemory bench {name}", f"Measures {BENCHES[name]}. Prints JSON.")
    parser.add_argument(
        "--scale",
        default="cpu",
        help=f"{', '.join(SCALES)}: smoke takes seconds and says nothing (default %(default)s)",
    )
    parser.add_argument(
        "--dir",
        help="folder on the disk to measure, for some GB of scratch files (default: the system's"
        " temporary folder)",
    )
    parser.add_argument("--out", help="file to write the JSON to as well")
    for option, how in own.items():
        parser.add_argument(option, **how)
    args, more = parser.parse_known_args(argv[1:])
    stray = [word for word in more if not (word.startswith("--config.") and "--config" in own)]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if args.scale not in SCALES:
        raise UserError(f"--scale: {args.scale!r}, {nearest(args.scale, SCALES)}")
    if args.dir and not Path(args.dir).is_dir():
        raise UserError(f"--dir: {args.dir} is not a folder")
    given = {word[2:]: getattr(args, word[2:]) for word in own}

    bench = importlib.import_module(f"flexmemory.bench.{name}")
    if "--config" in own:
        given["config"] = config_from(args.config, more, bench.CONFIGS[args.scale])
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="flexmemory-bench-") as scratch:
        given = {option: value for option, value in given.items() if value is not None}
        result = bench.measure(Path(scratch), args.scale, **given)
    print(json.dumps(result, indent=2))
    if args.out:
        files.write_json(Path(args.out), result)
    return 0


def config_from(given: str | None, overrides: list[str], default: Config) -> Config:
    """The checked config of --config=FILE[:ARG], or ``default`` where None, with the
    --config.SECTION.FIELD=VALUE of ``overrides``.
    """
    if given:
        return config_of(parse([f"--config={given}", *overrides], __doc__))
    for word in overrides:
        check_override(word.removeprefix("--config."))
    values, argv = flags.FlagValues(), ["flexmemory", *overrides]
    config_flags.DEFINE_config_dict(
        "config", ConfigDict(dataclasses.asdict(default)), flag_values=values, sys_argv=argv
    )
    values(argv)
    return config_of(values)
