"""The KV cache: an immutable value. A handle is buffers and one length per row; appending makes a new handle.

Slot s of row b holds the key and value of the token at position s, for s < length[b]; later slots are never seen. So
appending at a row's length changes nothing that an older handle sees, and rows of different lengths share one batch. To
go back, keep the older handle.

A token without a free slot is not written, but its row still counts it: `overflowed` marks such rows from then on, and
their logits are nan. If the lengths are known on the host (on a CPU, outside of compiled code), it is an error instead.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pgfunc import tree
from pgfunc.errors import CacheFullError
from pgfunc.lowering import on_host


class Cache(NamedTuple):
    """One key buffer and one value buffer per layer, and the number of tokens in each row."""

    k: tuple[Float[Tensor, "b s k h"], ...]
    v: tuple[Float[Tensor, "b s k h"], ...]
    length: Int[Tensor, "b"]

    def __repr__(self) -> str:
        return tree.summary(self)

    @property
    def slots(self) -> int:
        """The capacity of each row, in tokens."""
        return self.k[0].shape[1]

    @property
    def overflowed(self) -> Bool[Tensor, "b"]:
        """Whether each row was given more tokens than it has slots. Reading this property does not wait for a GPU."""
        return self.length > self.slots


class Empty(NamedTuple):
    """A cache without tokens, with so many slots; prefill fills it."""

    slots: int


class Slots(NamedTuple):
    """Which slots of each row get a new token, and which one, in all layers."""

    written: Bool[Tensor, "b s 1 1"]
    token: Int[Tensor, "b s 1 1"]  # has no meaning in other slots


class Past(NamedTuple):
    """One layer of a cache, and the slots for new tokens."""

    k: Float[Tensor, "b s k h"]
    v: Float[Tensor, "b s k h"]
    length: Int[Tensor, "b"]
    new: Slots


def check_room(length: Int[Tensor, "b"], tokens: int, slots: int) -> None:
    """Raise CacheFullError if a row has no free slots for so many more tokens and the lengths are known on the host."""
    if on_host(length) and len(length) and (longest := int(length.max())) + tokens > slots:
        raise CacheFullError(
            f"a row of {longest} tokens has no room for {tokens} more in {slots} slots; prefill with a larger size"
        )


def by_layer(cache: Cache | Empty | tuple[()], tokens: int, layers: int) -> Sequence[Past | Empty | tuple[()]]:
    """For each layer: where it appends its new tokens."""
    if not isinstance(cache, Cache):
        return [cache] * layers
    new = slots_behind(cache.length, tokens, cache.slots)
    return [Past(k, v, cache.length, new) for k, v in zip(cache.k, cache.v, strict=True)]


def slots_behind(length: Int[Tensor, "b"], tokens: int, slots: int) -> Slots:
    """The slots length .. length + t - 1 of each row. A token beyond the last slot is not written.

    length 2, tokens 3, slots 4  written . . 1 1  token . . 0 1
    """
    token = torch.arange(slots, device=length.device) - rearrange(length, "b -> b 1")
    token = rearrange(token, "b s -> b s 1 1")
    return Slots((token >= 0) & (token < tokens), token.clamp(0, tokens - 1))


def append_layer(
    k: Float[Tensor, "b t k h"], v: Float[Tensor, "b t k h"], past: Past | Empty | tuple[()]
) -> tuple[Float[Tensor, "b s k h"], Float[Tensor, "b s k h"]]:
    """The keys and values of t new tokens: alone, with free slots after them, or appended to the buffers of `past`.

    A function of (k, v, past), so that a rule can write into the buffers, see `lowering`.
    """
    if isinstance(past, Past):
        return append(past.k, k, past.new), append(past.v, v, past.new)
    if isinstance(past, Empty):
        return pad(k, past.slots - k.shape[1]), pad(v, past.slots - v.shape[1])
    return k, v


def append(buffer: Float[Tensor, "b s k h"], new: Float[Tensor, "b t k h"], to: Slots) -> Float[Tensor, "b s k h"]:
    """The buffer with `new` in these slots; all other slots are unchanged."""
    if new.shape[1] > 1:  # a single token needs no choice
        new = new.take_along_dim(to.token, dim=1)
    return torch.where(to.written, new, buffer) if new.shape[1] else buffer


def pad(buffer: Float[Tensor, "b t k h"], size: int) -> Float[Tensor, "b s k h"]:
    """The buffer with `size` more empty slots."""
    return F.pad(buffer, (0, 0, 0, 0, 0, size)) if size else buffer
