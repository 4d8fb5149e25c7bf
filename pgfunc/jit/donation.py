"""Which cache may be written in place: handles, continuations and forks.

A *handle* is a `Cache` made by compiled code, `reorder` or `rewind`: buffers, and a length per row. It sees only the
slots before its length. A step takes a handle whose buffers are *donated*: it appends the new token in place, and
returns the *continuation*, a longer handle on the same buffers. Several handles may thus share buffers, here one row of
8 slots:

    buffers   a b c d e . . .
    one       a b c|               length 3
    two       a b c d e|           length 5, continued from one

    step(two)                 two is the newest: the step appends after e, in place
    step(one)                 a *fork*: two sees d, so the step copies a b c to other buffers and appends there
    step(one), two is dead    no living handle sees d, so the step writes over it, in place
    rewind(two, 3)            a handle like one; to continue it while two is alive is a fork

This *copy on fork* makes a step with donation return what the pure function returns. A *lineage* is the list of handles
on the same buffers, ordered so that none sees more than the next, except that a rewound handle may see less than those
before it. A handle is alive while one of its buffers is, or a view of one; views that are detached or made in inference
mode do not count.

CUDA graphs read and write fixed addresses, so buffers are used again when all handles on them are dead. An *arena*
holds the last few sets of buffers of one function.

Threads may continue the same handle. `LOCK` protects the choice of buffers. A lineage has its own lock, which is held
from that choice until the new handle is recorded.
"""

from collections import deque
from threading import RLock
from typing import Any, NamedTuple
from weakref import ref

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pgfunc.cache import Cache
from pgfunc.jit import cuda_graphs
from pgfunc.jit.arguments import Layout, layout

LOCK = RLock()  # held briefly; no code waits for another lock while it holds this one


class Handle(NamedTuple):
    """What is known of a handle: weak references to its tensors, which are its own objects on shared memory."""

    buffers: tuple[ref[Tensor], ...]
    length: ref[Tensor]
    rewound: bool  # handles before it in the lineage may see more than it does: `rewind` made it, for example

    def alive(self) -> bool:
        return any(buffer() is not None for buffer in self.buffers)

    def belongs_to(self, cache: Cache) -> bool:
        """Whether the cache consists of exactly these tensor objects."""
        return self.length() is cache.length and all(
            own() is x for own, x in zip(self.buffers, buffers(cache), strict=True)
        )


class Arena:
    """Sets of buffers that are used again when no handle on them is alive, as CUDA graphs read fixed addresses."""

    def __init__(self):
        self.caches: deque[Cache] = deque(maxlen=cuda_graphs.MAX_GRAPHS)


class Lineage(NamedTuple):
    """All handles on the same buffers, ordered as the module's docstring states, and constants of the buffers."""

    handles: list[Handle]
    layouts: tuple[Layout, ...]  # of the buffers
    addresses: list[int]  # of the buffers, each of which begins its storage
    arena: Arena
    lock: Any  # an RLock, held while a handle is continued

    @classmethod
    def of(cls, memory: tuple[Tensor, ...], arena: Arena) -> "Lineage":
        return cls([], tuple(map(layout, memory)), [x.data_ptr() for x in memory], arena, RLock())


_lineages: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()  # first buffer of each handle -> Lineage


def buffers(cache: Cache) -> tuple[Tensor, ...]:
    return (*cache.k, *cache.v)


def bucket(slots: int, least: int = 64) -> int:
    """The smallest of least · 1, 1.5, 2, 3, 4, 6, ... that is at least `slots`; `least` is a power of two."""
    size = least
    while size < slots:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def find_lineage(cache: Cache) -> Lineage | None:
    """The lineage of a cache; None if the cache is not a handle."""
    return _lineages.get(cache.k[0])


def lineage_of(handle: Cache) -> Lineage:
    """The lineage of a handle."""
    return _lineages[handle.k[0]]


def appends_in_place(cache: Cache) -> bool:
    """Whether a step may append to the cache in place.

    The cache must be a handle, and no living handle may see the slots after its length.
    """
    handles = living_handles(cache)
    return bool(handles) and handles[-1].belongs_to(cache) and (len(handles) == 1 or not handles[-1].rewound)


def living_handles(cache: Cache) -> list[Handle]:
    """The living handles on the cache's buffers. Removes dead ones from the lineage."""
    lineage = find_lineage(cache)
    if lineage is None:
        return []
    with LOCK:
        lineage.handles[:] = [handle for handle in lineage.handles if handle.alive()]
    return lineage.handles


def copy_cache(cache: Cache, arena: Arena, rows: Int[Tensor, "n"] | None = None) -> Cache:
    """A handle on a copy of the cache, or of some of its rows, with `bucket(slots)` slots.

    The copy takes free buffers of the arena, or else new ones.
    """
    old = buffers(cache)
    count, slots = old[0].shape[0] if rows is None else len(rows), bucket(cache.slots)
    sizes = [((count, slots, *x.shape[2:]), x.dtype, x.device) for x in old]
    with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode can be written only there
        length = cache.length if rows is None else cache.length[rows]
        if slots > cache.slots:  # a row that overflowed must still overflow
            length = torch.where(length > cache.slots, length + (slots - cache.slots), length)
        copy = claim_buffers(sizes, arena, length)
        for x, new in zip(old, buffers(copy), strict=True):
            target = new[:, : cache.slots]
            target.copy_(x) if rows is None else torch.index_select(x, 0, rows, out=target)
            new[:, cache.slots :].zero_()
    return copy


def claim_buffers(
    sizes: list[tuple[tuple[int, ...], torch.dtype, torch.device]], arena: Arena, length: Int[Tensor, "b"]
) -> Cache:
    """A handle on buffers with these shapes, dtypes and devices that no other handle uses.

    New buffers join the arena if graphs will read them.
    """
    with LOCK:
        for base in arena.caches:
            if sizes == [(tuple(x.shape), x.dtype, x.device) for x in buffers(base)] and not living_handles(base):
                return add_handle(base, length, lineage_of(base), 0, rewound=False)
        memory = [torch.empty(size, dtype=dtype, device=device) for size, dtype, device in sizes]
        base = Cache(tuple(memory[: len(memory) // 2]), tuple(memory[len(memory) // 2 :]), length)
        _lineages[base.k[0]] = lineage = Lineage.of(buffers(base), arena)
        if cuda_graphs.can_capture(memory):
            arena.caches.append(base)
        return add_handle(base, length, lineage, 0, rewound=False)


def continuation(cache: Cache, length: Tensor, lineage: Lineage, rewound: bool) -> Cache:
    """The newest handle on the buffers of a cache, to which a step has just appended. `rewound`: it may be shorter."""
    return add_handle(cache, length, lineage, len(lineage.handles), rewound)


def add_handle(cache: Cache, length: Tensor, lineage: Lineage, position: int, rewound: bool) -> Cache:
    """A new handle on the buffers of a cache, at a position in the lineage."""
    k, v = (tuple(x.detach() for x in side) for side in (cache.k, cache.v))  # new objects on the same memory
    _lineages[k[0]] = lineage
    with LOCK:
        lineage.handles.insert(position, Handle(tuple(map(ref, (*k, *v))), ref(length), rewound))
    return Cache(k, v, length)
