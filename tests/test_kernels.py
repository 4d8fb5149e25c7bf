"""What stands in `tests/kernels` runs in processes of its own: in Triton's interpreter, and on a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pgfunc.errors import DeviceError
from pgfunc.kernels import calls, tuning

HERE = Path(__file__).parent


def run(**variables: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-s", "--noconftest", "-W", "default", str(HERE / "kernels")]
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths} | variables
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which interprets the kernels on a CPU")
def test_kernels_interpreted():
    run(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_gpu():
    run(TRITON_INTERPRET="0")


def test_without_triton_a_call_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "pgfunc.kernels.device", raising=False)
    with pytest.raises(DeviceError, match="need Triton, which is not installed: pip install triton"):
        calls.matvec(torch.ones(4), torch.ones(2, 4))


def test_a_block_is_no_wider_than_the_matrix_needs_and_every_size_has_a_tile():
    for name in tuning.TILES:
        kind, _, kernel = name.rpartition(" ")
        bits, group = {"": (16, 0), "int8": (8, 0), "int4": (4, 32)}[kind]
        for outputs, inputs in [(1, 1), (64, 16), (2560, 2048), (257_152, 4608)]:
            inputs, w = max(inputs, group), torch.empty(outputs, 0)
            sizes = calls.KernelMatrix((w, w), inputs, bits, group).sizes(tuning.tile(kernel, inputs, bits))
            assert sizes["BLOCK"] & (sizes["BLOCK"] - 1) == 0
            assert max(16, group) <= sizes["BLOCK"] < max(17, 2 * inputs)
    for slots in (1, 600, 1000, 8192):
        for size in (2, 4):
            share = tuning.chunk(slots, size)
            assert share.keys & (share.keys - 1) == 0
            assert share.keys >= 16  # the least that a tensor core multiplies
