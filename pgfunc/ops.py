"""The arithmetic that the towers share: linear maps, norms, rotary positions, softcap, attention.

Everything is a function of tensors and numbers. What must be precise is: norms, rotations and softmax run in float32
(float64 stays float64) and the result is cast last. Nothing here knows about parameter trees or configs.

Axes: b batch, t query, s key, n heads, k kv heads, g heads of one kv head, h head dim, d width.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import forward_ad

from pgfunc.errors import TokenError
from pgfunc.quant import lowbit
from pgfunc.quant.lowbit import Float8, Int8, Quantized

T = TypeVar("T")
AMX = torch.cpu._is_amx_tile_supported()


def identity(name: str, x: T) -> T:
    """The default tap: names a value that passes through, and changes nothing."""
    return x


def within(place: str, tap):
    """A tap for the values of a part: their names begin with the place. The default tap stays what it is."""
    return identity if tap is identity else lambda name, value: tap(f"{place}.{name}", value)


def plain(fn: T) -> T:
    """The default for what wraps a transformer block: changes nothing. Gradient checkpointing and `torch.compile` are
    others."""
    return fn


def widen(x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """x in float32, or wider where it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(
    x: Float[Tensor, "*b i"], w: Float[Tensor, "o i"] | Quantized, bias: Float[Tensor, "o"] | None = None
) -> Float[Tensor, "*b o"]:
    """x @ w.T + bias. The one place where weights meet activations, quantized or not.

    In compiled code for GPUs the bias is added to the product, where it is joined to what follows: cuBLAS may copy it
    to every row first. On CPUs without AMX one row is multiplied as a loop that inductor writes, at up to twice the
    speed of the library.
    """
    compiling = torch.compiler.is_compiling()
    if not isinstance(w, Tensor):
        out = lowbit.multiply(x, w)
    elif compiling and written_out(x, w):
        out = lowbit.one_row(x, w)
    elif compiling and x.is_cuda:
        out = F.linear(x, w)
    else:
        return F.linear(x, w, bias)
    return out if bias is None else out + bias


def written_out(x: Tensor, w: Tensor) -> bool:
    """Whether inductor's loop is faster at a product: it is on an EPYC, and on a Xeon with AMX it is not."""
    return x.device.type == "cpu" and x.shape[:-1].numel() == 1 and x.dtype == w.dtype != torch.float64 and not AMX


