"""The dense base of the MemoryLLM paper and the controls that the papers lack, at the same widths.

    flexmemory train --config=configs/dense.py:250m --workdir=runs/dense --config.data.path=DATA

kind: dense (Eq 2.1-2.3), parallel (attention and FFN both on X_L), attn_only (no FFN). Expected (paper, Table 2, 50B tokens of C4):
dense perplexity 19.730 at 750m, 23.190 at 250m.
"""

from flexmemory.config import nearest, parse_arg
from flexmemory.errors import UserError
from flexmemory.recipes import MEMORYLLM_SIZES, memoryllm_recipe

KINDS = ("dense", "parallel", "attn_only")


def get_config(arg: str = ""):
    size, options = parse_arg(arg, MEMORYLLM_SIZES, kind="dense")
    if options["kind"] not in KINDS:
        raise UserError(f"config argument kind: {options['kind']!r}; {nearest(options['kind'], KINDS)}")
    return memoryllm_recipe(size, f"{options['kind']}*{size['layers']}")
