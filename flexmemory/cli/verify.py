"""``flexmemory verify``: prove a store whole, and equal to the run it was exported from."""

import json
from typing import Any

from flexmemory.cli.flags import Parser
from flexmemory.errors import UserError


def run(argv: list[str]) -> int:
    parser = Parser(
        "flexmemory verify",
        "Compare rows, logits and greedy text of a store with those of the run it was exported"
        " from, or with --deep read all of its files again; prints JSON and ends with 1 when"
        " something differs.",
    )
    add = parser.add_argument
    add("--tkv", required=True, help="path or URL of the store")
    add("--workdir", help="run folder that was exported")
    deep = "read every file: sizes, checksums of files and of every token's rows"
    add("--deep", action="store_true", help=deep)
    tokens = "length of a prompt, and tokens decoded after it (default %(default)s)"
    add("--tokens", type=int, default=32, help=tokens)
    add("--prompts", type=int, default=4, help="random prompts (default %(default)s)")
    tolerance = "largest relative difference that passes (default %(default)s)"
    add("--tolerance", type=float, default=1e-5, help=tolerance)
    args = parser.parse_args(argv)
    if not args.workdir and not args.deep:
        raise UserError(
            "--workdir: missing; give the run folder that was exported, or --deep to check the"
            " files of the store alone"
        )

    from flexmemory.runtime.verify import verify
    from flexmemory.tkv.verify import verify_deep

    result: dict[str, Any] = {"deep": verify_deep(args.tkv)} if args.deep else {}
    # a damaged store is reported, not opened
    if args.workdir and (not args.deep or result["deep"]["ok"]):
        sizes = dict(tokens=args.tokens, prompts=args.prompts, tolerance=args.tolerance)
        result |= verify(args.tkv, args.workdir, **sizes)
    result["ok"] = all(part.get("ok", True) for part in (result, result.get("deep", {})))
    print(json.dumps(result, indent=2))
    return 0 if result["ok"] else 1
