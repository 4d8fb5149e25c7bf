"""A matrix of weights in 8 or 4 bits: made, read back, multiplied. `ops.linear` alone has it meet activations.

`Int8` and `Float8` have a scale for each output. `Int4` has a scale and a zero for each output and group of inputs, and
keeps two levels in a byte. For CPUs, and in files, two outputs' in blocks of 64, as PyTorch's kernel for AVX-512 reads
them:

    byte [n, i, d]  =  level of (output 64 n + d, input i)  |  level of (output 64 n + 32 + d, input i) << 4

For GPUs two inputs' of a group of h + h, so that a row lies together (`arranged`):

    byte [o, g h + j]  =  level of (output o, input 2 g h + j)  |  level of (output o, input 2 g h + h + j) << 4

Scales have 8 significant bits, and the dtype of the weights that they stand for. Knows nothing about models. Axes:
o outputs, i inputs, g groups of inputs, n blocks of 64 outputs, d 32 outputs, j pairs of inputs, z scale and zero.
"""

from collections.abc import Iterator
from math import gcd, prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped, UInt
from torch import Tensor
from torch.autograd import forward_ad

from pgfunc import tree

GROUPS = {"int8": 0, "fp8": 0, "int4": 128, "int4-64": 64, "int4-32": 32}  # inputs that share a scale; 0: all of a row
BLOCK = 64


class Int8(NamedTuple):
    """values · scale."""

    values: Int[Tensor, "o i"]  # int8, from -127 to 127
    scale: Float[Tensor, "o"]

    def __repr__(self) -> str:
        return tree.summary(self)


class Float8(NamedTuple):
    """values · scale: 3 bits of a mantissa, where an Int8 has even steps (Micikevicius et al. 2022)."""

    values: Float[Tensor, "o i"]  # float8_e4m3fn, from -448 to 448
    scale: Float[Tensor, "o"]

    def __repr__(self) -> str:
        return tree.summary(self)


class Int4(NamedTuple):
    """(level - 8) · scale + zero, with levels from 0 to 15."""

    values: UInt[Tensor, "n i d"] | UInt[Tensor, "o j"]  # uint8, two levels each, in blocks or in rows
    scale: Float[Tensor, "g o z"] | Float[Tensor, "o g z"]

    def __repr__(self) -> str:
        return tree.summary(self)

    @property
    def blocked(self) -> bool:
        """Whether it is in blocks, as CPUs read it, or in rows, as GPUs do; of stacked ones only within vmap."""
        return self.values.dim() == 3

    @property
    def inputs(self) -> int:
        return self.values.shape[1] * (1 if self.blocked else 2)

    @property
    def group(self) -> int:
        """So many inputs share a scale and a zero."""
        return self.inputs // self.scale.shape[0 if self.blocked else 1]


Quantized = Int8 | Float8 | Int4
TYPES: dict[str, type] = {"int8": Int8, "fp8": Float8} | {name: Int4 for name, size in GROUPS.items() if size}
MOST = {Int8: 127, Float8: 448}


def method(w: Quantized) -> str:
    """The name in `GROUPS` of how a matrix was quantized."""
    group = w.group if isinstance(w, Int4) else 0
    return next(name for name, size in GROUPS.items() if size == group and TYPES[name] is type(w))


def kind(w: Tensor | Quantized) -> str:
    """The method of a matrix, or "" where it is plain."""
    return "" if isinstance(w, Tensor) else method(w)


def quantize(w: Float[Tensor, "o i"], method: str) -> Quantized:
    """The nearest levels: no weight moves by more than half a step, but for the last rounding to its own dtype.

    A step is the scale, or for fp8 1/8 to 1/16 of the level, and at least 2^-9 of the scale. int4 needs outputs in
    multiples of 64, and inputs in multiples of its group, and is arranged for the device. A row or group of zeros stays
    so, and with int4 a group of any one number that bfloat16 holds. In float16 a scale is at least 6e-5. What is not
    finite has a scale that is not.
    """
    group, kind = GROUPS[method], TYPES[method]
    # in float64 the levels are exact, and a few rows at a time it costs little memory
    pieces = w.split(len(w) if w.is_meta else 1024)
    parts = [_int4(rows.double(), group, w.dtype) if group else _eight(rows.double(), w.dtype, kind) for rows in pieces]
    values, scales = map(torch.cat, zip(*parts, strict=True))
    return kind(values, scales) if not group else in_rows(values, scales) if w.is_cuda else in_blocks(values, scales)


