"""Logits and uniform numbers -> tokens. Every filter is a pure function from logits to logits.

A filter sets what it excludes to -inf and leaves the rest alone, so filters compose in any order that a loop wants;
`choose` applies them in the usual one: temperature, top-k, top-p, min-p. Randomness comes in as numbers.
"""

import math
import sys
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from pgfunc.errors import SettingError
from pgfunc.ops import upcast

PART = 512  # logits


@dataclass(frozen=True)
class Settings:
    """How to choose a token. Temperature 0 is greedy; `None` is no filter.

    Raises SettingError for a value outside its range, or that is no number. At temperature 0 filters change nothing.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        own = {
            "temperature": real("temperature", self.temperature),
            "top_k": None if self.top_k is None else whole("top-k", self.top_k, 1),
            "top_p": None if self.top_p is None else real("top-p", self.top_p),
            "min_p": None if self.min_p is None else real("min-p", self.min_p),
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)  # Python's own numbers: numpy's would be tensors in compiled code
        if not 0 <= self.temperature < float("inf"):
            raise SettingError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SettingError(f"top-p is {self.top_p}, expected more than 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise SettingError(f"min-p is {self.min_p}, expected 0 to 1")


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A setting that is an integer, numpy's included. Raises SettingError for anything else, or outside its range."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise SettingError(f"{name} is {value!r:.60}, expected a whole number")
    number = int(value)
    if number < least or (most is not None and number > most):
        raise SettingError(f"{name} is {number}, expected {least} {'or more' if most is None else f'to {most}'}")
    return number


def real(name: str, value: Any) -> float:
    """A setting that is a number, numpy's included. Raises SettingError for anything else."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise SettingError(f"{name} is {value!r:.60}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise SettingError(f"{name} is beyond the range of a float") from None


def choose(logits: Float[Tensor, "*b v"], u: Float[Tensor, "*b"], settings: Settings) -> Int[Tensor, "*b"]:
    """The next token under the settings; greedy choice ignores u."""
    if settings.temperature == 0:
        return greedy(logits)
    # the largest becomes 0, and in float64: a tiny temperature must make the others -inf, and nothing nan; on CUDA
    # PyTorch divides by a number by multiplying with its reciprocal, so that this must be finite
    temperature = max(settings.temperature, sys.float_info.min)
    logits = (logits - logits.amax(-1, keepdim=True)).double() / temperature
    logits = logits if settings.top_k is None else top_k(logits, settings.top_k)
    logits = logits if settings.top_p is None else top_p(logits, settings.top_p)
    logits = logits if settings.min_p is None else min_p(logits, settings.min_p)
    return draw(logits, u)


def greedy(logits: Float[Tensor, "*b v"]) -> Int[Tensor, "*b"]:
    """The most probable token, the first of equals."""
    parts = split(logits)
    best = parts.amax(-1).argmax(-1)
    within = torch.take_along_dim(parts, rearrange(best, "... -> ... 1 1"), dim=-2).argmax(-1)
    return best * parts.shape[-1] + rearrange(within, "... 1 -> ...")


def logprob(logits: Float[Tensor, "*b v"], token: Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """The log-probability of each token under its logits."""
    parts = split(upcast(logits))
    peaks = parts.amax(-1).clamp(min=torch.finfo(parts.dtype).min)  # finite where all of a part are excluded
    sums = (parts - rearrange(peaks, "... -> ... 1")).exp().sum(-1)
    peak = peaks.amax(-1)
    total = (sums * (peaks - rearrange(peak, "... -> ... 1")).exp()).sum(-1)
    chosen = logits.gather(-1, rearrange(token, "... -> ... 1"))
    return rearrange(chosen, "... 1 -> ...") - peak - total.log()


def split(logits: Float[Tensor, "*b v"]) -> Float[Tensor, "*b n s"]:
    """Logits in parts, each reduced before all are: compiled, a reduction of one row is the work of one program of a
    GPU, or takes a kernel for each of its numbers. A vocabulary that has no even parts is filled with -inf."""
    count = logits.shape[-1]
    if count > PART and math.gcd(count, PART) < PART / 8:
        logits = F.pad(logits, (0, -count % PART), value=-math.inf)
    return rearrange(logits, "... (n s) -> ... n s", s=math.gcd(logits.shape[-1], PART))


def draw(logits: Float[Tensor, "*b v"], u: Float[Tensor, "*b"]) -> Int[Tensor, "*b"]:
    """The token at which the cumulative probability first exceeds u, for u in [0, 1]; monotone in u.

    In float64: over 257,152 tokens a float32 sum loses the tail. A token of probability 0 is never drawn.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[..., -1:]
    # u = 1 must fall on the last token that has probability, not behind it
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(rearrange(u, "... -> ... 1").double() * total, below).contiguous()
    token = torch.searchsorted(cumulative, target, right=True)
    return rearrange(token, "... 1 -> ...").clamp(max=logits.shape[-1] - 1)  # beyond the last only where logits are nan


def among(allowed: range | Int[Tensor, "r"], choice: Int[Tensor, "*b"]) -> Int[Tensor, "*b"]:
    """The tokens that were chosen, by place, among those that have logits."""
    return choice + allowed.start if isinstance(allowed, range) else allowed[choice]


def top_k(logits: Float[Tensor, "*b v"], k: int) -> Float[Tensor, "*b v"]:
    """Keep the k largest logits, and what ties with the last of them."""
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, float("-inf"))


def top_p(logits: Float[Tensor, "*b v"], p: float) -> Float[Tensor, "*b v"]:
    """Keep the fewest tokens that sum to probability p, and what ties with the last (Holtzman et al. 2020)."""
    if p >= 1:
        return logits
    ranked = logits.sort(-1, descending=True).values
    shares = ranked.double().softmax(-1)
    kept = (shares.cumsum(-1) - shares < p).sum(-1, keepdim=True)
    least = ranked.gather(-1, (kept - 1).clamp(min=0))
    return logits.masked_fill(logits < least, float("-inf"))


def min_p(logits: Float[Tensor, "*b v"], p: float) -> Float[Tensor, "*b v"]:
    """Keep the tokens at least p times as probable as the most probable one (Nguyen et al. 2024)."""
    floor = logits.amax(-1, keepdim=True).double() + (math.log(p) if p else -math.inf)
    return logits.masked_fill(logits < floor, float("-inf"))
