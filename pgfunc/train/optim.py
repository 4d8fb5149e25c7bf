"""Optimizers and learning rates as pure functions on trees: state goes in and comes out, and no argument is changed.

AdamW's arithmetic is torch's own: the function behind `torch.optim.AdamW` (`torch.optim.adamw.adamw`, fused), on fresh
copies. A tree is any tree of tensors: all parameters, a dict of the leaves to train, or LoRA's pairs. Leaves that are
not in the tree need no state. The tree has at least one leaf, and is on one device. Nothing here knows about models.

Why not torchopt: its last wheel (0.7.3) is built against an older torch, its extension does not load beside 2.13, and
it updates in place unless told otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils import _pytree as pytree

from pgfunc import tree

T = TypeVar("T")
_multiply = torch._foreach_mul  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Settings:
    """Settings of AdamW (Loshchilov & Hutter 2019) besides the learning rate. Defaults are torch's but for decay."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_vectors: bool = False  # also decay biases and norms, as torch.optim.AdamW does with a single group


class State(NamedTuple):
    """The number of updates, and running means of the gradient and of its square, as trees like the parameters."""

    step: Tensor  # int64, no axes
    first: Any
    second: Any


def init(params: Any) -> State:
    """The state before the first update: zeros."""
    zeros = tree.map(torch.zeros_like, params)
    return State(torch.zeros((), dtype=torch.int64, device="cpu"), zeros, tree.map(torch.zeros_like, params))


@torch.no_grad()
def update(grads: T, state: State, params: T, rate: float, settings: Settings = Settings()) -> tuple[T, State]:
    """One step of AdamW: new parameters and state, bitwise equal to those of torch.optim.AdamW(fused=True)."""
    structure = pytree.tree_structure(params)
    old, gradients, old_first, old_second = (
        structure.flatten_up_to(each) for each in (params, grads, state.first, state.second)
    )
    # one call copies all leaves: on a GPU one launch per leaf would take longer than the copying
    new, first, second = (_multiply(leaves, 1) for leaves in (old, old_first, old_second))
    decayed = [settings.decay_vectors or leaf.dim() > 1 for leaf in new]
    for decay in (True, False):
        chosen = [i for i, each in enumerate(decayed) if each == decay]
        # adamw increments each counter in place; filled on the device, since a copy from the CPU waits for the GPU
        steps = list(torch.full((len(chosen),), float(state.step), dtype=torch.float32, device=new[0].device).unbind())
        adamw(
            _pick(new, chosen), _pick(gradients, chosen), _pick(first, chosen), _pick(second, chosen), [], steps,
            fused=True, amsgrad=False, maximize=False, lr=rate, beta1=settings.beta1, beta2=settings.beta2,
            eps=settings.eps, weight_decay=settings.weight_decay if decay else 0.0,
        )  # fmt: skip
    trees = [pytree.tree_unflatten(leaves, structure) for leaves in (new, first, second)]
    return trees[0], State(state.step + 1, trees[1], trees[2])


def clip(grads: T, norm: float) -> tuple[T, Tensor]:
    """Gradients scaled to a global norm of at most `norm`, and their norm before scaling (Pascanu et al. 2013)."""
    total = torch.nn.utils.get_total_norm(pytree.tree_leaves(grads))
    scale = (norm / (total + 1e-6)).clamp(max=1.0)  # torch.nn.utils.clip_grad_norm_ adds the same 1e-6
    leaves, structure = pytree.tree_flatten(grads)
    return pytree.tree_unflatten(_multiply(leaves, scale), structure), total


def constant(step: int, peak: float, warmup: int) -> float:
    """The learning rate of update `step`, counted from 0: linear up to `peak` over `warmup` updates."""
    return peak * min(1.0, (step + 1) / (warmup + 1))


def cosine(step: int, peak: float, warmup: int, total: int) -> float:
    """The warm-up of `constant`, then half a cosine from `peak` to 0, reached at update `total` (Loshchilov 2017)."""
    done = max(0, step - warmup) / max(1, total - warmup)
    return constant(step, peak, warmup) * (0.5 + 0.5 * cos(pi * min(1.0, done)))


def _pick(leaves: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
    return [leaves[i] for i in indices]
