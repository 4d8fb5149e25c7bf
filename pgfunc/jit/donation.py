"""Handles on the buffers of caches, and who of them may write: `jit` appends in place where nobody can see it.

A handle does not see what is written behind its length. So the newest handle on some buffers may write there; an older
one forks, and its buffers are copied first. A handle is alive while any of its tensors is, or a view of one; what was
detached from it, or cut in inference mode, is not seen to be a part of it.

Threads may continue one handle: `LOCK` guards the choice of buffers, and the lock of a lineage is held from the choice
until the new handle is known.
"""

from collections import deque
from threading import RLock
from typing import Any, NamedTuple
from weakref import ref

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pgfunc import tree
from pgfunc.cache import Cache
from pgfunc.errors import SettingError
from pgfunc.jit import cuda_graphs
from pgfunc.jit.arguments import shape
from pgfunc.lowering import on_host, transformed

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LOCK = RLock()  # held for moments, and nothing is waited for with it


class Handle(NamedTuple):
    """A cache that was made here, while it lives: its tensors, which are objects of its own on shared memory."""

    buffers: tuple[ref[Tensor], ...]
    length: ref[Tensor]
    rewound: bool  # then those before it may see more than it does

    def alive(self) -> bool:
        return any(buffer() is not None for buffer in self.buffers)

    def of(self, cache: Cache) -> bool:
        return self.length() is cache.length and all(
            mine() is given for mine, given in zip(self.buffers, buffers(cache), strict=True)
        )


class Arena:
    """Buffers that may be used again when no handle on them is alive: the graphs of a step read them where they are."""

    def __init__(self):
        self.caches: deque[Cache] = deque(maxlen=cuda_graphs.KEPT)


class Lineage(NamedTuple):
    """All handles on the same memory, of which none sees more than the next; what never changes is noted once."""

    handles: list[Handle]
    shapes: tuple[Any, ...]  # of the buffers
    places: list[int]  # where they lie, each at the beginning of its storage
    arena: Arena
    lock: Any  # an RLock, held while a handle is continued

    @classmethod
    def on(cls, memory: tuple[Tensor, ...], arena: Arena) -> "Lineage":
        return cls([], tuple(map(shape, memory)), [x.data_ptr() for x in memory], arena, RLock())


_lineages: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()  # by the first buffer of each handle


def buffers(cache: Cache) -> tuple[Tensor, ...]:
    return (*cache.k, *cache.v)


def bucket(slots: int, least: int = 64) -> int:
    """The smallest of 64, 96, 128, 192, 256, 384, ... that holds so many slots; `least` is a power of two."""
    size = least
    while size < slots:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def known(cache: Cache) -> Lineage | None:
    """All handles on the memory of a cache; None where it was not made here."""
    return _lineages.get(cache.k[0])


def lineage_of(cache: Cache) -> Lineage:
    """All handles on the memory of a cache that is `writable`."""
    return _lineages[cache.k[0]]


def is_newest(cache: Cache) -> bool:
    """Whether a handle may write behind its length: it was made here, and none that is alive sees what stands there."""
    handles = living(cache)
    return bool(handles) and handles[-1].of(cache) and (len(handles) == 1 or not handles[-1].rewound)


def living(cache: Cache) -> list[Handle]:
    """The handles on the cache's buffers; those that are dead are forgotten."""
    lineage = known(cache)
    if lineage is None:
        return []
    with LOCK:
        lineage.handles[:] = [handle for handle in lineage.handles if handle.alive()]
    return lineage.handles


def copied(cache: Cache, arena: Arena, rows: Int[Tensor, "n"] | None = None) -> Cache:
    """A handle on a copy of a cache, or of these of its rows: in buffers of the arena that no handle uses, or new ones.

    New ones join the arena where graphs will read them. A copy has `bucket` slots.
    """
    old = buffers(cache)
    count, slots = old[0].shape[0] if rows is None else len(rows), bucket(cache.slots)
    kinds = [((count, slots, *x.shape[2:]), x.dtype, x.device) for x in old]
    with torch.inference_mode(False), torch.no_grad():  # else they could be written in inference mode alone
        length = cache.length if rows is None else cache.length[rows]
        if slots > cache.slots:  # a row that overflowed stays one
            length = torch.where(length > cache.slots, length + (slots - cache.slots), length)
        made = claimed(kinds, arena, length)
        for x, new in zip(old, buffers(made), strict=True):
            kept = new[:, : cache.slots]
            kept.copy_(x) if rows is None else torch.index_select(x, 0, rows, out=kept)
            new[:, cache.slots :].zero_()
    return made


