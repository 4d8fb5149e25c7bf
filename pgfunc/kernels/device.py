"""The code that runs on the GPU, in Triton: products with matrices, and norms (`device_attention` has the rest).

A program computes WIDE · COUNT rows of a matrix. It loops over their D columns, BLOCK at a time; the loop is unrolled,
because D is a constant. Weights are loaded one block ahead, the first block before `awaited`. Sums are in float32. WIDE
rows are one axis of a tensor, and each may have its own warp; COUNT such tensors use the same lanes, so that a value
computed from x is used for all of them. Rows beyond the last repeat the last row, and are not written. BITS is the
storage of a weight: 8 and 4 as in `lowbit`, otherwise a plain number. This module knows nothing about PyTorch: `calls`
launches its kernels.

With EARLY (programmatic dependent launch, from Hopper on) a kernel starts while the kernel before it still runs. Every
program that writes, or reads results of earlier kernels, first waits in `awaited`; after that, all kernels before this
one are done. Before `awaited` a program reads only what no running kernel writes: weights, lengths, and the keys and
values of earlier tokens.
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
    """Wait until all kernels before this one are done. Loads above this call stay above it: none crosses a barrier.

    HOLD: the next kernel may start only after all kernels before this one are done. It may then read their results
    before it calls `awaited` itself.
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
    blocks = ()
    for r in tl.static_range(COUNT):
        pointers = rows[r][:, None] + columns
        if start + BLOCK <= D:
            weights = tl.load(pointers, eviction_policy="evict_first")
        else:
            weights = tl.load(pointers, mask=columns < D, other=0.0, eviction_policy="evict_first")
        blocks = blocks + (weights,)
    return blocks


@triton.jit
@no_type_check
def elements(vector, columns, D: tl.constexpr, INSIDE: tl.constexpr):
    """The elements of a vector in these columns, in float32. INSIDE: none of them is beyond the last, D - 1.

    All programs read the vector, so the cache should keep it.
    """
    if INSIDE:
        values = tl.load(vector + columns, eviction_policy="evict_last")
    else:
        values = tl.load(vector + columns, mask=columns < D, other=0.0, eviction_policy="evict_last")
    return values.to(tl.float32)


