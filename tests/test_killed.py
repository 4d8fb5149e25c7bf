"""A stopped writer leaves the old content, the new one, or a commit that the next one completes; see `killing`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

POINTS = 100 if settings.get_current_profile_name() == "deep" else 2  # for each of four faults and each writer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_a_writer_that_is_stopped_anywhere_leaves_the_old_or_the_new():
    """SIGKILL, SIGINT, SIGTERM or a full disk stops it, at calls spread over all its changes of files.

    The content is complete, the same write then succeeds, and no temporary file remains.
    """
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run([sys.executable, script, str(POINTS)], capture_output=True, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
