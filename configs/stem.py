"""STEM (arXiv 2601.10639): a learned table per layer replaces the up-projection.

    flexmemory train --config=configs/stem.py:1b --workdir=runs/stem-1b --config.data.path=DATA

Sizes 1b (16 layers, STEM on 1, 4, 7, 10, 13) and 350m (32 layers, every third); smoke takes
seconds. kind: stem, stem-gate, stem-dagger. Tables are trained by dense AdamW as in the paper;
--config.optimizer.table_optimizer=lazy_adam touches a batch's rows alone. Expected (paper):
validation perplexity 12.64 against 13.19 dense at 1T tokens, 1b.
"""

from flexmemory.config import parse_arg
from flexmemory.recipes import STEM_SIZES, stem_recipe


def get_config(arg: str = ""):
    size, options = parse_arg(arg, STEM_SIZES, kind=("stem", "stem-gate", "stem-dagger"))
    return stem_recipe(size, kind=options["kind"])
