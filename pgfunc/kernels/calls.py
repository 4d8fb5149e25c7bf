"""A function for each kernel: it checks the tensors, allocates the result, and launches the kernel.

`reference` has the same functions as formulas. Here everything is float32 until the result is cast, while the formulas
also round the intermediate results. The functions have no derivative, and read no value on the host, so that a CUDA
graph can capture them. Matrices are bf16, f16, f32 or quantized, with dense rows. The device code is in `device` and
`device_attention`, and needs Triton, which the first call imports.

Axes: d width, o outputs, i inputs, f hidden, v vocabulary, n heads, k kv heads, b batch, t tokens, s slots, h head dim,
p positions, c counters.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pgfunc.errors import SettingError
from pgfunc.kernels import tuning
from pgfunc.kernels.launch import check_dense, code, early, shared_memory
from pgfunc.kernels.tuning import Tile, power, warps
from pgfunc.quant.lowbit import Int4, Quantized

Matrix = Float[Tensor, "_o _i"] | Quantized


class KernelMatrix(NamedTuple):
    """A matrix as the kernels read it: its rows and their scales. The scales of a plain matrix are not read."""

    tensors: tuple[Tensor, Tensor]
    inputs: int
    bits: int
    group: int = 0  # how many inputs share a scale, in 4 bits

    @classmethod
    def of(cls, w: Matrix) -> "KernelMatrix":
        if isinstance(w, Tensor):
            return cls((w, w), w.shape[1], 16)
        if not isinstance(w, Int4):
            return cls((w.values, w.scale.contiguous()), w.values.shape[1], 8)
        if w.blocked:
            raise SettingError("kernels for GPUs read 4 bits in rows: see lowbit.to_device_layout")
        return cls((w.values, w.scale.flatten(1).contiguous()), w.inputs, 4, w.group)

    @property
    def outputs(self) -> int:
        return len(self.tensors[0])

    @property
    def strides(self) -> tuple[int, int]:
        """From one row to the next, and from the scales of one row to those of the next."""
        return self.tensors[0].stride(0), self.tensors[1].stride(0)

    def sizes(self, tile: Tile) -> dict[str, int]:
        """The constants that a kernel is compiled for."""
        apart = tile.apart or self.bits == 4  # then a tensor holds one row, 32 weights a lane
        return {
            "D": self.inputs, "BITS": self.bits, "GROUP": self.group,
            "BLOCK": max(min(tile.block, power(self.inputs)), self.group),
            "WIDE": 1 if apart else tile.rows, "COUNT": tile.rows if apart else 1,
        }  # fmt: skip


def launch(kernel: str, w: KernelMatrix) -> Any:
    """The kernel with the programs, warps and constants that this matrix needs; it is called with the rest."""
    tile = tuning.tile(kernel, w.outputs, w.inputs, w.bits)
    programs = -(-w.outputs // tile.rows)
    return partial(getattr(code("device"), kernel)[(programs,)], OUT=w.outputs, num_warps=tile.warps, **w.sizes(tile))


def matvec(x: Float[Tensor, "i"], w: Matrix, residual: Float[Tensor, "o"] | None = None) -> Float[Tensor, "o"]:
    """w · x + residual. The product is not rounded before the residual is added."""
    m = KernelMatrix.of(w)
    check_dense(x, *m.tensors)
    out = x.new_empty(m.outputs)
    addend, add = (x, False) if residual is None else (residual, True)
    launch("matvec", m)(x, *m.tensors, addend, out, *m.strides, ADD=add, **early(x))
    return out


def norm_matvec(
    x: Float[Tensor, "d"], scale: Float[Tensor, "d"], w: Matrix, eps: float, just_written: bool = False
) -> Float[Tensor, "o"]:
    """w · rms_norm(x). Does not prefetch w if it was `just_written`, by the kernel before."""
    m = KernelMatrix.of(w)
    check_dense(x, scale, *m.tensors)
    out = x.new_empty(m.outputs)
    start = {"EARLY": False} if just_written else early(x)
    launch("norm_matvec", m)(x, scale, *m.tensors, out, *m.strides, eps, **start)
    return out


def add_norm(
    x: Float[Tensor, "d"], residual: Float[Tensor, "d"], scale: Float[Tensor, "d"], eps: float
) -> Float[Tensor, "d"]:
    """residual + rms_norm(x)."""
    check_dense(x, residual, scale)
    out, size = torch.empty_like(x), power(len(x))
    code("device").add_norm[(1,)](x, residual, scale, out, eps, D=len(x), BLOCK=size, num_warps=warps(size), **early(x))
    return out


def angles(positions: Int[Tensor, "p"], dim: int, theta: float) -> Float[Tensor, "p half"]:
    """The angle of each plane at each position, rounded once to float32."""
    positions, half = positions.contiguous(), dim // 2
    out = torch.empty(len(positions), half, dtype=torch.float32, device=positions.device)
    code("device").angles[(len(positions),)](
        positions, out, LOG_THETA=math.log2(theta), HALF=half, BLOCK=power(half), num_warps=1, **early(positions)
    )
    return out


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
    arrivals: Int[Tensor, "c"] | None = None,
) -> Float[Tensor, "n h"]:
    """The heads of q, of rms_norm(x); k and v are written into slot `length` of the buffers, if they have that slot.

    Each plane of q and k is rotated by its angle. The counters for `decode_attention` are set to 0 here.
    """
    h, matrices = 2 * angles.shape[-1], [*map(KernelMatrix.of, (q, k, v))]
    tensors, first = [x for m in matrices for x in m.tensors], matrices[0]
    check_dense(x, scale, angles, k_buffer, v_buffer, *tensors)
    heads, kv_heads = (m.outputs // h for m in matrices[:2])
    out, tile = x.new_empty(heads, h), tuning.tile("norm_qkv_rope", first.outputs, len(x), first.bits)
    tile = tile._replace(rows=min(tile.rows, h // 2 & -(h // 2)))  # of one head: a power of two that divides its planes
    code("device").norm_qkv_rope[((heads + 2 * kv_heads) * h // 2 // tile.rows,)](
        x, scale, *tensors, angles, out, k_buffer, v_buffer, length, length if arrivals is None else arrivals,
        *(m.strides[0] for m in matrices), first.strides[1], *k_buffer.stride()[:2], *v_buffer.stride()[:2],
        len(k_buffer), eps, HEADS=heads, KV=kv_heads, HALF=h // 2, COUNTERS=0 if arrivals is None else len(arrivals),
        **first.sizes(tile), num_warps=tile.warps, **early(x),
    )  # fmt: skip
    return out


def norm_geglu(
    x: Float[Tensor, "d"], scale: Float[Tensor, "d"], gate: Matrix, up: Matrix, eps: float
) -> Float[Tensor, "f"]:
    """gelu(gate · rms_norm(x)) times up · rms_norm(x). The two products are not rounded, as the formula's are."""
    g, u = KernelMatrix.of(gate), KernelMatrix.of(up)
    check_dense(x, scale, *g.tensors, *u.tensors)
    out = x.new_empty(g.outputs)
    launch("norm_geglu", g)(
        x, scale, *g.tensors, *u.tensors, out, g.strides[0], u.strides[0], g.strides[1], eps, **early(x)
    )
    return out


