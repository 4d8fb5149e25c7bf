"""The files in examples/ run, and print what their documentation says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read where Linux reports it")
def test_loading_a_sharded_checkpoint_of_1_gb_takes_less_than_1_2_times_its_size():
    found = json.loads(run(sys.executable, "examples/benchmarks/load_memory.py").stdout)
    assert found["bytes"] > 10**9
    assert found["shards"] > 2
    assert found["loaded"] < 0.1, "weights are mapped, not read"
    assert found["read"] < 1.2


def test_the_classic_script_prints_what_the_command_line_prints():
    flags = ["--prompt", "caption en", "--image_file_path", "examples/images/scene.png", "--only_cpu", "True"]
    classic = run(sys.executable, "examples/inference.py", *flags, "--do_sample", "False")
    assert classic.stdout == run(sys.executable, "-m", "pgfunc.cli", "caption", "examples/images/scene.png").stdout
    assert classic.stdout == run("bash", "examples/launch_inference.sh").stdout
    wrong = run(sys.executable, "examples/inference.py", "--prompt", "x", "--image_file_path", "no.png")
    assert wrong.stderr == "inference.py: no.png: no such file\n"
    assert wrong.returncode
