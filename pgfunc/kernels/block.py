"""A transformer block and the head over one token of one row, by the kernels: what `gemma` does, in fewer of them.

    norm, q, k, v, rotation | append | attention, in two | out, residual | norm, gate, up, GELU | down, residual

Gemma 2 normalises what it adds, which is left to torch.compile. Knows the shapes of `gemma.Layer`, and no masks: a
token that is appended sees all that stand before it, or the last of a window.
"""

from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils import _pytree as pytree

from pgfunc import kernels, ops
from pgfunc.cache import append
from pgfunc.config import TextConfig

TRITON = find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def serves(x: Float[Tensor, "*b d"], tap, weights: Any) -> bool:
    """Whether the kernels do it: for one token in compiled code on a GPU, without a tap, a gradient or quantization."""
    fits = TRITON and x.is_cuda and torch.compiler.is_compiling() and x.shape[:-1] == (1, 1)
    plain = tap is ops.identity and not torch.is_grad_enabled() and not ops.transformed()
    return fits and plain and all(w.dtype == x.dtype in DTYPES for w in pytree.tree_leaves(weights))


def block(
    p: Any,
    x: Float[Tensor, "1 1 d"],
    angles: Float[Tensor, "1 1 half"],
    past: tuple[Float[Tensor, "1 s k h"], Float[Tensor, "1 s k h"], Int[Tensor, "1"]],
    window: int,
    cfg: TextConfig,
) -> tuple[Float[Tensor, "1 1 d"], tuple[Tensor, Tensor]]:
    """`gemma.block` on a cache, of a `gemma.Layer`; `window` is this layer's, or 0."""
    k_buffer, v_buffer, length = past
    row = x[0, 0]
    heads = kernels.rotated_qkv(row, p.attention_norm, p.q, p.k, p.v, angles, cfg.eps)
    q, k, v = heads.split([cfg.heads, cfg.kv_heads, cfg.kv_heads])
    k, v = append(k_buffer, k[None, None], length), append(v_buffer, v[None, None], length)
    seen = kernels.attend_one(q, k[0], v[0], length, cfg.query_scale, cfg.attention_softcap, window)
    row = added(row, seen.flatten(), p.out, p.post_attention_norm, cfg)
    hidden = kernels.geglu_matvec(row, p.mlp_norm, p.gate, p.up, cfg.eps)
    return added(row, hidden, p.down, p.post_mlp_norm, cfg)[None, None], (k, v)


def added(
    row: Float[Tensor, "d"], x: Float[Tensor, "i"], w: Float[Tensor, "d i"], norm: Tensor, cfg: TextConfig
) -> Float[Tensor, "d"]:
    """The residual stream with the product in it, normalised first in Gemma 2."""
    if not cfg.post_norms:
        return kernels.matvec_add(x, w, row)
    return row + ops.rms_norm(kernels.matvec(x, w), norm, cfg.eps)
