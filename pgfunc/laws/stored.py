"""The laws of parameters that are kept: in files of either format to the bit, in few bits within a bound."""

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
    """Random parameters."""

    seed: int
    dtype: str


class Matrix(NamedTuple):
    """64 x 256 weights, normal but for a few that are larger, and what they are quantized to."""

    seed: int
    dtype: str
    size: float
    middle: float  # in standard deviations
    outliers: float  # so much larger
    bits: int
    group: int


def stored(system: System, strategies: Strategies) -> SearchStrategy[Stored]:
    return st.builds(Stored, strategies.seeds, strategies.dtypes)


def matrices(system: System, strategies: Strategies) -> SearchStrategy[Matrix]:
    sizes, middles, larger = (st.sampled_from(of) for of in ([0.05, 1.0, 1e-3, 30.0], [0.0, 3.0], [1.0, 8.0]))
    parts = st.tuples(strategies.seeds, strategies.dtypes, sizes, middles, larger, strategies.formats)
    return parts.map(lambda drawn: Matrix(*drawn[:-1], *drawn[-1]))


def changed(found: Any, expected: Any) -> float:
    """Of how many tensors of two trees dtype, shape or bits differ."""
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    return float(sum(not same(one.cpu(), other.cpu()) for one, other in pairs))


def same(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(leaf.contiguous().view(torch.uint8) for leaf in (one, other)))


def made(system: System, example: Stored) -> Any:
    generator, dtype = torch.Generator().manual_seed(example.seed), getattr(torch, example.dtype)

    def drawn(leaf: Tensor) -> Tensor:
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device, dtype)

    return pytree.tree_map(drawn, system.params)


@law("Parameters that are saved and loaded are the same to the bit, and of the same dtype.",
     needs="params reload", domain=stored)  # fmt: skip
def what_is_loaded_is_what_was_saved(system: System, example: Stored) -> float:
    given = made(system, example)
    return changed(system.reload(given), given)


@law("Parameters that go to the other format and back are the same to the bit.",
     needs="params convert", domain=stored)  # fmt: skip
def a_conversion_and_back_changes_nothing(system: System, example: Stored) -> float:
    given = made(system, example)
    return changed(system.convert(given), given)


@law("Quantized to even steps, no weight moves by more than half of one: its group's largest over 127, or over 7.",
     needs="quantize", domain=matrices, within=1.0 + 1e-6,
     reason="computed: half a step, of 8 bits itself, and the rounding of what is left of the weights")  # fmt: skip
def quantized_within_half_a_step(system: System, example: Matrix) -> float:
    dtype, group = getattr(torch, example.dtype), example.group or 256
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(example.seed), dtype=torch.float64)
    w = (torch.where(w > 2.5, w * example.outliers, w) + example.middle) * example.size
    w = w.to(dtype)
    moved = system.quantize(w, example.bits, example.group).double() - w.double()
    largest = rearrange(w.double().abs(), "o (g i) -> o g i", i=group).amax(-1, keepdim=True)
    step = (largest / (2 ** (example.bits - 1) - 1) * (1 + 2**-8)).clamp(min=torch.finfo(dtype).tiny)
    bound = step / 2 + (largest + step) * torch.finfo(dtype).eps / 2
    return float((rearrange(moved.abs(), "o (g i) -> o g i", i=group) / bound).max())


STORED = (
    what_is_loaded_is_what_was_saved, a_conversion_and_back_changes_nothing, quantized_within_half_a_step,
)  # fmt: skip
