import pytest
from tkv.making import byte_tokenizer, config, make_store, params


@pytest.fixture(scope="session")
def mixed():
    """(Config, params) of a model with two groups, computed and learned rows, C layers before and
    between.
    """
    cfg = config("dense memoryllm (flex stem)*2")
    return cfg, params(cfg)


@pytest.fixture(scope="session")
def mixed_store(mixed, tmp_path_factory):
    """A float32 store of it; tests must not change it."""
    path = tmp_path_factory.mktemp("store") / "mixed"
    make_store(path, *mixed)
    return path


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()
