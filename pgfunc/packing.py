"""Weights that are packed side by side in memory, so that one product serves several matrices.

A packed tree is the plain tree: q, k and v (gate and up) are views of one buffer. Compiled code for GPUs reads the
buffer, everything else the views.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pgfunc import tree
from pgfunc.paligemma import Params

L = TypeVar("L", bound=Any)


def packed(params: Params, device: torch.device) -> Params:
    """A copy of the parameters on a device, with the matrices packed that multiply the same vectors.

    Quantized matrices are not packed. Parameters on the meta device give uninitialised memory of their shapes.
    """
    vision = tuple(pack_fields(layer, device, "q k v", "q_bias k_bias v_bias") for layer in params.vision.layers)
    language = tuple(pack_fields(layer, device, "q k v", "gate up") for layer in params.language.layers)
    params = params._replace(
        vision=params.vision._replace(layers=vision), language=params.language._replace(layers=language)
    )
    return tree.map(lambda leaf: torch.empty_like(leaf, device=device) if leaf.is_meta else leaf.to(device), params)


def pack_fields(layer: L, device: torch.device, *groups: str) -> L:
    """A layer in which the fields of each group, such as "q k v", are packed."""
    for names in map(str.split, groups):
        tensors = [getattr(layer, name) for name in names]
        if all(isinstance(x, Tensor) for x in tensors):
            layer = layer._replace(**dict(zip(names, pack(tensors, device), strict=True)))
    return layer


def pack(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of tensors, one behind another in one buffer on a device; uninitialised for tensors on the meta device.

    The tensors have one dtype, and differ in the size of their first axis only.
    """
    sizes = [len(x) for x in tensors]
    copies = tensors[0].new_empty(sum(sizes), *tensors[0].shape[1:], device=device).split(sizes)
    for copy, x in zip(copies, tensors, strict=True):
        if not x.is_meta:
            copy.copy_(x)
    return list(copies)


def packed_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors that `pack` made, as one tensor: a view of their buffer. None for other tensors."""
    first, ends = tensors[0], [x.data_ptr() + x.nbytes for x in tensors]
    alike = all(x.shape[1:] == first.shape[1:] and x.dtype == first.dtype and x.is_contiguous() for x in tensors)
    adjacent = all(x.data_ptr() == end for x, end in zip(tensors[1:], ends[:-1], strict=True))
    shared = all(x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for x in tensors)
    if not (alike and adjacent and shared):
        return None
    size = sum(len(x) for x in tensors), *first.shape[1:]
    return first.as_strided(size, torch.empty(size, device="meta").stride())
