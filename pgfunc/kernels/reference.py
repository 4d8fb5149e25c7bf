"""What each kernel of `calls` computes, as a formula of `ops` with the same name.

Arguments that only save time are left out: `just_written` and `arrivals`. The kernels keep float32 until the result is
cast (`angles` float64), but round attention weights to v's dtype. The formulas also round each intermediate result.
"""

from jaxtyping import Float, Int
from torch import Tensor

from pgfunc import ops
from pgfunc.cache import pad
from pgfunc.kernels.calls import Matrix
from pgfunc.masks import Appended, Span, dense


def matvec(x: Float[Tensor, "i"], w: Matrix, residual: Float[Tensor, "o"] | None = None) -> Float[Tensor, "o"]:
    return ops.linear(x, w) if residual is None else residual + ops.linear(x, w)


def norm_matvec(x: Float[Tensor, "d"], scale: Float[Tensor, "d"], w: Matrix, eps: float) -> Float[Tensor, "o"]:
    return ops.linear(ops.rms_norm(x, scale, eps), w)


def add_norm(
    x: Float[Tensor, "d"], residual: Float[Tensor, "d"], scale: Float[Tensor, "d"], eps: float
) -> Float[Tensor, "d"]:
    return residual + ops.rms_norm(x, scale, eps)


def angles(positions: Int[Tensor, "p"], dim: int, theta: float) -> Float[Tensor, "p half"]:
    return ops.angles(positions, dim, theta)


def norm_qkv_rope(
    x: Float[Tensor, "d"],
    scale: Float[Tensor, "d"],
    q: Matrix,
    k: Matrix,
    v: Matrix,
    angles: Float[Tensor, "1 1 half"],
    k_buffer: Float[Tensor, "s k h"],
    v_buffer: Float[Tensor, "s k h"],
    length: Int[Tensor, "1"],
    eps: float,
) -> Float[Tensor, "n h"]:
    """Unlike the kernel, raises IndexError if the buffers have no slot `length`."""
    normed = ops.rms_norm(x, scale, eps)
    query, key, value = (ops.linear(normed, w).unflatten(0, (1, 1, -1, 2 * angles.shape[-1])) for w in (q, k, v))
    rotation = ops.rotation(angles)
    k_buffer[length], v_buffer[length] = ops.rotate(key, rotation)[0], value[0]
    return ops.rotate(query, rotation)[0, 0]


def norm_geglu(
    x: Float[Tensor, "d"], scale: Float[Tensor, "d"], gate: Matrix, up: Matrix, eps: float
) -> Float[Tensor, "f"]:
    normed = ops.rms_norm(x, scale, eps)
    return ops.gelu(ops.linear(normed, gate)) * ops.linear(normed, up)


def decode_attention(
    q: Float[Tensor, "n h"],
    k: Float[Tensor, "s k h"],
    v: Float[Tensor, "s k h"],
    length: Int[Tensor, "1"],
    scale: float,
    cap: float = 0.0,
    window: int = 0,
) -> Float[Tensor, "n h"]:
    mask = dense(Appended(length, 1, window), len(k))
    return ops.attend(q[None, None], k[None], v[None], mask, scale, cap)[0, 0]


def prefill_attention(
    q: Float[Tensor, "b t n h"],
    k: Float[Tensor, "b s k h"],
    v: Float[Tensor, "b s k h"],
    begin: Int[Tensor, "b t"],
    end: Int[Tensor, "b t"],
    scale: float,
    cap: float = 0.0,
) -> Float[Tensor, "b t n h"]:
    return ops.attend(q, k, v, dense(Span(begin, end), k.shape[1]), scale, cap)


def rope_to_cache(
    q: Float[Tensor, "b t n h"],
    k: Float[Tensor, "b t k h"],
    v: Float[Tensor, "b t k h"],
    angles: Float[Tensor, "b t half"],
    free: int,
) -> tuple[Float[Tensor, "b t n h"], Float[Tensor, "b s k h"], Float[Tensor, "b s k h"]]:
    rotation = ops.rotation(angles)
    return ops.rotate(q, rotation), pad(ops.rotate(k, rotation), free), pad(v, free)
