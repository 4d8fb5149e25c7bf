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

from pgfunc import tree
from pgfunc.errors import CacheFullError
from pgfunc.ops import on_host


class Cache(NamedTuple):
    """One key and one value buffer a layer, and how much of each row is filled."""

    k: tuple[Float[Tensor, "b s k h"], ...]
    v: tuple[Float[Tensor, "b s k h"], ...]
    length: Int[Tensor, "b"]

    def __repr__(self) -> str:
        return tree.summary(self)

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
    if on_host(length) and len(length) and (longest := int(length.max())) + tokens > slots:
        raise CacheFullError(
            f"a row of {longest} tokens has no room for {tokens} more in {slots} slots; prefill with a larger size"
        )


class Slots(NamedTuple):
    """Where t tokens of each row go, for all layers; a token without a slot is left out."""

    rows: Int[Tensor, "b one"]
    slots: Int[Tensor, "b t"]  # length, length + 1, ..., but at most the last
    tokens: Int[Tensor, "b t"]  # which of the t stands there
    full: Bool[Tensor, "b one one one"]  # rows without any slot, whose last one keeps what it holds


def slots_behind(length: Int[Tensor, "b"], tokens: int, slots: int) -> Slots:
    """The slots length .. length + t of each row, of a cache that has so many.

    length 2, tokens 3, slots 4  slots 2 3 3  tokens 0 1 1: the last is written twice, with the same token
    """
    begin = rearrange(length, "b -> b 1")
    inside = (begin + torch.arange(tokens, device=length.device)).clamp(max=slots - 1)
    rows = torch.arange(len(length), device=length.device)
    return Slots(rearrange(rows, "b -> b 1"), inside, (inside - begin).clamp(min=0), begin[:, :, None, None] >= slots)


def append(buffer: Float[Tensor, "b s k h"], new: Float[Tensor, "b t k h"], where: Slots) -> Float[Tensor, "b s k h"]:
    """The buffer with `new` in these slots; all others are unchanged."""
    written = torch.where(where.full, buffer[where.rows, where.slots], new[where.rows, where.tokens])
    return torch.index_put(buffer, (where.rows, where.slots), written)


def pad(buffer: Float[Tensor, "b t k h"], size: int) -> Float[Tensor, "b s k h"]:
    """The buffer with `size` empty slots more."""
    return F.pad(buffer, (0, 0, 0, 0, 0, size)) if size else buffer
