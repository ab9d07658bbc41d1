"""flexmemory train --config=configs/flexmemory.py:250m,beta=3 --workdir=runs/x [--config.train.steps=200]"""

import sys

from absl import flags

from flexmemory.cli.flags import config_of, parse
from flexmemory.errors import UserError


def run(argv: list[str]) -> int:
    def define(values):
        flags.DEFINE_string("workdir", None, "run folder; an existing one is resumed", flag_values=values)

    values = parse(argv, define, __doc__)
    if not values.workdir:
        raise UserError("--workdir: missing; give the folder of the run")
    from flexmemory.train.loop import TrainingDiverged, train

    try:
        final = train(config_of(values), values.workdir)
    except TrainingDiverged as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    rate = final["train_tokens_per_s"]
    print(f"{values.workdir}: step {final['step']}, validation loss {final['val_loss']:.4f} "
          f"({final['val_bits_per_byte']:.4f} bits per byte)" + (f", {rate:,.0f} tokens/s" if rate else ""))
    return 0
