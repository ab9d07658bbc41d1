"""``flexmemory verify``: a store against the run that it was exported from."""

import json

from flexmemory.cli.flags import Parser


def run(argv: list[str]) -> int:
    parser = Parser("flexmemory verify", "Compare a store with the run that it was exported "
                                     "from: all rows, logits, greedy tokens. Prints JSON; exits with 1 when they differ.")
    parser.add_argument("--tkv", required=True, help="directory of the store")
    parser.add_argument("--workdir", required=True, help="run folder that was exported")
    parser.add_argument("--tokens", type=int, default=32, help="length of a prompt, and tokens decoded after it (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=4, help="random prompts (default %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference that passes (default %(default)s)")
    args = parser.parse_args(argv)

    from flexmemory.tkv.verify import verify

    result = verify(args.tkv, args.workdir, tokens=args.tokens, prompts=args.prompts, tolerance=args.tolerance)
    print(json.dumps(result, indent=2))
    return 0 if result["ok"] else 1
