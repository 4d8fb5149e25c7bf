"""A recorder of the operators that run in a block, and of the devices of their results."""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Watched(TorchDispatchMode):
    """Records the names of operators, such as `aten::mm`, in the order of the calls."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name)
        self.devices.update(x.device.type for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
        return out
