"""Settings that every test shares; they must be in place before JAX starts."""

import gc
import os
import tempfile

gc.set_threshold(
    200_000,
    10,
    10,
    # tracing makes millions of small objects that live on: looking through them takes a tenth of
    # the time
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# programs that several tests or their child processes compile are compiled once
CACHE = (
    None
    if "JAX_COMPILATION_CACHE_DIR" in os.environ
    else tempfile.TemporaryDirectory(prefix="flexmemory-tests-")
)
if CACHE:
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": CACHE.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }

import pytest
from absl import flags
from hypothesis import settings

flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags, which pytest never parses
settings.register_profile("flexmemory", deadline=None, derandomize=True)
settings.load_profile("flexmemory")


TINY_SOURCE = "facts:people=4,docs=6+tasks:n=60,eval=12,length=4,pairs=3"


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """The user's cache folder of commands called from tests, in this process or in another."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A prepared dataset of a few thousand tokens with questions, vocabulary 400."""
    from flexmemory.data.prepare import prepare

    out = tmp_path_factory.mktemp("data") / "tiny"
    prepare(TINY_SOURCE, "bpe:400", out, val_fraction=0.1, progress=False)
    return out


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
