"""Flags of `flexmemory bench`: those of every bench, a bench's own, and configs. Mistakes are one
line, before any work.
"""

import importlib

import pytest
from cli.test_cli import CONFIG, refused

from flexmemory.bench.train import CONFIGS
from flexmemory.cli.bench import BENCHES, config_from
from flexmemory.cli.main import main


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--kinds=memorylm"], "--kinds: 'memorylm', did you mean 'memoryllm'?"),
        (["--kinds="], "--kinds: '', known: attn_only, dense"),
        (["--kinds=dense,dense"], "--kinds: 'dense' is named twice"),
        (["--kinds=dense:naive"], "dense computes no rows"),
        (["--kinds=memoryllm:lazy_adam"], "memoryllm has no tables"),
        (["--kinds=stem:lazy_adm"], "option 'lazy_adm': did you mean 'lazy_adam'?"),
        (["--kinds=flex:9"], "config model.beta: 9 is outside 0..8"),
        (["--config=nowhere.py"], "--config: no file 'nowhere.py'"),
        (["--config.data.batch_size=many"], "config data.batch_size: 'many', give a whole number"),
        (["--config.data.batch_sise=4"], "did you mean 'batch_size'?"),
        (["--config.model.n_heads=7"], "config model.n_heads: 7 does not divide d_model 32"),
        (["--config.model.vocab_size=0"], "config model.vocab_size: 0 takes the data's"),
        (["--data=nowhere"], "nowhere"),
        (["--nonsense=3"], "unrecognized arguments: --nonsense=3"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_bench_train_refuses(extra, says, capsys):
    assert says in refused(capsys, "bench", "train", "--scale=smoke", *extra)


def test_a_bench_takes_no_flags_of_another(capsys):
    assert "unrecognized arguments: --kinds=dense" in refused(
        capsys, "bench", "read", "--kinds=dense"
    )
    assert "unrecognized arguments: --config.data.batch_size=4" in refused(
        capsys, "bench", "read", "--config.data.batch_size=4"
    )


def test_config_of_a_bench():
    scale = CONFIGS["smoke"]
    assert config_from(None, [], scale) == scale
    changed = config_from(
        None, ["--config.data.batch_size=8", "--config.model.compute_dtype=bfloat16"], scale
    )
    assert (
        changed.data.batch_size == 8
        and changed.model.compute_dtype == "bfloat16"
        and changed.model.d_model == scale.model.d_model
    )
    given = config_from(CONFIG.removeprefix("--config="), ["--config.data.batch_size=8"], scale)
    assert given.data.batch_size == 8 and given.model.vocab_size == 0


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_has_a_measure_and_help(name, capsys):
    assert callable(importlib.import_module(f"flexmemory.bench.{name}").measure)
    with pytest.raises(SystemExit):
        main(["bench", name, "--help"])
    said = capsys.readouterr().out
    assert "--scale" in said and ("--kinds" in said) == (name == "train")
