"""flexmemory train: profiling, and compiled programs kept between runs."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from flexmemory.cli.train import parse_steps
from flexmemory.errors import UserError
from flexmemory.run_folder import load_params

CONFIG = f"--config={Path(__file__).parents[2] / 'configs' / 'quickstart.py'}"


def test_steps_to_profile():
    assert list(parse_steps("3:5")) == [3, 4, 5] and not parse_steps("5:3")
    for text in ("", "3", "3:", ":5", "3:5:7", "-1:5", "a:b", "3.5:4", "3:5 "):
        with pytest.raises(
            UserError, match="--profile_steps: .* is not FIRST:LAST; write for example 10:12"
        ):
            parse_steps(text)


def test_a_second_start_finds_the_compiled_step_and_a_damaged_one_is_compiled_again(
    tiny_config, tmp_path
):
    sets = [
        f"--config.{section}.{name}={value}"
        for section, fields in dataclasses.asdict(
            tiny_config("memoryllm", **{"train.steps": 2})
        ).items()
        for name, value in fields.items()
    ]
    explain = {
        name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
    } | {"JAX_EXPLAIN_CACHE_MISSES": "true", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    kept = tmp_path / "home" / "flexmemory" / "xla"

    def run(name, **env):
        made = subprocess.run(
            [
                sys.executable,
                "-m",
                "flexmemory.cli.main",
                "train",
                CONFIG,
                f"--workdir={tmp_path / name}",
                *sets,
            ],
            env=explain | env,
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stderr
        assert (
            json.loads((tmp_path / name / "compile.json").read_text())["steps"][0]["bytes"][
                "aliased"
            ]
            > 0
        )
        return made.stderr, [
            np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(load_params(tmp_path / name)[1])
        ]

    missed = "CACHE MISS for 'jit_step'"
    said, cold = run("cold", XDG_CACHE_HOME=str(tmp_path / "home"))
    assert missed in said
    said, warm = run("warm", JAX_COMPILATION_CACHE_DIR=str(kept))  # the user's own choice of folder
    assert missed not in said and warm == cold
    for entry in kept.glob("jit_step-*-cache"):  # of training and of evaluation
        os.truncate(entry, entry.stat().st_size // 2)
    said, again = run("damaged", XDG_CACHE_HOME=str(tmp_path / "home"))
    assert (
        "Error reading persistent compilation cache entry for 'jit_step'" in said and again == cold
    )
