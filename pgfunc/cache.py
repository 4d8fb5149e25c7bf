"""The KV cache: an immutable value. A handle is buffers and a length a row; appending makes a new handle.

Slot s of row b holds the key and value of the token at position s, for s < length[b]; what lies behind is never seen.
So appending at a row's length changes nothing that an older handle can see, rows of different lengths sit in one
batch, and going back is keeping the older handle.

A token that finds no slot is not written, and its row still counts it: `overflowed` tells such rows for ever. Their
logits are nan. Where the lengths are known on the host, on a CPU outside of compiled code, it is an error instead.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pgfunc.errors import CacheFullError
from pgfunc.ops import on_host


class Cache(NamedTuple):
    """One key and one value buffer a layer, and how much of each row is filled."""

    k: tuple[Float[Tensor, "b s k h"], ...]
    v: tuple[Float[Tensor, "b s k h"], ...]
    length: Int[Tensor, "b"]

    @property
    def slots(self) -> int:
        """The positions that a row has room for."""
        return self.k[0].shape[1]

    @property
    def overflowed(self) -> Bool[Tensor, "b"]:
        """The rows that were given more tokens than they had room for; nothing is asked of a GPU."""
        return self.length > self.slots


def check_room(length: Int[Tensor, "b"], tokens: int, slots: int) -> None:
    """Raise CacheFullError where a row has no room for so many tokens more, if the lengths are known on the host."""
    if on_host(length) and (longest := int(length.max())) + tokens > slots:
        raise CacheFullError(
            f"a row of {longest} tokens has no room for {tokens} more in {slots} slots; prefill with a larger size"
        )


def append(
    buffer: Float[Tensor, "b s k h"], new: Float[Tensor, "b t k h"], length: Int[Tensor, "b"]
) -> Float[Tensor, "b s k h"]:
    """The buffer with `new` at slots length .. length + t of each row; earlier slots are unchanged.

    What would stand behind the last slot is left out.
    """
    rows = rearrange(torch.arange(new.shape[0], device=new.device), "b -> b 1")
    begin = rearrange(length, "b -> b 1")
    slots = (begin + torch.arange(new.shape[1], device=new.device)).clamp(max=buffer.shape[1] - 1)
    # a token without a slot writes again what the last slot is given here, or holds already
    written = torch.take_along_dim(new, rearrange((slots - begin).clamp(min=0), "b t -> b t 1 1"), dim=1)
    full = rearrange(begin >= buffer.shape[1], "b t -> b t 1 1")
    return torch.index_put(buffer, (rows, slots), torch.where(full, buffer[rows, slots], written))


def pad(buffer: Float[Tensor, "b t k h"], size: int) -> Float[Tensor, "b s k h"]:
    """The buffer with `size` empty slots more."""
    return F.pad(buffer, (0, 0, 0, 0, 0, size)) if size else buffer