@triton.jit
@no_type_check
def vector_block(vector, start: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of a vector from `start` on, as a row."""
    return elements(vector, start + tl.arange(0, BLOCK)[None, :], D, start + BLOCK <= D)


@triton.jit
@no_type_check
def wide(weights):
    """Weights in float32. A GPU converts int8 at a quarter of its rate of multiplication; moving bits is faster."""
    if weights.dtype == tl.int8 and not INTERPRETED:
        # the byte, with its sign bit flipped, below the exponent of 2**23: the float is 2**23 + 128 + the weight
        bits = tl.inline_asm_elementwise(
            """{ .reg .b32 t; xor.b32 t, $4, 0x80808080;
            prmt.b32 $0, t, 0x4B000000, 0x7440; prmt.b32 $1, t, 0x4B000000, 0x7441;
            prmt.b32 $2, t, 0x4B000000, 0x7442; prmt.b32 $3, t, 0x4B000000, 0x7443; }""",
            "=r,=r,=r,=r,r", [weights], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
        result = bits.to(tl.float32, bitcast=True) - 8388736.0
    else:
        result = weights.to(tl.float32)
    return result


@triton.jit
@no_type_check
def products(
    x, norm, rows, scales, eps,
    NORMED: tl.constexpr, WIDE: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr, HOLD: tl.constexpr = False,
):  # fmt: skip
    """The products of x, or of rms_norm(x), with the rows at these pointers."""
    if BITS == 4:
        results = products_of_levels(x, norm, rows, scales, eps, NORMED, COUNT, D, GROUP, BLOCK, EARLY, HOLD)
    else:
        ahead = tiles(rows, 0, COUNT, D, BLOCK)
        awaited(EARLY, HOLD)
        squares = tl.zeros([1, BLOCK], tl.float32)
        totals = ()
        for _ in tl.static_range(COUNT):
            totals = totals + (tl.zeros([WIDE, BLOCK], tl.float32),)
        for start in tl.static_range(0, D, BLOCK):
            current = ahead
            if start + BLOCK < D:
                ahead = tiles(rows, start + BLOCK, COUNT, D, BLOCK)
            factor = vector_block(x, start, D, BLOCK)
            if NORMED:  # all but the division by the root mean square, which comes last
                squares += factor * factor
                factor += factor * vector_block(norm, start, D, BLOCK)
            updated = ()
            for r in tl.static_range(COUNT):
                updated = updated + (totals[r] + wide(current[r]) * factor,)
            totals = updated
        inverse = tl.rsqrt(tl.sum(squares) / D + eps) if NORMED else 1.0
        results = ()
        for r in tl.static_range(COUNT):
            factor = tl.load(scales[r]).to(tl.float32) if BITS == 8 else 1.0
            results = results + (tl.sum(totals[r], axis=1) * factor * inverse,)
    return results


@triton.jit
@no_type_check
def level_tiles(
    rows, scales, start: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """The bytes of BLOCK weights of each row, 16 bytes per lane, and the scale and zero of their group."""
    lane = start // 32 + tl.arange(0, BLOCK // 32)[:, None]
    byte, group = lane * 16 + tl.arange(0, 16)[None, :], lane // (GROUP // 32)
    blocks = ()
    for r in tl.static_range(COUNT):
        if start + BLOCK <= D:
            packed = tl.load(rows[r][:, None] + byte, eviction_policy="evict_first")
            scale, zero = tl.load(scales[r] + 2 * group), tl.load(scales[r] + 2 * group + 1)
        else:
            inside = lane < D // 32
            packed = tl.load(rows[r][:, None] + byte, mask=inside, other=0, eviction_policy="evict_first")
            scale = tl.load(scales[r] + 2 * group, mask=inside, other=0.0)
            zero = tl.load(scales[r] + 2 * group + 1, mask=inside, other=0.0)
        blocks = blocks + (packed, scale.to(tl.float32), zero.to(tl.float32))
    return blocks


@triton.jit
@no_type_check
def levels(packed):
    """Level + 128, of the low levels and of the high ones. Below the exponent of 2**7, bit 16 is worth 1."""
    if INTERPRETED:
        low, high = (packed & 15).to(tl.float32) + 128, (packed >> 4).to(tl.float32) + 128
    else:
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 l, h; and.b32 l, $8, 0x0F0F0F0F; shr.u32 h, $8, 4; and.b32 h, h, 0x0F0F0F0F;
            prmt.b32 $0, l, 0x43000000, 0x7044; prmt.b32 $1, l, 0x43000000, 0x7144;
            prmt.b32 $2, l, 0x43000000, 0x7244; prmt.b32 $3, l, 0x43000000, 0x7344;
            prmt.b32 $4, h, 0x43000000, 0x7044; prmt.b32 $5, h, 0x43000000, 0x7144;
            prmt.b32 $6, h, 0x43000000, 0x7244; prmt.b32 $7, h, 0x43000000, 0x7344; }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,r", [packed], dtype=(tl.int32, tl.int32), is_pure=True, pack=4,
        )  # fmt: skip
        low, high = low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    return low, high


@triton.jit
@no_type_check
def halves(vector, start: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The elements of a vector for the low levels of a block, and those for the high ones, half a group later."""
    lane = start // 32 + tl.arange(0, BLOCK // 32)[:, None]
    column = lane // (GROUP // 32) * GROUP + lane % (GROUP // 32) * 16 + tl.arange(0, 16)[None, :]
    inside: tl.constexpr = start + BLOCK <= D
    return elements(vector, column, D, inside), elements(vector, column + GROUP // 2, D, inside)


@triton.jit
@no_type_check
def products_of_levels(
    x, norm, rows, scales, eps,
    NORMED: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """`products` with rows in 4 bits: a lane sums its part of a group, and then applies the scale and the zero.

    `levels` returns level + 128, and a weight is (level - 8) · scale + zero: the excess of 136 is subtracted, and the
    zero is added, with the sum of x.
    """
    ahead = level_tiles(rows, scales, 0, COUNT, D, GROUP, BLOCK)
    awaited(EARLY, HOLD)
    squares = tl.zeros([BLOCK // 32, 16], tl.float32)
    totals = ()
    for _ in tl.static_range(COUNT):
        totals = totals + (tl.zeros([BLOCK // 32, 1], tl.float32),)
    for start in tl.static_range(0, D, BLOCK):
        current = ahead
        if start + BLOCK < D:
            ahead = level_tiles(rows, scales, start + BLOCK, COUNT, D, GROUP, BLOCK)
        low_x, high_x = halves(x, start, D, GROUP, BLOCK)
        if NORMED:
            squares += low_x * low_x + high_x * high_x
            low_norm, high_norm = halves(norm, start, D, GROUP, BLOCK)
            low_x, high_x = low_x + low_x * low_norm, high_x + high_x * high_norm
        x_sum = tl.sum(low_x + high_x, axis=1, keep_dims=True)
        updated = ()
        for r in tl.static_range(COUNT):
            low, high = levels(current[3 * r])
            scale, zero = current[3 * r + 1], current[3 * r + 2]
            # two sums: each compiles to a chain of multiply-adds
            product = tl.sum(low * low_x, axis=1, keep_dims=True) + tl.sum(high * high_x, axis=1, keep_dims=True)
            updated = updated + (totals[r] + product * scale + x_sum * (zero - 136 * scale),)
        totals = updated
    inverse = tl.rsqrt(tl.sum(squares) / D + eps) if NORMED else 1.0
    results = ()
    for r in tl.static_range(COUNT):
        results = results + (tl.sum(totals[r]) * inverse,)
    return results


@triton.jit
@no_type_check
def gelu(x):
    """The tanh form of GELU: (1 + tanh(y)) / 2 = sigmoid(2y), and 1.5957691 is twice the square root of 2/π."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
@no_type_check
def row_indices(first, r: tl.constexpr, WIDE: tl.constexpr):
    """The indices of the rows in tensor r."""
    return first + r * WIDE + tl.arange(0, WIDE)


@triton.jit
@no_type_check
def owned(w, stride, first, OUT: tl.constexpr, WIDE: tl.constexpr, COUNT: tl.constexpr):
    """Pointers to the rows of a matrix (or to their scales) that a program computes."""
    rows = ()
    for r in tl.static_range(COUNT):
        rows = rows + (w + tl.minimum(row_indices(first, r, WIDE), OUT - 1).to(tl.int64) * stride,)
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
    results = products(x, x, rows, scales, 0.0, False, WIDE, COUNT, D, BITS, GROUP, BLOCK, EARLY)
    for r in tl.static_range(COUNT):
        value, row = results[r], row_indices(first, r, WIDE)
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
    results = products(x, scale, rows, scales, eps, True, WIDE, COUNT, D, BITS, GROUP, BLOCK, EARLY)
    for r in tl.static_range(COUNT):
        row = row_indices(first, r, WIDE)
        tl.store(out + row, results[r].to(out.dtype.element_ty), mask=row < OUT)


@triton.jit
@no_type_check
def add_norm(
    x, residual, scale, out, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program computes the residual plus a normalized vector."""
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    factor = 1 + tl.load(scale + columns, mask=inside, other=0.0).to(tl.float32)
    awaited(EARLY)
    values = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(residual + columns, mask=inside, other=0.0).to(tl.float32)
    total += values * tl.rsqrt(tl.sum(values * values) / D + eps) * factor
    tl.store(out + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def angles(
    positions, out,
    LOG_THETA: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program computes one position, in float64 until the cast: the position multiplies the error of a frequency."""
    index = tl.program_id(0)
    plane = tl.arange(0, BLOCK)
    frequency = tl.exp2(plane.to(tl.float64) * (-LOG_THETA / HALF))
    awaited(EARLY)
    tl.store(out + index * HALF + plane, (tl.load(positions + index) * frequency).to(tl.float32), mask=plane < HALF)


@triton.jit
@no_type_check
def norm_qkv_rope(
    x, scale, q, q_scale, k, k_scale, v, v_scale, angles, out, k_buffer, v_buffer, length, arrivals,
    q_stride, k_stride, v_stride, scale_stride, k_slot, k_head, v_slot, v_head, slots, eps,
    HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, COUNTERS: tl.constexpr, D: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    WIDE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """WIDE · COUNT planes of one head of q, k or v. Plane i is the rows i and i + HALF; in q and k it is rotated.

    k and v are written into slot `length` of their buffers, or nowhere if the buffers have no such slot. The first
    program sets the counters of the attention to 0.
    """
    first = tl.program_id(0) * WIDE * COUNT
    head, plane = first // HALF, first % HALF
    slot = tl.load(length)
    w, w_scale, stride, start_head, target, has_slot = q, q_scale, q_stride, 0, out + head * 2 * HALF, slot == slot
    if head >= HEADS:
        w, w_scale, stride, start_head = k, k_scale, k_stride, HEADS
        target, has_slot = k_buffer + slot * k_slot + (head - HEADS) * k_head, (slot >= 0) & (slot < slots)
    if head >= HEADS + KV:
        w, w_scale, stride, start_head = v, v_scale, v_stride, HEADS + KV
        target, has_slot = v_buffer + slot * v_slot + (head - HEADS - KV) * v_head, (slot >= 0) & (slot < slots)
    row = (head - start_head) * 2 * HALF + plane
    row_count: tl.constexpr = (HEADS + 2 * KV) * 2 * HALF
    rows = owned(w, stride, row, row_count, WIDE, COUNT) + owned(w, stride, row + HALF, row_count, WIDE, COUNT)
    scales = owned(w_scale, scale_stride, row, row_count, WIDE, COUNT)
    scales = scales + owned(w_scale, scale_stride, row + HALF, row_count, WIDE, COUNT)
    results = products(x, scale, rows, scales, eps, True, WIDE, 2 * COUNT, D, BITS, GROUP, BLOCK, EARLY, True)
    for r in tl.static_range(COUNT):
        lower, upper, planes = results[r], results[COUNT + r], row_indices(plane, r, WIDE)
        angle = tl.where(head < HEADS + KV, tl.load(angles + planes), 0.0)
        cos, sin = tl.cos(angle), tl.sin(angle)
        tl.store(target + planes, (lower * cos - upper * sin).to(out.dtype.element_ty), mask=has_slot)
        tl.store(target + planes + HALF, (upper * cos + lower * sin).to(out.dtype.element_ty), mask=has_slot)
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
    results = products(x, scale, rows, scales, eps, True, WIDE, 2 * COUNT, D, BITS, GROUP, BLOCK, EARLY)
    for r in tl.static_range(COUNT):
        row = row_indices(first, r, WIDE)
        tl.store(out + row, (gelu(results[r]) * results[COUNT + r]).to(out.dtype.element_ty), mask=row < OUT)
