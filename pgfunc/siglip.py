"""The SigLIP vision encoder (Zhai et al. 2023; big_vision `models/vit.py`): pictures -> one vector per patch.

It also has the transformer block, which SigLIP's text encoder shares (`siglip_dual`), and the head that pools the
patches into one vector, which PaliGemma does not use. Axes: n pictures or texts, p patches or tokens, s the sequence
that attention reads, d width, f hidden; `nh` heads and head dim fused.
"""

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from pgfunc import ops, tree
from pgfunc.config import SiglipTextConfig, VisionConfig
from pgfunc.ops import Rotation, layer_norm, linear, linear_many
from pgfunc.taps import Tap, Wrap, identity, plain, within

Rotations = tuple[Rotation, Rotation] | tuple[()]  # of `rotate_grid`; (): no rotation
TAPS = {  # what a tap gets from each block, in order, with its axes; b pictures or texts, n heads
    "resid_pre": "b p d",
    "attn_in": "b p d",
    "q": "b p n h",
    "k": "b p n h",
    "v": "b p n h",
    "rot_q": "b p n h",  # only if positions are rotary
    "rot_k": "b p n h",
    "mask": "b p s",
    "attn_scores": "b n p s",
    "pattern": "b n p s",
    "z": "b p n h",
    "attn_out": "b p d",
    "resid_mid": "b p d",
    "mlp_in": "b p d",
    "up": "b p f",
    "mlp_hidden": "b p f",
    "mlp_out": "b p d",
    "resid_post": "b p d",
}


class Layer(NamedTuple):
    """One pre-norm transformer layer."""

    norm1_scale: Float[Tensor, "d"]
    norm1_bias: Float[Tensor, "d"]
    q: Float[Tensor, "nh d"]
    q_bias: Float[Tensor, "nh"]
    k: Float[Tensor, "nh d"]
    k_bias: Float[Tensor, "nh"]
    v: Float[Tensor, "nh d"]
    v_bias: Float[Tensor, "nh"]
    out: Float[Tensor, "d nh"]
    out_bias: Float[Tensor, "d"]
    norm2_scale: Float[Tensor, "d"]
    norm2_bias: Float[Tensor, "d"]
    up: Float[Tensor, "f d"]
    up_bias: Float[Tensor, "f"]
    down: Float[Tensor, "d f"]
    down_bias: Float[Tensor, "d"]

    def __repr__(self) -> str:
        return tree.summary(self)


class Params(NamedTuple):
    """The encoder."""

    patch: Float[Tensor, "d c y x"]
    patch_bias: Float[Tensor, "d"]
    position: Float[Tensor, "p d"]  # () when positions are rotary
    layers: tuple[Layer, ...]
    norm_scale: Float[Tensor, "d"]
    norm_bias: Float[Tensor, "d"]

    def __repr__(self) -> str:
        return tree.summary(self)


class Head(NamedTuple):
    """Attention pooling: a learned query reads all patches (MAP; Lee et al. 2019, big_vision `models/vit.py`)."""

    probe: Float[Tensor, "one d"]
    q: Float[Tensor, "nh d"]
    q_bias: Float[Tensor, "nh"]
    k: Float[Tensor, "nh d"]
    k_bias: Float[Tensor, "nh"]
    v: Float[Tensor, "nh d"]
    v_bias: Float[Tensor, "nh"]
    out: Float[Tensor, "d nh"]
    out_bias: Float[Tensor, "d"]
    norm_scale: Float[Tensor, "d"]
    norm_bias: Float[Tensor, "d"]
    up: Float[Tensor, "f d"]
    up_bias: Float[Tensor, "f"]
    down: Float[Tensor, "d f"]
    down_bias: Float[Tensor, "d"]

    def __repr__(self) -> str:
        return tree.summary(self)


def abstract(cfg: VisionConfig) -> Params:
    """The parameter tree on the meta device."""
    sizes = {"d": cfg.width, "nh": cfg.width, "f": cfg.hidden, "p": cfg.tokens, "c": 3, "y": cfg.patch, "x": cfg.patch}
    absent = {} if cfg.position == "learned" else {"position": ()}
    layers = tuple(tree.abstract(Layer, sizes) for _ in range(cfg.layers))
    return tree.abstract(Params, sizes, layers=layers, **absent)


def names(cfg: VisionConfig) -> list[str]:
    """What a tap gets from the encoder, in order."""
    inside = [name for name in TAPS if cfg.position == "rope2d" or not name.startswith("rot_")]
    blocks = [f"vision.{i}.{name}" for i in range(cfg.layers) for name in inside]
    return ["vision.embed", *blocks, "vision.out"]


def patchify(pixels: Float[Tensor, "n 3 y x"], cfg: VisionConfig) -> Float[Tensor, "n p cyx"]:
    """Cut pictures into non-overlapping squares, row by row. A square is flattened channel first, like the weight.

    The last rows and columns are not read if they do not fill a square: the convolution is 'valid' (big_vision vit.py).
    """
    side = cfg.grid * cfg.patch
    return rearrange(pixels[..., :side, :side], "n c (gy y) (gx x) -> n (gy gx) (c y x)", y=cfg.patch, x=cfg.patch)


