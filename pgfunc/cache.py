"""The KV cache: an immutable value. A handle is buffers and a length a row; appending makes a new handle.

Slot s of row b holds the key and value of the token at position s, for s < length[b]; what lies behind is never seen.
So appending at a row's length changes nothing that an older handle can see, rows of different lengths sit in one
batch, and going back is keeping the older handle.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


class Cache(NamedTuple):
    """One key and one value buffer a layer, and how much of each row is filled."""

    k: tuple[Float[Tensor, "b s k h"], ...]
    v: tuple[Float[Tensor, "b s k h"], ...]
    length: Int[Tensor, "b"]

    @property
    def slots(self) -> int:
        """The positions that a row has room for."""
        return self.k[0].shape[1]


def append(
    buffer: Float[Tensor, "b s k h"], new: Float[Tensor, "b t k h"], length: Int[Tensor, "b"]
) -> Float[Tensor, "b s k h"]:
    """The buffer with `new` at slots length .. length + t of each row; earlier slots are unchanged.

    A row must have room: eager on the CPU a full one is an IndexError, elsewhere what the device makes of it.
    """
    rows = torch.arange(new.shape[0], device=new.device)
    slots = rearrange(length, "b -> b 1") + torch.arange(new.shape[1], device=new.device)
    return torch.index_put(buffer, (rearrange(rows, "b -> b 1"), slots), new)


def pad(buffer: Float[Tensor, "b t k h"], size: int) -> Float[Tensor, "b s k h"]:
    """The buffer with `size` empty slots more."""
    return F.pad(buffer, (0, 0, 0, 0, 0, size)) if size else buffer
