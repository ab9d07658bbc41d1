"""A run moves from 8 devices to 2 to 4, and ends as the one that never moved."""

import json

import pytest

from flexmemory.config import to_json
from flexmemory.run_folder import read_metrics
from flexmemory.train.loop import train


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_devices(child, tiny_config, tmp_path):
    sets = {
        "data.batch_size": 8,
        "train.steps": 6,
        "optimizer.table_optimizer": "lazy_adam",
        "optimizer.lr": 1e-3,
        "optimizer.min_lr": 1e-4,
    }
    alone = train(tiny_config("flex stem", **sets), tmp_path / "alone", progress=False)
    for devices, plan in ((8, "dp"), (2, "fsdp"), (4, "dp")):
        config = tmp_path / f"{devices}.json"
        where = {
            "parallel.plan": plan,
            "parallel.table_memory": "host" if devices == 2 else "device",
        }
        config.write_text(to_json(tiny_config("flex stem", **sets, **where)))
        made = child(devices, "train", config, tmp_path / "moved", 2)
    assert (
        made["step"] == 6
        and made["resumed_from"] == 4
        and json.loads((tmp_path / "moved" / "run.json").read_text())["devices"] == 4
    )
    assert made["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-5)
    losses = [
        {row["step"]: row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row}
        for name in ("alone", "moved")
    ]
    assert losses[1].keys() == set(range(1, 7)) and losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert made["kinds"] == alone["kinds"] and made["questions"] > 0
