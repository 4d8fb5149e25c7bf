"""The products of `pgfunc.kernels` with matrices in 4 bits, which the functions there call. Their twins are there.

The bytes are read as they lie for CPUs, 64 outputs side by side: so a program has 64 outputs and all inputs, which its
warps share.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pgfunc.kernels.launch import code, early
from pgfunc.lowbit import BLOCK, Int4


def dense(w: Int4) -> tuple[Int[Tensor, "n i word"], Float[Tensor, "g o z"]]:
    """The levels, 8 in a number each, and scales; where a matrix is a part of another, copies."""
    return w.values.contiguous().view(torch.int32), w.scale.contiguous()


def sizes(w: Int4) -> dict[str, int]:
    """What the kernels know of a matrix before they run: 16 lanes a warp, so many steps each."""
    width = w.values.shape[1]
    group = width // len(w.scale)
    steps = min(group, 16 if width < 8192 else 64)
    lanes = max(16, 1 << (width // steps - 1).bit_length())
    return {"D": width, "GROUP": group, "STEPS": steps, "LANES": lanes, "num_warps": min(16, lanes // 16)}


def matvec(x: Float[Tensor, "i"], w: Int4, residual: Float[Tensor, "o"] | None) -> Float[Tensor, "o"]:
    outputs, settings = w.scale.shape[1], sizes(w) | early(x)
    out = x.new_empty(outputs)
    given = x if residual is None else residual
    code("device_int4").matvec[(outputs // BLOCK,)](
        x, *dense(w), given, out, OUT=outputs, ADD=residual is not None, **settings
    )
    return out


def geglu_matvec(
    x: Float[Tensor, "d"], scale: Float[Tensor, "d"], gate: Int4, up: Int4, eps: float
) -> Float[Tensor, "f"]:
    outputs, settings = gate.scale.shape[1], sizes(gate) | early(x)
    out = x.new_empty(outputs)
    code("device_int4").geglu_matvec[(outputs // BLOCK,)](
        x,
        scale,
        *dense(gate),
        *dense(up),
        out,
        eps,
        OUT=outputs,
        **settings,
    )
    return out


def rotated_qkv(
    x: Float[Tensor, "d"],
    scale: Float[Tensor, "d"],
    q: Int4,
    k: Int4,
    v: Int4,
    angles: Float[Tensor, "1 1 half"],
    k_buffer: Float[Tensor, "s k h"],
    v_buffer: Float[Tensor, "s k h"],
    length: Int[Tensor, "1"],
    eps: float,
) -> Float[Tensor, "n h"]:
    h = 2 * angles.shape[-1]
    heads, kv_heads = q.scale.shape[1] // h, k.scale.shape[1] // h
    out = x.new_empty(heads, h)
    code("device_int4").rotated_qkv[((heads + 2 * kv_heads) * h // 2 // BLOCK,)](
        x, scale, *dense(q), *dense(k), *dense(v), angles, out, k_buffer, v_buffer, length,
        *k_buffer.stride()[:2], *v_buffer.stride()[:2], len(k_buffer), eps,
        HEADS=heads, KV=kv_heads, HALF=h // 2, **sizes(q), **early(x),
    )  # fmt: skip
    return out
