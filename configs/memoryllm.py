"""MemoryLLM (arXiv 2602.00398): every FFN reads the token embedding alone and folds into a table.

    flexmemory train --config=configs/memoryllm.py:1b --workdir=runs/memoryllm-1b
    --config.data.path=DATA

Sizes 250m, 750m, 1b are the paper's (24 layers, Llama 3.1 vocabulary); smoke takes seconds. dense=N
puts N dense (C) layers at the input, the C/M ratio by layers. Cost: 1b at 50B tokens is a cluster
run. Expected (paper, Table 2, 50B tokens of C4): perplexity 20.933 at 1b, 22.079 at 750m.
"""

from flexmemory.config import parse_arg
from flexmemory.errors import UserError
from flexmemory.recipes import MEMORYLLM_SIZES, memoryllm_recipe


def get_config(arg: str = ""):
    size, options = parse_arg(arg, MEMORYLLM_SIZES, dense=0)
    n_c, layers = options["dense"], size["layers"]
    if not 0 <= n_c <= layers:
        raise UserError(
            f"config argument dense: {n_c} is outside 0..{layers}, the layers of this size"
        )
    return memoryllm_recipe(
        size,
        " ".join(f"{kind}*{n}" for kind, n in (("dense", n_c), ("memoryllm", layers - n_c)) if n),
    )
