"""Children with fake devices: their count must be known before JAX starts, so each is a process of
its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def child():
    """``child(devices, what, *arguments)``: what parallel/child.py prints."""

    def run(devices: int, what: str, *arguments):
        paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        done = subprocess.run(
            [sys.executable, "-m", "parallel.child", str(devices), what, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
