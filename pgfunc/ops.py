"""The arithmetic of both towers: linear maps, embedding, norms, rotary positions, softcap, attention.

Everything is a function of tensors and numbers. Norms, rotations and softmax are computed in float32 (float64 stays
float64), and the result is cast last. This module knows nothing about parameter trees, configs or devices. Compiled
code may replace a formula, see `lowering`.

Axes: b batch, t query, s key, n heads, k kv heads, g heads of one kv head, h head dim, d width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pgfunc.errors import TokenError
from pgfunc.lowering import lowered, on_host, transformed
from pgfunc.masks import Mask, Prepared, dense, prepare
from pgfunc.quant import lowbit
from pgfunc.quant.lowbit import Float8, Int8, Quantized
from pgfunc.taps import Tap, asks, identity


class Rotation(NamedTuple):
    """Rotary positions, in float32: `rotate` multiplies x by `cos`, and x with its halves swapped by `sin`."""

    angles: Float[Tensor, "*b t half"]
    cos: Float[Tensor, "*b t 1 h"]  # of the angles, twice
    sin: Float[Tensor, "*b t 1 h"]  # of the angles, twice; the first half is negated


def upcast(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """x in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(
    x: Float[Tensor, "*b i"], w: Float[Tensor, "o i"] | Quantized, bias: Float[Tensor, "o"] | None = None
) -> Float[Tensor, "*b o"]:
    """x @ w.T + bias, for plain and quantized w.

    The model's files multiply by matrices only through this function and `linear_many`.
    """
    return lowered(linear_formula)(x, w, bias)


def linear_formula(x: Tensor, w: Tensor | Quantized, bias: Tensor | None) -> Tensor:
    """The formula of `linear`."""
    if isinstance(w, Tensor):
        return F.linear(x, w, bias)
    out = lowbit.multiply(x, w)
    return out if bias is None else out + bias


def linear_many(
    x: Float[Tensor, "*b i"], weights: Sequence[Any], biases: Sequence[Tensor] = ()
) -> tuple[Float[Tensor, "*b _"], ...]:
    """`linear` of one x by several matrices."""
    return lowered(linear_many_formula)(x, weights, biases)


def linear_many_formula(x: Tensor, weights: Sequence[Any], biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The formula of `linear_many`."""
    return tuple(linear(x, *each) for each in zip(weights, *([biases] if biases else []), strict=True))


def embedding(ids: Int[Tensor, "*b"], table: Float[Tensor, "v d"] | Int8 | Float8) -> Float[Tensor, "*b d"]:
    """The rows of a table with these ids. Only these rows of a quantized table are dequantized.

    An id outside the table gives nan, as `jax.numpy.take` does, or raises TokenError if the host knows the ids.
    """
    size = len(table if isinstance(table, Tensor) else table.scale)
    nearest = ids.clamp(0, size - 1)
    valid = nearest == ids
    if on_host(ids) and not valid.all():
        raise TokenError(f"token id {int(ids[~valid][0])} is outside 0..{size - 1}; is it another model's?")
    rows = (
        F.embedding(nearest, table)
        if isinstance(table, Tensor)
        else lowbit.dequantize(type(table)(*(part[nearest] for part in table)))
    )
    return torch.where(rearrange(valid, "... -> ... 1"), rows, torch.nan)


def layer_norm(
    x: Float[Tensor, "*b d"], scale: Float[Tensor, "d"], bias: Float[Tensor, "d"], eps: float
) -> Float[Tensor, "*b d"]:
    """LayerNorm over the last axis (Ba et al. 2016)."""
    return F.layer_norm(x, x.shape[-1:], scale, bias, eps)


def rms_norm(x: Float[Tensor, "*b d"], scale: Float[Tensor, "d"], eps: float) -> Float[Tensor, "*b d"]:
    """x / rms(x) · (1 + scale), in float32, cast last (Gemma; Zhang & Sennrich 2019).

    The tree keeps the raw scale, and the 1 is added in float32: in bf16 1 + scale would lose the scale's low bits.
    """
    return F.rms_norm(upcast(x), scale.shape, 1 + upcast(scale), eps).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU (Hendrycks & Gimpel 2016), which SigLIP and Gemma were trained with."""
    return F.gelu(x, approximate="tanh")


def softcap(x: Tensor, cap: float) -> Tensor:
    """tanh(x / cap) · cap: close to x near 0, never beyond ±cap, and monotone (Gemma 2)."""
    return torch.tanh(x / cap) * cap


def angles(positions: Int[Tensor, "*b t"], dim: int, theta: float) -> Float[Tensor, "*b t half"]:
    """The angle of each of the dim / 2 planes at each position, in float32 (Su et al. 2021).

    Computed in float64 and cast last: devices differ in the last bit of a power, and the position multiplies that.
    """
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    return (rearrange(positions.double(), "... -> ... 1") * theta**-exponents).float()


def rotation(angles: Float[Tensor, "*b t half"]) -> Rotation:
    """The rotation by these angles."""
    cos, sin = (rearrange(wave, "... half -> ... 1 half") for wave in (angles.cos(), angles.sin()))
    return Rotation(angles, torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))


