"""The laws of stored parameters: exact in files of both formats, and within a bound if quantized."""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch.utils import _pytree as pytree

from pgfunc.laws.law import law
from pgfunc.laws.strategies import Strategies
from pgfunc.laws.system import System


class Stored(NamedTuple):
    """The seed and dtype of random parameters."""

    seed: int
    dtype: str


class Matrix(NamedTuple):
    """Random weights, 64 x 256, normally distributed with a few outliers; and a quantized format."""

    seed: int
    dtype: str
    size: float  # standard deviation
    middle: float  # mean, in standard deviations
    outliers: float  # factor on the largest weights
    bits: int
    group: int  # inputs that share a step; 0: all


def stored(system: System, strategies: Strategies) -> SearchStrategy[Stored]:
    return st.builds(Stored, strategies.seeds, strategies.dtypes)


def matrices(system: System, strategies: Strategies) -> SearchStrategy[Matrix]:
    sizes, middles, larger = (st.sampled_from(of) for of in ([0.05, 1.0, 1e-3, 30.0], [0.0, 3.0], [1.0, 8.0]))
    parts = st.tuples(strategies.seeds, strategies.dtypes, sizes, middles, larger, strategies.formats)
    return parts.map(lambda drawn: Matrix(*drawn[:-1], *drawn[-1]))


def count_changed(actual: Any, expected: Any) -> float:
    """The number of tensors whose dtype, shape or bits differ between two trees."""
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    return float(sum(not identical(one.cpu(), other.cpu()) for one, other in pairs))


def identical(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; nan equals itself."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(leaf.contiguous().view(torch.uint8) for leaf in (one, other)))


def random_parameters(system: System, example: Stored) -> Any:
    """Random parameters with the shapes of the system's."""
    generator, dtype = torch.Generator().manual_seed(example.seed), getattr(torch, example.dtype)

    def random(leaf: Tensor) -> Tensor:
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device, dtype)

    return pytree.tree_map(random, system.params)


@law("Parameters that are saved and loaded have the same bits and dtypes.", needs="params reload", domain=stored)
def what_is_loaded_is_what_was_saved(system: System, example: Stored) -> float:
    params = random_parameters(system, example)
    return count_changed(system.reload(params), params)


@law("Parameters that are converted to the other format and back have the same bits.",
     needs="params convert", domain=stored)  # fmt: skip
def a_conversion_and_back_changes_nothing(system: System, example: Stored) -> float:
    params = random_parameters(system, example)
    return count_changed(system.convert(params), params)


@law("Quantization changes no weight by more than half a step: its group's largest over 127 (8 bits) or 7 (4 bits).",
     needs="quantize", domain=matrices, within=1.0 + 1e-6,
     reason="the bound is computed: half a step, itself stored in 8 bits, and the rounding of the dtype")  # fmt: skip
def quantized_within_half_a_step(system: System, example: Matrix) -> float:
    dtype, group = getattr(torch, example.dtype), example.group or 256
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(example.seed), dtype=torch.float64)
    w = (torch.where(w > 2.5, w * example.outliers, w) + example.middle) * example.size
    w = w.to(dtype)
    change = system.quantize(w, example.bits, example.group).double() - w.double()
    largest = rearrange(w.double().abs(), "o (g i) -> o g i", i=group).amax(-1, keepdim=True)
    step = (largest / (2 ** (example.bits - 1) - 1) * (1 + 2**-8)).clamp(min=torch.finfo(dtype).tiny)
    bound = step / 2 + (largest + step) * torch.finfo(dtype).eps / 2
    return float((rearrange(change.abs(), "o (g i) -> o g i", i=group) / bound).max())


STORED = (
    what_is_loaded_is_what_was_saved, a_conversion_and_back_changes_nothing, quantized_within_half_a_step,
)  # fmt: skip
