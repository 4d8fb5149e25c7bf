"""A matrix of weights in 8 or 4 bits: quantize, dequantize, multiply.

`Int8` and `Float8` have a scale for each output. `Int4` has a scale and a zero for each output and group of inputs, and
two levels in a byte. On CPUs and in files a byte holds levels of two outputs, in blocks of 64 outputs, the layout of
PyTorch's kernel for AVX-512:

    byte [n, i, d]  =  level of (output 64 n + d, input i)  |  level of (output 64 n + 32 + d, input i) << 4

On GPUs a byte holds levels of two inputs of a group of h + h, so that a row is contiguous (`to_device_layout`):

    byte [o, g h + j]  =  level of (output o, input 2 g h + j)  |  level of (output o, input 2 g h + h + j) << 4

Scales have 8 significant bits, and the dtype of the original weights. This module knows nothing about models. Axes:
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

from pgfunc import tree
from pgfunc.lowering import transformed
from pgfunc.names import GROUPS

BLOCK = 64


class Int8(NamedTuple):
    """values · scale, in equal steps."""

    values: Int[Tensor, "o i"]  # int8, from -127 to 127
    scale: Float[Tensor, "o"]

    def __repr__(self) -> str:
        return tree.summary(self)


class Float8(NamedTuple):
    """values · scale. Steps grow with the value: it has a mantissa of 3 bits (Micikevicius et al. 2022)."""

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
        """Whether the layout is blocks, for CPUs; otherwise it is rows, for GPUs.

        A stack of matrices has one more axis, so this property is right only inside vmap.
        """
        return self.values.dim() == 3

    @property
    def inputs(self) -> int:
        return self.values.shape[1] * (1 if self.blocked else 2)

    @property
    def group(self) -> int:
        """The number of inputs that share a scale and a zero."""
        return self.inputs // self.scale.shape[0 if self.blocked else 1]


Quantized = Int8 | Float8 | Int4
TYPES: dict[str, type] = {"int8": Int8, "fp8": Float8} | {name: Int4 for name, size in GROUPS.items() if size}
LARGEST = {Int8: 127, Float8: 448}  # the largest value that is stored


def method(w: Quantized) -> str:
    """The method, a name in `GROUPS`, by which a matrix was quantized."""
    group = w.group if isinstance(w, Int4) else 0
    return next(name for name, size in GROUPS.items() if size == group and TYPES[name] is type(w))


def kind(w: Tensor | Quantized) -> str:
    """The method of a matrix; "" if it is plain."""
    return "" if isinstance(w, Tensor) else method(w)


def quantize(w: Float[Tensor, "o i"], method: str) -> Quantized:
    """The matrix rounded to the nearest levels: no weight moves by more than half a step, before the final cast.

    A step is the scale; for fp8 it is 1/8 to 1/16 of the level, and at least 2^-9 of the scale. int4 needs outputs in
    multiples of 64 and inputs in multiples of its group, and has the layout of the device. Rows or groups of zeros stay
    zeros; with int4 so does a group of one repeated number that bfloat16 can represent. In float16 a scale is at least
    6e-5. Weights that are not finite get a scale that is not finite.
    """
    group, matrix_type = GROUPS[method], TYPES[method]
    # in float64 the levels are exact; a few rows at a time need little memory
    parts = [
        _int4(rows.double(), group, w.dtype) if group else _eight(rows.double(), w.dtype, matrix_type)
        for rows in w.split(len(w) if w.is_meta else 1024)
    ]
    values, scales = map(torch.cat, zip(*parts, strict=True))
    if not group:
        return matrix_type(values, scales)
    return in_rows(values, scales) if w.is_cuda else in_blocks(values, scales)


def _eight(rows: Tensor, dtype: torch.dtype, matrix_type: type) -> tuple[Shaped[Tensor, "o i"], Float[Tensor, "o"]]:
    largest = LARGEST[matrix_type]
    scale = _scale(rows.abs().amax(-1) / largest, dtype)
    levels = rows / rearrange(scale, "o -> o 1")
    if matrix_type is Int8:
        return levels.round().to(torch.int8), scale
    # rounded here, so that the conversion is exact: PyTorch's rounds to float32 first. Below 2^-6 the steps are equal
    step = torch.exp2((torch.frexp(levels).exponent.double() - 1).clamp(min=-6) - 3)
    return ((levels / step).round() * step).clamp(-largest, largest).to(torch.float8_e4m3fn), scale


def _int4(rows: Tensor, group: int, dtype: torch.dtype) -> tuple[UInt[Tensor, "o i"], Float[Tensor, "o g z"]]:
    rows = rearrange(rows, "o (g i) -> o g i", i=group)
    low, high = rows.amin(-1), rows.amax(-1)
    zero = _coarse((8 * high + 7 * low) / 15, dtype).double()
    # computed from the rounded zero, so that the levels still reach both ends
    scale = _scale(torch.maximum((high - zero) / 7, (zero - low) / 8), dtype)
    levels = (rows - rearrange(zero, "o g -> o g 1")) / rearrange(scale, "o g -> o g 1")
    levels = levels.round().clamp(-8, 7).add(8).to(torch.uint8)
    return rearrange(levels, "o g i -> o (g i)"), torch.stack([scale, zero.to(dtype)], -1)


def in_blocks(levels: UInt[Tensor, "o i"], scale: Float[Tensor, "o g z"]) -> Int4:
    """The matrix with these levels, in the layout for CPUs."""
    first, second = rearrange(levels, "(n half d) i -> half n i d", half=2, d=BLOCK // 2)
    return Int4((first | second << 4).contiguous(), rearrange(scale, "o g z -> g o z").contiguous())


def in_rows(levels: UInt[Tensor, "o i"], scale: Float[Tensor, "o g z"]) -> Int4:
    """The matrix with these levels, in the layout for GPUs."""
    first, second = rearrange(levels, "o (g half j) -> half o (g j)", half=2, g=scale.shape[1])
    return Int4((first | second << 4).contiguous(), scale.contiguous())


def to_device_layout(w: Int4, device: torch.device) -> Int4:
    """The matrix on a device, in its fastest layout. In the other layout, each product dequantizes the matrix first."""
    return ordered(Int4(w.values.to(device), w.scale.to(device)), rows=device.type == "cuda")


def ordered(w: Int4, rows: bool) -> Int4:
    """The matrix in rows, or else in blocks."""
    if w.blocked != rows:
        return w
    return in_rows(levels(w), rearrange(w.scale, "g o z -> o g z")) if rows else in_blocks(levels(w), w.scale)


def levels(w: Int4) -> UInt[Tensor, "o i"]:
    """The levels, from 0 to 15."""
    halves = torch.stack([w.values & 15, w.values >> 4])
    if w.blocked:
        return rearrange(halves, "half n i d -> (n half d) i")
    return rearrange(halves, "half o (g j) -> o (g half j)", g=w.scale.shape[1])


def _scale(step: Tensor, dtype: torch.dtype) -> Tensor:
    # not 0 and not subnormal, which has fewer bits: otherwise the bound of half a step would not hold
    return _coarse(step, dtype).clamp(min=max(torch.finfo(dtype).tiny, torch.finfo(torch.bfloat16).tiny))


def _coarse(x: Tensor, dtype: torch.dtype) -> Tensor:
    # 8 significant bits: level times scale is exact in float32, and bf16 holds the scales of a float32 tree
    return x.bfloat16().to(dtype)


def dequantize(w: Quantized) -> Float[Tensor, "*o i"]:
    """The weights that a matrix represents, in the dtype of its scales. 8-bit matrices may have leading axes."""
    if not isinstance(w, Int4):
        return w.values.to(w.scale.dtype) * rearrange(w.scale, "... -> ... 1")
    scale, zero = rearrange(w.scale, "g o z -> z o g 1" if w.blocked else "o g z -> z o g 1")
    groups = rearrange(levels(w).to(torch.int8) - 8, "o (g i) -> o g i", i=w.group).to(scale.dtype)
    return rearrange(torch.addcmul(zero, groups, scale), "o g i -> o (g i)")


def finite(w: Quantized) -> bool:
    """Whether every weight that the scales can represent is finite in their dtype."""
    if not isinstance(w, Int4):
        return bool((w.scale * LARGEST[type(w)]).isfinite().all())
    scale, zero = w.scale.unbind(-1)
    return bool(((zero - 8 * scale).isfinite() & (zero + 7 * scale).isfinite()).all())


def multiply(x: Float[Tensor, "*b i"], w: Quantized) -> Float[Tensor, "*b o"]:
    """x @ dequantize(w).T, by the fastest method for the number of rows."""
    rows = prod(x.shape[:-1])
    # with more rows it is faster to dequantize first (2 cores with AVX-512 and AMX, bf16)
    if 0 < rows <= (16 if isinstance(w, Int8) else 128) and cpu_kernel_applies(x, w):
        return cpu_kernel(x, w)
    if not torch.compiler.is_compiling():
        return torch.cat([F.linear(x, dequantize(piece)) for piece in pieces(w)], -1)
    return one_row(x, dequantize(w)) if rows == 1 else F.linear(x, dequantize(w))


def one_row(x: Float[Tensor, "*b i"], w: Float[Tensor, "o i"]) -> Float[Tensor, "*b o"]:
    """x @ w.T for a single row x: inductor compiles it to one loop, which also dequantizes w.

    A long x is split into parts, which is 15% faster (16,384 inputs in bf16, an EPYC).
    """
    x = x.as_strided(x.shape, x.stride())  # otherwise inductor may compute x anew, with its norm, for each output
    wide, inputs = torch.promote_types(x.dtype, torch.float32), w.shape[-1]
    size = gcd(inputs, 2048) if inputs > 4096 else inputs
    w, x = rearrange(w, "o (c i) -> o c i", i=size), rearrange(x, "... (c i) -> ... 1 c i", i=size)
    return (w.to(wide) * x.to(wide)).sum(-1).sum(-1).to(x.dtype)


def pieces(w: Quantized) -> Iterator[Quantized]:
    """The matrix in parts along its outputs: a dequantized part fits a CPU's cache, or needs little memory on a GPU."""
    size = 2**21 if w.scale.device.type == "cpu" else 2**27
    inputs = w.inputs if isinstance(w, Int4) else w.values.shape[-1]
    blocks = max(1, size // (inputs * BLOCK))
    if isinstance(w, Int4) and w.blocked:
        for part in zip(w.values.split(blocks), w.scale.split(blocks * BLOCK, 1), strict=True):
            yield Int4(*part)
    else:
        for part in zip(w.values.split(blocks * BLOCK), w.scale.split(blocks * BLOCK), strict=True):
            yield type(w)(*part)


def cpu_kernel(x: Float[Tensor, "*b i"], w: Quantized) -> Float[Tensor, "*b o"]:
    """`multiply` by PyTorch's kernels for CPUs, which have no derivative and sum in float32."""
    rows = rearrange(x, "... i -> (...) i").contiguous()
    if isinstance(w, Int8):
        out = torch.ops.aten._weight_int8pack_mm(rows, w.values, w.scale)
    else:
        inputs = w.values.shape[1]
        packed = w.values.view(-1, inputs // 2)  # the same bytes, in the shape that the kernel expects
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, inputs // len(w.scale), w.scale)
    return out.view(*x.shape[:-1], -1)


def cpu_kernel_applies(x: Tensor, w: Quantized) -> bool:
    """Whether `cpu_kernel` supports this device, these dtypes and sizes, and no derivative is needed."""
    if isinstance(w, Float8):  # PyTorch has no such kernel for CPUs
        return False
    if transformed():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or w.scale.requires_grad):
        return False
    supported = x.device.type == "cpu" and x.dtype == w.scale.dtype != torch.float64 and w.values.is_contiguous()
    # the int8 kernel reads 16 numbers at once, even beyond the end of a row (PyTorch 2.13, bf16: a segmentation fault)
    return supported and (BLOCKED and w.blocked if isinstance(w, Int4) else x.shape[-1] % 16 == 0)


def _blocked() -> bool:
    """Whether PyTorch's layout of int4 on this CPU is the layout of `Int4`."""
    levels = torch.arange(BLOCK * 32, dtype=torch.int32, device="cpu").view(BLOCK, 32) % 15
    first, second = rearrange(levels.to(torch.uint8), "(half d) i -> half i d", half=2)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    return torch.equal(packed.flatten(), (first | second << 4).flatten())


# once, on import: it depends on this CPU and on this PyTorch, whose operator is private, so the layout is not assumed
BLOCKED = _blocked()
