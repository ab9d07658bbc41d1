import os

import pytest

from flexmemory.tkv import format
from flexmemory.tkv.storage.reader import open_reader
from flexmemory.tkv.storage.uring import CacheStat

from .making import MIXED, config, make_store, params
from .tables import LAYOUTS, Table, drop, make


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


@pytest.fixture
def table(tmp_path):
    return make(tmp_path, LAYOUTS["4096"])


@pytest.fixture
def disk_table(table):
    """A table whose bundles can be cold: not on tmpfs."""
    location, group, _ = table
    drop(location, group)
    fd = os.open(location.local / format.shard_file(group, 0), os.O_RDONLY)
    try:
        cached = CacheStat().pages(fd, 0, 4096)
    except OSError as error:
        pytest.skip(f"cachestat: {error}")
    finally:
        os.close(fd)
    if cached:
        pytest.skip("this file system lives in the page cache")
    return table


@pytest.fixture
def opened():
    """open_reader whose readers are closed after the test."""
    made = []

    def opened(table, method="auto"):
        made.append(open_reader(table[0], format.records(Table(), table[1]), method=method))
        return made[-1]

    yield opened
    for r in made:
        r.close()
