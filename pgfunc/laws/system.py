"""What a law is about: an implementation of PaliGemma with its parameters, as a record of functions.

A stranger's implementation fills in what it has and leaves the rest out; a law says what it needs. Prompts are
pgfunc's, a tuple of plain tensors; what stands for a cache is the implementation's own. Knows nothing about laws.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor

from pgfunc.prompt import Prompt

# how far two ways to compute the same logits may be apart, as a share of their standard deviation: measured on small
# networks and on the shipped checkpoint, with room; in bf16 each way was up to 0.1 from float32, and two 0.17 apart
ROUNDING = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}


Edges = tuple[float, float, float, float]


def absent(*unused: Any) -> Any:
    """Stands for a function that an implementation does not have."""
    raise NotImplementedError("this implementation does not have that function")


class System(NamedTuple):
    """An implementation. Shapes are those of pgfunc's functions: b rows, t tokens of text, v vocabulary.

    Of a prompt the tokens that `valid` marks count; `causal` marks those of the suffix. Tensors go in and come out on
    the CPU. `rounding` is how far two ways to compute the same logits may be apart, as a share of their standard
    deviation. A box is (ymin, xmin, ymax, xmax), in pixels from the top left corner.
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
    windowed: Callable[[Prompt, int], Float[Tensor, "b t v"]] = absent  # the windows as wide as that, 0: none
    image_tokens: Any = ()  # so many a picture
    # the model as a function of its parameters, a tree of tensors
    params: Any = ()
    apply: Callable[[Any, Prompt], Float[Tensor, "b t v"]] = absent
    reorder: Callable[[Any, Int[Tensor, "v"]], Any] = absent  # the parameters, rows of the embedding in that order
    # parameters in files, and in few bits
    reload: Callable[[Any], Any] = absent  # parameters, saved and loaded
    convert: Callable[[Any], Any] = absent  # parameters, by way of the other format
    # the weights that a matrix becomes, of so many bits, where so many inputs share a step (0: all)
    quantize: Callable[[Float[Tensor, "o i"], int, int], Float[Tensor, "o i"]] = absent
    # its parts
    rms_norm: Callable[[Tensor, Tensor], Tensor] = absent  # x, scale
    rotate: Callable[[Float[Tensor, "b t n h"], Int[Tensor, "b t"]], Tensor] = absent  # x, positions
    softcap: Callable[[Tensor, float], Tensor] = absent  # x, cap
    attend: Callable[..., Tensor] = absent  # q [b t n h], k, v [b s k h], mask [b t s]
    mask: Callable[..., Tensor] = absent  # valid, causal, window (0: none) -> [b t t]
    # from logits [b v] to tokens, by uniform numbers [b] in [0, 1); probabilities and numbers are float64
    draw: Callable[[Float[Tensor, "b v"], Float[Tensor, "b"]], Int[Tensor, "b"]] = absent
    choose: Callable[[Tensor, Tensor, float], Int[Tensor, "b"]] = absent  # the same at a temperature; 0 is greedy
    top_k: Callable[[Tensor, int], Tensor] = absent
    top_p: Callable[[Tensor, float], Tensor] = absent
    min_p: Callable[[Tensor, float], Tensor] = absent
    # text and pictures
    to_ids: Callable[[str], list[int]] = absent  # nothing is added before or after
    to_text: Callable[[list[int]], str] = absent
    write_boxes: Callable[[list[tuple[str, Edges]], int, int], str] = absent  # labels and boxes, width, height
    read_boxes: Callable[[str, int, int], list[tuple[str, Edges]]] = absent  # text, width, height
    write_masks: Callable[[list[tuple[str, Tensor]]], str] = absent  # labels and masks [y x], of one picture
    read_masks: Callable[[str, int, int], list[tuple[str, Edges, Tensor]]] = absent  # label, box, mask [y x]
    features: Callable[[Int[Tensor, "n s"]], Float[Tensor, "n s d"]] = absent  # of the codes of masks, 16 a mask
    codes: Callable[[Float[Tensor, "n s d"]], Int[Tensor, "n s"]] = absent
    pixels: Callable[[Image], Float[Tensor, "c y x"]] = absent  # of a picture
    # losses of pairs: "softmax" or "sigmoid", unit vectors [b d] of pictures and of texts, logarithm of the factor,
    # bias (of no meaning to softmax), so many rows at once (0: all)
    contrast: Callable[..., Float[Tensor, ""]] = absent

    def __repr__(self) -> str:
        return f"System({self.name!r})"  # of its parameters Hypothesis would print every number

    def missing(self, names: tuple[str, ...]) -> list[str]:
        """Which of these functions it does not have."""
        return [name for name in names if getattr(self, name) is absent or getattr(self, name) == ()]
