"""The mask VQ-VAE: a mask of 64 x 64 <-> 16 codes, which PaliGemma writes as `<seg000>`..`<seg127>`.

The architecture is that of AiT (Ning et al. 2023, arXiv:2301.02229); big_vision's `vae-oid.npz` holds its weights:

    mask ──encode──▶ features ──quantize──▶ codes ──lookup──▶ features ──decode──▶ map, above 0 inside the mask

Pure functions, for inference and for training. Axes: n masks, y x rows and columns, s the 4 x 4 grid of codes row by
row, d width of a feature, c codebook entries; i o input and output channels of a convolution. Nothing here knows about
text or boxes.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from pgfunc import tree

SIDE, GRID, CODES, WIDTH = 64, 4, 128, 512
# channels before and after each layer that halves or doubles the side
DOWN, UP = (1, 16, 32, 64, 128), (128, 128, 64, 32, 16)
BLOCKS = 2  # residual blocks in the encoder, and in the decoder


class Conv(NamedTuple):
    """A convolution."""

    weight: Float[Tensor, "o i y x"]
    bias: Float[Tensor, "o"]


class Transposed(NamedTuple):
    """A transposed convolution."""

    weight: Float[Tensor, "i o y x"]
    bias: Float[Tensor, "o"]


class Block(NamedTuple):
    """A residual block: 3 x 3, 3 x 3, 1 x 1."""

    first: Conv
    second: Conv
    third: Conv


class Params(NamedTuple):
    """The encoder, the codebook and the decoder, in the order in which a mask passes through them."""

    down: tuple[Conv, ...]
    encoder: tuple[Block, ...]
    to_feature: Conv
    codebook: Float[Tensor, "c d"]
    from_feature: Conv
    decoder: tuple[Block, ...]
    up: tuple[Transposed, ...]
    to_map: Conv


def abstract() -> Params:
    """The parameter tree on the meta device."""

    def conv(i: int, o: int, kernel: int, declaration: type = Conv):
        return tree.abstract(declaration, {"i": i, "o": o, "y": kernel, "x": kernel})

    def blocks(width: int) -> tuple[Block, ...]:
        return tuple(Block(conv(width, width, 3), conv(width, width, 3), conv(width, width, 1)) for _ in range(BLOCKS))

    return tree.abstract(
        Params,
        {"c": CODES, "d": WIDTH},
        down=tuple(conv(i, o, 4) for i, o in pairwise(DOWN)),
        encoder=blocks(DOWN[-1]),
        to_feature=conv(DOWN[-1], WIDTH, 1),
        from_feature=conv(WIDTH, UP[0], 1),
        decoder=blocks(UP[0]),
        up=tuple(conv(i, o, 4, Transposed) for i, o in pairwise(UP)),
        to_map=conv(UP[-1], 1, 1),
    )


def init(seed: int = 0) -> Params:
    """Random parameters to start training from: weights normal with variance 2 / fan-in (He et al. 2015), biases 0.

    The codebook is standard normal. Training works better if it is replaced by features of the encoder.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(path: str, leaf: Tensor) -> Tensor:
        if leaf.dim() == 1:
            return torch.zeros(leaf.shape, dtype=torch.float32, device="cpu")
        # in a transposed convolution of 4 x 4 with stride 2, only 2 x 2 inputs reach an output pixel
        fan_in = leaf[:, 0].numel() / 4 if path.startswith("up.") else leaf[0].numel()
        variance = 1 if path == "codebook" else 2 / fan_in
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float32, device="cpu") * variance**0.5

    return tree.map_with_path(draw, abstract())


def encode(p: Params, masks: Float[Tensor, "n y x"]) -> Float[Tensor, "n s d"]:
    """Masks of 64 x 64 with values in [0, 1] -> features, not yet quantized."""
    x = rearrange(masks.to(p.codebook.dtype) * 2 - 1, "n y x -> n 1 y x")
    for layer in p.down:
        x = F.conv2d(x, *layer, stride=2, padding=1).relu()
    for layer in p.encoder:
        x = block(layer, x)
    return rearrange(F.conv2d(x, *p.to_feature), "n d y x -> n (y x) d")


def quantize(codebook: Float[Tensor, "c d"], features: Float[Tensor, "n s d"]) -> Int[Tensor, "n s"]:
    """The code of the codebook entry that is nearest to each feature."""
    # |f - e|² without |f|², which is the same for all codes
    distance = codebook.square().sum(-1) - 2 * einsum(features, codebook, "n s d, c d -> n s c")
    return distance.argmin(-1)


def lookup(codebook: Float[Tensor, "c d"], codes: Int[Tensor, "n s"]) -> Float[Tensor, "n s d"]:
    """The codebook entry of each code."""
    return codebook[codes]


def decode(p: Params, features: Float[Tensor, "n s d"]) -> Float[Tensor, "n y x"]:
    """Features, quantized or not -> maps of 64 x 64, which training brings near 1 inside the mask and -1 outside."""
    x = rearrange(features, "n (y x) d -> n d y x", y=GRID)
    x = F.conv2d(x, *p.from_feature).relu()
    for layer in p.decoder:
        x = block(layer, x)
    for layer in p.up:
        x = F.conv_transpose2d(x, *layer, stride=2, padding=1).relu()
    return rearrange(F.conv2d(x, *p.to_map), "n 1 y x -> n y x")


def block(p: Block, x: Float[Tensor, "n d y x"]) -> Float[Tensor, "n d y x"]:
    """x plus three convolutions of x, with a ReLU between them."""
    hidden = F.conv2d(x, *p.first, padding=1).relu()
    hidden = F.conv2d(hidden, *p.second, padding=1).relu()
    return x + F.conv2d(hidden, *p.third)
