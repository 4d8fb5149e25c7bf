"""The device that a command computes on, and its memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pgfunc.checkpoint import as_device
from pgfunc.errors import DeviceError, SettingError


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Raise a SettingError that says what helps, if the memory of the device is not enough for the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise  # a CPU's allocator raises a plain RuntimeError
        raise SettingError(f"not enough memory on the device: {remedy}") from error


def computing_device(name: str | None, purpose: str) -> torch.device:
    """The device with this name. Raises DeviceError for meta, where there is nothing to check or to measure."""
    device = as_device(name)
    if device.type == "meta":
        raise DeviceError(f"device meta has shapes but no arithmetic, so there is nothing to {purpose}; name another")
    return device
