"""A folder with truncated files is repaired, and the results are the same."""

import os
import subprocess
import sys

PROGRAM = """
import sys, torch
import pgfunc as pg
def f(x): return torch.sin(x) * 2 + 1
with pg.compiled_in(sys.argv[1]):
    print(pg.jit(f)(torch.arange(8.0)).tolist())
"""


def test_truncated_code_is_compiled_again(tmp_path):
    environment = os.environ | {"TORCHINDUCTOR_VEC_ISA_OK": "1"}  # else PyTorch compiles a test for each vector width

    def run() -> str:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "code")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    first = run()
    files = {path: path.read_bytes() for path in (tmp_path / "code").rglob("*") if path.is_file()}
    for path, content in files.items():
        path.write_bytes(content[: len(content) // 2])
    assert run() == first
