"""Flex-MemoryLLM (arXiv 2602.00398, section 4.2): beta h^2 of each FFN computes on the context, (8
- beta) h^2 folds into a table.

    flexmemory train --config=configs/flexmemory.py:250m,beta=3 --workdir=runs/flex3
    --config.data.path=DATA

Sizes as in configs/memoryllm.py. beta: 0..8, fractions allowed; one per layer through
--config.model.beta="3 3 2 ...". Expected (paper, Figure 9): loss falls from beta 0 to 3 towards the
dense model's at equal total parameters.
"""

from flexmemory.config import parse_arg
from flexmemory.recipes import MEMORYLLM_SIZES, memoryllm_recipe


def get_config(arg: str = ""):
    size, options = parse_arg(arg, MEMORYLLM_SIZES, beta="3")
    c = memoryllm_recipe(size, f"flex*{size['layers']}")
    c.model.beta = options["beta"]
    return c
