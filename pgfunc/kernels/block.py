"""A transformer block and the head over one token of one row, by the kernels: what `gemma` does, in fewer of them.

    norm, q, k, v, rotation, append | attention | out, residual | norm, gate, up, GELU | down, residual

Gemma 2 normalises what it adds, in a kernel of its own. Each is one operator for torch.compile, which has nothing to
join or to trace in them. Knows the shapes of `gemma.Layer`, and no masks: a token that is appended sees all that stand
before it, or the last of a window.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils import _pytree as pytree

from pgfunc import kernels, ops
from pgfunc.config import TextConfig
from pgfunc.kernels import Matrix
from pgfunc.masks import Span
from pgfunc.quant import lowbit
from pgfunc.quant.lowbit import Float8, Int4, Int8

TRITON = find_spec("triton") is not None
QUANTIZED = {torch.int8: Int8, torch.float8_e4m3fn: Float8, torch.uint8: Int4}  # what the values tell
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def possible(x: Tensor) -> bool:
    """Whether kernels can do something with this: on a GPU of Nvidia's, without a gradient."""
    here = TRITON and x.is_cuda and torch.version.hip is None and x.dtype in DTYPES
    return here and not torch.is_grad_enabled() and not ops.transformed()


def compiled(x: Tensor) -> bool:
    """Whether this is code that is compiled for a GPU, without a gradient."""
    return torch.compiler.is_compiling() and possible(x)


def serves(x: Float[Tensor, "*b d"], tap, weights: Any) -> bool:
    """Whether the kernels do it: for one token in compiled code on a GPU, without a tap or a gradient."""
    fits = x.shape[:-1] == (1, 1) and tap is ops.identity and compiled(x)
    return fits and all(w.dtype in (x.dtype, *QUANTIZED) for w in pytree.tree_leaves(weights))


def serves_layers(x: Float[Tensor, "b t d"], tap, layers: Sequence[Any]) -> bool:
    """`serves`, of whole layers: matrices that are read together must be of one kind, and 4 bits in rows."""
    if not serves(x, tap, layers):
        return False
    together = (group for p in layers for group in ((p.q, p.k, p.v), (p.gate, p.up)))
    alike = all(len({lowbit.kind(w) for w in group}) == 1 for group in together)
    return alike and not any(isinstance(w, Int4) and w.blocked for p in layers for w in p)


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
    k, v = k_buffer.clone(), v_buffer.clone()  # inductor leaves them out where the buffers may be written
    numbers = cfg.eps, cfg.query_scale, cfg.attention_softcap, window
    x = torch.ops.pgfunc.block(x, pytree.tree_leaves(p), angles, k, v, length, *numbers)
    return x, (k, v)


def head(
    x: Float[Tensor, "1 1 d"], norm: Float[Tensor, "d"], w: Matrix, eps: float, made: bool
) -> Float[Tensor, "1 1 v"]:
    """The final norm and the product with the head; `made` where its rows were put together just before."""
    return torch.ops.pgfunc.head(x, norm, pytree.tree_leaves(w), eps, made)


def rotation(positions: Int[Tensor, "b t"], dim: int, theta: float) -> Float[Tensor, "b t half"]:
    """`ops.angles`, made once: inductor would make them anew for each operator that takes them."""
    return torch.ops.pgfunc.angles(positions, dim, theta)


def attend(
    q: Float[Tensor, "b t n h"],
    k: Float[Tensor, "b s k h"],
    v: Float[Tensor, "b s k h"],
    mask: Span,
    scale: float,
    cap: float = 0.0,
) -> Float[Tensor, "b t n h"]:
    """`ops.attend` of queries that see what stands together."""
    return torch.ops.pgfunc.attend_spans(q, k, v, mask.begin, mask.end, scale, cap)


