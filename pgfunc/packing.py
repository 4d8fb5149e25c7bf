"""Weights that are packed one after another in memory, so that one product computes several.

A packed tree has the same values as the plain tree, but q, k and v (gate and up) are views of one buffer. The compiled
`linear_many` on a GPU multiplies by the whole buffer; all other code reads the views.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pgfunc import tree
from pgfunc.paligemma import Params

L = TypeVar("L", bound=Any)


def packed(params: Params, device: torch.device) -> Params:
    """A copy of the parameters on a device, in which matrices that multiply the same vectors are packed.

    Quantized matrices are not packed. For parameters on the meta device, the copies are uninitialized memory.
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
    """Copies of tensors, one after another in one buffer on a device; uninitialized for tensors on the meta device.

    The tensors have the same dtype and the same shape but for the first axis.
    """
    sizes = [len(x) for x in tensors]
    copies = tensors[0].new_empty(sum(sizes), *tensors[0].shape[1:], device=device).split(sizes)
    for copy, x in zip(copies, tensors, strict=True):
        if not x.is_meta:
            copy.copy_(x)
    return list(copies)


def packed_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors that `pack` returned, as one tensor: a view of their buffer. None for other tensors."""
    first, ends = tensors[0], [x.data_ptr() + x.nbytes for x in tensors]
    alike = all(x.shape[1:] == first.shape[1:] and x.dtype == first.dtype and x.is_contiguous() for x in tensors)
    adjacent = all(x.data_ptr() == end for x, end in zip(tensors[1:], ends[:-1], strict=True))
    shared = all(x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for x in tensors)
    if not (alike and adjacent and shared):
        return None
    size = sum(len(x) for x in tensors), *first.shape[1:]
    return first.as_strided(size, torch.empty(size, device="meta").stride())
