"""A function for each kernel: it checks the tensors, allocates the result, and launches the kernel.

`reference` has each function as a formula, and says where kernels and formulas round. The functions have no derivative,
and read no value on the host, so that a CUDA graph can capture them. Matrices are bf16, f16, f32 or quantized, with
dense rows. The device code is in `device` and `device_attention`, and needs Triton, which the first call imports.

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
from pgfunc.kernels.launch import check_dense, early_launch, shared_memory, triton_module
from pgfunc.kernels.tuning import Tile, next_power_of_two, warps
from pgfunc.quant.lowbit import Int4, Quantized

Matrix = Float[Tensor, "_o _i"] | Quantized


class KernelMatrix(NamedTuple):
    """A matrix as the kernels read it: its rows and their scales. The scales of a plain matrix are not read."""

    tensors: tuple[Tensor, Tensor]
    inputs: int
    bits: int  # 16: a plain matrix, also in float32
    group: int = 0  # how many inputs share a scale in 4 bits

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
        """The distance from one row to the next, and from the scales of one row to those of the next, in elements."""
        return self.tensors[0].stride(0), self.tensors[1].stride(0)

    def sizes(self, tile: Tile) -> dict[str, int]:
        """The constants that a kernel is compiled for."""
        # then a tensor holds one row; in 4 bits, each lane reads 32 of its weights
        apart = tile.apart or self.bits == 4
        return {
            "D": self.inputs, "BITS": self.bits, "GROUP": self.group,
            "BLOCK": max(min(tile.block, next_power_of_two(self.inputs)), self.group),
            "WIDE": 1 if apart else tile.rows, "COUNT": tile.rows if apart else 1,
        }  # fmt: skip


def launch(kernel: str, w: KernelMatrix) -> Any:
    """The kernel with the programs, warps and constants that this matrix needs. Call it with the other arguments."""
    tile = tuning.tile(kernel, w.inputs, w.bits)
    programs = -(-w.outputs // tile.rows)
    grid_kernel = getattr(triton_module("device"), kernel)[(programs,)]
    return partial(grid_kernel, OUT=w.outputs, num_warps=tile.warps, **w.sizes(tile))


def matvec(x: Float[Tensor, "i"], w: Matrix, residual: Float[Tensor, "o"] | None = None) -> Float[Tensor, "o"]:
    """w · x + residual. The product is not rounded before the residual is added."""
    m = KernelMatrix.of(w)
    check_dense(x, *m.tensors)
    out = x.new_empty(m.outputs)
    addend, add = (x, False) if residual is None else (residual, True)
    launch("matvec", m)(x, *m.tensors, addend, out, *m.strides, ADD=add, **early_launch(x))
    return out


def norm_matvec(
    x: Float[Tensor, "d"], scale: Float[Tensor, "d"], w: Matrix, eps: float, just_written: bool = False
) -> Float[Tensor, "o"]:
    """w · rms_norm(x). w is not prefetched if the kernel before has `just_written` it."""
    m = KernelMatrix.of(w)
    check_dense(x, scale, *m.tensors)
    out = x.new_empty(m.outputs)
    start = {"EARLY": False} if just_written else early_launch(x)
    launch("norm_matvec", m)(x, scale, *m.tensors, out, *m.strides, eps, **start)
    return out


def add_norm(
    x: Float[Tensor, "d"], residual: Float[Tensor, "d"], scale: Float[Tensor, "d"], eps: float
) -> Float[Tensor, "d"]:
    """residual + rms_norm(x)."""
    check_dense(x, residual, scale)
    out, size = torch.empty_like(x), next_power_of_two(len(x))
    triton_module("device").add_norm[(1,)](
        x, residual, scale, out, eps, D=len(x), BLOCK=size, num_warps=warps(size), **early_launch(x)
    )
    return out


def angles(positions: Int[Tensor, "p"], dim: int, theta: float) -> Float[Tensor, "p half"]:
    """The angle of each plane at each position, rounded once to float32."""
    positions, half = positions.contiguous(), dim // 2
    out = torch.empty(len(positions), half, dtype=torch.float32, device=positions.device)
    triton_module("device").angles[(len(positions),)](
        positions, out, LOG_THETA=math.log2(theta), HALF=half, BLOCK=next_power_of_two(half), num_warps=1,
        **early_launch(positions),
    )  # fmt: skip
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
    """Returns the query heads, computed from rms_norm(x). k and v are written into slot `length`, if there is one.

    Each plane of q and k is rotated by its angle. `arrivals`, the counters of `decode_attention`, are set to 0.
    """
    h, matrices = 2 * angles.shape[-1], [*map(KernelMatrix.of, (q, k, v))]
    tensors, first = [x for m in matrices for x in m.tensors], matrices[0]
    check_dense(x, scale, angles, k_buffer, v_buffer, *tensors)
    heads, kv_heads = (m.outputs // h for m in matrices[:2])
    out, tile = x.new_empty(heads, h), tuning.tile("norm_qkv_rope", len(x), first.bits)
    tile = tile._replace(rows=min(tile.rows, h // 2 & -(h // 2)))  # in one head: a power of two that divides its planes
    triton_module("device").norm_qkv_rope[((heads + 2 * kv_heads) * h // 2 // tile.rows,)](
        x, scale, *tensors, angles, out, k_buffer, v_buffer, length, length if arrivals is None else arrivals,
        *(m.strides[0] for m in matrices), first.strides[1], *k_buffer.stride()[:2], *v_buffer.stride()[:2],
        len(k_buffer), eps, HEADS=heads, KV=kv_heads, HALF=h // 2, COUNTERS=0 if arrivals is None else len(arrivals),
        **first.sizes(tile), num_warps=tile.warps, **early_launch(x),
    )  # fmt: skip
    return out


def norm_geglu(
    x: Float[Tensor, "d"], scale: Float[Tensor, "d"], gate: Matrix, up: Matrix, eps: float
) -> Float[Tensor, "f"]:
    """gelu(gate · rms_norm(x)) · (up · rms_norm(x)). The formula rounds the two products; the kernel does not."""
    g, u = KernelMatrix.of(gate), KernelMatrix.of(up)
    check_dense(x, scale, *g.tensors, *u.tensors)
    out = x.new_empty(g.outputs)
    launch("norm_geglu", g)(
        x, scale, *g.tensors, *u.tensors, out, g.strides[0], u.strides[0], g.strides[1], eps, **early_launch(x)
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
    """Attention of the token in slot `length` of a cache to that slot, where its key and value are, and all before it.

        length 3, slots 6  sees  1 1 1 1 . .        window 2 sees  . . 1 1 . .

    A cap or window of 0 means none. Slots that are not seen are not read; a program for such slots costs only its
    launch. Weights are rounded to v's dtype before they are divided by their sum; the formula rounds them after.
    `arrivals` are `counters` that are 0, as `norm_qkv_rope` leaves them; by default they are allocated here.
    """
    q = q.contiguous()
    check_dense(k, v)
    (heads, h), (slots, kv_heads, _), chunk = q.shape, k.shape, tuning.chunk(k.shape[0], k.element_size())
    chunks, group = -(-slots // chunk.keys), heads // kv_heads
    columns = min(chunk.columns, next_power_of_two(h))
    slices = -(-h // columns)
    counts = counters(k).zero_() if arrivals is None else arrivals
    sizes, out = q.new_empty(heads, chunks, dtype=torch.float32), torch.empty_like(q)
    parts = q.new_empty(heads, chunks, h, dtype=torch.float32)
    triton_module("device_attention").decode_attention[(chunks, kv_heads, slices)](
        q, k, v, length, counts, sizes, parts, out, *k.stride()[:2], *v.stride()[:2], slots, window or slots, scale,
        cap, G=group, H=h, CHUNKS=chunks, CAP=cap > 0, CHUNK=chunk.keys, GROUP=next_power_of_two(group),
        HEAD=next_power_of_two(h), COLUMNS=columns, PARTS=chunk.parts, num_warps=chunk.warps, **early_launch(q),
    )  # fmt: skip
    return out


def counters(k: Float[Tensor, "s k h"]) -> Int[Tensor, "c"]:
    """Memory for the counters of finished programs in `decode_attention`.

    The size is an upper bound: one counter for each kv head and each 16 value columns.
    """
    return torch.empty(next_power_of_two(k.shape[1] * -(-k.shape[2] // 16)), dtype=torch.int32, device=k.device)


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
    share = tuning.share(rows * kv_heads * tokens * group, next_power_of_two(h) * q.element_size(), shared_memory(q))
    triton_module("device_attention").prefill_attention[(-(-tokens * group // share.queries), rows * kv_heads)](
        q, k, v, begin, end, out, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], tokens, slots, scale, cap,
        HEADS=heads, KV=kv_heads, G=group, H=h, HEAD=next_power_of_two(h), CAP=cap > 0,
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
    """Returns q and k, each plane rotated by its angle, and v. `free` slots of zeros follow the tokens of k and v."""
    angles = angles.contiguous()
    check_dense(q, k, v)
    (rows, tokens, heads, h), kv_heads = q.shape, k.shape[2]
    out, slots = q.new_empty(q.shape), tokens + free
    k_buffer, v_buffer = (x.new_empty(rows, slots, kv_heads, h) for x in (k, v))
    triton_module("device_attention").rope_to_cache[(slots, rows)](
        q, k, v, angles, out, k_buffer, v_buffer, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], tokens, slots,
        HEADS=heads, KV=kv_heads, HALF=h // 2,
        QS=next_power_of_two(heads, 1), KS=next_power_of_two(kv_heads, 1), PLANES=next_power_of_two(h // 2, 1),
        num_warps=warps(heads * h // 2),
    )  # fmt: skip
    return out, k_buffer, v_buffer
