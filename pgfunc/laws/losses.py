"""The laws of contrastive losses: values and gradients equal those of the formulas, for any logits and any chunks."""

from math import inf
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch.func import grad_and_value

from pgfunc.laws.law import law
from pgfunc.laws.strategies import Strategies
from pgfunc.laws.system import System

SUMS = "float64, relative; the same sums in another order"


class Pairs(NamedTuple):
    """A batch of pairs of random unit vectors in float64, and the parameters of the loss."""

    loss: str  # softmax or sigmoid
    size: int
    chunk: int  # rows of logits in memory at once; 0: all
    seed: int
    scale: float  # logarithm of the factor that multiplies the cosines
    bias: float


def pairs(scales: SearchStrategy[float], biases: SearchStrategy[float], strategies: Strategies):
    sizes, chunks = st.integers(1, 9), st.integers(0, 10)
    return st.builds(Pairs, strategies.losses, sizes, chunks, strategies.seeds, scales, biases)


def moderate(system: System, strategies: Strategies) -> SearchStrategy[Pairs]:
    return pairs(st.floats(-1, 3), st.floats(-3, 3), strategies)


def extreme(system: System, strategies: Strategies) -> SearchStrategy[Pairs]:
    """Also logits of a million and more, of either sign."""
    return pairs(st.floats(-3, 14), st.floats(-1e4, 1e4), strategies)


def arguments(example: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of the loss: vectors of pictures, vectors of texts, scale, bias."""
    generator = torch.Generator().manual_seed(example.seed)
    x, y = torch.randn(2, example.size, 6, generator=generator, dtype=torch.float64)
    scale, bias = torch.tensor([example.scale, example.bias], dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True), scale, bias


def value_and_gradients(system: System, example: Pairs, inputs: tuple[Tensor, ...], chunk: int) -> list[Tensor]:
    """The loss of a system, followed by its gradients with respect to the four arguments."""

    def loss(*inputs: Tensor) -> Tensor:
        return system.contrast(example.loss, *inputs, chunk)

    gradients, value = grad_and_value(loss, argnums=(0, 1, 2, 3))(*inputs)
    return [value, *gradients]


def largest_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of a value or gradient, relative to the largest number of that tensor, or to 1 if that is more.

    Infinity if a number is not finite.
    """
    if not all(leaf.isfinite().all() for leaf in actual):
        return inf
    pairs = zip(actual, expected, strict=True)
    return max(float((one - other).abs().max() / other.abs().max().clamp(min=1)) for one, other in pairs)


@law("A loss and its gradients equal those of the formula for any logits, and are finite for extreme ones.",
     needs="contrast", domain=extreme, within=1e-9, reason=SUMS)  # fmt: skip
def a_loss_is_its_formula_at_any_logits(system: System, example: Pairs) -> float:
    def formula(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        own = torch.eye(example.size, dtype=torch.float64)
        if example.loss == "sigmoid":
            logits = (scale.exp() * x @ y.T + bias) * (1 - 2 * own)
            return torch.logaddexp(logits, torch.zeros_like(logits)).sum() / example.size
        logits = scale.exp() * x @ y.T
        both = logits.logsumexp(0) + logits.logsumexp(1)
        return (both / 2 - (logits * own).sum(0)).mean()

    gradients, value = grad_and_value(formula, argnums=(0, 1, 2, 3))(*arguments(example))
    actual = value_and_gradients(system, example, arguments(example), example.chunk)
    return largest_error(actual, [value, *gradients])


@law("A loss and its gradients computed in chunks equal those computed for the whole batch at once.",
     needs="contrast", domain=moderate, within=1e-12, reason=SUMS)  # fmt: skip
def chunks_of_a_loss_equal_the_whole(system: System, example: Pairs) -> float:
    sizes = (0, max(1, example.chunk))
    whole, chunks = (value_and_gradients(system, example, arguments(example), size) for size in sizes)
    return largest_error(chunks, whole)


@law("If the pairs are reordered, the loss stays the same and the gradients are reordered in the same way.",
     needs="contrast", domain=moderate, within=1e-12, reason=SUMS)  # fmt: skip
def the_order_of_pairs_does_not_matter(system: System, example: Pairs) -> float:
    order = torch.randperm(example.size, generator=torch.Generator().manual_seed(example.seed))
    x, y, scale, bias = arguments(example)
    value, to_x, to_y, *rest = value_and_gradients(system, example, (x, y, scale, bias), example.chunk)
    shuffled = value_and_gradients(system, example, (x[order], y[order], scale, bias), example.chunk)
    return largest_error(shuffled, [value, to_x[order], to_y[order], *rest])


@law("The gradient of a loss equals finite differences of the loss.",
     needs="contrast", domain=moderate, within=1e-6, reason="float64, an error of order step²")  # fmt: skip
def the_gradient_of_a_loss_equals_finite_differences(system: System, example: Pairs) -> float:
    inputs, step = arguments(example), 1e-5
    generator = torch.Generator().manual_seed(example.seed + 1)
    directions = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in inputs]
    directions = [direction / direction.norm() for direction in directions]
    _, *gradients = value_and_gradients(system, example, inputs, example.chunk)
    slope = torch.stack([(one * other).sum() for one, other in zip(gradients, directions, strict=True)]).sum()

    def loss_at(shift: float) -> Tensor:
        shifted = (leaf + shift * direction for leaf, direction in zip(inputs, directions, strict=True))
        return system.contrast(example.loss, *shifted, example.chunk)

    above, below = loss_at(step), loss_at(-step)
    return largest_error([slope], [(above - below) / (2 * step)])


LOSSES = (
    a_loss_is_its_formula_at_any_logits, chunks_of_a_loss_equal_the_whole, the_order_of_pairs_does_not_matter,
    the_gradient_of_a_loss_equals_finite_differences,
)  # fmt: skip
