"""Logits and uniform numbers -> tokens. Every filter is a pure function from logits to logits.

A filter sets the logits of the tokens it excludes to -inf and does not change the others, so filters compose; their
order matters. `choose` applies them in the usual order: temperature, top-k, top-p, min-p. Random numbers are arguments.
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

PART = 512  # logits that are reduced together


@dataclass(frozen=True)
class Settings:
    """How to choose a token. Temperature 0 is greedy, and then filters have no effect; `None` means no filter.

    Raises SettingError if a value is not a number or is outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        numbers = {
            "temperature": checked_float("temperature", self.temperature),
            "top_k": None if self.top_k is None else checked_int("top-k", self.top_k, 1),
            "top_p": None if self.top_p is None else checked_float("top-p", self.top_p),
            "min_p": None if self.min_p is None else checked_float("min-p", self.min_p),
        }
        for name, value in numbers.items():
            object.__setattr__(self, name, value)  # Python numbers: numpy's would be tensors in compiled code
        if not 0 <= self.temperature < float("inf"):
            raise SettingError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SettingError(f"top-p is {self.top_p}, expected more than 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise SettingError(f"min-p is {self.min_p}, expected 0 to 1")


def checked_int(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The setting as an int; numpy integers are accepted.

    Raises SettingError if it is not an integer, or not in the range least..most.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise SettingError(f"{name} is {value!r:.60}, expected a whole number")
    number = int(value)
    if number < least or (most is not None and number > most):
        raise SettingError(f"{name} is {number}, expected {least} {'or more' if most is None else f'to {most}'}")
    return number


def checked_float(name: str, value: Any) -> float:
    """The setting as a float; numpy numbers are accepted. Raises SettingError if it is not a number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise SettingError(f"{name} is {value!r:.60}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise SettingError(f"{name} is beyond the range of a float") from None


whole, real = checked_int, checked_float  # their former names


def choose(logits: Float[Tensor, "*b v"], u: Float[Tensor, "*b"], settings: Settings) -> Int[Tensor, "*b"]:
    """The next token under the settings. At temperature 0 it does not depend on u."""
    if settings.temperature == 0:
        return greedy(logits)
    # subtract the maximum, then divide in float64: a tiny temperature makes all other logits -inf and none nan;
    # PyTorch on CUDA multiplies by 1 / temperature, so that must be finite
    temperature = max(settings.temperature, sys.float_info.min)
    logits = (logits - logits.amax(-1, keepdim=True)).double() / temperature
    logits = logits if settings.top_k is None else top_k(logits, settings.top_k)
    logits = logits if settings.top_p is None else top_p(logits, settings.top_p)
    logits = logits if settings.min_p is None else min_p(logits, settings.min_p)
    return draw(logits, u)


def greedy(logits: Float[Tensor, "*b v"]) -> Int[Tensor, "*b"]:
    """The most probable token; the first one of several with the same logit."""
    parts = split_vocabulary(logits)
    best_part = parts.amax(-1).argmax(-1)
    offset = torch.take_along_dim(parts, rearrange(best_part, "... -> ... 1 1"), dim=-2).argmax(-1)
    return best_part * parts.shape[-1] + rearrange(offset, "... 1 -> ...")


def logprob(logits: Float[Tensor, "*b v"], token: Int[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """The log-probability of each token under its logits."""
    parts = split_vocabulary(upcast(logits))
    maxima = parts.amax(-1).clamp(min=torch.finfo(parts.dtype).min)  # finite even if a whole part is excluded
    sums = (parts - rearrange(maxima, "... -> ... 1")).exp().sum(-1)
    maximum = maxima.amax(-1)
    total = (sums * (maxima - rearrange(maximum, "... -> ... 1")).exp()).sum(-1)
    chosen = logits.gather(-1, rearrange(token, "... -> ... 1"))
    return rearrange(chosen, "... 1 -> ...") - maximum - total.log()


def split_vocabulary(logits: Float[Tensor, "*b v"]) -> Float[Tensor, "*b n s"]:
    """Logits in equal parts, so that a reduction first reduces each part, then the results.

    In compiled code on a GPU, one row would be reduced by a single thread block, or by a separate kernel for each
    result. A vocabulary that does not divide well is padded with -inf.
    """
    count = logits.shape[-1]
    if count > PART and math.gcd(count, PART) < PART / 8:
        logits = F.pad(logits, (0, -count % PART), value=-math.inf)
    return rearrange(logits, "... (n s) -> ... n s", s=math.gcd(logits.shape[-1], PART))


def draw(logits: Float[Tensor, "*b v"], u: Float[Tensor, "*b"]) -> Int[Tensor, "*b"]:
    """The first token at which the cumulative probability exceeds u; for u = 1, the last token of probability above 0.

    Monotone in u in [0, 1]. Never draws a token of probability 0. Computed in float64, as a float32 sum over 257,152
    tokens loses the tail.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[..., -1:]
    # u = 1 must select the last token with a probability above 0
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(rearrange(u, "... -> ... 1").double() * total, below).contiguous()
    token = torch.searchsorted(cumulative, target, right=True)
    return rearrange(token, "... 1 -> ...").clamp(max=logits.shape[-1] - 1)  # greater only if logits are nan


def allowed_ids(allowed: range | Int[Tensor, "r"], choice: Int[Tensor, "*b"]) -> Int[Tensor, "*b"]:
    """The token ids for choices among the allowed tokens, where `choice` indexes `allowed`."""
    return choice + allowed.start if isinstance(allowed, range) else allowed[choice]


split, among = split_vocabulary, allowed_ids  # their former names


def top_k(logits: Float[Tensor, "*b v"], k: int) -> Float[Tensor, "*b v"]:
    """Keep the k largest logits, and all that equal the smallest of them."""
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, float("-inf"))


def top_p(logits: Float[Tensor, "*b v"], p: float) -> Float[Tensor, "*b v"]:
    """Keep the fewest most probable tokens that sum to probability p or more, and all that tie with the last of them.

    (Holtzman et al. 2020)
    """
    if p >= 1:
        return logits
    ranked = logits.sort(-1, descending=True).values
    probabilities = ranked.double().softmax(-1)
    count = (probabilities.cumsum(-1) - probabilities < p).sum(-1, keepdim=True)
    least = ranked.gather(-1, (count - 1).clamp(min=0))
    return logits.masked_fill(logits < least, float("-inf"))


def min_p(logits: Float[Tensor, "*b v"], p: float) -> Float[Tensor, "*b v"]:
    """Keep the tokens that are at least p times as probable as the most probable one (Nguyen et al. 2024)."""
    floor = logits.amax(-1, keepdim=True).double() + (math.log(p) if p else -math.inf)
    return logits.masked_fill(logits < floor, float("-inf"))
