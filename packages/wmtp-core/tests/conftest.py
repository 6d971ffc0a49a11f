"""Fixtures of several files."""

import os
import subprocess
import sys

import pytest


@pytest.fixture
def assert_passes_interpreted(request):
    """Runs the tests of the same file in a process in which Triton interprets its kernels, which needs no GPU."""

    def run():
        command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", str(request.path)]
        env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-8000:]
        assert " passed" in done.stdout

    return run
