"""What a law is about: an implementation of PaliGemma with its parameters, as a record of functions.

A stranger's implementation fills in what it has and leaves the rest out; a law says what it needs. Prompts are
pgfunc's, a tuple of plain tensors; what stands for a cache is the implementation's own. Knows nothing about laws.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pgfunc.prompt import Prompt

# how far two ways to compute the same logits may be apart, as a share of their standard deviation: measured on small
# networks and on the shipped checkpoint, with room
ROUNDING = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def absent(*unused: Any) -> Any:
    """Stands for a function that an implementation does not have."""
    raise NotImplementedError("this implementation does not have that function")


class System(NamedTuple):
    """An implementation. Shapes are those of pgfunc's functions: b rows, t tokens of text, v vocabulary.

    Of a prompt the tokens that `valid` marks count; `causal` marks those of the suffix. Tensors go in and come out on
    the CPU. `rounding` is how far two ways
    to compute the same logits may be apart, as a share of their standard deviation.
    """

    name: str
    vocab: int
    image_size: int
    rounding: float = ROUNDING[torch.float32]
    # the model
    forward: Callable[[Prompt], Float[Tensor, "b t v"]] = absent
    prefill: Callable[[Prompt, int], tuple[Float[Tensor, "b v"], Any]] = absent  # with room for so many more
    extend: Callable[[Int[Tensor, "b t"], Any], tuple[Float[Tensor, "b t v"], Any]] = absent
    decode: Callable[[Int[Tensor, "b"], Any], tuple[Float[Tensor, "b v"], Any]] = absent
    reference: Callable[[Prompt], Float[Tensor, "b t v"]] = absent  # another implementation, the same weights
    # the model as a function of its parameters, a tree of tensors
    params: Any = ()
    apply: Callable[[Any, Prompt], Float[Tensor, "b t v"]] = absent
    # its parts
    rms_norm: Callable[[Tensor, Tensor], Tensor] = absent  # x, scale
    rotate: Callable[[Float[Tensor, "b t n h"], Int[Tensor, "b t"]], Tensor] = absent  # x, positions
    softcap: Callable[[Tensor, float], Tensor] = absent  # x, cap
    attend: Callable[..., Tensor] = absent  # q [b t n h], k, v [b s k h], mask [b t s]
    mask: Callable[..., Tensor] = absent  # valid, causal, window (0: none) -> [b t t]
    # from logits [b v] to tokens, by uniform numbers [b] in [0, 1); probabilities and numbers are float64
    draw: Callable[[Float[Tensor, "b v"], Float[Tensor, "b"]], Int[Tensor, "b"]] = absent
    top_k: Callable[[Tensor, int], Tensor] = absent
    top_p: Callable[[Tensor, float], Tensor] = absent
    min_p: Callable[[Tensor, float], Tensor] = absent

    def missing(self, names: tuple[str, ...]) -> list[str]:
        """Which of these functions it does not have."""
        return [name for name in names if getattr(self, name) is absent or getattr(self, name) == ()]
