"""flexmemory params --config=configs/memoryllm.py:1b [--json] [--seq_len=2048]"""

import json

from absl import flags

from flexmemory.cli.flags import config_of, parse
from flexmemory.errors import UserError


def run(argv: list[str]) -> int:
    def define(values):
        flags.DEFINE_bool("json", False, "print the numbers as JSON", flag_values=values)
        flags.DEFINE_integer(
            "seq_len",
            0,
            "length for the causal FLOPs; 0 takes config data.seq_len",
            lower_bound=0,
            flag_values=values,
        )

    values = parse(argv, define, __doc__)
    cfg = config_of(values)
    if not cfg.model.vocab_size:
        raise UserError(
            "config model.vocab_size: 0 (the data's) has no table to count; give"
            " --config.model.vocab_size=N"
        )
    from flexmemory.models.accounting import account, table

    numbers = account(cfg.model, values.seq_len or cfg.data.seq_len)
    print(json.dumps(numbers, indent=2) if values.json else table(numbers))
    return 0
