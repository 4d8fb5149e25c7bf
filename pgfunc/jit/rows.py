"""Caches with other rows or fewer tokens: `rewind` forgets tokens, `reorder` chooses rows, `insert` replaces rows.

All are functions of a cache, and leave it as it is. They know which buffers compiled code may continue in place
(`donation.py`), so that a loop that uses them copies no more than it must.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from pgfunc import tree
from pgfunc.cache import Cache
from pgfunc.errors import SettingError
from pgfunc.jit.donation import LOCK, Arena, add_handle, buffers, copy_cache, find_lineage
from pgfunc.lowering import on_host, transformed

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def rewind(cache: Cache, length: Int[Tensor, "b"]) -> Cache:
    """The cache as it was when its rows had these lengths; for example to forget a rejected draft.

    `length` is an integer per row, from 0 to the current length. Outside this range, a number raises SettingError if
    both lengths are on the host; elsewhere a greater one becomes the current length, and a negative one 0. Compiled
    code continues the result without a copy if no other handle on its buffers is alive, as in a loop that keeps one
    handle.
    """
    if not isinstance(length, Tensor) or length.shape != cache.length.shape or length.dtype not in INTEGERS:
        text = f"{length.dtype} of shape {(*length.shape,)}" if isinstance(length, Tensor) else repr(length)
        raise SettingError(f"length is {one_line(text)}, expected a whole number for each of {len(cache.length)} rows")
    if on_host(length) and on_host(cache.length):
        if ((length < 0) | (length > cache.length)).any():
            raise SettingError(f"length is {length.tolist()}, expected 0 to {cache.length.tolist()}: rewind goes back")
        length = length.to(cache.length.dtype)
    else:
        length = torch.minimum(length.to(cache.length), cache.length).clamp(min=0)
    lineage = None if torch.compiler.is_compiling() else find_lineage(cache)
    if lineage is None:
        return cache._replace(length=length)
    with lineage.lock, LOCK:
        for position, handle in enumerate(lineage.handles):
            if handle.belongs_to(cache):
                return add_handle(cache, length, lineage, position, rewound=True)
    return cache._replace(length=length)


def reorder(cache: Cache, rows: Int[Tensor, "n"]) -> Cache:
    """The cache with these rows, in this order; a row may be repeated or left out.

    Reorders beams, and makes n samples of one prompt. Makes one copy with `bucket(slots)` slots, to which compiled code
    appends in place. Within a gradient or a transform the copy has as many slots as the cache, and is differentiable.
    If `rows` is on the host, an index that is not a row raises SettingError; elsewhere it is clamped to the rows.
    """
    count = len(cache.length)
    if not isinstance(rows, Tensor) or rows.dim() != 1 or not len(rows) or rows.dtype not in INTEGERS:
        raise SettingError(f"rows are {one_line(repr(rows))}, expected a list of one or more whole numbers as a tensor")
    if on_host(rows) and not ((rows >= 0) & (rows < count)).all():
        raise SettingError(f"rows are {rows.tolist()}, expected 0 to {count - 1}, as the cache has {count} rows")
    rows = rows.to(cache.length.device, torch.int64).clamp(0, count - 1)
    if torch.compiler.is_compiling() or transformed() or requires_gradient(cache):
        return tree.map(lambda x: x.index_select(0, rows), cache)
    lineage = find_lineage(cache)
    if lineage is None:
        return copy_cache(cache, Arena(), rows)
    with lineage.lock:
        return copy_cache(cache, lineage.arena, rows)


def insert(cache: Cache, new: Cache, rows: Int[Tensor, "n"]) -> Cache:
    """The cache with row i of `new` in place of its row rows[i]; other rows are unchanged.

    Lets new prompts take the places of finished rows, see `examples/loops/continuous.py`. Makes one copy with
    `bucket(slots)` slots, to which compiled code appends in place. Within a gradient or a transform the copy has as
    many slots as the cache, and is differentiable. `new` may have fewer slots than the cache. Raises SettingError if
    it has more, has other layers, or if `rows` are not different rows of the cache, as far as the host knows them.
    """
    count, device = len(cache.length), cache.length.device
    if not isinstance(rows, Tensor) or rows.shape != new.length.shape or rows.dtype not in INTEGERS:
        raise SettingError(f"rows are {one_line(repr(rows))}, expected {len(new.length)} whole numbers as a tensor")
    if on_host(rows) and not (((rows >= 0) & (rows < count)).all() and len(rows.unique()) == len(rows)):
        raise SettingError(f"rows are {rows.tolist()}, expected different numbers from 0 to {count - 1}")
    if new.slots > cache.slots or [x.shape[2:] for x in buffers(new)] != [x.shape[2:] for x in buffers(cache)]:
        raise SettingError("the new rows do not fit the cache: they have more slots, or are of another model")
    rows = rows.to(device, torch.int64)
    overflowed = torch.where(new.overflowed, cache.slots - new.slots, 0)  # such a row must still overflow
    length = cache.length.index_copy(0, rows, new.length + overflowed)
    if torch.compiler.is_compiling() or transformed() or requires_gradient(cache) or requires_gradient(new):
        pairs = zip(buffers(cache), buffers(new), strict=True)
        both = [x.index_copy(0, rows, F.pad(y, (0, 0, 0, 0, 0, cache.slots - new.slots))) for x, y in pairs]
        return Cache(tuple(both[: len(cache.k)]), tuple(both[len(cache.k) :]), length)
    lineage = find_lineage(cache)
    with lineage.lock if lineage else nullcontext():
        copy = copy_cache(cache._replace(length=length), lineage.arena if lineage else Arena())
    with torch.inference_mode(False), torch.no_grad():
        for x, y in zip(buffers(copy), buffers(new), strict=True):
            x[:, : new.slots].index_copy_(0, rows, y)
    return copy


def one_line(text: str) -> str:
    """The start of a text for a message, without line breaks."""
    return f"{' '.join(text.split()):.60}"


def requires_gradient(cache: Cache) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in buffers(cache))
