"""Compile a pure function; a donated cache is appended to in place, and the meaning stays that of the pure function.

    step = pg.jit(pg.decode, donate="cache")
    logits, cache = step(params, token, cache, cfg)

A cache is append-only: a handle does not see what is written behind its length. So its buffers may be written in place
there, unless a newer handle on them is alive: then the older one forks, and its buffers are copied first. Owns who may
write where. Knows nothing about models.
"""

import inspect
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar
from weakref import ref

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Int
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from pgfunc.cache import Cache
from pgfunc.errors import SettingError

P = ParamSpec("P")
R = TypeVar("R")
CACHE = "the continuation"  # stands for it among the results of compiled code


class Handle(NamedTuple):
    """A cache that was made here, as long as it lives; each has a tensor object of its own for the first buffer."""

    first: "ref[Tensor]"
    length: "ref[Tensor]"
    rewound: bool  # then those before it may see more than it does


_lineages: "WeakTensorKeyDictionary" = (
    WeakTensorKeyDictionary()
)  # first buffer -> handles on it: none sees more than the next


def jit(fn: Callable[P, R], donate: str | None = None) -> "Jitted[P, R]":
    """`fn`, compiled: the same arguments, the same results, without gradients.

    `fn` is a pure function of trees of tensors. What else is among its arguments (a config, a number) is fixed in the
    code, which is compiled once for each combination of those with the tensors' shapes, strides and dtypes. `donate`
    names an argument that is a `Cache`, of which `fn` returns the continuation as one of its results: it appends
    behind the length of each row and leaves the rest alone. Caches have `bucket(slots)` slots in compiled code, so that
    prompts of many lengths share it; one that was not made by compiled code is copied once.

    Raises SettingError where `fn` has no such argument, or does not return a continuation: before the code is compiled,
    `fn` runs once as it is.
    """
    return Jitted(fn, donate)