def encode_image(
    p: Params, pixels: Float[Tensor, "n 3 y x"], cfg: VisionConfig, tap: Tap = identity, wrap: Wrap = plain
) -> Float[Tensor, "n p d"]:
    """Pictures with values in [-1, 1] -> the encoder's normalized output, one vector per patch.

    `wrap` is applied to `block`.
    """
    patches = patchify(pixels.to(p.patch.dtype), cfg)
    x = linear(patches, rearrange(p.patch, "d c y x -> d (c y x)"), p.patch_bias)
    if cfg.position == "learned":
        x = x + p.position
    x = tap("vision.embed", x)
    rotations = grid_rotations(cfg, x.device) if cfg.position == "rope2d" else ()
    for i, layer in enumerate(p.layers):
        x = wrap(block)(layer, x, cfg, within(f"vision.{i}", tap, TAPS), rotations)
    return tap("vision.out", layer_norm(x, p.norm_scale, p.norm_bias, cfg.eps))


def block(
    p: Layer,
    x: Float[Tensor, "n p d"],
    cfg: VisionConfig | SiglipTextConfig,
    tap: Tap = identity,
    rotations: Rotations = (),
) -> Float[Tensor, "n p d"]:
    """Attention and MLP: each reads a normalized copy of x, and its result is added to x."""
    x = tap("resid_pre", x)
    normed = tap("attn_in", layer_norm(x, p.norm1_scale, p.norm1_bias, cfg.eps))
    x = tap("resid_mid", x + tap("attn_out", attention(p, normed, normed, cfg, tap, rotations)))
    normed = tap("mlp_in", layer_norm(x, p.norm2_scale, p.norm2_bias, cfg.eps))
    return tap("resid_post", x + tap("mlp_out", mlp(p, normed, tap)))


def attention(
    p: Layer | Head,
    x: Float[Tensor, "n p d"],
    source: Float[Tensor, "n s d"],
    cfg: VisionConfig | SiglipTextConfig,
    tap: Tap = identity,
    rotations: Rotations = (),
) -> Float[Tensor, "n p d"]:
    """Multi-head attention: every vector of x attends to all vectors of `source`, which is x itself in a block."""
    if x is source:
        projections = linear_many(x, (p.q, p.k, p.v), (p.q_bias, p.k_bias, p.v_bias))
    else:
        projections = linear(x, p.q, p.q_bias), *linear_many(source, (p.k, p.v), (p.k_bias, p.v_bias))
    heads = (rearrange(each, "b p (n h) -> b p n h", n=cfg.heads) for each in projections)
    q, k, v = (tap(name, each) for name, each in zip("qkv", heads, strict=True))
    if rotations:
        q, k = tap("rot_q", rotate_grid(q, *rotations)), tap("rot_k", rotate_grid(k, *rotations))
    z = tap("z", ops.attend(q, k, v, mask=None, scale=cfg.head_dim**-0.5, tap=tap))
    return linear(rearrange(z, "b p n h -> b p (n h)"), p.out, p.out_bias)


def mlp(p: Layer | Head, x: Float[Tensor, "n p d"], tap: Tap = identity) -> Float[Tensor, "n p d"]:
    """Up, tanh-GELU, down."""
    hidden = tap("mlp_hidden", ops.gelu(tap("up", linear(x, p.up, p.up_bias))))
    return linear(hidden, p.down, p.down_bias)


def pool(p: Head, x: Float[Tensor, "n p d"], cfg: VisionConfig, tap: Tap = identity) -> Float[Tensor, "n d"]:
    """The encoder's output -> one vector per picture. The order of the patches does not matter."""
    probe = repeat(p.probe, "one d -> n one d", n=x.shape[0])
    # the query's own vector is not added back: the head's residual starts after its attention (big_vision vit.py)
    x = tap("resid_mid", tap("attn_out", attention(p, probe, x, cfg, tap)))
    normed = tap("mlp_in", layer_norm(x, p.norm_scale, p.norm_bias, cfg.eps))
    x = tap("resid_post", x + tap("mlp_out", mlp(p, normed, tap)))
    return rearrange(x, "n 1 d -> n d")


def grid_rotations(cfg: VisionConfig, device: torch.device) -> tuple[Rotation, Rotation]:
    """The rotation of each patch by its row, and by its column; `rotate_grid` uses each for one half of the head."""
    index = torch.arange(cfg.grid, device=device)
    rows, columns = repeat(index, "y -> (y x)", x=cfg.grid), repeat(index, "x -> (y x)", y=cfg.grid)
    by_row, by_column = (ops.rotation(ops.angles(each, cfg.head_dim // 2, cfg.theta)) for each in (rows, columns))
    return by_row, by_column


def rotate_grid(x: Float[Tensor, "b p n h"], by_row: Rotation, by_column: Rotation) -> Float[Tensor, "b p n h"]:
    """2-D RoPE: rotate the first half of each head by the row, the second by the column (Heo et al. 2024, axial)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([ops.rotate(first, by_row), ops.rotate(second, by_column)], dim=-1)
