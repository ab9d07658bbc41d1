"""The dense base of the MemoryLLM paper and the controls that the papers lack, at the same widths.

    flexmemory train --config=configs/dense.py:250m --workdir=runs/dense --config.data.path=DATA

kind: dense (Eq 2.1-2.3), parallel (attention and FFN both on X_L), attn_only (no FFN). Expected
(paper, Table 2, 50B tokens of C4): dense perplexity 19.730 at 750m, 23.190 at 250m.
"""

from flexmemory.config import parse_arg
from flexmemory.recipes import MEMORYLLM_SIZES, memoryllm_recipe


def get_config(arg: str = ""):
    size, options = parse_arg(arg, MEMORYLLM_SIZES, kind=("dense", "parallel", "attn_only"))
    return memoryllm_recipe(size, f"{options['kind']}*{size['layers']}")
