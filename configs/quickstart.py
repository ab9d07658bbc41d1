"""A small model for two CPU cores: about half a minute of training on text from `flexmemory
prepare`.

    flexmemory train '--config=configs/quickstart.py:pattern=memoryllm*4' --workdir=runs/x
    --config.data.path=data/demo

Bare word: smoke (seconds). Options: pattern=..., beta=... .
"""

from flexmemory.config import default_config, parse_arg
from flexmemory.recipes import smoke


def get_config(arg: str = ""):
    size, options = parse_arg(
        arg, {"cpu": {"smoke": False}, "smoke": {"smoke": True}}, pattern="flex*4", beta="3"
    )
    if size["smoke"]:
        c = smoke(options["pattern"])
    else:
        c = default_config()
        c.model.pattern, c.model.init_std = options["pattern"], 0.08
        c.optimizer.lr, c.optimizer.min_lr = 3e-3, 3e-4
    c.model.beta = options["beta"]
    return c
