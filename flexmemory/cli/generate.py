"""``flexmemory generate``: text from a TKV store alone, its rows read from disk."""

import json
import re
import sys

from flexmemory.cli.flags import Parser
from flexmemory.errors import UserError

UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def run(argv: list[str]) -> int:
    parser = Parser("flexmemory generate", "Continue prompts with a model whose rows are read from a TKV store.")
    parser.add_argument("--tkv", required=True, help="directory of the store")
    parser.add_argument("--prompt", required=True, action="append", help="text to continue; give it again for more, which run as one batch")
    parser.add_argument("--max_tokens", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default %(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest tokens of this mass (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default %(default)s)")
    parser.add_argument("--ram_budget", default="64MiB", help="rows kept in memory: a size such as 64MiB, 0 for none, `all` for the whole "
                        "table (default %(default)s)")
    parser.add_argument("--no_check", action="store_true", help="do not verify the checksums of rows")
    parser.add_argument("--stats", action="store_true", help="print speeds, cache hits and waits as JSON on stderr")
    args = parser.parse_args(argv)
    budget = None if args.ram_budget == "all" else parse_bytes(args.ram_budget)

    from flexmemory.runtime.engine import Engine

    engine = Engine.from_store(args.tkv, budget, check=not args.no_check)
    options = dict(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    if len(args.prompt) == 1:
        text = TextStream(engine.tokenizer.decode)
        shown = [args.prompt[0]]  # goes out with the first token, so that a refused request prints nothing

        def show(_, token: int) -> None:
            sys.stdout.write("".join(shown) + text.add(token))
            sys.stdout.flush()
            shown.clear()

        made = engine.generate(args.prompt, on_token=show, **options)
        print(made[0].text[text.shown :])
    else:
        for number, (prompt, generation) in enumerate(zip(args.prompt, engine.generate(args.prompt, **options), strict=True), 1):
            print(f"--- {number}\n{prompt}{generation.text}")
    if args.stats:
        print(json.dumps(engine.stats), file=sys.stderr)
    return 0


def parse_bytes(text: str) -> int:
    """Bytes of "64MiB", "1.5GB" or "4096". Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if not found or found[2] not in UNITS:
        raise UserError(f"--ram_budget: {text!r} is not a size; write for example 64MiB, 1GiB or 0")
    return int(float(found[1]) * UNITS[found[2]])


class TextStream:
    """Turns tokens into text as they come, holding back a character of which only some bytes are there yet."""

    def __init__(self, decode):
        self._decode, self._ids, self._settled = decode, [], 0  # tokens before _settled have been shown whole
        self.shown = 0  # characters given out so far

    def add(self, token: int) -> str:
        self._ids.append(token)
        context = self._ids[max(0, self._settled - 4) : self._settled]  # decoders may look at the neighbour, e.g. for a space
        before, after = self._decode(context), self._decode(context + self._ids[self._settled :])
        if after.endswith("\ufffd") or not after.startswith(before):
            return ""
        self._settled = len(self._ids)
        self.shown += len(after) - len(before)
        return after[len(before) :]
