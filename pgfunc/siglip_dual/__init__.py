"""SigLIP as a dual encoder (Zhai et al. 2023): pictures and texts -> unit vectors to compare.

    pixels -> encode_image -> pool -> unit vector ─┐
                                                   ├─> logit = exp(scale) · cos + bias, the log-odds of a pair
    ids ----> encode_text ----------> unit vector ─┘

The vision encoder is PaliGemma's, with the same `siglip.Params`. The text encoder is bidirectional and has no mask: it
reads padding like any other token, so every text is padded to the same length. The last position gives the vector of
the text. Axes: n pictures, b texts, t tokens, d width, e length of the vectors.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from pgfunc import siglip, tree
from pgfunc.config import SiglipConfig, SiglipTextConfig
from pgfunc.ops import layer_norm, linear, upcast
from pgfunc.taps import Tap, identity, within


class TextParams(NamedTuple):
    """The text encoder."""

    embed: Float[Tensor, "v d"]
    position: Float[Tensor, "t d"]
    layers: tuple[siglip.Layer, ...]
    norm_scale: Float[Tensor, "d"]
    norm_bias: Float[Tensor, "d"]
    head: Float[Tensor, "e d"]
    head_bias: Float[Tensor, "e"]

    def __repr__(self) -> str:
        return tree.summary(self)


class DualParams(NamedTuple):
    """Both encoders, and the two numbers that turn a cosine into a logit."""

    vision: siglip.Params
    pool: siglip.Head
    text: TextParams
    scale: Float[Tensor, ""]  # the logarithm of the factor
    bias: Float[Tensor, ""]

    def __repr__(self) -> str:
        return tree.summary(self)


def abstract(cfg: SiglipConfig) -> DualParams:
    """The parameter tree on the meta device."""
    vision, text = cfg.vision, cfg.text
    head = {"one": 1, "d": vision.width, "nh": vision.width, "f": vision.hidden}
    sizes = {"v": text.vocab, "t": text.positions, "e": text.out, "d": text.width, "nh": text.width, "f": text.hidden}
    layers = tuple(tree.abstract(siglip.Layer, sizes) for _ in range(text.layers))
    return tree.abstract(
        DualParams, {},
        vision=siglip.abstract(vision),
        pool=tree.abstract(siglip.Head, head),
        text=tree.abstract(TextParams, sizes, layers=layers),
    )  # fmt: skip


def init(cfg: SiglipConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> DualParams:
    """Random parameters to train from scratch, see `tree.init`. SigLIP's training starts at factor 10 and bias -10."""
    scalars = {
        name: torch.tensor(x, dtype=dtype, device="cpu") for name, x in {"scale": math.log(10), "bias": -10.0}.items()
    }
    return tree.init(abstract(cfg), seed, dtype)._replace(**scalars)


def encode_text(
    p: TextParams, ids: Int[Tensor, "b t"], cfg: SiglipTextConfig, tap: Tap = identity
) -> Float[Tensor, "b e"]:
    """Texts of `cfg.positions` tokens, including padding -> one vector per text, not yet normalized."""
    x = tap("text.embed", F.embedding(ids, p.embed) + p.position[: ids.shape[1]])
    for i, layer in enumerate(p.layers):
        x = siglip.block(layer, x, cfg, within(f"text.{i}", tap, siglip.TAPS))
    x = tap("text.out", layer_norm(x, p.norm_scale, p.norm_bias, cfg.eps))
    return linear(x[:, -1], p.head, p.head_bias)


def embed_images(
    params: DualParams, pixels: Float[Tensor, "n 3 y x"], cfg: SiglipConfig, tap: Tap = identity
) -> Float[Tensor, "n e"]:
    """Pictures with values in [-1, 1] -> unit vectors, in float32."""
    x = siglip.encode_image(params.vision, pixels, cfg.vision, tap)
    x = siglip.pool(params.pool, x, cfg.vision, within("vision.pool", tap, siglip.TAPS))
    return tap("vision.vector", F.normalize(upcast(x), dim=-1))


def embed_texts(
    params: DualParams, ids: Int[Tensor, "b t"], cfg: SiglipConfig, tap: Tap = identity
) -> Float[Tensor, "b e"]:
    """Texts of `cfg.text.positions` tokens -> unit vectors, in float32."""
    return tap("text.vector", F.normalize(upcast(encode_text(params.text, ids, cfg.text, tap)), dim=-1))


def logits(params: DualParams, images: Float[Tensor, "n e"], texts: Float[Tensor, "b e"]) -> Float[Tensor, "n b"]:
    """The log-odds that a picture and a text belong together, from their unit vectors; in float32."""
    return upcast(params.scale).exp() * linear(images, texts) + upcast(params.bias)
