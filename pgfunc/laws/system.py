"""A system: an implementation of PaliGemma with its parameters, as a record of functions. Laws are checked on it.

Any implementation can be one. It fills in the functions that it has; each law names those that it needs. Prompts are
pgfunc's, tuples of plain tensors; a cache may be any object of the implementation. Knows nothing about laws.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor

from pgfunc.prompt import Prompt

# the allowed difference between two ways to compute the same logits, as a share of their standard deviation: measured
# on small networks and on the shipped checkpoint, with a margin; in bf16 each way differed from float32 by up to 0.1,
# and two ways from each other by 0.17
ROUNDING = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}

Edges = tuple[float, float, float, float]


def absent(*unused: Any) -> Any:
    """Stands for a function that an implementation lacks. Raises NotImplementedError."""
    raise NotImplementedError("this implementation lacks that function")


class System(NamedTuple):
    """An implementation. Shapes are those of pgfunc's functions: b rows, t text tokens, v vocabulary.

    In a prompt, `valid` marks the tokens that are not padding and `causal` those of the suffix. Arguments and results
    are on the CPU. `rounding` is the allowed difference between two ways to compute the same logits, as a share of
    their standard deviation. A box is (ymin, xmin, ymax, xmax), in pixels from the top left corner.
    """

    name: str
    vocab: int
    image_size: int
    rounding: float = ROUNDING[torch.float32]
    # the model
    forward: Callable[[Prompt], Float[Tensor, "b t v"]] = absent
    prefill: Callable[[Prompt, int], tuple[Float[Tensor, "b v"], Any]] = absent  # free slots for this many more tokens
    extend: Callable[[Int[Tensor, "b t"], Any], tuple[Float[Tensor, "b t v"], Any]] = absent
    decode: Callable[[Int[Tensor, "b"], Any], tuple[Float[Tensor, "b v"], Any]] = absent
    reference: Callable[[Prompt], Float[Tensor, "b t v"]] = absent  # another implementation, same weights
    windowed: Callable[[Prompt, int], Float[Tensor, "b t v"]] = absent  # with windows of this size; 0: none
    image_tokens: Any = ()  # int: image tokens of one picture
    # the model as a function of its parameters, a tree of tensors
    params: Any = ()
    apply: Callable[[Any, Prompt], Float[Tensor, "b t v"]] = absent
    reorder: Callable[[Any, Int[Tensor, "v"]], Any] = absent  # with the embedding's rows in this order
    # activations: a forward pass with a tap (`pgfunc.taps`), and functions of such functions (`pgfunc.lab`)
    tapped: Callable[..., Float[Tensor, "b t v"]] = absent  # prompt, tap
    capture: Callable[..., Callable[..., Any]] = absent  # fn, names -> fn that returns (result, {name: activation})
    edit: Callable[..., Callable[..., Any]] = absent  # fn, {name: function of the activation} -> fn
    compile: Callable[..., Callable[..., Any]] = absent  # fn -> fn
    resume: Callable[..., Float[Tensor, "b t v"]] = absent  # prompt, layer, its input [b s d]
    parts: tuple[str, ...] = ()  # the activations that `attribution` reads
    attribution: Callable[..., Any] = absent  # activations, tokens [b r], positions [b] -> parts with `total()` [b r]
    integrated: Callable[..., tuple[Tensor, Tensor]] = absent  # fn, x, baseline, nodes -> parts, gap
    # parameters in files, and quantized
    reload: Callable[[Any], Any] = absent  # the parameters, saved and loaded
    convert: Callable[[Any], Any] = absent  # the parameters, converted to the other format and back
    # the matrix after quantization: matrix, bits of a weight, number of inputs that share a step (0: all)
    quantize: Callable[[Float[Tensor, "o i"], int, int], Float[Tensor, "o i"]] = absent
    # parts of the model
    rms_norm: Callable[[Tensor, Tensor], Tensor] = absent  # x, scale
    rotate: Callable[[Float[Tensor, "b t n h"], Int[Tensor, "b t"]], Tensor] = absent  # x, positions
    softcap: Callable[[Tensor, float], Tensor] = absent  # x, cap
    attend: Callable[..., Tensor] = absent  # q [b t n h], k, v [b s k h], mask [b t s]
    mask: Callable[..., Tensor] = absent  # valid, causal, window (0: none) -> [b t t]
    # sampling: logits [b v] and uniform numbers [b] in [0, 1) give tokens; probabilities and numbers are float64
    draw: Callable[[Float[Tensor, "b v"], Float[Tensor, "b"]], Int[Tensor, "b"]] = absent
    choose: Callable[[Tensor, Tensor, float], Int[Tensor, "b"]] = absent  # draw at a temperature; 0 is greedy
    top_k: Callable[[Tensor, int], Tensor] = absent
    top_p: Callable[[Tensor, float], Tensor] = absent
    min_p: Callable[[Tensor, float], Tensor] = absent
    # text and pictures
    to_ids: Callable[[str], list[int]] = absent  # adds no token before or after
    to_text: Callable[[list[int]], str] = absent
    write_boxes: Callable[[list[tuple[str, Edges]], int, int], str] = absent  # labels and boxes, width, height
    read_boxes: Callable[[str, int, int], list[tuple[str, Edges]]] = absent  # text, width, height
    write_masks: Callable[[list[tuple[str, Tensor]]], str] = absent  # labels and masks [y x], of one picture
    read_masks: Callable[[str, int, int], list[tuple[str, Edges, Tensor]]] = absent  # label, box, mask [y x]
    features: Callable[[Int[Tensor, "n s"]], Float[Tensor, "n s d"]] = absent  # of mask codes, 16 for each mask
    codes: Callable[[Float[Tensor, "n s d"]], Int[Tensor, "n s"]] = absent
    pixels: Callable[[Image], Float[Tensor, "c y x"]] = absent
    # the contrastive loss: "softmax" or "sigmoid", unit vectors [b d] of pictures and of texts, logarithm of the
    # factor, bias (unused by softmax), rows computed at once (0: all)
    contrast: Callable[..., Float[Tensor, ""]] = absent

    def __repr__(self) -> str:
        return f"System({self.name!r})"  # else Hypothesis prints every number of the parameters

    def missing(self, names: tuple[str, ...]) -> list[str]:
        """The functions among `names` that this system lacks."""
        return [name for name in names if getattr(self, name) is absent or getattr(self, name) == ()]
