"""Edits as values: put, add, block; and selections of tokens, heads and patches for them.

An edit is a function from an activation to its replacement. These are trees, whose tensors may be traced by
`torch.func` and `pg.jit`. `where` is a mask that broadcasts to the activation, so `vmap` over masks is a sweep.

Axes: t tokens, s keys, n heads, p patches.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from pgfunc.config import Config
from pgfunc.errors import SettingError
from pgfunc.lab.naming import describe

Where = Bool[Tensor, "*#s"] | bool


class Put(NamedTuple):
    """Replaces the activation by a value where the mask is True."""

    value: Any
    where: Any = True

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(as_mask(self.where, x), as_value(self.value, x), x)


class Add(NamedTuple):
    """Adds a vector to the activation where the mask is True."""

    vector: Any
    where: Any = True

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(as_mask(self.where, x), x + as_value(self.vector, x), x)


class Block(NamedTuple):
    """Makes queries blind to keys, in a mask of attention."""

    queries: Any
    keys: Any

    def __call__(self, mask: Tensor) -> Tensor:
        queries, keys = (as_mask(each, mask) for each in self)
        return mask & ~(rearrange(queries, "... t -> ... t 1") & rearrange(keys, "... s -> ... 1 s"))


def put(value: Float[Tensor, "*#s"] | float | int, where: Where = True) -> Put:
    """The edit that puts a value (of another run, a mean, 0) where a mask is True: patching and ablation."""
    return Put(value, where)


def add(vector: Float[Tensor, "*#s"] | float | int, where: Where = True) -> Add:
    """The edit that adds a vector where a mask is True: steering."""
    return Add(vector, where)


def block(queries: Bool[Tensor, "*b t"], keys: Bool[Tensor, "*b s"]) -> Block:
    """The edit of a `mask` after which these queries do not see these keys: attention knockout (Geva et al. 2023)."""
    return Block(queries, keys)


def tokens(*which: int | Bool[Tensor, "p"], n: int, device: torch.device | str = "cpu") -> Bool[Tensor, "t 1"]:
    """True at these tokens of n; negative indices count from the end. A mask selects among the first tokens.

    The axes suit activations `b t d`; for `b t n h` use `tokens(...)[:, None] & heads(...)`. A mask is moved to the
    device of the activation; for a compiled step on a GPU, make it there.
    """
    selected = torch.zeros(n, dtype=torch.bool, device=device)
    for each in which:
        if isinstance(each, Tensor):
            if each.dtype != torch.bool or each.dim() != 1 or len(each) > n:
                raise SettingError(f"a selection is {describe(each)}, expected a mask of at most {n} bool")
            selected[: len(each)] |= each.to(device)
        elif -n <= each < n:
            selected[each] = True
        else:
            raise SettingError(f"{each} is not one of {n}")
    return rearrange(selected, "t -> t 1")


def heads(*which: int, n: int, device: torch.device | str = "cpu") -> Bool[Tensor, "n 1"]:
    """True at these heads of n, for activations `b t n h`; for `b n t s` use `heads(...)[..., None]`. See `tokens`."""
    return tokens(*which, n=n, device=device)


def patches(mask: Bool[Tensor, "*b y x"], cfg: Config, share: float = 0.5) -> Bool[Tensor, "*b p"]:
    """The image tokens of which at least this share of the pixels is in a mask, of the model's picture size."""
    size, side = cfg.vision.image_size, cfg.vision.patch
    if mask.shape[-2:] != (size, size):
        raise SettingError(f"the mask has {mask.shape[-2]} x {mask.shape[-1]} pixels, expected {size} x {size}")
    inner = mask[..., : cfg.vision.grid * side, : cfg.vision.grid * side].float()
    return reduce(inner, "... (gy y) (gx x) -> ... (gy gx)", "mean", y=side, x=side) >= share


def as_mask(where: Any, x: Tensor) -> Tensor:
    """The mask on the activation's device. Raises SettingError if it is not a mask, such as an index."""
    if not (isinstance(where, bool) or (isinstance(where, Tensor) and where.dtype == torch.bool)):
        kind = str(where.dtype).removeprefix("torch.") if isinstance(where, Tensor) else type(where).__name__
        raise SettingError(f"a selection is {kind}, expected a mask of bool, see lab.tokens and lab.heads")
    return torch.as_tensor(where, device=x.device)


def as_value(value: Any, x: Tensor) -> Tensor:
    """The value on the activation's device, in its dtype."""
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)
