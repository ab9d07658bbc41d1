import pytest

from .making import MIXED, config, make_store, params


@pytest.fixture(scope="session")
def mixed():
    """(Config, params) of a model with every kind."""
    cfg = config(MIXED)
    return cfg, params(cfg)


@pytest.fixture(scope="session")
def mixed_store(mixed, tmp_path_factory):
    """A float32 store of it; tests must not change it."""
    path = tmp_path_factory.mktemp("store") / "mixed"
    make_store(path, *mixed)
    return path
