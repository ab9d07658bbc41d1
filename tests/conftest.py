"""Settings that every test shares; they must be in place before JAX starts."""

import fcntl
import gc
import json
import os
import tempfile

# tracing makes millions of small objects that live on; looking through them took 10% of it
gc.set_threshold(200_000, 10, 10)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# a program that several tests, workers or child processes use is compiled once
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="flexmemory-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{CACHE.name}/xla"
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = f"{CACHE.name}/hypothesis"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import pytest
from absl import flags
from hypothesis import settings

flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags, which pytest never parses
settings.register_profile("flexmemory", deadline=None, derandomize=True)
settings.load_profile("flexmemory")


TINY_SOURCE = "facts:people=4,docs=6+tasks:n=60,eval=12,length=4,pairs=3"


LONGEST = ("test_equality", "test_loop", "test_processes", "test_host_tables", "test_run")


def pytest_collection_modifyitems(items):
    """Files that take longest come first, so that no worker is left alone with one at the end."""
    order = {f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """The user's cache folder of commands called from tests, in this process or in another."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """``once(name, make) -> path``: ``make(path)`` is called once in the session, by the first
    worker that asks; the others wait. Tests must not change what lies there.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "once"
    folder.mkdir(exist_ok=True)

    def call(name, make):
        with open(folder / f"{name}.lock", "a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.getsize(lock.name):
                make(folder / name)
                lock.write("made")
        return folder / name

    return call


@pytest.fixture(scope="session")
def tiny_data(once):
    """A prepared dataset of a few thousand tokens with questions, vocabulary 400."""
    from flexmemory.data.prepare import prepare

    return once(
        "data",
        lambda out: prepare(TINY_SOURCE, "bpe:400", out, val_fraction=0.1, progress=False),
    )


@pytest.fixture(scope="session")
def tiny_config(tiny_data):
    """``tiny_config(pattern, **{"train.steps": 6, ...}) -> Config`` of a model that trains in
    seconds.
    """
    from experiments.sweeps import with_fields
    from flexmemory.config import Config

    base = {
        "model.d_model": 32,
        "model.n_heads": 4,
        "model.d_ff": 88,
        "model.init_std": 0.08,
        "data.seq_len": 96,
        "data.batch_size": 4,
        "data.path": str(tiny_data),
        "train.steps": 6,
        "train.log_every": 1,
        "train.eval_tokens": 512,
        "optimizer.warmup_steps": 2,
        "optimizer.lr": 1e-2,
        "optimizer.min_lr": 1e-3,
    }

    def make(pattern="flex memoryllm stem", **sets):
        return with_fields(Config(), base | {"model.pattern": pattern} | sets)

    return make


@pytest.fixture(scope="session")
def tiny_run(tiny_config, once):
    """(config, run folder, final result) of a finished run of two steps, for tests that need any
    run with rows to export. They must not change it.
    """
    from flexmemory.train.loop import train

    cfg = tiny_config("dense memoryllm", **{"train.steps": 2})
    workdir = once("run", lambda out: train(cfg, out, progress=False))
    return cfg, workdir, json.loads((workdir / "final_result.json").read_text())
