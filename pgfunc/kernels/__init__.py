"""Decoding one row on a GPU: the products, norms and attention of a single token, in as few kernels as they take.

And the attention of a whole prompt, without a mask in memory. Each function is what its eager twin is, `<name>_eager`,
a composition of `ops`, but that all is float32 until the result is cast, where the twin also rounds what lies between.
They have no derivative, and a CUDA graph can capture them: none looks at a value on the host. Matrices are bf16, f16,
f32 or quantized, with dense rows. Owns how the work is cut (`TILES`, `CHUNKS`, `SHARES`). The code of the kernels is in
`device` and `device_attention`, and needs Triton, which a call imports.

`block` puts them together, as operators for torch.compile; the model calls it where it `serves`.

Axes: d width, o outputs, i inputs, f hidden, v vocabulary, n heads, k kv heads, s slots, h head dim.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pgfunc import ops
from pgfunc.cache import pad
from pgfunc.errors import SettingError
from pgfunc.kernels.launch import code, dense, early, shared_memory
from pgfunc.quant.lowbit import Int4, Quantized


class Tile(NamedTuple):
    """What a program does at once: so many rows, so many columns of each, by so many warps.

    Rows are an axis of one tensor, which the warps share out, or `apart`, in tensors of their own: then what is made of
    x serves all, which pays off where weights take arithmetic. A warp reads 16 bytes a lane, 256 columns of bf16, 512
    of int8 and fp8, which share a tile, 1024 of int4: at least so many columns a warp, or its lanes read less. Nothing
    is staged: the walk over the columns is unrolled, and loads of several blocks are under way together.
    """

    rows: int
    block: int
    warps: int
    apart: bool = False


class Chunk(NamedTuple):
    """How attention is shared out: to a program so many keys and so many columns of their values, by so many warps.

    The last to finish of those with the same columns joins them, so many `parts` at a time.
    """

    keys: int
    columns: int
    warps: int
    parts: int


class Share(NamedTuple):
    """What a program of many tokens does: so many queries, over so many keys at a time, by so many warps, with the keys
    and values of some stages under way."""

    queries: int
    keys: int
    warps: int
    stages: int


# for each kernel, and the same on fewer bits, by the least outputs and the least inputs: the first that fits (H100)
TILES: dict[str, tuple[tuple[int, int, Tile], ...]] = {
    "matvec": ((0, 8192, Tile(1, 1024, 4)), (0, 0, Tile(2, 1024, 1))),
    "normed_matvec": ((0, 0, Tile(2, 2048, 4)),),
    "rotated_qkv": ((0, 2049, Tile(2, 1024, 1)), (0, 0, Tile(1, 1024, 1))),
    "geglu_matvec": ((0, 2049, Tile(2, 2048, 4)), (0, 0, Tile(2, 1024, 2))),
    "int8 matvec": ((0, 8192, Tile(2, 1024, 2, True)), (0, 0, Tile(2, 2048, 4, True))),
    "int8 normed_matvec": ((0, 0, Tile(4, 1024, 2, True)),),
    "int8 rotated_qkv": ((0, 0, Tile(1, 2048, 1, True)),),
    "int8 geglu_matvec": ((0, 0, Tile(2, 2048, 2, True)),),
    "int4 matvec": ((0, 0, Tile(2, 2048, 2, True)),),
    "int4 normed_matvec": ((0, 0, Tile(4, 1024, 1, True)),),
    "int4 rotated_qkv": ((0, 0, Tile(1, 2048, 1, True)),),
    "int4 geglu_matvec": ((0, 0, Tile(2, 2048, 1, True)),),
}
# by the least number of slots
CHUNKS: tuple[tuple[int, Chunk], ...] = ((768, Chunk(64, 64, 4, 16)), (0, Chunk(32, 64, 4, 16)))
# of many tokens, by the least number of queries in all
SHARES: tuple[tuple[int, Share], ...] = (
    (65536, Share(64, 32, 4, 2)), (8192, Share(128, 64, 8, 2)), (8192, Share(64, 32, 4, 2)),
    (0, Share(32, 64, 4, 3)), (0, Share(32, 32, 4, 2)), (0, Share(16, 16, 4, 1)),
)  # fmt: skip


def tile(kernel: str, outputs: int, inputs: int, bits: int = 16) -> Tile:
    """The tile of a kernel for a matrix of numbers of so many bits. A benchmark puts another function here."""
    kind = f"int{bits} " if bits < 16 else ""
    return next(tile for o, i, tile in TILES[kind + kernel] if outputs >= o and inputs >= i)


def chunk(slots: int, size: int) -> Chunk:
    """The share of the keys for a cache of so many slots, of numbers of `size` bytes. A benchmark puts another here."""
    found = next(chunk for least, chunk in CHUNKS if slots >= least)
    return found._replace(keys=max(16, found.keys * 2 // size))  # float32 takes twice the shared memory


def share(queries: int, row: int, room: float) -> Share:
    """The first share for so many queries that has room in shared memory, in bytes; a key has `row` of them."""
    fitting = (each for least, each in SHARES if queries >= least)
    return next((each for each in fitting if (each.queries + 2 * each.stages * each.keys) * row <= room), SHARES[-1][1])


def power(size: int, least: int = 16) -> int:
    """The smallest power of two that is not less; 16 is the least that a tensor core multiplies."""
    return max(least, 1 << (size - 1).bit_length())


def warps(size: int) -> int:
    """So many warps that each lane has 8 of the elements, at most 16."""
    return min(16, max(1, size // 256))


# --- the functions, each beside its eager twin ------------------------------------------------------------------------

Matrix = Float[Tensor, "o i"] | Quantized


def matvec(x: Float[Tensor, "i"], w: Matrix, residual: Float[Tensor, "o"] | None = None) -> Float[Tensor, "o"]:
    """w · x, and the residual: the product is not rounded before it is added."""
    kept = Kept.of(w)
    dense(x, *kept.tensors)
    out = x.new_empty(kept.outputs)
    given, add = (x, False) if residual is None else (residual, True)
    launch("matvec", kept)(x, *kept.tensors, given, out, *kept.strides, ADD=add, **early(x))
    return out


def matvec_eager(x: Float[Tensor, "i"], w: Matrix, residual: Float[Tensor, "o"] | None = None) -> Float[Tensor, "o"]:
    return ops.linear(x, w) if residual is None else residual + ops.linear(x, w)


def normed_matvec(
    x: Float[Tensor, "d"], scale: Float[Tensor, "d"], w: Matrix, eps: float, made: bool = False
) -> Float[Tensor, "o"]:
    """w · rms_norm(x). Of a w that was `made` just before nothing is asked for early."""
    kept = Kept.of(w)
    dense(x, scale, *kept.tensors)
    out = x.new_empty(kept.outputs)
    when = {"EARLY": False} if made else early(x)
    launch("normed_matvec", kept)(x, scale, *kept.tensors, out, *kept.strides, eps, **when)
    return out


def normed_matvec_eager(x: Float[Tensor, "d"], scale: Float[Tensor, "d"], w: Matrix, eps: float) -> Float[Tensor, "o"]:
    return ops.linear(ops.rms_norm(x, scale, eps), w)


def add_normed(
    x: Float[Tensor, "d"], residual: Float[Tensor, "d"], scale: Float[Tensor, "d"], eps: float
) -> Float[Tensor, "d"]:
    """residual + rms_norm(x)."""
    dense(x, residual, scale)
    out, size = torch.empty_like(x), power(len(x))
    code("device").add_normed[(1,)](
        x, residual, scale, out, eps, D=len(x), BLOCK=size, num_warps=warps(size), **early(x)
    )
    return out


def add_normed_eager(
    x: Float[Tensor, "d"], residual: Float[Tensor, "d"], scale: Float[Tensor, "d"], eps: float
) -> Float[Tensor, "d"]:
    return residual + ops.rms_norm(x, scale, eps)


def angles(positions: Int[Tensor, "p"], dim: int, theta: float) -> Float[Tensor, "p half"]:
    """The angle of each plane at each position, rounded once to float32."""
    places, half = positions.contiguous(), dim // 2
    out = torch.empty(len(places), half, dtype=torch.float32, device=places.device)
    code("device").angles[(len(places),)](
        places, out, LOG_THETA=math.log2(theta), HALF=half, BLOCK=power(half), num_warps=1, **early(places)
    )
    return out


def angles_eager(positions: Int[Tensor, "p"], dim: int, theta: float) -> Float[Tensor, "p half"]:
    return ops.angles(positions, dim, theta)


def rotated_qkv(
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
    """q of rms_norm(x), a row a head; its k and v are written into slot `length` of the buffers, if they have it.

    Each plane of q and k is turned by its angle. The counters that `attend_one` needs are set to 0 here.
    """
    h, all_kept = 2 * angles.shape[-1], [*map(Kept.of, (q, k, v))]
    dense(x, scale, angles, k_buffer, v_buffer, *(part for kept in all_kept for part in kept.tensors))
    heads, kv_heads = (kept.outputs // h for kept in all_kept[:2])
    out, cut = x.new_empty(heads, h), tile("rotated_qkv", all_kept[0].outputs, len(x), all_kept[0].bits)
    cut = cut._replace(rows=min(cut.rows, h // 2 & -(h // 2)))  # of one head: a power of two that divides its planes
    code("device").rotated_qkv[((heads + 2 * kv_heads) * h // 2 // cut.rows,)](
        x, scale, *(part for kept in all_kept for part in kept.tensors), angles, out, k_buffer, v_buffer, length,
        length if arrivals is None else arrivals, *(kept.strides[0] for kept in all_kept), all_kept[0].strides[1],
        *k_buffer.stride()[:2], *v_buffer.stride()[:2], len(k_buffer), eps,
        HEADS=heads, KV=kv_heads, HALF=h // 2, COUNTERS=0 if arrivals is None else len(arrivals),
        **all_kept[0].sizes(cut), num_warps=cut.warps, **early(x),
    )  # fmt: skip
    return out


def rotated_qkv_eager(
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
    normed = ops.rms_norm(x, scale, eps)
    query, key, value = (ops.linear(normed, w).unflatten(0, (1, 1, -1, 2 * angles.shape[-1])) for w in (q, k, v))
    k_buffer[length], v_buffer[length] = ops.rotate(key, angles)[0], value[0]
    return ops.rotate(query, angles)[0, 0]


def geglu_matvec(
    x: Float[Tensor, "d"], scale: Float[Tensor, "d"], gate: Matrix, up: Matrix, eps: float
) -> Float[Tensor, "f"]:
    """gelu(gate · rms_norm(x)) times up · rms_norm(x). Neither product is rounded before, as the twin's are."""
    g, u = Kept.of(gate), Kept.of(up)
    dense(x, scale, *g.tensors, *u.tensors)
    out = x.new_empty(g.outputs)
    launch("geglu_matvec", g)(
        x, scale, *g.tensors, *u.tensors, out, g.strides[0], u.strides[0], g.strides[1], eps, **early(x)
    )
    return out