def beside(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of tensors of one dtype that differ in their first axis alone, one behind another in the memory of a
    device; of meta tensors, room for them."""
    sizes = [len(x) for x in tensors]
    copies = tensors[0].new_empty(sum(sizes), *tensors[0].shape[1:], device=device).split(sizes)
    for copy, x in zip(copies, tensors, strict=True):
        if not x.is_meta:
            copy.copy_(x)
    return list(copies)


def together(tensors: Sequence[Tensor]) -> Tensor | None:
    """The one tensor, a view, that tensors are which `beside` made; None for others."""
    first, ends = tensors[0], [x.data_ptr() + x.nbytes for x in tensors]
    alike = all(x.shape[1:] == first.shape[1:] and x.dtype == first.dtype and x.is_contiguous() for x in tensors)
    behind = all(x.data_ptr() == end for x, end in zip(tensors[1:], ends[:-1], strict=True))
    shared = all(x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for x in tensors)
    if not (alike and behind and shared):
        return None
    size = sum(len(x) for x in tensors), *first.shape[1:]
    return first.as_strided(size, torch.empty(size, device="meta").stride())


def linears(
    x: Float[Tensor, "*b i"], weights: Sequence[Any], biases: Sequence[Tensor] = ()
) -> tuple[Float[Tensor, "*b _"], ...]:
    """`linear` of one x by several matrices. In compiled code for GPUs one product, where `beside` put them."""
    simple = all(isinstance(w, Tensor) for w in weights)
    if simple and x.is_cuda and torch.compiler.is_compiling() and not torch.is_grad_enabled() and not transformed():
        return torch.ops.pgfunc.linears(x, weights, biases).split([len(w) for w in weights], -1)
    return tuple(linear(x, *each) for each in zip(weights, *([biases] if biases else []), strict=True))


@torch.library.custom_op("pgfunc::linears", mutates_args=())
def _linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    w, bias = together(weights), together(biases) if biases else None
    with torch.autocast(x.device.type, enabled=False):
        if w is None:  # or they would be copied for each product
            pairs = zip(weights, *([biases] if biases else []), strict=True)
            return torch.cat([linear(x, *each) for each in pairs], -1)
        return F.linear(x, w, torch.cat(tuple(biases)) if biases and bias is None else bias)


_linears.register_fake(lambda x, weights, biases: x.new_empty(*x.shape[:-1], sum(len(w) for w in weights)))


def look_up(ids: Int[Tensor, "*b"], table: Float[Tensor, "v d"] | Int8 | Float8) -> Float[Tensor, "*b d"]:
    """The rows of a table; of a quantized one only those are made.

    An id that is no row gives nan, as `jax.numpy.take` does; where it is known on the host it is a TokenError.
    """
    size = len(table if isinstance(table, Tensor) else table.scale)
    inside = ids.clamp(0, size - 1)
    known = inside == ids
    if on_host(ids) and not known.all():
        raise TokenError(f"token id {int(ids[~known][0])} is outside 0..{size - 1}; is it another model's?")
    rows = (
        F.embedding(inside, table)
        if isinstance(table, Tensor)
        else lowbit.dequantize(type(table)(*(part[inside] for part in table)))
    )
    return torch.where(rearrange(known, "... -> ... 1"), rows, torch.nan)


def layer_norm(
    x: Float[Tensor, "*b d"], scale: Float[Tensor, "d"], bias: Float[Tensor, "d"], eps: float
) -> Float[Tensor, "*b d"]:
    """LayerNorm over the last axis (Ba et al. 2016)."""
    return F.layer_norm(x, x.shape[-1:], scale, bias, eps)


def rms_norm(x: Float[Tensor, "*b d"], scale: Float[Tensor, "d"], eps: float) -> Float[Tensor, "*b d"]:
    """x / rms(x) · (1 + scale), in float32, cast last (Gemma; Zhang & Sennrich 2019).

    The tree keeps the raw scale, and the 1 is added in float32: in bf16 1 + scale would lose the scale's low bits.
    """
    wide = widen(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (1 + widen(scale))).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU (Hendrycks & Gimpel 2016), which SigLIP and Gemma were trained with."""
    return F.gelu(x, approximate="tanh")


def softcap(x: Tensor, cap: float) -> Tensor:
    """tanh(x / cap) · cap: close to x near 0, never beyond ±cap, and monotone (Gemma 2)."""
    return torch.tanh(x / cap) * cap


def angles(positions: Int[Tensor, "*b t"], dim: int, theta: float) -> Float[Tensor, "*b t half"]:
    """The angle of each of the dim / 2 planes at each position, in float32 (Su et al. 2021).

    In float64 until it is cast: devices differ in the last bit of a power, and the position multiplies that.
    """
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    return (rearrange(positions.double(), "... -> ... 1") * theta**-exponents).float()


def rotate(x: Float[Tensor, "*b t n h"], angles: Float[Tensor, "*#b t half"]) -> Float[Tensor, "*b t n h"]:
    """Turn each plane (x[i], x[i + h/2]) by its angle, in float32: the half-split form of RoPE."""
    cos, sin = (rearrange(wave, "... t half -> ... t 1 half") for wave in (angles.cos(), angles.sin()))
    first, second = widen(x).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def transformed() -> bool:
    """Whether torch.func transforms or forward-mode AD are at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def on_host(x: Tensor) -> bool:
    """Whether the numbers of a tensor can be looked at, and nothing waits for it: on a CPU, eager, not transformed."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def attend(
    q: Float[Tensor, "b t n h"],
    k: Float[Tensor, "b s k h"],
    v: Float[Tensor, "b s k h"],
    mask: Bool[Tensor, "b t s"] | None,
    scale: float,
    cap: float = 0.0,
) -> Float[Tensor, "b t n h"]:
    """softmax(softcap(q·k · scale)) · v over the keys where mask is True; head n reads kv head n // (n / k).

    A query that may see no key gives zeros. PyTorch's fused kernels serve when they can; they know neither softcaps
    nor forward-mode AD nor vmap, where the same formula is written out. They also have no second derivative: use
    torch.func for it, or `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`. In compiled code for GPUs the formula is
    written out for a single query too: it is then joined to what stands around it.
    """
    joined = q.shape[1] == 1 and q.is_cuda and torch.compiler.is_compiling()
    if joined or cap or transformed():
        return attend_explicit(q, k, v, mask, scale, cap)
    q, k, v = (rearrange(x, "b t n h -> b n t h") for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if mask is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    else:
        mask = rearrange(mask, "b t s -> b 1 t s")
        # cuDNN's gradient of a query without keys is nan (PyTorch 2.11, H100): it reads all, and is made zero after
        some = mask.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(q, k, v, mask | ~some, scale=scale, enable_gqa=grouped)
        out = torch.where(some, out, 0.0)
    return rearrange(out, "b n t h -> b t n h")


def attend_explicit(
    q: Float[Tensor, "b t n h"],
    k: Float[Tensor, "b s k h"],
    v: Float[Tensor, "b s k h"],
    mask: Bool[Tensor, "b t s"] | None,
    scale: float,
    cap: float = 0.0,
) -> Float[Tensor, "b t n h"]:
    """`attend`, with the weights of the attention as a value: differentiable to any order and in either mode."""
    grouped = rearrange(q, "b t (k g) h -> b t k g h", k=k.shape[2])
    scores = widen(einsum(grouped, k, "b t k g h, b s k h -> b k g t s")) * scale
    scores = softcap(scores, cap) if cap else scores
    if mask is not None:
        seen = rearrange(mask, "b t s -> b 1 1 t s")
        # the lowest finite number rather than -inf: an empty row then has finite gradients, and is made zero after
        scores = torch.where(seen, scores, torch.finfo(scores.dtype).min)
        weights = torch.where(seen, scores.softmax(-1), 0.0)
    else:
        weights = scores.softmax(-1)
    out = einsum(weights.to(v.dtype), v, "b k g t s, b s k h -> b t k g h")
    return rearrange(out, "b t k g h -> b t (k g) h")
