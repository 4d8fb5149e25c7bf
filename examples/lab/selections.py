"""Selections of image tokens, as masks: neighbours, random ones, and those with the highest norm.

Axes: s scenes, p image tokens.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

CORNERS = (0, 15)  # the top corners, whose norms are outliers inside the vision encoder, see `vision`


def widened(mask: Bool[Tensor, "s p"]) -> Bool[Tensor, "s p"]:
    """The mask with one ring of neighbouring tokens, eight around each."""
    planes = rearrange(mask.float(), "s (gy gx) -> s 1 gy gx", gx=round(mask.shape[1] ** 0.5))
    return rearrange(F.max_pool2d(planes, 3, 1, 1) > 0, "s 1 gy gx -> s (gy gx)")


def highest(scores: Float[Tensor, "s p"], count: Int[Tensor, "s"] | int) -> Bool[Tensor, "s p"]:
    """True at so many tokens of each scene, those with the highest scores."""
    rank = scores.argsort(1, descending=True).argsort(1)
    return rank < torch.as_tensor(count).reshape(-1, 1)


def random_of(allowed: Bool[Tensor, "s p"], count: Int[Tensor, "s"] | int, seed: int) -> Bool[Tensor, "s p"]:
    """True at so many random tokens of each scene, among the allowed ones; at all of these if there are not enough."""
    scores = torch.rand(allowed.shape, generator=torch.Generator().manual_seed(seed))
    return allowed & highest(torch.where(allowed, scores, -1.0), count)


def outliers(x: Float[Tensor, "s p d"], deviations: float) -> Bool[Tensor, "s p"]:
    """True at tokens whose norm is so many standard deviations above the mean of their picture."""
    norms = x.norm(dim=-1)
    return norms > norms.mean(1, keepdim=True) + deviations * norms.std(1, keepdim=True)
