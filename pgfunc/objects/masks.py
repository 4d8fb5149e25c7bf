"""Objects with masks, as data, and what makes them valid. Knows nothing of models or their text."""

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from pgfunc import tree
from pgfunc.errors import SettingError
from pgfunc.objects.boxes import Box


class Segment(NamedTuple):
    """An object, its box and its mask."""

    label: str
    box: Box
    mask: Bool[Tensor, "y x"]  # of the whole picture; False outside the box
    confidence: float | None = None  # of the box; see `detect.with_confidence`


def check_tensor(mask: Tensor) -> None:
    """Raise SettingError unless the mask is a tensor."""
    if not isinstance(mask, Tensor):
        raise SettingError(f"a mask is a {type(mask).__name__}, expected a tensor; torch.as_tensor makes one")


def check_mask(mask: Bool[Tensor, "y x"]) -> None:
    """Raise SettingError unless the mask is a Boolean tensor of two axes."""
    check_tensor(mask)
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise SettingError(f"a mask is {tree.dtype_name(mask)}{list(mask.shape)}, expected bool[height, width]")


def bounds(mask: Bool[Tensor, "y x"]) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the True pixels of a mask that has some; bottom and right are exclusive."""
    (top, bottom), (left, right) = (_ends(mask.any(axis)) for axis in (1, 0))
    return top, left, bottom, right


def _ends(present: Bool[Tensor, "n"]) -> tuple[int, int]:
    indices = present.nonzero()
    return int(indices.min()), int(indices.max()) + 1
