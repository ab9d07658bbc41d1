"""Fake devices in a process of their own, which all tests share: the other tests run on one
device, and JAX has one number of devices at a time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def child(tmp_path_factory):
    """``child(devices, function, *arguments)``: the result of that function of parallel/child.py.
    Its exceptions fail the test with their traceback.
    """
    log = tmp_path_factory.mktemp("devices") / "stderr"
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    with (
        open(log, "w") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "parallel.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths},
        ) as process,
    ):

        def call(devices: int, function: str, *arguments):
            request = json.dumps([devices, function, *arguments], default=str)
            print(request, file=process.stdin, flush=True)
            line = process.stdout.readline()
            assert line, f"the process ended with {process.wait()}:\n{log.read_text()[-3000:]}"
            answer = json.loads(line)
            if "error" in answer:
                pytest.fail(f"{function} on {devices} devices:\n{answer['error']}", pytrace=False)
            return answer["result"]

        try:
            yield call
        finally:
            process.stdin.close()
            process.wait(60)
