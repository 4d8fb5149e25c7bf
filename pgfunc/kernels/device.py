"""The code that runs on the GPU, in Triton: products with matrices, and norms (`device_attention` has the rest).

A program computes WIDE · COUNT rows of a matrix. It loops over their D columns, BLOCK at a time; the loop is unrolled,
because D is a constant. Weights are loaded one block ahead, the first block before `awaited`. Sums are in float32. WIDE
rows are one axis of a tensor, and each may have its own warp; COUNT such tensors use the same lanes, so that a value
computed from x is used for all of them. Rows beyond the last repeat the last row, and are not written. BITS is the
storage of a weight: 8 and 4 as in `lowbit`, otherwise a plain number. Nothing here knows PyTorch: `calls` launches it.

With EARLY (programmatic dependent launch, from Hopper on) a kernel starts while the kernel before it still runs. Every
program waits in `awaited` before it reads what an earlier kernel wrote, and before it writes; so each kernel finds that
all kernels before it are done. Before `awaited` a program only reads what was written long ago: it loads weights and
lengths, and the keys and values that were in the cache before the kernel that appends.
"""

import os
from typing import no_type_check  # the shape checks of the tests must not wrap what Triton reads

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # pyright: ignore[reportMissingImports]

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
@no_type_check
def awaited(EARLY: tl.constexpr, HOLD: tl.constexpr = False):
    """Wait until the kernel before is done. Loads that stand before this call stay before it: none crosses a barrier.

    HOLD: the next kernel starts only when the one before is done, because it reads results before its own `awaited`.
    """
    tl.debug_barrier()
    if EARLY:
        if HOLD:
            gdc_wait()
            gdc_launch_dependents()
        else:
            gdc_launch_dependents()
            gdc_wait()


