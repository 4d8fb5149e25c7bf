"""The kernels as operators for torch.compile, which neither traces nor fuses what is inside them.

One token of one row takes a few kernels per layer:

    norm, q, k, v, rotation, append | attention | out, residual | norm, gate, up, GELU | down, residual

Gemma 2 also normalizes each product before it adds it, in a separate kernel. This module knows the fields of
`gemma.Layer`. `block` makes no mask: a token attends to itself and all before it, or to the last `window` of these.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from pgfunc.gemma import Layer
from pgfunc.kernels import calls
from pgfunc.kernels.calls import Matrix
from pgfunc.ops import linear
from pgfunc.packing import packed_view
from pgfunc.quant.lowbit import Float8, Int4, Int8

QUANTIZED = {torch.int8: Int8, torch.float8_e4m3fn: Float8, torch.uint8: Int4}  # by the dtype of their values
POST_NORMS = {"post_attention_norm": (), "post_mlp_norm": ()}  # absent in Gemma 1


@torch.library.custom_op("pgfunc::block", mutates_args=("k", "v"))
def block(
    x: Tensor, weights: Sequence[Tensor], angles: Tensor, k: Tensor, v: Tensor, length: Tensor,
    eps: float, scale: float, cap: float, window: int,
) -> Tensor:  # fmt: skip
    """`gemma.block` for one token of one row, whose key and value are appended to the buffers k and v."""
    p, arrivals = layer_of(weights), calls.counters(k[0])
    q = calls.norm_qkv_rope(x[0, 0], p.attention_norm, p.q, p.k, p.v, angles, k[0], v[0], length, eps, arrivals)
    attended = calls.decode_attention(q, k[0], v[0], length, scale, cap, window, arrivals).flatten()
    row = add_product(x[0, 0], attended, p.out, p.post_attention_norm, eps)
    hidden = calls.norm_geglu(row, p.mlp_norm, p.gate, p.up, eps)
    return rearrange(add_product(row, hidden, p.down, p.post_mlp_norm, eps), "d -> 1 1 d")


@torch.library.custom_op("pgfunc::head", mutates_args=())
def head(x: Tensor, norm: Tensor, w: Sequence[Tensor], eps: float, just_written: bool) -> Tensor:
    """`gemma.head` for one token of one row. `just_written`: the kernel before has written w."""
    (matrix,) = matrices(w)
    return rearrange(calls.norm_matvec(x[0, 0], norm, matrix, eps, just_written), "v -> 1 1 v")


@torch.library.custom_op("pgfunc::angles", mutates_args=())
def angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """`ops.angles`, computed once: inductor would compute the formula again for each operator that takes the angles."""
    return calls.angles(positions.flatten(), dim, theta).view(*positions.shape, dim // 2)


@torch.library.custom_op("pgfunc::prefill_attention", mutates_args=())
def prefill_attention(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, scale: float, cap: float) -> Tensor:
    """`ops.attend` with a `masks.Span`."""
    return calls.prefill_attention(q, k, v, begin, end, scale, cap)


@torch.library.custom_op("pgfunc::rope_to_cache", mutates_args=())
def rope_to_cache(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, free: int) -> tuple[Tensor, Tensor, Tensor]:
    """`gemma.rotate_and_append` for an empty cache, with `free` slots of zeros after the tokens."""
    return calls.rope_to_cache(q, k, v, angles, free)


@torch.library.custom_op("pgfunc::linear_many", mutates_args=())
def linear_many(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """`ops.linear_many`, with the results concatenated: one product if the weights are packed."""
    w, bias = packed_view(weights), packed_view(biases) if biases else None
    with torch.autocast(x.device.type, enabled=False):
        if w is None:  # packing them here would copy them for each product
            pairs = zip(weights, *([biases] if biases else []), strict=True)
            return torch.cat([linear(x, *each) for each in pairs], -1)
        return F.linear(x, w, torch.cat(tuple(biases)) if biases and bias is None else bias)


def _rope_to_cache_fake(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, free: int) -> tuple[Tensor, Tensor, Tensor]:
    size = k.shape[0], k.shape[1] + free, *k.shape[2:]
    return q.new_empty(q.shape), k.new_empty(size), v.new_empty(size)


# the shapes of the results
block.register_fake(lambda x, *rest: torch.empty_like(x))
head.register_fake(lambda x, norm, w, eps, just_written: x.new_empty(1, 1, len(w[0])))
angles.register_fake(lambda positions, dim, theta: positions.new_empty(*positions.shape, dim // 2, dtype=torch.float32))
prefill_attention.register_fake(lambda q, *rest: q.new_empty(q.shape))
rope_to_cache.register_fake(_rope_to_cache_fake)
linear_many.register_fake(lambda x, weights, biases: x.new_empty(*x.shape[:-1], sum(len(w) for w in weights)))


def layer_of(leaves: Sequence[Tensor]) -> Layer:
    """The layer of Gemma 1 or Gemma 2 that has these leaves."""
    weights = list(matrices(leaves))
    absent = POST_NORMS if len(weights) < len(Layer._fields) else {}
    return Layer(**absent, **dict(zip([name for name in Layer._fields if name not in absent], weights, strict=True)))


def matrices(leaves: Sequence[Tensor]) -> Iterator[Any]:
    """The weights that have these leaves, in order: the values of a quantized matrix are followed by its scales."""
    rest = iter(leaves)
    for leaf in rest:
        yield QUANTIZED[leaf.dtype](leaf, next(rest)) if leaf.dtype in QUANTIZED else leaf


def add_product(
    row: Float[Tensor, "d"], x: Float[Tensor, "i"], w: Matrix, norm: Tensor | tuple[()], eps: float
) -> Float[Tensor, "d"]:
    """The residual stream plus the product w · x, which Gemma 2 first normalizes."""
    if isinstance(norm, Tensor):
        return calls.add_norm(calls.matvec(x, w), row, norm, eps)
    return calls.matvec(x, w, row)
