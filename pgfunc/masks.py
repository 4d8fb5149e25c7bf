"""Which tokens attend to which. The model's masks are made only here.

The masks of a prompt are made from two flags per token, `valid` and `causal`; those of tokens appended to a cache from
its lengths. `causal` marks a token that begins a block; a token sees its own block and all blocks before it. This rule
gives the prefix-LM of PaliGemma (image and prefix 0, suffix 1), a causal LM (all 1) and block-causal masks
(big_vision's `mask_ar`):

    causal  0 0 0 1 1        sees  1 1 1 . .
    valid   1 1 1 1 1              1 1 1 . .
                                   1 1 1 . .
                                   1 1 1 1 .
                                   1 1 1 1 1

The formulas make boolean masks. Compiled code may describe a mask instead (`Span`, `Appended`), for kernels that need
no mask in memory; `dense` converts a description to a boolean mask.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Span(NamedTuple):
    """The mask of queries that each see contiguous keys: from `begin` up to, but not including, `end`."""

    begin: Int[Tensor, "b t"]
    end: Int[Tensor, "b t"]


class Appended(NamedTuple):
    """The mask of tokens appended to a cache at `length`: each sees itself and all before it, or the last `window`."""

    length: Int[Tensor, "b"]
    tokens: int
    window: int  # 0: no window


class Prepared(NamedTuple):
    """A boolean mask (`seen`) in the form that PyTorch's fused attention reads, made once for all layers."""

    seen: Bool[Tensor, "b t s"]
    bias: Float[Tensor, "b t s"]  # 0 for seen keys and -inf for others; 0 for all keys of an empty query
    empty: Bool[Tensor, "b t 1"]  # queries that see no key


Mask = Bool[Tensor, "b t s"] | Span | Appended | Prepared


class Masks(NamedTuple):
    """The masks of full attention and of a sliding window, which every second layer of Gemma 2 has."""

    full: Mask
    window: Mask | tuple[()]


def positions(valid: Bool[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """The index of each token among the valid ones of its row, from 0: `1 1 0 1 -> 0 1 1 2`."""
    return (valid.cumsum(-1) - 1).clamp(min=0)


def prefix_lm(valid: Bool[Tensor, "b t"], causal: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t t"]:
    """Query t sees key s if both are valid and s is in the block of t or in an earlier one."""
    query, key = _blocks(causal)
    return (key <= query) & _both(valid)


def window(valid: Bool[Tensor, "b t"], causal: Bool[Tensor, "b t"], size: int) -> Bool[Tensor, "b t t"]:
    """`prefix_lm`, but only the last `size` positions of other blocks are seen; the query's own position counts.

    The window does not apply within a block: the bidirectional prefix sees all of itself (the rule of transformers).

        causal  0 0 0 1 1        size 2 sees  1 1 1 . .
                                              1 1 1 . .
                                              1 1 1 . .
                                              . . 1 1 .
                                              . . . 1 1
    """
    query, key = _blocks(causal)
    position = positions(valid)
    near = rearrange(position, "b s -> b 1 s") > rearrange(position, "b t -> b t 1") - size
    return prefix_lm(valid, causal) & (near | (query == key))


def prompt(valid: Bool[Tensor, "b t"], causal: Bool[Tensor, "b t"], size: int) -> Masks:
    """The masks of tokens that attend to one another. There is no windowed mask if `size` is 0."""
    return Masks(prefix_lm(valid, causal), window(valid, causal, size) if size else ())


def left_aligned_prompt(valid: Bool[Tensor, "b t"], causal: Bool[Tensor, "b t"], size: int) -> Masks:
    """`prompt` for rows whose valid tokens come first. Then each query sees contiguous keys.

    It has a name of its own so that a rule can replace it by `spans`, see `lowering`.
    """
    return prompt(valid, causal, size)


def spans(masks: Masks) -> Masks:
    """The same masks as spans, if each query sees contiguous keys."""
    assert isinstance(masks.full, Tensor)
    end = masks.full.sum(-1)
    windowed = Span(end - masks.window.sum(-1), end) if isinstance(masks.window, Tensor) else ()
    return Masks(Span(torch.zeros_like(end), end), windowed)


def cached(length: Int[Tensor, "b"], tokens: int, slots: int, size: int) -> Masks:
    """The masks of `tokens` causal tokens appended at `length`, over the slots of a cache.

    length 2, tokens 2, slots 5  sees  1 1 1 . .      size 2 sees  . 1 1 . .
                                       1 1 1 1 .                   . . 1 1 .
    """
    windowed = dense(Appended(length, tokens, size), slots) if size else ()
    return Masks(dense(Appended(length, tokens, 0), slots), windowed)


def appended(length: Int[Tensor, "b"], tokens: int, slots: int, size: int) -> Masks:
    """The masks of `cached` as descriptions."""
    return Masks(Appended(length, tokens, 0), Appended(length, tokens, size) if size else ())


def dense(mask: Mask, slots: int) -> Bool[Tensor, "b t s"]:
    """The boolean mask of a description, over so many slots. A mask that exists is returned as it is."""
    if isinstance(mask, Tensor):
        return mask
    if isinstance(mask, Prepared):
        return mask.seen
    key = torch.arange(slots, device=mask[0].device)
    if isinstance(mask, Span):
        return (key >= rearrange(mask.begin, "b t -> b t 1")) & (key < rearrange(mask.end, "b t -> b t 1"))
    token = torch.arange(mask.tokens, device=key.device)
    query = rearrange(mask.length, "b -> b 1 1") + rearrange(token, "t -> t 1")
    return (key <= query) & (key > query - mask.window) if mask.window else key <= query


def prepared(masks: Masks, dtype: torch.dtype) -> Masks:
    """Boolean masks -> prepared masks, whose bias has this dtype; other masks are returned as they are.

    It has a name of its own so that a rule can skip it, see `lowering`.
    """
    full, window = (prepare(mask, dtype) if isinstance(mask, Tensor) else mask for mask in masks)
    return Masks(full, window)  # pyright: ignore[reportArgumentType]  only `window` may be ()


def prepare(seen: Bool[Tensor, "b t s"], dtype: torch.dtype) -> Prepared:
    """`Prepared` for one mask."""
    # an empty query reads all keys, and `attend` sets its result to 0: otherwise cuDNN's gradient is nan (PyTorch 2.11,
    # H100)
    empty = ~seen.any(-1, keepdim=True)
    bias = torch.zeros_like(seen, dtype=dtype).masked_fill(~(seen | empty), float("-inf"))
    return Prepared(seen, bias, empty)


def _blocks(causal: Bool[Tensor, "b t"]) -> tuple[Int[Tensor, "b t 1"], Int[Tensor, "b 1 t"]]:
    block = causal.cumsum(-1)
    return rearrange(block, "b t -> b t 1"), rearrange(block, "b s -> b 1 s")


def _both(valid: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t t"]:
    return rearrange(valid, "b t -> b t 1") & rearrange(valid, "b s -> b 1 s")
