"""How long a call takes on a device, and what the device can do. This module knows nothing about models."""

import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pgfunc import tree
from pgfunc.bench.roofline import Machine
from pgfunc.jit import compiled_in


def times(fn: Callable[[], Any], device: torch.device, repeat: int, calls: int = 1) -> tuple[float, ...]:
    """The mean seconds of a call in each of `repeat` runs of `calls` calls. A further run warms up first."""
    return tuple(timed(lambda: [fn() for _ in range(calls)], device) / calls for _ in range(repeat + 1))[1:]


def timed(fn: Callable[[], Any], device: torch.device) -> float:
    """The seconds until the device has finished the work of a call."""
    synchronize(device)
    start = perf_counter()
    fn()
    synchronize(device)
    return perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure the memory bandwidth and the rate of a square matrix product, each as the fastest of a few runs.

    A CPU reads 1 GiB; any other device copies it.
    """
    cpu = device.type == "cpu"
    buffer = torch.ones(2**28, dtype=torch.float32, device=device)
    bandwidth = read_bandwidth(buffer) if cpu else copy_bandwidth(buffer)
    side = 2048 if cpu else 8192
    x = torch.randn(side, side, device=device).to(dtype)
    return Machine(bandwidth, 2 * side**3 / min(times(lambda: x @ x.T, device, 5, 1 if cpu else 10)))


def read_bandwidth(buffer: Float[Tensor, "n"]) -> float:
    """Bytes/s of a sum or a matrix-vector product with PyTorch's threads; which one is faster depends on the CPU."""
    vector = buffer[:2048].clone()
    reads = (lambda: buffer.sum(), lambda: buffer.view(-1, 2048) @ vector)
    return tree.nbytes(buffer) / min(min(times(read, buffer.device, 5)) for read in reads)


def copy_bandwidth(buffer: Float[Tensor, "n"]) -> float:
    """Bytes/s of a copy on the device, counting both the bytes read and the bytes written."""
    other = torch.empty_like(buffer)
    return 2 * tree.nbytes(buffer) / min(times(lambda: other.copy_(buffer), buffer.device, 5, 10))


def memory(device: torch.device) -> int | float:
    """The bytes of memory of a device. For a CPU, those of the machine or the container, whichever is less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if not hasattr(os, "sysconf"):  # Windows
        return inf
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), int(text) if text.isdigit() else inf)


def hardware(device: torch.device) -> str:
    """The name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if device.type == "cpu" and cpuinfo.exists() else None
    return name[1] if name else platform.processor() or platform.machine()


@contextmanager
def cold() -> Iterator[None]:
    """A context in which torch.compile uses no code that an earlier process left on the disk, and leaves none."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, compiled_in(folder):
        yield
