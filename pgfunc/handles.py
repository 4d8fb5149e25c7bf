"""Handles on the buffers of caches, and who of them may write: `jit` appends in place where nobody can see it.

A handle does not see what is written behind its length. So the newest handle on some buffers may write there; an older
one forks, and its buffers are copied first. A handle is alive while any of its tensors is, or a view of one; what was
detached from it, or cut in inference mode, is not seen to be a part of it.
"""

from collections import deque
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pgfunc import replay
from pgfunc.arguments import shape
from pgfunc.cache import Cache


class Handle(NamedTuple):
    """A cache that was made here, while it lives: its tensors, which are objects of its own on shared memory."""

    buffers: tuple["ref[Tensor]", ...]
    length: "ref[Tensor]"
    rewound: bool  # then those before it may see more than it does

    def alive(self) -> bool:
        return any(buffer() is not None for buffer in self.buffers)

    def of(self, cache: Cache) -> bool:
        return self.length() is cache.length and all(
            mine() is given for mine, given in zip(self.buffers, buffers(cache), strict=True)
        )


class Lineage(NamedTuple):
    """All handles on the same memory, of which none sees more than the next; what never changes is noted once."""

    handles: list[Handle]
    shapes: tuple[Any, ...]  # of the buffers
    places: list[int]  # where they lie, each at the beginning of its storage

    @classmethod
    def on(cls, memory: tuple[Tensor, ...]) -> "Lineage":
        return cls([], tuple(map(shape, memory)), [x.data_ptr() for x in memory])


_lineages: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()  # by the first buffer of each handle


def buffers(cache: Cache) -> tuple[Tensor, ...]:
    return (*cache.k, *cache.v)


def bucket(slots: int, least: int = 64) -> int:
    """The smallest of 64, 96, 128, 192, 256, 384, ... that holds so many slots; `least` is a power of two."""
    size = least
    while size < slots:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def lineage_of(cache: Cache) -> Lineage:
    """All handles on the memory of a cache that is `writable`."""
    return _lineages[cache.k[0]]


def writable(cache: Cache, arena: deque[Cache]) -> Cache:
    """The cache on buffers of which no living handle sees the slots behind its length: its own, or copies.

    Copies are made in new buffers, which join the arena where graphs will read them, or in ones of it that no handle
    uses any more.
    """
    handles = living(cache)
    if handles and handles[-1].of(cache) and (len(handles) == 1 or not handles[-1].rewound):
        return cache
    room = bucket(cache.slots) - cache.slots
    sizes = [(x.shape[0], x.shape[1] + room, *x.shape[2:]) for x in buffers(cache)]
    for made in arena:
        kinds = [(x.dtype, x.device) for x in buffers(cache)] == [(x.dtype, x.device) for x in buffers(made)]
        if kinds and sizes == [x.shape for x in buffers(made)] and not living(made):
            for old, new in zip(buffers(cache), buffers(made), strict=True):
                new[:, : cache.slots].copy_(old)
                new[:, cache.slots :].zero_()
            return made._replace(length=cache.length)
    with torch.inference_mode(False), torch.no_grad():  # else they could be written in inference mode alone
        k, v = (tuple(F.pad(x, (0, 0, 0, 0, 0, room)).contiguous() for x in side) for side in (cache.k, cache.v))
    _lineages[k[0]] = Lineage.on((*k, *v))
    made = Cache(k, v, cache.length)
    if replay.possible(buffers(made)):
        arena.append(made)
    return made


def living(cache: Cache) -> list[Handle]:
    """The handles on the cache's buffers; those that are dead are forgotten."""
    lineage = _lineages.get(cache.k[0])
    if lineage is None:
        return []
    lineage.handles[:] = [handle for handle in lineage.handles if handle.alive()]
    return lineage.handles


def continued(cache: Cache, length: Tensor, lineage: Lineage) -> Cache:
    """A new handle on the buffers of a cache that has just been appended to."""
    return registered(cache, length, lineage, len(lineage.handles), rewound=False)


def rewind(cache: Cache, length: Int[Tensor, "b"]) -> Cache:
    """The cache as it was when its rows were so long, at most as they are: what a rejected draft wrote is forgotten.

    Compiled code goes on from it without a copy if no other handle on its buffers is alive: a loop keeps one.
    """
    lineage = None if torch.compiler.is_compiling() else _lineages.get(cache.k[0])
    if lineage is not None:
        for place, handle in enumerate(lineage.handles):
            if handle.of(cache):
                return registered(cache, length, lineage, place, rewound=True)
    return cache._replace(length=length)


def registered(cache: Cache, length: Tensor, lineage: Lineage, place: int, rewound: bool) -> Cache:
    """A handle of its own on the buffers of a cache, at a place among the others."""
    k, v = (tuple(x.detach() for x in side) for side in (cache.k, cache.v))  # new objects on the same memory
    _lineages[k[0]] = lineage
    lineage.handles.insert(place, Handle(tuple(map(ref, (*k, *v))), ref(length), rewound))
    return Cache(k, v, length)