def claimed(kinds: list[tuple[Any, torch.dtype, torch.device]], arena: Arena, length: Int[Tensor, "b"]) -> Cache:
    """A handle on buffers of these shapes, dtypes and devices that nobody else uses from now on."""
    with LOCK:
        for base in arena.caches:
            if kinds == [(tuple(x.shape), x.dtype, x.device) for x in buffers(base)] and not living(base):
                return registered(base, length, lineage_of(base), 0, rewound=False)
        made = [torch.empty(size, dtype=dtype, device=device) for size, dtype, device in kinds]
        base = Cache(tuple(made[: len(made) // 2]), tuple(made[len(made) // 2 :]), length)
        _lineages[base.k[0]] = lineage = Lineage.on(buffers(base), arena)
        if cuda_graphs.possible(made):
            arena.caches.append(base)
        return registered(base, length, lineage, 0, rewound=False)


def continued(cache: Cache, length: Tensor, lineage: Lineage) -> Cache:
    """A new handle on the buffers of a cache that has just been appended to."""
    return registered(cache, length, lineage, len(lineage.handles), rewound=False)


def registered(cache: Cache, length: Tensor, lineage: Lineage, position: int, rewound: bool) -> Cache:
    """A handle of its own on the buffers of a cache, at a position among the others."""
    k, v = (tuple(x.detach() for x in side) for side in (cache.k, cache.v))  # new objects on the same memory
    _lineages[k[0]] = lineage
    with LOCK:
        lineage.handles.insert(position, Handle(tuple(map(ref, (*k, *v))), ref(length), rewound))
    return Cache(k, v, length)


def rewind(cache: Cache, length: Int[Tensor, "b"]) -> Cache:
    """The cache as it was when its rows were so long: what a rejected draft wrote is forgotten.

    `length` is a whole number for each row, from 0 to what it is; a longer one is an error where the numbers are known
    on the host, and the row stays as long as it is elsewhere. Compiled code goes on from it without a copy if no other
    handle on its buffers is alive: a loop keeps one. Raises SettingError.
    """
    if not isinstance(length, Tensor) or length.shape != cache.length.shape or length.dtype not in WHOLE:
        given = f"{length.dtype} of shape {(*length.shape,)}" if isinstance(length, Tensor) else repr(length)
        raise SettingError(
            f"length is {' '.join(given.split()):.60}, expected a whole number for each of {len(cache.length)} rows"
        )
    if on_host(length) and on_host(cache.length):
        if ((length < 0) | (length > cache.length)).any():
            raise SettingError(f"length is {length.tolist()}, expected 0 to {cache.length.tolist()}: rewind goes back")
        length = length.to(cache.length.dtype)
    else:
        length = torch.minimum(length.to(cache.length), cache.length).clamp(min=0)
    lineage = None if torch.compiler.is_compiling() else known(cache)
    if lineage is None:
        return cache._replace(length=length)
    with lineage.lock, LOCK:
        for position, handle in enumerate(lineage.handles):
            if handle.of(cache):
                return registered(cache, length, lineage, position, rewound=True)
    return cache._replace(length=length)


def reorder(cache: Cache, rows: Int[Tensor, "n"]) -> Cache:
    """These rows of a cache, in this order; a row may stand there several times, or not at all.

    Beams are reordered so, and one prompt becomes n samples. It is one copy, to which compiled code appends in place,
    and has `bucket(slots)` slots; within a gradient or a transform it has as many as the cache, and is differentiable.
    Raises SettingError for what names no row, if that is known on the host; elsewhere the nearest row is taken.
    """
    count = len(cache.length)
    if not isinstance(rows, Tensor) or rows.dim() != 1 or not len(rows) or rows.dtype not in WHOLE:
        raise SettingError(
            f"rows are {' '.join(repr(rows).split()):.60}, expected a list of one or more whole numbers as a tensor"
        )
    if on_host(rows) and not ((rows >= 0) & (rows < count)).all():
        raise SettingError(f"rows are {rows.tolist()}, expected 0 to {count - 1}, as the cache has {count} rows")
    rows = rows.to(cache.length.device, torch.int64).clamp(0, count - 1)
    if torch.compiler.is_compiling() or transformed() or differentiated(cache):
        return tree.map(lambda x: x.index_select(0, rows), cache)
    lineage = known(cache)
    if lineage is None:
        return copied(cache, Arena(), rows)
    with lineage.lock:
        return copied(cache, lineage.arena, rows)


def differentiated(cache: Cache) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in buffers(cache))
