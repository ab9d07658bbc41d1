"""flexmemory params --config=configs/memoryllm.py:1b [--json] [--seq_len=2048]"""

import json
import os

from flexmemory.cli.flags import config_of, parse
from flexmemory.errors import UserError


def run(argv: list[str]) -> int:
    values = parse(
        argv,
        __doc__,
        json=(False, "print the numbers as JSON"),
        seq_len=(0, "length for the causal FLOPs; 0 takes config data.seq_len"),
    )
    if values.seq_len < 0:
        raise UserError(f"--seq_len: {values.seq_len} must not be negative")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # shapes alone: no device is needed
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
