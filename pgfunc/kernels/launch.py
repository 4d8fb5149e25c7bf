"""What every launch of a kernel needs: its code, whether it may start early, and rows that it can read."""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from pgfunc.errors import DeviceError, SettingError


def code(name: str) -> ModuleType:
    """A module of this folder that is written in Triton."""
    try:
        return import_module(f"pgfunc.kernels.{name}")
    except ImportError:
        raise DeviceError("these kernels need Triton, which is not installed: pip install triton") from None


def dense(*tensors: Tensor) -> None:
    """Raise SettingError where the elements of a row do not lie side by side, as the kernels read them."""
    for x in tensors:
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise SettingError(f"strides {x.stride()} of a tensor of shape {tuple(x.shape)}, expected dense rows")


def early(x: Tensor) -> dict[str, bool]:
    """Whether a kernel may start while the one before still runs, as Triton wants to hear it: from Hopper on it may."""
    able = x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if able else {"EARLY": False}


def shared_memory(x: Tensor) -> float:
    """The bytes that a program may have in the shared memory of the device."""
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else float("inf")