def _eight(rows: Tensor, dtype: torch.dtype, kind: type) -> tuple[Shaped[Tensor, "o i"], Float[Tensor, "o"]]:
    scale = _scale(rows.abs().amax(-1) / MOST[kind], dtype)
    levels = rows / rearrange(scale, "o -> o 1")
    if kind is Int8:
        return levels.round().to(torch.int8), scale
    # rounded here, so that the conversion is exact: PyTorch's goes by way of float32. Below 2^-6 the steps are even
    step = torch.exp2((torch.frexp(levels).exponent.double() - 1).clamp(min=-6) - 3)
    return ((levels / step).round() * step).clamp(-MOST[kind], MOST[kind]).to(torch.float8_e4m3fn), scale


def _int4(rows: Tensor, group: int, dtype: torch.dtype) -> tuple[UInt[Tensor, "o i"], Float[Tensor, "o g z"]]:
    rows = rearrange(rows, "o (g i) -> o g i", i=group)
    low, high = rows.amin(-1), rows.amax(-1)
    zero = _coarse((8 * high + 7 * low) / 15, dtype).double()
    # of the zero as it was rounded, so that the grid still covers both ends
    scale = _scale(torch.maximum((high - zero) / 7, (zero - low) / 8), dtype)
    levels = (rows - rearrange(zero, "o g -> o g 1")) / rearrange(scale, "o g -> o g 1")
    levels = levels.round().clamp(-8, 7).add(8).to(torch.uint8)
    return rearrange(levels, "o g i -> o (g i)"), torch.stack([scale, zero.to(dtype)], -1)


