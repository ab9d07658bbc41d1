"""flexmemory eval --workdir=runs/x [--data=DIR] [--alpha=1.0] [--max_tokens=0] [--step=N]: prints JSON."""

import dataclasses
import json
import math

from flexmemory.cli.flags import Parser
from flexmemory.errors import UserError


def run(argv: list[str]) -> int:
    parser = Parser("flexmemory eval", __doc__)
    parser.add_argument("--workdir", required=True, help="run folder")
    parser.add_argument("--data", help="prepared data; default: what the run was trained on")
    parser.add_argument("--alpha", type=float, default=1.0, help="scale of what FFNs and rows add to the residual (MemoryLLM section 3.2)")
    parser.add_argument("--max_tokens", type=int, default=0, help="validation tokens, 0 for all")
    parser.add_argument("--step", type=int, help="checkpoint, default the latest")
    args = parser.parse_args(argv)
    if not math.isfinite(args.alpha):
        raise UserError(f"--alpha: {args.alpha} is not a finite number")
    from flexmemory.data import tokenizer as tokenizers
    from flexmemory.data.shards import TokenShards, read_questions
    from flexmemory.evals.perplexity import make_eval_step, perplexity
    from flexmemory.evals.questions import answer_accuracy
    from flexmemory.train.checkpoint import load_params

    cfg, params, step = load_params(args.workdir, args.step)
    if args.data:
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=args.data))
    shards, tokenizer = TokenShards(cfg.data.path, "val"), tokenizers.load(args.workdir)
    if shards.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(f"--data {cfg.data.path}: prepared with another tokenizer ({shards.tokenizer_fingerprint}) than the run's "
                        f"({tokenizer.fingerprint})")
    result = perplexity(cfg, params, shards, make_eval_step(cfg, args.alpha), max_tokens=args.max_tokens)
    result |= answer_accuracy(cfg, params, tokenizer, read_questions(cfg.data.path), args.alpha)
    print(json.dumps({"step": step, "alpha": args.alpha, **result}, indent=2))
    return 0