class Jitted(Generic[P, R]):
    """A compiled function. `compilations` says how often it was compiled."""

    def __init__(self, fn: Callable[P, R], donate: str | None = None):
        self.fn: Callable[..., R] = fn
        self.donate, self.signature = donate, inspect.signature(fn)
        self._compiled: dict[Any, Callable[[list[Tensor]], Any]] = {}
        if donate is not None and donate not in self.signature.parameters:
            raise SettingError(f"donate is {donate!r}, expected one of {', '.join(self.signature.parameters)}")

    @property
    def compilations(self) -> int:
        return len(self._compiled)

    @torch.no_grad()
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        bound = self.signature.bind(*args, **kwargs)
        given, cache = dict(bound.arguments), ()
        if self.donate is not None:
            cache = given.pop(self.donate, ())
            if not isinstance(cache, Cache):
                raise SettingError(
                    f"{self.donate} is a {type(cache).__name__}, expected a Cache: others stay undonated"
                )
            cache = writable(cache)
        leaves, structure = pytree.tree_flatten((given, cache))
        moving = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        fixed = tuple(leaf for leaf, moves in zip(leaves, moving, strict=True) if not moves)
        tensors = [dense(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        key = structure, moving, fixed, tuple((x.shape, x.stride(), x.dtype, x.device) for x in tensors)
        if key not in self._compiled:
            if isinstance(cache, Cache):
                check_appends(cache, continuation(self.fn(**given, **{str(self.donate): cache})))
            self._compiled[key] = compiled(self.fn, self.donate, structure, moving, fixed)
        results, length = self._compiled[key](tensors)
        if not isinstance(cache, Cache):
            return results
        new = continued(cache, length)
        return pytree.tree_map(lambda leaf: new if leaf is CACHE else leaf, results)


def compiled(fn, donate: str | None, structure, moving: tuple[bool, ...], fixed: tuple) -> Callable:
    """A function of the tensors alone: the results of `fn`, and the length of the continuation, whose buffers are those
    that went in."""

    def body(tensors: list[Tensor]):
        rest, others = iter(tensors), iter(fixed)
        given, cache = pytree.tree_unflatten([next(rest if moves else others) for moves in moving], structure)
        if donate is None:
            return fn(**given), ()
        results = fn(**given, **{donate: cache})
        new = continuation(results)
        for old, after in zip((*cache.k, *cache.v), (*new.k, *new.v), strict=True):
            old.copy_(after)  # compiled, this writes the new slots and nothing else
        return pytree.tree_map(lambda x: CACHE if x is new else x, results, is_leaf=lambda x: x is new), new.length

    # torch keeps a few compiled versions of each code object, and this has one object a version
    body.__code__ = body.__code__.replace()
    return torch.compile(body, dynamic=False, fullgraph=True)


def continuation(results: Any) -> Cache:
    """The one cache among the results."""
    found = [x for x in pytree.tree_leaves(results, is_leaf=lambda x: isinstance(x, Cache)) if isinstance(x, Cache)]
    if len(found) != 1:
        raise SettingError(f"the function returns {len(found)} caches, expected one: the donated one, continued")
    return found[0]


def dense(x: Tensor) -> Tensor:
    """A slice of one axis as a tensor of its own, so that it does not matter where it was cut from."""
    return x.clone(memory_format=torch.contiguous_format) if x.dim() == 1 and x.stride() != (1,) else x


def check_appends(cache: Cache, new: Cache) -> None:
    """Raise SettingError where a continuation differs from the cache in what a handle on it sees."""
    seen = torch.arange(cache.slots, device=cache.length.device) < rearrange(cache.length, "b -> b 1")
    for old, after in zip((*cache.k, *cache.v), (*new.k, *new.v), strict=True):
        if old.shape != after.shape or not torch.equal(old[seen], after[seen]):
            raise SettingError("the function changes a donated cache before its length: it may append to it alone")
    if (new.length < cache.length).any():
        raise SettingError("the function makes a donated cache shorter: it may append to it alone")


def bucket(slots: int) -> int:
    """The smallest of 64, 96, 128, 192, 256, 384, ... that holds so many slots."""
    size = 64
    while size < slots:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def writable(cache: Cache) -> Cache:
    """The cache on buffers of which no living handle sees the slots behind its length: its own, or copies."""
    handles = _lineages.get(cache.k[0]) or []
    handles[:] = [handle for handle in handles if handle.first() is not None]
    if handles:
        last = handles[-1]
        alone = len(handles) == 1 or not last.rewound
        if alone and last.first() is cache.k[0] and last.length() is cache.length:
            return cache
    room = bucket(cache.slots) - cache.slots
    k, v = (tuple(F.pad(x, (0, 0, 0, 0, 0, room)).contiguous() for x in side) for side in (cache.k, cache.v))
    if not room:
        k, v = (tuple(x.clone() for x in side) for side in (k, v))
    _lineages[k[0]] = []
    return Cache(k, v, cache.length)


def continued(cache: Cache, length: Tensor) -> Cache:
    """A new handle on the buffers of a cache that has just been appended to."""
    handles = _lineages[cache.k[0]]
    return registered(cache, length, handles, len(handles), rewound=False)


def rewind(cache: Cache, length: Int[Tensor, "b"]) -> Cache:
    """The cache as it was when its rows were so long, at most as they are: what a rejected draft wrote is forgotten.

    Compiled code goes on from it without a copy if no other handle on its buffers is alive: a loop keeps one.
    """
    handles = _lineages.get(cache.k[0])
    if handles is None:
        return cache._replace(length=length)
    place = next(i for i, handle in enumerate(handles) if handle.first() is cache.k[0])
    return registered(cache, length, handles, place, rewound=True)


def registered(cache: Cache, length: Tensor, handles: list[Handle], place: int, rewound: bool) -> Cache:
    """A handle of its own on the buffers of a cache, at a place among the others."""
    first = cache.k[0].detach()  # the same memory
    _lineages[first] = handles
    handles.insert(place, Handle(ref(first), ref(length), rewound))
    return Cache((first, *cache.k[1:]), cache.v, length)
