"""Choose how a function of the model is computed: by its formula, or by something faster in compiled code.

    out = lowered(attend_formula)(q, k, v, mask, scale, cap)

Eager code calls the formula. Compiled code calls the first rule in `RULES` that applies to the arguments, or else the
formula. `kernels/rules.py` fills `RULES`. A rule's `run` takes the formula's arguments and computes the same. Products
with quantized matrices also choose a method themselves: `quant.lowbit.multiply`. This module knows nothing about
models, kernels or compilers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])


class Rule(NamedTuple):
    """A faster implementation of a formula (`run`), and whether it can take these arguments (`applies`)."""

    applies: Callable[..., bool]
    run: Callable[..., Any]


RULES: dict[Callable[..., Any], tuple[Rule, ...]] = {}


def lowered(formula: F) -> F:
    """The formula; in compiled code, the first of its rules that applies. Arguments must be positional."""
    if not torch.compiler.is_compiling():
        return formula
    from pgfunc.kernels import rules  # noqa: F401  # fills the table; torch.compile imports it while it traces

    def chosen(*args: Any) -> Any:
        for rule in RULES.get(formula, ()):
            if rule.applies(*args):
                return rule.run(*args)
        return formula(*args)

    return chosen  # pyright: ignore[reportReturnType]


def transformed() -> bool:
    """Whether torch.func transforms or forward-mode AD are active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def on_host(x: Tensor) -> bool:
    """Whether the values of a tensor can be read without waiting: it is on a CPU, eager, and not transformed."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()
