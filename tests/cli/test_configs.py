"""Every file in configs/ builds at its sizes and trains at smoke size."""

import importlib.util
from pathlib import Path

import pytest

from flexmemory.config import from_dict
from flexmemory.models.accounting import account
from flexmemory.models.blocks import layer_specs
from flexmemory.train.loop import train

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_trains_at_smoke_size(path, tiny_data, tmp_path):
    c = load(path).get_config("smoke")
    c.data.path, c.data.seq_len = str(tiny_data), 96
    final = train(from_dict(c), tmp_path / "run", progress=False)
    assert final["step"] == c.train.steps
    assert 0 < final["val_loss"] < 10


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        ("memoryllm", "250m"),
        ("memoryllm", "750m"),
        ("memoryllm", "1b,dense=8"),
        ("flexmemory", "1b,beta=0.5"),
        ("flexmemory", "250m,beta=8"),
        ("dense", "750m,kind=parallel"),
        ("dense", "1b,kind=attn_only"),
        ("stem", "350m,kind=stem-gate"),
        ("stem", "1b,kind=stem-dagger"),
    ],
)
def test_paper_sizes_build(name, arg):
    module = next(load(path) for path in FILES if path.stem == name)
    cfg = from_dict(module.get_config(arg))
    if arg == "250m,beta=8":
        assert {spec.kind for spec in layer_specs(cfg.model)} == {"dense"}
    assert account(cfg.model)["total"] > 50e6
    assert module.__doc__ and "flexmemory train" in module.__doc__


def test_every_config_says_what_it_is():
    assert {path.stem for path in FILES} >= {
        "quickstart",
        "dense",
        "memoryllm",
        "flexmemory",
        "stem",
    }