def geglu_matvec_eager(
    x: Float[Tensor, "d"], scale: Float[Tensor, "d"], gate: Matrix, up: Matrix, eps: float
) -> Float[Tensor, "f"]:
    normed = ops.rms_norm(x, scale, eps)
    return ops.gelu(ops.linear(normed, gate)) * ops.linear(normed, up)


def attend_one(
    q: Float[Tensor, "n h"],
    k: Float[Tensor, "s k h"],
    v: Float[Tensor, "s k h"],
    length: Int[Tensor, "1"],
    scale: float,
    cap: float = 0.0,
    window: int = 0,
    arrivals: Int[Tensor, "c"] | None = None,
) -> Float[Tensor, "n h"]:
    """Attention of the token in slot `length` of a cache, where its own key is, to that slot and those before it.

        length 3, slots 6  sees  1 1 1 1 . .        window 2 sees  . . 1 1 . .

    A cap or window of 0 is none. What lies in slots that are not seen is not read, and of a program that finds nothing
    else to do, the launch is the cost. Weights are rounded to v's dtype before they are divided by their sum; the twin
    rounds them after.
    `arrivals` are `counters` that are 0, as `rotated_qkv` leaves them; without, they are made here.
    """
    q = q.contiguous()
    dense(k, v)
    (heads, h), (slots, kv_heads, _), share = q.shape, k.shape, chunk(k.shape[0], k.element_size())
    count, group = -(-slots // share.keys), heads // kv_heads
    columns = min(share.columns, power(h))
    slices = -(-h // columns)
    counts = counters(k).zero_() if arrivals is None else arrivals
    sizes, out = q.new_empty(heads, count, dtype=torch.float32), torch.empty_like(q)
    parts = q.new_empty(heads, count, h, dtype=torch.float32)
    code("device_attention").attend_one[(count, kv_heads, slices)](
        q, k, v, length, counts, sizes, parts, out, *k.stride()[:2], *v.stride()[:2], slots, window or slots, scale,
        cap, G=group, H=h, CHUNKS=count, CAP=cap > 0, CHUNK=share.keys, GROUP=power(group), HEAD=power(h),
        COLUMNS=columns, PARTS=share.parts, num_warps=share.warps, **early(q),
    )  # fmt: skip
    return out


def counters(k: Float[Tensor, "s k h"]) -> Int[Tensor, "c"]:
    """Room for what `attend_one` counts: of each kv head how many programs are done, at most one for 16 columns."""
    return torch.empty(power(k.shape[1] * -(-k.shape[2] // 16)), dtype=torch.int32, device=k.device)


def attend_one_eager(
    q: Float[Tensor, "n h"],
    k: Float[Tensor, "s k h"],
    v: Float[Tensor, "s k h"],
    length: Int[Tensor, "1"],
    scale: float,
    cap: float = 0.0,
    window: int = 0,
) -> Float[Tensor, "n h"]:
    key = torch.arange(k.shape[0], device=k.device)
    seen = (key <= length) & (key > length - (window or k.shape[0]))
    return ops.attend(q[None, None], k[None], v[None], seen[None, None], scale, cap)[0, 0]


def attend_spans(
    q: Float[Tensor, "b t n h"],
    k: Float[Tensor, "b s k h"],
    v: Float[Tensor, "b s k h"],
    begin: Int[Tensor, "b t"],
    end: Int[Tensor, "b t"],
    scale: float,
    cap: float = 0.0,
) -> Float[Tensor, "b t n h"]:
    """Attention of many tokens, each to the keys from its `begin` to before its `end` (Dao et al. 2022).

    A query that sees none gives zeros. Weights are rounded to v's dtype before they are divided by their sum.
    """
    begin, end = begin.contiguous(), end.contiguous()
    dense(q, k, v)
    (rows, tokens, heads, h), (slots, kv_heads) = q.shape, k.shape[1:3]
    out, group = q.new_empty(q.shape), heads // kv_heads
    cut = share(rows * kv_heads * tokens * group, power(h) * q.element_size(), shared_memory(q))
    code("device_attention").attend_spans[(-(-tokens * group // cut.queries), rows * kv_heads)](
        q, k, v, begin, end, out, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], tokens, slots, scale, cap,
        HEADS=heads, KV=kv_heads, G=group, H=h, HEAD=power(h), CAP=cap > 0,
        QUERIES=cut.queries, KEYS=cut.keys, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out


def attend_spans_eager(
    q: Float[Tensor, "b t n h"],
    k: Float[Tensor, "b s k h"],
    v: Float[Tensor, "b s k h"],
    begin: Int[Tensor, "b t"],
    end: Int[Tensor, "b t"],
    scale: float,
    cap: float = 0.0,
) -> Float[Tensor, "b t n h"]:
    key = torch.arange(k.shape[1], device=k.device)
    return ops.attend(q, k, v, (key >= begin[..., None]) & (key < end[..., None]), scale, cap)


def rotated_prompt(
    q: Float[Tensor, "b t n h"],
    k: Float[Tensor, "b t k h"],
    v: Float[Tensor, "b t k h"],
    angles: Float[Tensor, "b t half"],
    room: int,
) -> tuple[Float[Tensor, "b t n h"], Float[Tensor, "b s k h"], Float[Tensor, "b s k h"]]:
    """q and k, each plane turned by its angle, and v; k and v with `room` empty slots behind them, filled with 0."""
    angles = angles.contiguous()
    dense(q, k, v)
    (rows, tokens, heads, h), kv_heads = q.shape, k.shape[2]
    out, slots = q.new_empty(q.shape), tokens + room
    k_buffer, v_buffer = (x.new_empty(rows, slots, kv_heads, h) for x in (k, v))
    code("device_attention").rotated_prompt[(slots, rows)](
        q, k, v, angles, out, k_buffer, v_buffer, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], tokens, slots,
        HEADS=heads, KV=kv_heads, HALF=h // 2,
        QS=power(heads, 1), KS=power(kv_heads, 1), PLANES=power(h // 2, 1), num_warps=warps(heads * h // 2),
    )  # fmt: skip
    return out, k_buffer, v_buffer


def rotated_prompt_eager(
    q: Float[Tensor, "b t n h"],
    k: Float[Tensor, "b t k h"],
    v: Float[Tensor, "b t k h"],
    angles: Float[Tensor, "b t half"],
    room: int,
) -> tuple[Float[Tensor, "b t n h"], Float[Tensor, "b s k h"], Float[Tensor, "b s k h"]]:
    return ops.rotate(q, angles), pad(ops.rotate(k, angles), room), pad(v, room)


# --- how they are launched --------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """A matrix as the kernels read it: its rows, and their scales, which of one that is not quantized are not read."""

    tensors: tuple[Tensor, Tensor]
    inputs: int
    bits: int
    group: int = 0  # inputs that share a scale in 4 bits

    @classmethod
    def of(cls, w: Matrix) -> "Kept":
        if isinstance(w, Tensor):
            return cls((w, w), w.shape[1], 16)
        if not isinstance(w, Int4):
            return cls((w.values, w.scale.contiguous()), w.values.shape[1], 8)
        if w.blocked:
            raise SettingError("kernels for GPUs read 4 bits in rows: see lowbit.arranged")
        return cls((w.values, w.scale.flatten(1).contiguous()), w.inputs, 4, w.group)

    @property
    def outputs(self) -> int:
        return len(self.tensors[0])

    @property
    def strides(self) -> tuple[int, int]:
        """From row to row, and from the scales of a row to those of the next."""
        return self.tensors[0].stride(0), self.tensors[1].stride(0)

    def sizes(self, cut: Tile) -> dict[str, int]:
        """What the kernels know of it before they run."""
        apart = cut.apart or self.bits == 4  # where a tensor has a row, 32 weights a lane
        return {
            "D": self.inputs, "BITS": self.bits, "GROUP": self.group,
            "BLOCK": max(min(cut.block, power(self.inputs)), self.group),
            "WIDE": 1 if apart else cut.rows, "COUNT": cut.rows if apart else 1,
        }  # fmt: skip


def launch(kernel: str, kept: Kept) -> Any:
    """The kernel on as many programs as the rows take, with what it needs to know of the sizes."""
    cut = tile(kernel, kept.outputs, kept.inputs, kept.bits)
    run = getattr(code("device"), kernel)[(-(-kept.outputs // cut.rows),)]
    return partial(run, OUT=kept.outputs, num_warps=cut.warps, **kept.sizes(cut))
