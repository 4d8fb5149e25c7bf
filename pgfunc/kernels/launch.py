"""What every launch of a kernel needs: its module, the arguments of an early start, and a check of its tensors."""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from pgfunc.errors import DeviceError, SettingError


def triton_module(name: str) -> ModuleType:
    """A module of this folder that is written in Triton. Raises DeviceError if Triton is not installed."""
    try:
        return import_module(f"pgfunc.kernels.{name}")
    except ImportError:
        raise DeviceError("these kernels need Triton, which is not installed: pip install triton") from None


def check_dense(*tensors: Tensor) -> None:
    """Raise SettingError if the elements of a row are not adjacent in memory, as the kernels read them."""
    for x in tensors:
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise SettingError(f"strides {x.stride()} of a tensor of shape {tuple(x.shape)}, expected dense rows")


def early_launch(x: Tensor) -> dict[str, bool]:
    """Triton's arguments for a kernel that may start while the kernel before it still runs (on Hopper and later)."""
    supported = x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if supported else {"EARLY": False}


def shared_memory(x: Tensor) -> float:
    """The bytes of shared memory that one program can use on the device of x."""
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else float("inf")
