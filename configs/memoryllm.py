"""MemoryLLM (arXiv 2602.00398): every FFN reads the token embedding and folds into a table.

    flexmemory train --config=configs/memoryllm.py:1b --workdir=runs/memoryllm-1b --config.data.path=DATA

Sizes 250m, 750m, 1b are the paper's (Table 5: 24 layers, vocabulary of Llama 3.1, Table 3 recipe); smoke trains in seconds.
Options: dense=N puts N dense layers at the input (C/M ratio by layers), pattern=... replaces the whole stack
("attn_only*24", "parallel*24"). Cost: 1b for 50B tokens is a cluster run. Expected (paper, Table 2, 50B tokens of C4):
perplexity 20.933 (1b), 22.079 (750m).
"""

from flexmemory.config import default_config, parse_arg
from flexmemory.errors import UserError

SIZES = {
    "1b": dict(layers=24, d_model=2048, n_heads=32, d_ff=5464),
    "750m": dict(layers=24, d_model=1600, n_heads=16, d_ff=4272),
    "250m": dict(layers=24, d_model=960, n_heads=16, d_ff=2560),
    "smoke": dict(layers=2, d_model=32, n_heads=4, d_ff=88),
}


def paper_recipe(c, smoke: bool):
    """Table 3 of MemoryLLM; what it leaves open is in docs/variants.md."""
    if smoke:
        c.data.seq_len, c.data.batch_size = 32, 4
        c.train.steps, c.train.eval_tokens, c.optimizer.warmup_steps = 3, 512, 1
        return c
    c.model.vocab_size, c.model.compute_dtype, c.model.remat = 128_256, "bfloat16", True
    c.data.seq_len, c.data.batch_size = 2048, 512
    c.train.steps, c.train.eval_every, c.train.checkpoint_every, c.train.eval_tokens = 47_684, 1000, 1000, 1_048_576  # 50B tokens
    c.optimizer.lr, c.optimizer.min_lr, c.optimizer.warmup_steps = 1e-4, 1e-5, 5000
    c.optimizer.table_weight_decay = 0.1
    return c


def get_config(arg: str = ""):
    size, options = parse_arg(arg, SIZES, dense=0, pattern="")
    c, layers = default_config(), size.pop("layers")
    if not 0 <= options["dense"] <= layers:
        raise UserError(f"config argument dense: {options['dense']} is outside 0..{layers} layers")
    c.model.update(size)
    n_c, n_m = options["dense"], layers - options["dense"]
    c.model.pattern = options["pattern"] or " ".join(
        f"{kind}*{n}" for kind, n in (("dense", n_c), ("memoryllm", n_m)) if n)
    return paper_recipe(c, smoke=layers == 2)
