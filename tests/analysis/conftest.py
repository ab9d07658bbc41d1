"""Models as they are before training, with the tiny data: most measures can be checked on them."""

import dataclasses
import functools

import pytest

from flexmemory.analysis.trained import Trained
from flexmemory.data import tokenizer as tokenizers
from flexmemory.data.shards import read_questions
from flexmemory.models.transformer import init_params
from flexmemory.train.loop import resolve


@pytest.fixture(scope="session")
def trained_of(tiny_config):
    """``trained_of(pattern, seed=0) -> Trained``: weights of that seed; train.seed is 0."""

    @functools.cache
    def make(pattern: str, seed: int = 0) -> Trained:
        cfg, train, val = resolve(tiny_config(pattern))
        return Trained(
            cfg,
            init_params(cfg.model, seed),
            val,
            train,
            tokenizers.load(cfg.data.path),
            read_questions(cfg.data.path)[:40],
        )

    return make


@pytest.fixture(scope="session")
def with_params():
    return lambda trained, params: dataclasses.replace(trained, params=params)
