"""The code that runs on the GPU for matrices in 4 bits (`lowbit.Int4`), in Triton.

A program owns a block of 64 outputs, or two of them. Its bytes are read as words of 8 levels:

    word [i, w]  =  for p from 0 to 7 the level of output 4 w + p // 2 + 32 (p % 2) at input i, in bits 4 p to 4 p + 3

LANES lanes walk over the inputs, several through each group, beside one another: what they sum has one scale. A level
is made a float by its bits alone, as 128 + the level; what that is too much, and the zero of a group, is multiplied by
the sum of the lane's x. Sums are float32. See `device` for EARLY and for what stands above `awaited`.
"""

from typing import no_type_check  # the shape checks of the tests must not wrap what Triton reads

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from pgfunc.kernels.device import awaited, gelu

AHEAD = tl.constexpr(8)  # steps, of which the words are asked for at once


@triton.jit
@no_type_check
def level(words, p: tl.constexpr):
    """128 + the level in bits 4 p to 4 p + 3: below the exponent of 2**7 one unit is bit 16."""
    bits = words << (16 - 4 * p) if p < 4 else words >> (4 * p - 16)
    return ((bits & 0xF0000) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def outputs(n, p: tl.constexpr):
    """Of a block, those that the words have in bits 4 p to 4 p + 3."""
    return 64 * n + 4 * tl.arange(0, 8) + p // 2 + 32 * (p % 2)


@triton.jit
@no_type_check
def added(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p):
    """Two tuples of 8."""
    return a + i, b + j, c + k, d + l, e + m, f + n, g + o, h + p


@triton.jit
@no_type_check
def inputs(step, GROUP: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr):
    """The input that each lane has at a step: of a group they have one beside the other."""
    lane, beside = tl.arange(0, LANES), GROUP // STEPS
    return lane // beside * GROUP + step * beside + lane % beside


@triton.jit
@no_type_check
def walk(w, n, start, D: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr):
    """The words of some steps, for a block of outputs: a tuple of [lanes, 8]."""
    words = ()
    for ahead in tl.static_range(AHEAD):
        i = inputs(start + ahead, GROUP, STEPS, LANES)
        place = w + (n.to(tl.int64) * D + i)[:, None] * 8 + tl.arange(0, 8)[None, :]
        live = ((i < D) & (start + ahead < STEPS))[:, None]
        words = words + (tl.load(place, mask=live, other=0, eviction_policy="evict_first"),)
    return words


@triton.jit
@no_type_check
def products(
    x, norm, w, scales, n, words, count,
    D: tl.constexpr, GROUP: tl.constexpr, NORMED: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The products of a block of outputs with x, or with x times 1 + the scale of its norm, as a tuple of 8 times [8];
    and the sum of the squares of x. `words` are those of the first steps."""
    sums = ()
    for _ in tl.static_range(8):
        sums = sums + (tl.zeros([LANES, 8], tl.float32),)
    total, squares = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for start in tl.range(0, STEPS, AHEAD):
        here = words
        words = walk(w, n, start + AHEAD, D, GROUP, STEPS, LANES)
        for ahead in tl.static_range(AHEAD):
            i = inputs(start + ahead, GROUP, STEPS, LANES)
            live = (i < D) & (start + ahead < STEPS)
            part = tl.load(x + i, mask=live, other=0.0, eviction_policy="evict_last").to(tl.float32)
            if NORMED:
                squares += part * part
                part += part * tl.load(norm + i, mask=live, other=0.0, eviction_policy="evict_last").to(tl.float32)
            total += part
            more = ()
            for p in tl.static_range(8):
                more = more + (sums[p] + level(here[ahead], p) * part[:, None],)
            sums = more
    group = inputs(0, GROUP, STEPS, LANES) // GROUP
    found = ()
    for p in tl.static_range(8):
        place = scales + (group[:, None].to(tl.int64) * count + outputs(n, p)[None, :]) * 2
        live = (group < D // GROUP)[:, None]
        scale = tl.load(place, mask=live, other=0.0).to(tl.float32)
        zero = tl.load(place + 1, mask=live, other=0.0).to(tl.float32) - 136 * scale
        found = found + (sums[p] * scale + total[:, None] * zero,)
    return tl.reduce(found, 0, added), tl.sum(squares, axis=0)


@triton.jit
@no_type_check
def matvec(
    x, w, scales, residual, out,
    OUT: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, ADD: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    words = walk(w, n, 0, D, GROUP, STEPS, LANES)
    awaited(EARLY)
    found, _ = products(x, x, w, scales, n, words, OUT, D, GROUP, False, STEPS, LANES)
    for p in tl.static_range(8):
        place = outputs(n, p)
        value = found[p]
        if ADD:
            value += tl.load(residual + place).to(tl.float32)
        tl.store(out + place, value.to(out.dtype.element_ty))


@triton.jit
@no_type_check
def geglu_matvec(
    x, norm, gate, gate_scales, up, up_scales, out, eps,
    OUT: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    words = walk(gate, n, 0, D, GROUP, STEPS, LANES)
    awaited(EARLY)
    gates, squares = products(x, norm, gate, gate_scales, n, words, OUT, D, GROUP, True, STEPS, LANES)
    words = walk(up, n, 0, D, GROUP, STEPS, LANES)
    ups, _ = products(x, norm, up, up_scales, n, words, OUT, D, GROUP, True, STEPS, LANES)
    inverse = tl.rsqrt(squares / D + eps)
    for p in tl.static_range(8):
        g, u = gates[p] * inverse, ups[p] * inverse
        tl.store(out + outputs(n, p), (gelu(g) * u).to(out.dtype.element_ty))


@triton.jit
@no_type_check
def rotated_qkv(
    x, norm, q, q_scales, k, k_scales, v, v_scales, angles, out, k_buffer, v_buffer, length,
    k_slot, k_head, v_slot, v_head, slots, eps,
    HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """64 planes of one head of q, k or v, see `device.rotated_qkv`."""
    head, block = tl.program_id(0) // (HALF // 64), tl.program_id(0) % (HALF // 64)
    slot = tl.load(length)
    w, scales, rows, start_head, place, room = q, q_scales, HEADS * 2 * HALF, 0, out + head * 2 * HALF, slot == slot
    if head >= HEADS:
        w, scales, rows, start_head = k, k_scales, KV * 2 * HALF, HEADS
        place, room = k_buffer + slot * k_slot + (head - HEADS) * k_head, (slot >= 0) & (slot < slots)
    if head >= HEADS + KV:
        w, scales, start_head = v, v_scales, HEADS + KV
        place, room = v_buffer + slot * v_slot + (head - HEADS - KV) * v_head, (slot >= 0) & (slot < slots)
    n = (head - start_head) * (2 * HALF // 64) + block
    words = walk(w, n, 0, D, GROUP, STEPS, LANES)
    awaited(EARLY)
    one, squares = products(x, norm, w, scales, n, words, rows, D, GROUP, True, STEPS, LANES)
    words = walk(w, n + HALF // 64, 0, D, GROUP, STEPS, LANES)
    two, _ = products(x, norm, w, scales, n + HALF // 64, words, rows, D, GROUP, True, STEPS, LANES)
    inverse = tl.rsqrt(squares / D + eps)
    for p in tl.static_range(8):
        plane = outputs(block, p)
        angle = tl.where(head < HEADS + KV, tl.load(angles + plane), 0.0)
        cos, sin = tl.cos(angle) * inverse, tl.sin(angle) * inverse
        tl.store(place + plane, (one[p] * cos - two[p] * sin).to(out.dtype.element_ty), mask=room)
        tl.store(place + plane + HALF, (two[p] * cos + one[p] * sin).to(out.dtype.element_ty), mask=room)