@triton.jit
@no_type_check
def tiles(rows, start: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of each row of weights. They are read only once, so the cache may evict them first."""
    columns = start + tl.arange(0, BLOCK)[None, :]
    found = ()
    for r in tl.static_range(COUNT):
        places = rows[r][:, None] + columns
        if start + BLOCK <= D:
            part = tl.load(places, eviction_policy="evict_first")
        else:
            part = tl.load(places, mask=columns < D, other=0.0, eviction_policy="evict_first")
        found = found + (part,)
    return found


@triton.jit
@no_type_check
def elements(places, columns, D: tl.constexpr, INSIDE: tl.constexpr):
    """These columns of a vector that all programs read, in float32; INSIDE: none of them is beyond the last."""
    if INSIDE:
        part = tl.load(places + columns, eviction_policy="evict_last")
    else:
        part = tl.load(places + columns, mask=columns < D, other=0.0, eviction_policy="evict_last")
    return part.to(tl.float32)


@triton.jit
@no_type_check
def piece(places, start: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of a vector, as a row."""
    return elements(places, start + tl.arange(0, BLOCK)[None, :], D, start + BLOCK <= D)


@triton.jit
@no_type_check
def wide(part):
    """Weights in float32. A GPU converts int8 at a quarter of its rate of multiplication, so bits are moved instead."""
    if part.dtype == tl.int8 and not INTERPRETED:
        # the byte, with its sign bit flipped, under the exponent of 2**23: the float is 2**23 + 128 + the number
        bits = tl.inline_asm_elementwise(
            """{ .reg .b32 t; xor.b32 t, $4, 0x80808080;
            prmt.b32 $0, t, 0x4B000000, 0x7440; prmt.b32 $1, t, 0x4B000000, 0x7441;
            prmt.b32 $2, t, 0x4B000000, 0x7442; prmt.b32 $3, t, 0x4B000000, 0x7443; }""",
            "=r,=r,=r,=r,r", [part], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
        found = bits.to(tl.float32, bitcast=True) - 8388736.0
    else:
        found = part.to(tl.float32)
    return found


@triton.jit
@no_type_check
def products(
    x, norm, rows, scales, eps,
    NORMED: tl.constexpr, WIDE: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr, HOLD: tl.constexpr = False,
):  # fmt: skip
    """The products of x, or of rms_norm(x), with the rows at these pointers."""
    if BITS == 4:
        found = products_of_levels(x, norm, rows, scales, eps, NORMED, COUNT, D, GROUP, BLOCK, EARLY, HOLD)
    else:
        ahead = tiles(rows, 0, COUNT, D, BLOCK)
        awaited(EARLY, HOLD)
        squares = tl.zeros([1, BLOCK], tl.float32)
        totals = ()
        for _ in tl.static_range(COUNT):
            totals = totals + (tl.zeros([WIDE, BLOCK], tl.float32),)
        for start in tl.static_range(0, D, BLOCK):
            here = ahead
            if start + BLOCK < D:
                ahead = tiles(rows, start + BLOCK, COUNT, D, BLOCK)
            by = piece(x, start, D, BLOCK)
            if NORMED:  # all but the division by the root mean square, which is one number
                squares += by * by
                by += by * piece(norm, start, D, BLOCK)
            more = ()
            for r in tl.static_range(COUNT):
                more = more + (totals[r] + wide(here[r]) * by,)
            totals = more
        inverse = tl.rsqrt(tl.sum(squares) / D + eps) if NORMED else 1.0
        found = ()
        for r in tl.static_range(COUNT):
            by = tl.load(scales[r]).to(tl.float32) if BITS == 8 else 1.0
            found = found + (tl.sum(totals[r], axis=1) * by * inverse,)
    return found


@triton.jit
@no_type_check
def level_tiles(
    rows, scales, start: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """The bytes of BLOCK weights of each row, 16 bytes a lane, and the scale and zero of their group."""
    lane = start // 32 + tl.arange(0, BLOCK // 32)[:, None]
    byte, group = lane * 16 + tl.arange(0, 16)[None, :], lane // (GROUP // 32)
    found = ()
    for r in tl.static_range(COUNT):
        if start + BLOCK <= D:
            both = tl.load(rows[r][:, None] + byte, eviction_policy="evict_first")
            scale, zero = tl.load(scales[r] + 2 * group), tl.load(scales[r] + 2 * group + 1)
        else:
            inside = lane < D // 32
            both = tl.load(rows[r][:, None] + byte, mask=inside, other=0, eviction_policy="evict_first")
            scale = tl.load(scales[r] + 2 * group, mask=inside, other=0.0)
            zero = tl.load(scales[r] + 2 * group + 1, mask=inside, other=0.0)
        found = found + (both, scale.to(tl.float32), zero.to(tl.float32))
    return found


@triton.jit
@no_type_check
def levels(both):
    """128 + each level: the low ones, then the high ones. Under the exponent of 2**7, bit 16 is worth one."""
    if INTERPRETED:
        low, high = (both & 15).to(tl.float32) + 128, (both >> 4).to(tl.float32) + 128
    else:
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 l, h; and.b32 l, $8, 0x0F0F0F0F; shr.u32 h, $8, 4; and.b32 h, h, 0x0F0F0F0F;
            prmt.b32 $0, l, 0x43000000, 0x7044; prmt.b32 $1, l, 0x43000000, 0x7144;
            prmt.b32 $2, l, 0x43000000, 0x7244; prmt.b32 $3, l, 0x43000000, 0x7344;
            prmt.b32 $4, h, 0x43000000, 0x7044; prmt.b32 $5, h, 0x43000000, 0x7144;
            prmt.b32 $6, h, 0x43000000, 0x7244; prmt.b32 $7, h, 0x43000000, 0x7344; }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,r", [both], dtype=(tl.int32, tl.int32), is_pure=True, pack=4,
        )  # fmt: skip
        low, high = low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    return low, high


@triton.jit
@no_type_check
def halves(places, start: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The elements of a vector for the low levels of these bytes, and for the high ones, half a group further."""
    lane = start // 32 + tl.arange(0, BLOCK // 32)[:, None]
    column = lane // (GROUP // 32) * GROUP + lane % (GROUP // 32) * 16 + tl.arange(0, 16)[None, :]
    inside: tl.constexpr = start + BLOCK <= D
    return elements(places, column, D, inside), elements(places, column + GROUP // 2, D, inside)


@triton.jit
@no_type_check
def products_of_levels(
    x, norm, rows, scales, eps,
    NORMED: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """`products` with rows in 4 bits: a lane sums its part of a group, and then applies the scale and the zero.

    Levels are too large by 136: that excess and the zero are multiplied by the sum of x.
    """
    ahead = level_tiles(rows, scales, 0, COUNT, D, GROUP, BLOCK)
    awaited(EARLY, HOLD)
    squares = tl.zeros([BLOCK // 32, 16], tl.float32)
    totals = ()
    for _ in tl.static_range(COUNT):
        totals = totals + (tl.zeros([BLOCK // 32, 1], tl.float32),)
    for start in tl.static_range(0, D, BLOCK):
        here = ahead
        if start + BLOCK < D:
            ahead = level_tiles(rows, scales, start + BLOCK, COUNT, D, GROUP, BLOCK)
        one, two = halves(x, start, D, GROUP, BLOCK)
        if NORMED:
            squares += one * one + two * two
            by_one, by_two = halves(norm, start, D, GROUP, BLOCK)
            one, two = one + one * by_one, two + two * by_two
        both = tl.sum(one + two, axis=1, keep_dims=True)
        more = ()
        for r in tl.static_range(COUNT):
            low, high = levels(here[3 * r])
            scale, zero = here[3 * r + 1], here[3 * r + 2]
            # each a chain of multiply-adds
            product = tl.sum(low * one, axis=1, keep_dims=True) + tl.sum(high * two, axis=1, keep_dims=True)
            more = more + (totals[r] + product * scale + both * (zero - 136 * scale),)
        totals = more
    inverse = tl.rsqrt(tl.sum(squares) / D + eps) if NORMED else 1.0
    found = ()
    for r in tl.static_range(COUNT):
        found = found + (tl.sum(totals[r]) * inverse,)
    return found


@triton.jit
@no_type_check
def gelu(x):
    """The tanh form: (1 + tanh(y)) / 2 = sigmoid(2y), and 1.5957691 is twice the square root of 2/π."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
@no_type_check
def numbers(first, r: tl.constexpr, WIDE: tl.constexpr):
    """The numbers of the rows in tensor r."""
    return first + r * WIDE + tl.arange(0, WIDE)


@triton.jit
@no_type_check
def owned(w, stride, first, OUT: tl.constexpr, WIDE: tl.constexpr, COUNT: tl.constexpr):
    """Pointers to the rows of a matrix (or to their scales) that a program computes."""
    rows = ()
    for r in tl.static_range(COUNT):
        rows = rows + (w + tl.minimum(numbers(first, r, WIDE), OUT - 1).to(tl.int64) * stride,)
    return rows


@triton.jit
@no_type_check
def matvec(
    x, w, w_scale, residual, out, stride, scale_stride,
    OUT: tl.constexpr, D: tl.constexpr, ADD: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    WIDE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * WIDE * COUNT
    rows, scales = owned(w, stride, first, OUT, WIDE, COUNT), owned(w_scale, scale_stride, first, OUT, WIDE, COUNT)
    found = products(x, x, rows, scales, 0.0, False, WIDE, COUNT, D, BITS, GROUP, BLOCK, EARLY)
    for r in tl.static_range(COUNT):
        value, row = found[r], numbers(first, r, WIDE)
        if ADD:
            value += tl.load(residual + tl.minimum(row, OUT - 1)).to(tl.float32)
        tl.store(out + row, value.to(out.dtype.element_ty), mask=row < OUT)


@triton.jit
@no_type_check
def norm_matvec(
    x, scale, w, w_scale, out, stride, scale_stride, eps,
    OUT: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    WIDE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * WIDE * COUNT
    rows, scales = owned(w, stride, first, OUT, WIDE, COUNT), owned(w_scale, scale_stride, first, OUT, WIDE, COUNT)
    found = products(x, scale, rows, scales, eps, True, WIDE, COUNT, D, BITS, GROUP, BLOCK, EARLY)
    for r in tl.static_range(COUNT):
        row = numbers(first, r, WIDE)
        tl.store(out + row, found[r].to(out.dtype.element_ty), mask=row < OUT)


@triton.jit
@no_type_check
def add_norm(
    x, residual, scale, out, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: the residual plus a normalised vector."""
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    by = 1 + tl.load(scale + columns, mask=inside, other=0.0).to(tl.float32)
    awaited(EARLY)
    part = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(residual + columns, mask=inside, other=0.0).to(tl.float32)
    total += part * tl.rsqrt(tl.sum(part * part) / D + eps) * by
    tl.store(out + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def angles(
    positions, out,
    LOG_THETA: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One position a program, in float64 until it is cast: the position multiplies the error of a frequency."""
    place = tl.program_id(0)
    plane = tl.arange(0, BLOCK)
    frequency = tl.exp2(plane.to(tl.float64) * (-LOG_THETA / HALF))
    awaited(EARLY)
    tl.store(out + place * HALF + plane, (tl.load(positions + place) * frequency).to(tl.float32), mask=plane < HALF)


@triton.jit
@no_type_check
def norm_qkv_rope(
    x, scale, q, q_scale, k, k_scale, v, v_scale, angles, out, k_buffer, v_buffer, length, arrivals,
    q_stride, k_stride, v_stride, scale_stride, k_slot, k_head, v_slot, v_head, slots, eps,
    HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, COUNTERS: tl.constexpr, D: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    WIDE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """WIDE · COUNT planes of one head of q, k or v: the rows i and i + HALF of each, rotated by its angle (not v).

    k and v are written into slot `length` of their buffers, or nowhere if the buffers have no such slot. The first
    program sets the counters of the attention to 0.
    """
    first = tl.program_id(0) * WIDE * COUNT
    head, plane = first // HALF, first % HALF
    slot = tl.load(length)
    w, w_scale, stride, start_head, place, room = q, q_scale, q_stride, 0, out + head * 2 * HALF, slot == slot
    if head >= HEADS:
        w, w_scale, stride, start_head = k, k_scale, k_stride, HEADS
        place, room = k_buffer + slot * k_slot + (head - HEADS) * k_head, (slot >= 0) & (slot < slots)
    if head >= HEADS + KV:
        w, w_scale, stride, start_head = v, v_scale, v_stride, HEADS + KV
        place, room = v_buffer + slot * v_slot + (head - HEADS - KV) * v_head, (slot >= 0) & (slot < slots)
    row = (head - start_head) * 2 * HALF + plane
    last: tl.constexpr = (HEADS + 2 * KV) * 2 * HALF
    rows = owned(w, stride, row, last, WIDE, COUNT) + owned(w, stride, row + HALF, last, WIDE, COUNT)
    scales = owned(w_scale, scale_stride, row, last, WIDE, COUNT)
    scales = scales + owned(w_scale, scale_stride, row + HALF, last, WIDE, COUNT)
    found = products(x, scale, rows, scales, eps, True, WIDE, 2 * COUNT, D, BITS, GROUP, BLOCK, EARLY, True)
    for r in tl.static_range(COUNT):
        one, two, planes = found[r], found[COUNT + r], numbers(plane, r, WIDE)
        angle = tl.where(head < HEADS + KV, tl.load(angles + planes), 0.0)
        cos, sin = tl.cos(angle), tl.sin(angle)
        tl.store(place + planes, (one * cos - two * sin).to(out.dtype.element_ty), mask=room)
        tl.store(place + planes + HALF, (two * cos + one * sin).to(out.dtype.element_ty), mask=room)
    if COUNTERS > 0 and first == 0:
        tl.store(arrivals + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))


@triton.jit
@no_type_check
def norm_geglu(
    x, scale, gate, gate_scale, up, up_scale, out, gate_stride, up_stride, scale_stride, eps,
    OUT: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    WIDE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * WIDE * COUNT
    rows = owned(gate, gate_stride, first, OUT, WIDE, COUNT) + owned(up, up_stride, first, OUT, WIDE, COUNT)
    scales = owned(gate_scale, scale_stride, first, OUT, WIDE, COUNT)
    scales = scales + owned(up_scale, scale_stride, first, OUT, WIDE, COUNT)
    found = products(x, scale, rows, scales, eps, True, WIDE, 2 * COUNT, D, BITS, GROUP, BLOCK, EARLY)
    for r in tl.static_range(COUNT):
        row = numbers(first, r, WIDE)
        tl.store(out + row, (gelu(found[r]) * found[COUNT + r]).to(out.dtype.element_ty), mask=row < OUT)