def rotate(x: Float[Tensor, "*b t n h"], rotation: Rotation) -> Float[Tensor, "*b t n h"]:
    """Rotate each plane (x[i], x[i + h/2]) by its angle, in float32: the half-split form of RoPE."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    # the factors are float32, and so are the products
    return torch.addcmul(x * rotation.cos, swapped, rotation.sin).to(x.dtype)


def attend(
    q: Float[Tensor, "b t n h"],
    k: Float[Tensor, "b _ k h"],
    v: Float[Tensor, "b _ k h"],
    mask: Mask | None,
    scale: float,
    cap: float = 0.0,
    tap: Tap = identity,
) -> Float[Tensor, "b t n h"]:
    """softmax(softcap(q·k · scale)) · v over the keys where mask is True; query head i reads kv head i * k // n.

    A query that sees no key gives zeros. Keys beyond the mask's last column are not read. A tap gets `mask`,
    `attn_scores` and `pattern` only if it asks for them; for the last two, `attend_explicit` computes the attention.
    """
    if asks(tap, "mask"):
        mask = tap("mask", full_mask(q, k) if mask is None else dense(mask, k.shape[1]))
    if asks(tap, "attn_scores", "pattern"):
        return attend_explicit(q, k, v, None if mask is None else dense(mask, k.shape[1]), scale, cap, tap)
    return lowered(attend_formula)(q, k, v, mask, scale, cap)


def full_mask(q: Float[Tensor, "b t n h"], k: Float[Tensor, "b s k h"]) -> Bool[Tensor, "b t s"]:
    """The mask of queries that see all keys."""
    return torch.ones(*q.shape[:2], k.shape[1], dtype=torch.bool, device=q.device)


def attend_formula(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float, cap: float) -> Tensor:
    """The formula of `attend`, by PyTorch's fused attention if that can compute it.

    Fused attention supports neither softcaps nor forward-mode AD nor vmap, and has no second derivative. For second
    derivatives use torch.func, which selects `attend_explicit`, or `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    """
    seen = None if mask is None else dense(mask, k.shape[1])
    if cap or transformed():
        return attend_explicit(q, k, v, seen, scale, cap)
    k, v = read_keys(k, v, seen)
    # one query: the heads of a group become its queries, else PyTorch on a CPU reads their keys once for each head
    group = q.shape[2] // k.shape[2] if q.shape[1] == 1 else 1
    q = rearrange(q, "b 1 (k g) h -> b g k h", g=group) if group > 1 else q
    q, k, v = (rearrange(x, "b t n h -> b n t h") for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if seen is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    else:
        prepared = mask if isinstance(mask, Prepared) else prepare(seen, q.dtype)
        bias, empty = prepared.bias.unsqueeze(1), prepared.empty.unsqueeze(1)  # the same for all heads
        bias = bias.expand(-1, -1, q.shape[2], -1)
        out = F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=grouped).masked_fill(empty, 0.0)
    return rearrange(out, "b k g h -> b 1 (k g) h" if group > 1 else "b n t h -> b t n h")


def attend_explicit(
    q: Float[Tensor, "b t n h"],
    k: Float[Tensor, "b _ k h"],
    v: Float[Tensor, "b _ k h"],
    mask: Bool[Tensor, "b t s"] | None,
    scale: float,
    cap: float = 0.0,
    tap: Tap = identity,
) -> Float[Tensor, "b t n h"]:
    """`attend` with explicit attention weights: differentiable to any order, in forward and reverse mode.

    A tap gets the scores (softcapped, not masked) and the weights, both in float32: `attn_scores` and `pattern`.
    """
    k, v = read_keys(k, v, mask)
    grouped = rearrange(q, "b t (k g) h -> b t k g h", k=k.shape[2])
    scores = upcast(einsum(grouped, k, "b t k g h, b s k h -> b k g t s")) * scale
    scores = tap_heads(tap, "attn_scores", softcap(scores, cap) if cap else scores)
    if mask is not None:
        seen = rearrange(mask, "b t s -> b 1 1 t s")
        # the lowest finite number, not -inf: a query that sees no key then has finite gradients; it is set to 0 below
        scores = torch.where(seen, scores, torch.finfo(scores.dtype).min)
        weights = torch.where(seen, scores.softmax(-1), 0.0)
    else:
        weights = scores.softmax(-1)
    weights = tap_heads(tap, "pattern", weights)
    out = einsum(weights.to(v.dtype), v, "b k g t s, b s k h -> b t k g h")
    return rearrange(out, "b t k g h -> b t (k g) h")


def read_keys(
    k: Float[Tensor, "b _ k h"], v: Float[Tensor, "b _ k h"], mask: Bool[Tensor, "b t s"] | None
) -> tuple[Float[Tensor, "b s k h"], Float[Tensor, "b s k h"]]:
    """The keys and values that a mask has columns for."""
    return (k, v) if mask is None else (k[:, : mask.shape[-1]], v[:, : mask.shape[-1]])


def tap_heads(tap: Tap, name: str, x: Float[Tensor, "b k g t s"]) -> Float[Tensor, "b k g t s"]:
    """Pass a value of each query head through a tap that asks for it; the tap gets all heads on one axis."""
    if not asks(tap, name):
        return x
    return rearrange(tap(name, rearrange(x, "b k g t s -> b (k g) t s")), "b (k g) t s -> b k g t s", k=x.shape[1])
