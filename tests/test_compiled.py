"""What stands in `tests/compiled` runs in a process of its own: the hook that checks shapes cannot be compiled."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_compiled_code():
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-W", "default", str(HERE / "compiled")]
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=HERE.parent, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
