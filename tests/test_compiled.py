"""Runs `tests/compiled` in a separate process without `conftest.py`, as its shape-checking hook cannot be compiled."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_the_tests_of_compiled_code_pass():
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-W", "default", str(HERE / "compiled")]
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=HERE.parent, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
