"""What compiled code computes in place of the model's formulas, and when: the whole list, at the end of this file.

Without gradients, on an NVIDIA GPU: kernels (`operators`) for one token of one row, for rotary angles, and for the
rotation and the attention of a prompt. Without gradients, on any GPU: one product for packed matrices (`packing`).
With or without gradients: on any GPU, a bias that is added after the product, and explicit attention of one query; on a
CPU without AMX, the product of one row as a loop that inductor writes; on any device, an append by index, which can be
done in place, and masks that are not prepared for fused attention, since compiled code may need them in other forms.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils import _pytree as pytree

from pgfunc import cache, gemma, masks, ops, tree
from pgfunc.cache import Empty, Past
from pgfunc.config import TextConfig
from pgfunc.kernels import operators
from pgfunc.kernels.operators import QUANTIZED
from pgfunc.lowering import RULES, Rule, transformed
from pgfunc.masks import Appended, Mask, Masks, Span
from pgfunc.ops import Rotation
from pgfunc.quant import lowbit
from pgfunc.quant.lowbit import Int4, Quantized
from pgfunc.taps import asks, identity

TRITON = find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
AMX = torch.cpu._is_amx_tile_supported()


# --- when they apply --------------------------------------------------------------------------------------------------


def inference() -> bool:
    """Whether no gradients are recorded and no transforms of torch.func are active: the kernels support neither."""
    return not torch.is_grad_enabled() and not transformed()


def on_gpu(x: Tensor) -> bool:
    """Whether kernels can compute with this tensor: it is on an NVIDIA GPU, and no gradient is needed."""
    return TRITON and x.is_cuda and torch.version.hip is None and inference()


def kernels_read(x: Tensor) -> bool:
    """Whether kernels can compute with these activations: `on_gpu`, and in a dtype that they support."""
    return x.dtype in DTYPES and on_gpu(x)


def one_token(x: Tensor, weights: Any) -> bool:
    """Whether x is one token of one row, and the kernels support these weights."""
    fits = x.shape[:-1] == (1, 1) and kernels_read(x)
    return fits and all(w.dtype in (x.dtype, *QUANTIZED) for w in pytree.tree_leaves(weights))


def block_applies(
    p: gemma.Layer, x: Tensor, rotation: Rotation, mask: Mask, cfg: TextConfig, past: Any, tap: Any, queries: Any
) -> bool:
    """Whether the kernels can compute this layer.

    They read q, k and v together, and gate and up together: each group has one method. They read 4 bits only in rows.
    They compute the one token: `queries` is (), or selects that token once. They have no activations for a tap.
    """
    if not (isinstance(past, Past) and isinstance(mask, Appended) and tap is identity and one_token(x, p)):
        return False
    if isinstance(queries, Tensor) and queries.shape != (1, 1):
        return False
    alike = all(len({lowbit.kind(w) for w in group}) == 1 for group in ((p.q, p.k, p.v), (p.gate, p.up)))
    return alike and not any(isinstance(w, Int4) and w.blocked for w in p)


def head_applies(p: gemma.Params, x: Tensor, rows: Any, cfg: TextConfig, tap: Any) -> bool:
    return not asks(tap, "language.out") and one_token(x, p.embed)


def rotate_applies(q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, past: Any, queries: Any, tap: Any) -> bool:
    tapped = asks(tap, "rot_q", "rot_k")
    return isinstance(past, Empty) and isinstance(queries, tuple) and not tapped and kernels_read(q)


def span_applies(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, cap: float) -> bool:
    return isinstance(mask, Span) and kernels_read(q)


def one_query(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, cap: float) -> bool:
    return q.is_cuda and q.shape[1] == 1


def plain_on_gpu(x: Tensor, w: Tensor | Quantized, bias: Tensor | None) -> bool:
    return isinstance(w, Tensor) and x.is_cuda


def one_row_on_cpu(x: Tensor, w: Tensor | Quantized, bias: Tensor | None) -> bool:
    """Whether inductor's loop is faster than the library: it is on an EPYC, but not on a Xeon with AMX."""
    if not isinstance(w, Tensor) or AMX:
        return False
    return x.device.type == "cpu" and x.shape[:-1].numel() == 1 and x.dtype == w.dtype != torch.float64


