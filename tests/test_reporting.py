"""What a run of the tests says of them."""

import os
import signal
from pathlib import Path

from conftest import run_python

TWO_TESTS = """
import os

def test_that_fails():
    assert 1 == 2

def test_that_is_killed():
    os.kill(os.getpid(), 9)
"""


def test_a_killed_run_has_named_its_failures(tmp_path):
    (tmp_path / "test_two.py").write_text(TWO_TESTS)
    flags = ["-q", "--rootdir=.", "-p", "conftest", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    killed = run_python("-m", "pytest", *flags, "test_two.py", cwd=tmp_path, env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert "failed: test_two.py::test_that_fails (call): " in killed.stdout
    assert ":5: " in killed.stdout and "1 == 2" in killed.stdout
