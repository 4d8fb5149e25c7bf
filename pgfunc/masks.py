"""Who may see whom. Every mask of the project is made here, from two flags a token: valid and causal.

`causal` marks a token that opens a block of its own; a token sees its own block and all before it. One rule gives the
prefix-LM of PaliGemma (image and prefix 0, suffix 1), a causal LM (all 1) and block-causal masks (big_vision's
`mask_ar`):

    causal  0 0 0 1 1        sees  1 1 1 . .
    valid   1 1 1 1 1              1 1 1 . .
                                   1 1 1 . .
                                   1 1 1 1 .
                                   1 1 1 1 1
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor


class Span(NamedTuple):
    """A mask of which each query sees what stands together: the keys from `begin` to before `end`."""

    begin: Int[Tensor, "b t"]
    end: Int[Tensor, "b t"]


class Masks(NamedTuple):
    """What a layer may see; the even layers of Gemma 2 see less."""

    full: Bool[Tensor, "b t s"] | Span
    window: Bool[Tensor, "b t s"] | Span | tuple[()]


def positions(valid: Bool[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """The index of each token among the valid ones of its row, from 0: `1 1 0 1 -> 0 1 1 2`."""
    return (valid.cumsum(-1) - 1).clamp(min=0)


def prefix_lm(valid: Bool[Tensor, "b t"], causal: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t t"]:
    """Query t sees key s when s is of t's block or an earlier one, and both are valid."""
    query, key = _blocks(causal)
    return (key <= query) & _both(valid)


def window(valid: Bool[Tensor, "b t"], causal: Bool[Tensor, "b t"], size: int) -> Bool[Tensor, "b t t"]:
    """`prefix_lm`, but of other blocks only the last `size` positions, the query's own included.

    Within a block the window does not bite: the bidirectional prefix sees itself whole (the rule of transformers).

        causal  0 0 0 1 1        size 2 sees  1 1 1 . .
                                              1 1 1 . .
                                              1 1 1 . .
                                              . . 1 1 .
                                              . . . 1 1
    """
    query, key = _blocks(causal)
    place = positions(valid)
    near = rearrange(place, "b s -> b 1 s") > rearrange(place, "b t -> b t 1") - size
    return prefix_lm(valid, causal) & (near | (query == key))


def prompt(valid: Bool[Tensor, "b t"], causal: Bool[Tensor, "b t"], size: int) -> Masks:
    """The masks of tokens that see one another; `size` 0 makes no windowed one."""
    return Masks(prefix_lm(valid, causal), window(valid, causal, size) if size else ())


def cached(length: Int[Tensor, "b"], tokens: int, slots: int, size: int) -> Masks:
    """The masks of `tokens` causal tokens appended at `length`, over the slots of a cache.

    length 2, tokens 2, slots 5  sees  1 1 1 . .      size 2 sees  . 1 1 . .
                                       1 1 1 1 .                   . . 1 1 .
    """
    key = torch.arange(slots, device=length.device)
    query = rearrange(length, "b -> b 1 1") + rearrange(torch.arange(tokens, device=length.device), "t -> t 1")
    full = key <= query
    return Masks(full, full & (key > query - size) if size else ())


def spans(seen: Masks) -> Masks:
    """The masks of rows that have their valid tokens first, where all that a query sees stands together."""
    assert isinstance(seen.full, Tensor)
    end = seen.full.sum(-1)
    window = Span(end - seen.window.sum(-1), end) if isinstance(seen.window, Tensor) else ()
    return Masks(Span(torch.zeros_like(end), end), window)


def _blocks(causal: Bool[Tensor, "b t"]) -> tuple[Int[Tensor, "b t 1"], Int[Tensor, "b 1 t"]]:
    block = causal.cumsum(-1)
    return rearrange(block, "b t -> b t 1"), rearrange(block, "b s -> b 1 s")


def _both(valid: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t t"]:
    return rearrange(valid, "b t -> b t 1") & rearrange(valid, "b s -> b 1 s")
