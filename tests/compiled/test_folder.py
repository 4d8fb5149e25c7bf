"""A folder whose files were cut in the middle is mended, and gives the same."""

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


def test_a_folder_of_code_that_was_truncated_is_made_again(tmp_path):
    quick = os.environ | {"TORCHINDUCTOR_VEC_ISA_OK": "1"}  # else a library is compiled for each kind of vectors

    def run() -> str:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "code")]
        done = subprocess.run(command, env=quick, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    first = run()
    files = {path: path.read_bytes() for path in (tmp_path / "code").rglob("*") if path.is_file()}
    for path, content in files.items():
        path.write_bytes(content[: len(content) // 2])
    assert run() == first
