"""The laws of contrastive losses: their formulas at any logits, their chunks, their gradients."""

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

SUMS = "float64, relative; sums in another order"


class Pairs(NamedTuple):
    """A batch of pairs of random unit vectors, float64."""

    loss: str  # softmax or sigmoid
    size: int
    chunk: int
    seed: int
    scale: float  # logarithm of the factor on the cosines
    bias: float


def pairs(scales: SearchStrategy[float], biases: SearchStrategy[float], strategies: Strategies):
    sizes, chunks = st.integers(1, 9), st.integers(0, 10)
    return st.builds(Pairs, strategies.losses, sizes, chunks, strategies.seeds, scales, biases)


def moderate(system: System, strategies: Strategies) -> SearchStrategy[Pairs]:
    return pairs(st.floats(-1, 3), st.floats(-3, 3), strategies)


def extreme(system: System, strategies: Strategies) -> SearchStrategy[Pairs]:
    """Logits of a million and more too, either way."""
    return pairs(st.floats(-3, 14), st.floats(-1e4, 1e4), strategies)


def made(example: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures, texts, scale, bias."""
    generator = torch.Generator().manual_seed(example.seed)
    x, y = torch.randn(2, example.size, 6, generator=generator, dtype=torch.float64)
    scale, bias = torch.tensor([example.scale, example.bias], dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True), scale, bias


def value_and_gradients(system: System, example: Pairs, given: tuple[Tensor, ...], chunk: int) -> list[Tensor]:
    def loss(*given: Tensor) -> Tensor:
        return system.contrast(example.loss, *given, chunk)

    gradients, value = grad_and_value(loss, argnums=(0, 1, 2, 3))(*given)
    return [value, *gradients]


def differ(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of value and gradients, each as a share of its largest number, if that is above 1.

    Infinity where a number is none.
    """
    if not all(leaf.isfinite().all() for leaf in found):
        return inf
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).abs().max() / other.abs().max().clamp(min=1)) for one, other in pairs)


@law("A loss and its gradients are those of the formula at any logits, finite where these are extreme.",
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

    gradients, value = grad_and_value(formula, argnums=(0, 1, 2, 3))(*made(example))
    found = value_and_gradients(system, example, made(example), example.chunk)
    return differ(found, [value, *gradients])


@law("A loss and its gradients in chunks are those of the whole batch.",
     needs="contrast", domain=moderate, within=1e-12, reason=SUMS)  # fmt: skip
def chunks_of_a_loss_equal_the_whole(system: System, example: Pairs) -> float:
    whole, chunks = (value_and_gradients(system, example, made(example), size) for size in (0, max(1, example.chunk)))
    return differ(chunks, whole)


@law("Pairs in another order have the same loss, and their gradients in that order.",
     needs="contrast", domain=moderate, within=1e-12, reason=SUMS)  # fmt: skip
def the_order_of_pairs_does_not_matter(system: System, example: Pairs) -> float:
    order = torch.randperm(example.size, generator=torch.Generator().manual_seed(example.seed))
    x, y, scale, bias = made(example)
    value, to_x, to_y, *rest = value_and_gradients(system, example, (x, y, scale, bias), example.chunk)
    shuffled = value_and_gradients(system, example, (x[order], y[order], scale, bias), example.chunk)
    return differ(shuffled, [value, to_x[order], to_y[order], *rest])


@law("The gradient of a loss is the limit of finite differences.",
     needs="contrast", domain=moderate, within=1e-6, reason="float64, an error of order step²")  # fmt: skip
def the_gradient_of_a_loss_equals_finite_differences(system: System, example: Pairs) -> float:
    given, step = made(example), 1e-5
    generator = torch.Generator().manual_seed(example.seed + 1)
    along = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in given]
    along = [way / way.norm() for way in along]
    _, *gradients = value_and_gradients(system, example, given, example.chunk)
    slope = torch.stack([(one * other).sum() for one, other in zip(gradients, along, strict=True)]).sum()
    above, below = (
        system.contrast(
            example.loss, *(leaf + side * way for leaf, way in zip(given, along, strict=True)), example.chunk
        )
        for side in (step, -step)
    )
    return differ([slope], [(above - below) / (2 * step)])


LOSSES = (
    a_loss_is_its_formula_at_any_logits, chunks_of_a_loss_equal_the_whole, the_order_of_pairs_does_not_matter,
    the_gradient_of_a_loss_equals_finite_differences,
)  # fmt: skip
