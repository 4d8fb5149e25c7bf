"""The laws of the model as a function of its parameters: the transforms of torch.func, and the tied head."""

from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree

from pgfunc.laws.law import law
from pgfunc.laws.model import REORDERED, any_rows, difference, prompt_for
from pgfunc.laws.strategies import Rows
from pgfunc.laws.system import System
from pgfunc.prompt import Prompt


def loss(system: System, params: Any, prompt: Prompt) -> Tensor:
    """The mean log-probability of token 0 over the valid positions."""
    return system.apply(params, prompt).log_softmax(-1)[..., 0][prompt.valid].mean()


def random_like(params: Any, seed: int) -> Any:
    """A tree of random numbers with the shapes of the parameters, of standard deviation 0.1."""
    generator = torch.Generator().manual_seed(seed)
    return pytree.tree_map(lambda leaf: torch.randn(leaf.shape, generator=generator).to(leaf) * 0.1, params)


def perturbed(params: Any, seed: int) -> Any:
    """Parameters changed by about a tenth of their values, so that the network rounds about as the original does."""
    return pytree.tree_map(lambda leaf, share: leaf * (1 + share), params, random_like(params, seed))


@law("vmap over several trees of parameters gives the same logits as a loop over them.",
     needs="params apply", domain=any_rows, roundings=1.0, reason=REORDERED)  # fmt: skip
def vmap_equals_a_loop(system: System, rows: Rows) -> float:
    prompt = prompt_for(system, rows)
    trees = [perturbed(system.params, rows.seed + i) for i in range(2)]
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)
    batched = vmap(lambda tree: system.apply(tree, prompt))(stacked)
    return max(
        difference(logits[prompt.valid], system.apply(tree, prompt)[prompt.valid])
        for tree, logits in zip(trees, batched, strict=True)
    )


@law("The derivative along a direction equals the inner product of gradient and direction (jvp agrees with vjp).",
     needs="params apply", domain=any_rows, within=1e-8, reason="float64, relative to the derivative")  # fmt: skip
def jvp_equals_the_gradient_along_it(system: System, rows: Rows) -> float:
    params, tangent, prompt = in_float64(system, rows)
    slope = jvp(lambda tree: loss(system, tree, prompt), (params,), (tangent,))[1]
    return relative_error(slope, inner_product(grad(lambda tree: loss(system, tree, prompt))(params), tangent))


@law("The gradient equals finite differences of the loss.",
     needs="params apply", domain=any_rows, within=1e-4, reason="float64, an error of order step²")  # fmt: skip
def the_gradient_equals_finite_differences(system: System, rows: Rows) -> float:
    params, tangent, prompt = in_float64(system, rows)
    slope, step = inner_product(grad(lambda tree: loss(system, tree, prompt))(params), tangent), 1e-5
    ends = (pytree.tree_map(lambda p, t: p + side * t, params, tangent) for side in (step, -step))  # noqa: B023
    above, below = (loss(system, end, prompt) for end in ends)
    return relative_error(slope, (above - below) / (2 * step))


@law("The head is the embedding: if the rows of the embedding are reordered, the logits are reordered in the same way.",
     needs="params apply reorder", domain=any_rows, roundings=1.0, reason=REORDERED)  # fmt: skip
def the_head_is_the_embedding(system: System, rows: Rows) -> float:
    prompt = prompt_for(system, rows)
    order = torch.randperm(system.vocab, generator=torch.Generator().manual_seed(rows.seed))
    renumbered = prompt._replace(tokens=order.argsort()[prompt.tokens])  # the same tokens, under their new ids
    actual = system.apply(system.reorder(system.params, order), renumbered)
    return difference(actual[prompt.valid], system.apply(system.params, prompt)[prompt.valid][:, order])


def in_float64(system: System, rows: Rows) -> tuple[Any, Any, Prompt]:
    """The parameters, a random direction and a prompt, in float64."""
    prompt, params = prompt_for(system, rows), pytree.tree_map(torch.Tensor.double, system.params)
    return params, random_like(params, rows.seed), prompt._replace(pixels=prompt.pixels.double())


def inner_product(gradient: Any, tangent: Any) -> Tensor:
    """The inner product of two trees."""
    pairs = zip(pytree.tree_leaves(gradient), pytree.tree_leaves(tangent), strict=True)
    return torch.stack([(one * two).sum() for one, two in pairs]).sum()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The error relative to `expected`, or to 1e-3 if that is larger."""
    return float((actual - expected).abs() / expected.abs().clamp(min=1e-3))


TRANSFORMS = (
    vmap_equals_a_loop, jvp_equals_the_gradient_along_it, the_gradient_equals_finite_differences,
    the_head_is_the_embedding,
)  # fmt: skip
