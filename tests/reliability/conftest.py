import os

import pytest

from .toy import KINDS, export_to


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """Kind -> path of a whole store; tests must not change it."""
    folder = tmp_path_factory.mktemp("whole")
    for kind, options in KINDS.items():
        export_to(folder / kind, **options)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture
def command(capfd, monkeypatch):
    """``command(*argv) -> (exit code, what it printed on stderr without progress)`` of the
    flexmemory command. Fails on a traceback.
    """
    from flexmemory.cli import main as cli

    monkeypatch.setattr(
        cli, "start_process", lambda: None
    )  # it sets JAX's compilation cache for the whole process

    def run(*argv):
        code = cli.main([str(word) for word in argv])
        said = capfd.readouterr().err
        assert "Traceback" not in said
        return code, said.rpartition("\r")[2].strip()

    return run


@pytest.fixture(scope="session")
def child_environment():
    """For processes of their own: the tests' modules and the CPU."""
    tests = os.path.dirname(os.path.dirname(__file__))
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([tests, os.path.dirname(tests)]),
    }
