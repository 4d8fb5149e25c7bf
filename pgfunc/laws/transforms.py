"""The laws of the model as a function of its parameters: the transforms of torch.func, the head that is tied."""

from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree

from pgfunc.laws.law import law
from pgfunc.laws.model import AGAIN, apart, made, rows_of
from pgfunc.laws.strategies import Rows
from pgfunc.laws.system import System
from pgfunc.prompt import Prompt


def loss(system: System, params: Any, given: Prompt) -> Tensor:
    return system.apply(params, given).log_softmax(-1)[..., 0][given.valid].mean()


def other(params: Any, seed: int) -> Any:
    """Random numbers of the shapes of parameters."""
    generator = torch.Generator().manual_seed(seed)
    return pytree.tree_map(lambda leaf: torch.randn(leaf.shape, generator=generator).to(leaf) * 0.1, params)


def near(params: Any, seed: int) -> Any:
    """Parameters moved by about a tenth of themselves: a network that rounds about as the given one does."""
    return pytree.tree_map(lambda leaf, share: leaf * (1 + share), params, other(params, seed))


@law("vmap over several trees of parameters equals a loop.",
     needs="params apply", domain=rows_of, roundings=1.0, reason=AGAIN)  # fmt: skip
def vmap_equals_a_loop(system: System, rows: Rows) -> float:
    given = made(system, rows)
    trees = [near(system.params, rows.seed + i) for i in range(2)]
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)
    together = vmap(lambda tree: system.apply(tree, given))(stacked)
    return max(
        apart(row[given.valid], system.apply(tree, given)[given.valid])
        for tree, row in zip(trees, together, strict=True)
    )


@law("The derivative along a direction is the product of the gradient with it (jvp and vjp agree).",
     needs="params apply", domain=rows_of, within=1e-8, reason="float64, relative to the derivative")  # fmt: skip
def jvp_equals_the_gradient_along_it(system: System, rows: Rows) -> float:
    params, tangent, given = doubled(system, rows)
    slope = jvp(lambda tree: loss(system, tree, given), (params,), (tangent,))[1]
    return relative(slope, along(grad(lambda tree: loss(system, tree, given))(params), tangent))


@law("The gradient is the limit of finite differences.",
     needs="params apply", domain=rows_of, within=1e-4, reason="float64, an error of order step²")  # fmt: skip
def the_gradient_equals_finite_differences(system: System, rows: Rows) -> float:
    params, tangent, given = doubled(system, rows)
    slope, step = along(grad(lambda tree: loss(system, tree, given))(params), tangent), 1e-5
    ends = (pytree.tree_map(lambda p, t: p + side * t, params, tangent) for side in (step, -step))  # noqa: B023
    above, below = (loss(system, end, given) for end in ends)
    return relative(slope, (above - below) / (2 * step))


@law("The head is the embedding: with its rows in another order logits come in that order, for the same tokens.",
     needs="params apply reorder", domain=rows_of, roundings=1.0, reason=AGAIN)  # fmt: skip
def the_head_is_the_embedding(system: System, rows: Rows) -> float:
    given = made(system, rows)
    order = torch.randperm(system.vocab, generator=torch.Generator().manual_seed(rows.seed))
    renamed = given._replace(tokens=order.argsort()[given.tokens])
    found = system.apply(system.reorder(system.params, order), renamed)
    return apart(found[given.valid], system.apply(system.params, given)[given.valid][:, order])


def doubled(system: System, rows: Rows) -> tuple[Any, Any, Prompt]:
    """Parameters, a direction and a prompt in float64."""
    given, params = made(system, rows), pytree.tree_map(torch.Tensor.double, system.params)
    return params, other(params, rows.seed), given._replace(pixels=given.pixels.double())


def along(gradient: Any, tangent: Any) -> Tensor:
    pairs = zip(pytree.tree_leaves(gradient), pytree.tree_leaves(tangent), strict=True)
    return torch.stack([(one * two).sum() for one, two in pairs]).sum()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs() / expected.abs().clamp(min=1e-3))


TRANSFORMS = (
    vmap_equals_a_loop, jvp_equals_the_gradient_along_it, the_gradient_equals_finite_differences,
    the_head_is_the_embedding,
)  # fmt: skip
