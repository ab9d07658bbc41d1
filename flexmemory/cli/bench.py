"""``flexmemory bench``: measurements as JSON, with the limits of the same machine measured in the same run."""

import importlib
import json
import tempfile
from pathlib import Path

from flexmemory import files
from flexmemory.cli.flags import Parser
from flexmemory.errors import UserError, nearest

BENCHES = {
    "read": "gathers of rows from a store: cold, page cache, TensorStore, RAM, against the disk and memcpy",
    "decode": "tokens/s offloaded against resident, memoryllm against dense; waits, peak memory, time to the first token",
    "export": "writing a store against the disk's sequential write and the fold alone",
}
SCALES = ("smoke", "cpu", "gpu")


def run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: flexmemory bench NAME [--scale=cpu] [--dir=FOLDER] [--out=FILE]\n")
        print("\n".join(f"  {name:<8}{what}" for name, what in BENCHES.items()))
        return 0 if argv else 2
    if argv[0] not in BENCHES:
        raise UserError(f"bench {argv[0]!r}: {nearest(argv[0], BENCHES)}")
    parser = Parser(f"flexmemory bench {argv[0]}", f"Measures {BENCHES[argv[0]]}. Prints JSON.")
    parser.add_argument("--scale", default="cpu", help=f"{', '.join(SCALES)}: smoke takes seconds and says nothing (default %(default)s)")
    parser.add_argument("--dir", help="folder on the disk to measure, for some GB of scratch files (default: the system's temporary folder)")
    parser.add_argument("--out", help="file to write the JSON to as well")
    args = parser.parse_args(argv[1:])
    if args.scale not in SCALES:
        raise UserError(f"--scale: {args.scale!r}, {nearest(args.scale, SCALES)}")
    if args.dir and not Path(args.dir).is_dir():
        raise UserError(f"--dir: {args.dir} is not a folder")
    measure = importlib.import_module(f"flexmemory.bench.{argv[0]}").measure
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="flexmemory-bench-") as scratch:
        result = measure(Path(scratch), args.scale)
    print(json.dumps(result, indent=2))
    if args.out:
        files.write_json(Path(args.out), result)
    return 0