def rotated(
    q: Float[Tensor, "b t n h"],
    k: Float[Tensor, "b t k h"],
    v: Float[Tensor, "b t k h"],
    angles: Float[Tensor, "b t half"],
    room: int,
) -> tuple[Float[Tensor, "b t n h"], Float[Tensor, "b s k h"], Float[Tensor, "b s k h"]]:
    """`ops.rotate` of q and k, and the buffers of a cache that begins with these k and v, with `room` for more."""
    return torch.ops.pgfunc.rotated_prompt(q, k, v, angles, room)


# --- the operators ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("pgfunc::block", mutates_args=("k", "v"))
def _block(
    x: Tensor, weights: Sequence[Tensor], angles: Tensor, k: Tensor, v: Tensor, length: Tensor,
    eps: float, scale: float, cap: float, window: int,
) -> Tensor:  # fmt: skip
    p = list(rebuilt(weights))
    post_norms = len(p) > 9
    attention_norm, query, key, value, out = p[:5]
    mlp_norm, gate, up, down = p[5 + post_norms : 9 + post_norms]
    arrivals = kernels.counters(k[0])
    q = kernels.rotated_qkv(x[0, 0], attention_norm, query, key, value, angles, k[0], v[0], length, eps, arrivals)
    seen = kernels.attend_one(q, k[0], v[0], length, scale, cap, window, arrivals).flatten()
    row = added(x[0, 0], seen, out, p[5] if post_norms else None, eps)
    hidden = kernels.geglu_matvec(row, mlp_norm, gate, up, eps)
    return rearrange(added(row, hidden, down, p[-1] if post_norms else None, eps), "d -> 1 1 d")


@torch.library.custom_op("pgfunc::head", mutates_args=())
def _head(x: Tensor, norm: Tensor, w: Sequence[Tensor], eps: float, made: bool) -> Tensor:
    (matrix,) = rebuilt(w)
    return rearrange(kernels.normed_matvec(x[0, 0], norm, matrix, eps, made), "v -> 1 1 v")


@torch.library.custom_op("pgfunc::angles", mutates_args=())
def _angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    return kernels.angles(positions.flatten(), dim, theta).view(*positions.shape, dim // 2)


@torch.library.custom_op("pgfunc::attend_spans", mutates_args=())
def _attend_spans(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, scale: float, cap: float) -> Tensor:
    return kernels.attend_spans(q, k, v, begin, end, scale, cap)


@torch.library.custom_op("pgfunc::rotated_prompt", mutates_args=())
def _rotated_prompt(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.rotated_prompt(q, k, v, angles, room)


def _rotated_prompt_fake(q: Tensor, k: Tensor, v: Tensor, angles: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    size = k.shape[0], k.shape[1] + room, *k.shape[2:]
    return q.new_empty(q.shape), k.new_empty(size), v.new_empty(size)


_block.register_fake(lambda x, *rest: torch.empty_like(x))
_head.register_fake(lambda x, norm, w, eps, made: x.new_empty(1, 1, len(w[0])))
_attend_spans.register_fake(lambda q, *rest: q.new_empty(q.shape))
_rotated_prompt.register_fake(_rotated_prompt_fake)
_angles.register_fake(
    lambda positions, dim, theta: positions.new_empty(*positions.shape, dim // 2, dtype=torch.float32)
)


def rebuilt(leaves: Sequence[Tensor]) -> Iterator[Any]:
    """The weights whose leaves these are, in their order: a quantized matrix is followed by its scales."""
    rest = iter(leaves)
    for leaf in rest:
        yield QUANTIZED[leaf.dtype](leaf, next(rest)) if leaf.dtype in QUANTIZED else leaf


def added(row: Float[Tensor, "d"], x: Float[Tensor, "i"], w: Matrix, norm: Tensor | None, eps: float) -> Tensor:
    """The residual stream with the product in it, normalised first in Gemma 2."""
    if norm is None:
        return kernels.matvec(x, w, row)
    return kernels.add_normed(kernels.matvec(x, w), row, norm, eps)
