"""flexmemory eval --workdir=runs/x | --tkv=STORE [--data=DIR] [--alpha=1.0] [--max_tokens=0]
[--step=N]: prints JSON.

With --tkv the rows are read from the store, so that the JSON says what their dtype, ranks and
rounding cost (MemoryLLM's Tables 7 and 8).
"""

import dataclasses
import json
import math
from pathlib import Path

from flexmemory.cli.flags import Parser
from flexmemory.errors import UserError


def run(argv: list[str]) -> int:
    parser = Parser("flexmemory eval", __doc__)
    add = parser.add_argument
    add("--workdir", help="run folder; with --tkv only its config says which data and windows")
    add("--tkv", help="path or URL of a store: rows, weights and tokenizer are its own")
    add("--data", help="prepared data; default: what the run was trained on")
    windows = "tokens of a window; default: as the run was trained; 128 without --workdir"
    add("--seq_len", type=int, help=windows)
    scale = "scale of what FFNs and rows add to the residual (MemoryLLM section 3.2)"
    add("--alpha", type=float, default=1.0, help=scale)
    add("--max_tokens", type=int, default=0, help="validation tokens, 0 for all")
    add("--step", type=int, help="checkpoint, default the latest")
    args = parser.parse_args(argv)
    if not math.isfinite(args.alpha):
        raise UserError(f"--alpha: {args.alpha} is not a finite number")
    if args.seq_len is not None and args.seq_len < 1:
        raise UserError(f"--seq_len: {args.seq_len} must be above 0")
    if not args.workdir and not args.tkv:
        raise UserError("--workdir: missing; give a run folder, or a store with --tkv")
    if not args.workdir and not args.data:
        raise UserError(
            "--data: missing; a store does not know its data, give what `flexmemory prepare` wrote,"
            " or --workdir"
        )
    if args.tkv and args.step is not None:
        raise UserError(
            f"--step: {args.step} does not go with --tkv, whose rows are of one checkpoint; leave"
            " it out"
        )

    from flexmemory.config import Config, load_json
    from flexmemory.data import tokenizer as tokenizers
    from flexmemory.data.shards import TokenShards, read_questions
    from flexmemory.evals.perplexity import make_eval_step, perplexity
    from flexmemory.evals.questions import answer_accuracy
    from flexmemory.evals.rows import live_rows, stored_rows
    from flexmemory.run_folder import load_params
    from flexmemory.tkv.store import open_store

    if args.tkv:
        store = open_store(args.tkv)
        cfg = load_json(Path(args.workdir) / "config.json") if args.workdir else Config()
        manifest = store.manifest
        if args.workdir and cfg.model != store.model:
            raise UserError(
                f"--tkv {args.tkv}: its model is not the run's; give the run"
                f" {manifest.source.run!r} that it was exported from"
            )
        cfg = dataclasses.replace(cfg, model=store.model)
        params, tokenizer, rows_of = store.backbone(), store.tokenizer(), stored_rows(store)
        names = ("dtype", "scale_group", "ranks", "table_bytes")
        result = {"step": manifest.source.step}
        result |= {name: getattr(manifest, name) for name in names}
    else:
        cfg, params, step = load_params(args.workdir, args.step)
        tokenizer, rows_of = tokenizers.load(args.workdir), live_rows(cfg.model, params)
        result = {"step": step}
    given = {"path": args.data, "seq_len": args.seq_len}
    given = {name: value for name, value in given.items() if value}
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **given))
    shards = TokenShards(cfg.data.path, "val")
    if shards.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"--data {cfg.data.path}: prepared with another tokenizer"
            f" ({shards.tokenizer_fingerprint}) than the {'store' if args.tkv else 'run'}'s"
            f" ({tokenizer.fingerprint})"
        )
    result["alpha"] = args.alpha
    eval_step = make_eval_step(cfg, args.alpha)
    result |= perplexity(cfg, params, shards, eval_step, args.max_tokens, rows_of)
    questions = read_questions(cfg.data.path)
    result |= answer_accuracy(cfg, params, tokenizer, questions, args.alpha, rows_of)
    print(json.dumps(result, indent=2))
    return 0