def decode_attention(
    q: Float[Tensor, "n h"],
    k: Float[Tensor, "s k h"],
    v: Float[Tensor, "s k h"],
    length: Int[Tensor, "1"],
    scale: float,
    cap: float = 0.0,
    window: int = 0,
    arrivals: Int[Tensor, "c"] | None = None,
) -> Float[Tensor, "n h"]:
    """Attention of the token in slot `length` of a cache, which holds its key, to that slot and those before it.

        length 3, slots 6  sees  1 1 1 1 . .        window 2 sees  . . 1 1 . .

    0 is no cap, and no window. Slots that are not seen are not read; a program for such slots costs only its launch.
    Weights are rounded to v's dtype before they are divided by their sum; the formula rounds them after.
    `arrivals` are `counters` that are 0, as `norm_qkv_rope` leaves them; by default they are made here.
    """
    q = q.contiguous()
    check_dense(k, v)
    (heads, h), (slots, kv_heads, _), chunk = q.shape, k.shape, tuning.chunk(k.shape[0], k.element_size())
    chunks, group = -(-slots // chunk.keys), heads // kv_heads
    columns = min(chunk.columns, power(h))
    slices = -(-h // columns)
    counts = counters(k).zero_() if arrivals is None else arrivals
    sizes, out = q.new_empty(heads, chunks, dtype=torch.float32), torch.empty_like(q)
    parts = q.new_empty(heads, chunks, h, dtype=torch.float32)
    code("device_attention").decode_attention[(chunks, kv_heads, slices)](
        q, k, v, length, counts, sizes, parts, out, *k.stride()[:2], *v.stride()[:2], slots, window or slots, scale,
        cap, G=group, H=h, CHUNKS=chunks, CAP=cap > 0, CHUNK=chunk.keys, GROUP=power(group), HEAD=power(h),
        COLUMNS=columns, PARTS=chunk.parts, num_warps=chunk.warps, **early(q),
    )  # fmt: skip
    return out


def counters(k: Float[Tensor, "s k h"]) -> Int[Tensor, "c"]:
    """Memory for the counters of `decode_attention`: how many programs of each kv head and 16 columns are done."""
    return torch.empty(power(k.shape[1] * -(-k.shape[2] // 16)), dtype=torch.int32, device=k.device)


def prefill_attention(
    q: Float[Tensor, "b t n h"],
    k: Float[Tensor, "b s k h"],
    v: Float[Tensor, "b s k h"],
    begin: Int[Tensor, "b t"],
    end: Int[Tensor, "b t"],
    scale: float,
    cap: float = 0.0,
) -> Float[Tensor, "b t n h"]:
    """Attention of many tokens, each to the keys from its `begin` to its `end`, exclusive (Dao et al. 2022).

    A query that sees no key gives zeros. Weights are rounded to v's dtype before they are divided by their sum.
    """
    begin, end = begin.contiguous(), end.contiguous()
    check_dense(q, k, v)
    (rows, tokens, heads, h), (slots, kv_heads) = q.shape, k.shape[1:3]
    out, group = q.new_empty(q.shape), heads // kv_heads
    share = tuning.share(rows * kv_heads * tokens * group, power(h) * q.element_size(), shared_memory(q))
    code("device_attention").prefill_attention[(-(-tokens * group // share.queries), rows * kv_heads)](
        q, k, v, begin, end, out, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], tokens, slots, scale, cap,
        HEADS=heads, KV=kv_heads, G=group, H=h, HEAD=power(h), CAP=cap > 0,
        QUERIES=share.queries, KEYS=share.keys, num_warps=share.warps, num_stages=share.stages,
    )  # fmt: skip
    return out


def rope_to_cache(
    q: Float[Tensor, "b t n h"],
    k: Float[Tensor, "b t k h"],
    v: Float[Tensor, "b t k h"],
    angles: Float[Tensor, "b t half"],
    free: int,
) -> tuple[Float[Tensor, "b t n h"], Float[Tensor, "b s k h"], Float[Tensor, "b s k h"]]:
    """q and k, each plane rotated by its angle, and v; `free` slots of zeros follow k and v."""
    angles = angles.contiguous()
    check_dense(q, k, v)
    (rows, tokens, heads, h), kv_heads = q.shape, k.shape[2]
    out, slots = q.new_empty(q.shape), tokens + free
    k_buffer, v_buffer = (x.new_empty(rows, slots, kv_heads, h) for x in (k, v))
    code("device_attention").rope_to_cache[(slots, rows)](
        q, k, v, angles, out, k_buffer, v_buffer, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], tokens, slots,
        HEADS=heads, KV=kv_heads, HALF=h // 2,
        QS=power(heads, 1), KS=power(kv_heads, 1), PLANES=power(h // 2, 1), num_warps=warps(heads * h // 2),
    )  # fmt: skip
    return out, k_buffer, v_buffer
