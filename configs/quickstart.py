"""A small model for two CPU cores: about half a minute of training on text from `flexmemory prepare`.

    flexmemory train --config=configs/quickstart.py:pattern=memoryllm*4 --workdir=runs/x --config.data.path=data/demo

Bare word: smoke (seconds). Options: pattern=..., beta=... .
"""

from flexmemory.config import default_config, parse_arg

SIZES = {
    "cpu": dict(d_model=128, n_heads=4, d_ff=344),
    "smoke": dict(d_model=32, n_heads=4, d_ff=88),
}


def get_config(arg: str = ""):
    size, options = parse_arg(arg, SIZES, pattern="flex*4", beta="3")
    c = default_config()
    c.model.update(size)
    c.model.pattern, c.model.beta = options["pattern"], options["beta"]
    c.model.init_std = 0.08
    c.data.seq_len, c.data.batch_size = 128, 16
    c.train.steps, c.optimizer.lr, c.optimizer.min_lr, c.optimizer.warmup_steps = 200, 3e-3, 3e-4, 20
    if size["d_model"] == 32:
        c.data.seq_len, c.data.batch_size, c.train.steps, c.train.eval_tokens = 32, 4, 3, 512
    return c