def in_blocks(levels: UInt[Tensor, "o i"], scale: Float[Tensor, "o g z"]) -> Int4:
    """Levels as CPUs read them."""
    first, second = rearrange(levels, "(n half d) i -> half n i d", half=2, d=BLOCK // 2)
    return Int4((first | second << 4).contiguous(), rearrange(scale, "o g z -> g o z").contiguous())


def in_rows(levels: UInt[Tensor, "o i"], scale: Float[Tensor, "o g z"]) -> Int4:
    """Levels as GPUs read them."""
    first, second = rearrange(levels, "o (g half j) -> half o (g j)", half=2, g=scale.shape[1])
    return Int4((first | second << 4).contiguous(), scale.contiguous())


def arranged(w: Int4, device: torch.device) -> Int4:
    """The matrix on a device, as it is read fastest there; a reader of the other order makes the weights first."""
    return ordered(Int4(w.values.to(device), w.scale.to(device)), rows=device.type == "cuda")


def ordered(w: Int4, rows: bool) -> Int4:
    """The matrix in rows, or in blocks."""
    if w.blocked != rows:
        return w
    return in_rows(levels(w), rearrange(w.scale, "g o z -> o g z")) if rows else in_blocks(levels(w), w.scale)


def levels(w: Int4) -> UInt[Tensor, "o i"]:
    """From 0 to 15."""
    both = torch.stack([w.values & 15, w.values >> 4])
    if w.blocked:
        return rearrange(both, "half n i d -> (n half d) i")
    return rearrange(both, "half o (g j) -> o (g half j)", g=w.scale.shape[1])


def _scale(step: Tensor, dtype: torch.dtype) -> Tensor:
    # neither 0 nor a number so small that it has fewer bits: then the bound of half a step would not hold
    return _coarse(step, dtype).clamp(min=max(torch.finfo(dtype).tiny, torch.finfo(torch.bfloat16).tiny))


def _coarse(x: Tensor, dtype: torch.dtype) -> Tensor:
    # 8 significant bits: level times scale is exact in float32, and bf16 holds the scales of a float32 tree
    return x.bfloat16().to(dtype)


def dequantize(w: Quantized) -> Float[Tensor, "*o i"]:
    """The weights that a matrix stands for, in the dtype of its scales; in 8 bits of any rows, with any axes before."""
    if not isinstance(w, Int4):
        return w.values.to(w.scale.dtype) * rearrange(w.scale, "... -> ... 1")
    scale, zero = rearrange(w.scale, "g o z -> z o g 1" if w.blocked else "o g z -> z o g 1")
    groups = rearrange(levels(w).to(torch.int8) - 8, "o (g i) -> o g i", i=w.group).to(scale.dtype)
    return rearrange(torch.addcmul(zero, groups, scale), "o g i -> o (g i)")


def finite(w: Quantized) -> bool:
    """Whether every weight that the scales allow is a number of their dtype."""
    if not isinstance(w, Int4):
        return bool((w.scale * MOST[type(w)]).isfinite().all())
    scale, zero = w.scale.unbind(-1)
    return bool(((zero - 8 * scale).isfinite() & (zero + 7 * scale).isfinite()).all())


def multiply(x: Float[Tensor, "*b i"], w: Quantized) -> Float[Tensor, "*b o"]:
    """x @ dequantize(w).T, by what is fastest for the number of rows. A kernel of one's own would go first here."""
    rows = prod(x.shape[:-1])
    # more rows than these, and it is faster to make the weights first (2 cores with AVX-512 and AMX, bf16)
    if 0 < rows <= (16 if isinstance(w, Int8) else 128) and kernel_serves(x, w):
        return kernel(x, w)
    if not torch.compiler.is_compiling():
        return torch.cat([F.linear(x, dequantize(piece)) for piece in pieces(w)], -1)
    return one_row(x, dequantize(w)) if rows == 1 else F.linear(x, dequantize(w))


def one_row(x: Float[Tensor, "*b i"], w: Float[Tensor, "o i"]) -> Float[Tensor, "*b o"]:
    """x @ w.T of a single x: inductor makes one loop of it, also of what w is made of.

    A long x is walked in pieces, which is 15% faster (16,384 inputs in bf16, an EPYC).
    """
    wide, inputs = torch.promote_types(x.dtype, torch.float32), w.shape[-1]
    size = gcd(inputs, 2048) if inputs > 4096 else inputs
    w, x = rearrange(w, "o (c i) -> o c i", i=size), rearrange(x, "... (c i) -> ... 1 c i", i=size)
    return (w.to(wide) * x.to(wide)).sum(-1).sum(-1).to(x.dtype)


def pieces(w: Quantized) -> Iterator[Quantized]:
    """A matrix cut along its outputs: the weights of a piece stay in the cache of a CPU, or spare a GPU's memory."""
    size = 2**21 if w.scale.device.type == "cpu" else 2**27
    inputs = w.inputs if isinstance(w, Int4) else w.values.shape[-1]
    blocks = max(1, size // (inputs * BLOCK))
    if isinstance(w, Int4) and w.blocked:
        for part in zip(w.values.split(blocks), w.scale.split(blocks * BLOCK, 1), strict=True):
            yield Int4(*part)
    else:
        for part in zip(w.values.split(blocks * BLOCK), w.scale.split(blocks * BLOCK), strict=True):
            yield type(w)(*part)


def kernel(x: Float[Tensor, "*b i"], w: Quantized) -> Float[Tensor, "*b o"]:
    """`multiply` by PyTorch's kernels for CPUs, which have no derivative; they sum in float32."""
    rows = rearrange(x, "... i -> (...) i").contiguous()
    if isinstance(w, Int8):
        out = torch.ops.aten._weight_int8pack_mm(rows, w.values, w.scale)
    else:
        inputs = w.values.shape[1]
        packed = w.values.view(-1, inputs // 2)  # the same bytes, under the shape that the kernel asks for
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, inputs // len(w.scale), w.scale)
    return out.view(*x.shape[:-1], -1)


def kernel_serves(x: Tensor, w: Quantized) -> bool:
    """Whether `kernel` may be used: where it exists, for these dtypes and sizes, and when nothing is differentiated."""
    if isinstance(w, Float8):  # PyTorch has no such kernel for CPUs
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or w.scale.requires_grad):
        return False
    here = x.device.type == "cpu" and x.dtype == w.scale.dtype != torch.float64 and w.values.is_contiguous()
    # the int8 kernel reads 16 numbers at once, also beyond the end of a row (PyTorch 2.13, bf16: a segmentation fault)
    return here and (BLOCKED and w.blocked if isinstance(w, Int4) else x.shape[-1] % 16 == 0)


def _blocked() -> bool:
    """Whether PyTorch packs int4 for this CPU as `Int4` does."""
    levels = torch.arange(BLOCK * 32, dtype=torch.int32, device="cpu").view(BLOCK, 32) % 15
    first, second = rearrange(levels.to(torch.uint8), "(half d) i -> half i d", half=2)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    return torch.equal(packed.flatten(), (first | second << 4).flatten())


BLOCKED = _blocked()