def linear_many_applies(x: Tensor, weights: Sequence[Any], biases: Sequence[Tensor]) -> bool:
    plain = all(isinstance(w, Tensor) for w in weights)
    return plain and x.is_cuda and inference()


# --- what they compute ------------------------------------------------------------------------------------------------


def block(
    p: gemma.Layer, x: Tensor, rotation: Rotation, mask: Appended, cfg: TextConfig, past: Past, tap: Any, queries: Any
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    k, v = past.k.clone(), past.v.clone()  # inductor removes these copies if the buffers may be overwritten
    settings = cfg.eps, cfg.query_scale, cfg.attention_softcap, mask.window
    return operators.block(x, pytree.tree_leaves(p), rotation.angles, k, v, past.length, *settings), (k, v)


def head(p: gemma.Params, x: Tensor, rows: Any, cfg: TextConfig, tap: Any) -> Tensor:
    w = tree.map(lambda part: part[rows], p.embed)
    return operators.head(x, p.norm, pytree.tree_leaves(w), cfg.eps, isinstance(rows, Tensor))


def rotate_and_append(
    q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, past: Empty, queries: Any, tap: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return operators.rope_to_cache(q, k, v, rotation.angles, past.slots - k.shape[1])


def append_by_index(k: Tensor, v: Tensor, past: Past) -> tuple[Tensor, Tensor]:
    """`append_layer` by `index_put`, which inductor computes in place if the buffers may be overwritten.

    A token without a free slot repeats the token in the last slot; that of a full row stays as it was.
    """
    tokens, slots = k.shape[1], past.k.shape[1]
    begin = rearrange(past.length, "b -> b 1")
    slot = (begin + torch.arange(tokens, device=begin.device)).clamp(max=slots - 1)
    row = rearrange(torch.arange(len(begin), device=begin.device), "b -> b 1")
    token, full = (slot - begin).clamp(min=0), begin[..., None, None] >= slots

    def put(buffer: Tensor, new: Tensor) -> Tensor:
        return torch.index_put(buffer, (row, slot), torch.where(full, buffer[row, slot], new[row, token]))

    return put(past.k, k), put(past.v, v)


def attend_span(q: Tensor, k: Tensor, v: Tensor, mask: Span, scale: float, cap: float) -> Tensor:
    return operators.prefill_attention(q, k, v, mask.begin, mask.end, scale, cap)


def attend_one_query(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, cap: float) -> Tensor:
    """Explicit attention, which inductor fuses with the operations around it."""
    mask = None if mask is None else masks.dense(mask, k.shape[1])
    return ops.attend_explicit(q, k, v, mask, scale, cap)


def spans(valid: Tensor, causal: Tensor, size: int) -> Masks:
    return masks.spans(masks.left_aligned_prompt(valid, causal, size))


def linear_without_bias(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """The bias is added after the product, fused with what follows: cuBLAS may first copy the bias to every row."""
    return add_bias(F.linear(x, w), bias)


def linear_of_one_row(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """The product as a loop that inductor writes, at up to twice the speed of the library."""
    return add_bias(lowbit.one_row(x, w), bias)


def add_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias


def linear_many(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return operators.linear_many(x, weights, biases).split([len(w) for w in weights], -1)


# --- the list ---------------------------------------------------------------------------------------------------------

RULES.update({
    cache.append_layer: (Rule(lambda k, v, past: isinstance(past, Past), append_by_index),),
    gemma.block: (Rule(block_applies, block),),
    gemma.head: (Rule(head_applies, head),),
    gemma.rotate_and_append: (Rule(rotate_applies, rotate_and_append),),
    masks.left_aligned_prompt: (Rule(lambda valid, causal, size: on_gpu(valid), spans),),
    masks.cached: (Rule(lambda length, tokens, slots, size: tokens == len(length) == 1 and on_gpu(length),
                        masks.appended),),
    masks.prepared: (Rule(lambda masks, dtype: True, lambda masks, dtype: masks),),
    ops.angles: (Rule(lambda positions, dim, theta: on_gpu(positions), operators.angles),),
    ops.attend_formula: (Rule(span_applies, attend_span), Rule(one_query, attend_one_query)),
    ops.linear_formula: (Rule(plain_on_gpu, linear_without_bias), Rule(one_row_on_cpu, linear_of_one_row)),
    ops.linear_many_formula: (Rule(linear_many_applies, linear_many),),
})  # fmt: skip
