"""The code that runs on the GPU, in Triton: what one program of each kernel reads, computes and writes.

A program owns ROWS rows of a matrix and walks over their D columns, BLOCK at a time; the walk is unrolled, for D is
known when it is compiled. Weights are asked for one block ahead, the first before `awaited`. Sums are float32. A row is
a tensor of its own, so that all lie on the lanes as x does: of a tile of two axes x would be moved for each row. Rows
beyond the last are the last again, and are not written. Knows nothing about PyTorch: `pgfunc.kernels` calls it.

With EARLY (Hopper's programmatic dependent launch) a kernel starts while the one before it still runs. Every program
waits in `awaited` before it reads what a kernel made or writes anything, so that what a kernel after it finds is that
all before are done. Above stands what was made long before: weights are asked for, and lengths read.
"""

import os
from typing import no_type_check  # the shape checks of the tests must not wrap what Triton reads

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # pyright: ignore[reportMissingImports]

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
@no_type_check
def awaited(EARLY: tl.constexpr):
    """Below this the kernel before is done. What was asked for above stays above: no load moves over a barrier."""
    tl.debug_barrier()
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
@no_type_check
def tiles(rows, start: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of each row of weights, which are read once: they give way to what is read again."""
    columns = start + tl.arange(0, BLOCK)
    found = ()
    for r in tl.static_range(COUNT):
        if start + BLOCK <= D:
            part = tl.load(rows[r] + columns, eviction_policy="evict_first")
        else:
            part = tl.load(rows[r] + columns, mask=columns < D, other=0.0, eviction_policy="evict_first")
        found = found + (part,)
    return found


@triton.jit
@no_type_check
def piece(places, start: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of a vector in float32."""
    columns = start + tl.arange(0, BLOCK)
    if start + BLOCK <= D:
        part = tl.load(places + columns, eviction_policy="evict_last")
    else:
        part = tl.load(places + columns, mask=columns < D, other=0.0, eviction_policy="evict_last")
    return part.to(tl.float32)


@triton.jit
@no_type_check
def wide(part):
    """Weights in float32. A GPU converts int8 at a quarter of the rate at which it multiplies."""
    if part.dtype == tl.int8 and not INTERPRETED:
        # its byte, with the sign bit turned, below the exponent of 2**23: the float is 2**23 + 128 + the number
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
    x, norm, rows, eps,
    NORMED: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The products of x, or of its norm, with the rows that begin at these places: so many numbers."""
    ahead = tiles(rows, 0, COUNT, D, BLOCK)
    awaited(EARLY)
    squares = tl.zeros([BLOCK], tl.float32)
    totals = ()
    for _ in tl.static_range(COUNT):
        totals = totals + (tl.zeros([BLOCK], tl.float32),)
    for start in tl.static_range(0, D, BLOCK):
        here = ahead
        if start + BLOCK < D:
            ahead = tiles(rows, start + BLOCK, COUNT, D, BLOCK)
        by = piece(x, start, D, BLOCK)
        if NORMED:  # but for the one number that all are divided by
            squares += by * by
            by += by * piece(norm, start, D, BLOCK)
        more = ()
        for r in tl.static_range(COUNT):
            more = more + (totals[r] + wide(here[r]) * by,)
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
def owned(w, stride, first, OUT: tl.constexpr, ROWS: tl.constexpr):
    """Where the rows of a matrix begin that a program owns."""
    rows = ()
    for r in tl.static_range(ROWS):
        rows = rows + (w + tl.minimum(first + r, OUT - 1).to(tl.int64) * stride,)
    return rows


@triton.jit
@no_type_check
def scaled(value, scales, row, SCALED: tl.constexpr):
    """A product with a row of a matrix in 8 bits, times its scale; as it is for others."""
    return value * tl.load(scales + row).to(tl.float32) if SCALED else value


@triton.jit
@no_type_check
def matvec(
    x, w, w_scale, residual, out, stride,
    OUT: tl.constexpr, D: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    found = products(x, x, owned(w, stride, first, OUT, ROWS), 0.0, False, ROWS, D, BLOCK, EARLY)
    for r in tl.static_range(ROWS):
        if first + r < OUT:
            value = scaled(found[r], w_scale, first + r, SCALED)
            if ADD:
                value += tl.load(residual + first + r).to(tl.float32)
            tl.store(out + first + r, value.to(out.dtype.element_ty))


@triton.jit
@no_type_check
def normed_matvec(
    x, scale, w, w_scale, out, stride, eps,
    OUT: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    found = products(x, scale, owned(w, stride, first, OUT, ROWS), eps, True, ROWS, D, BLOCK, EARLY)
    for r in tl.static_range(ROWS):
        if first + r < OUT:
            value = scaled(found[r], w_scale, first + r, SCALED)
            tl.store(out + first + r, value.to(out.dtype.element_ty))


@triton.jit
@no_type_check
def add_normed(
    x, residual, scale, out, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: the residual and a vector that is normalised before it is added."""
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
def rotated_qkv(
    x, scale, q, q_scale, k, k_scale, v, v_scale, angles, out, k_buffer, v_buffer, length,
    q_stride, k_stride, v_stride, k_slot, k_head, v_slot, v_head, slots, eps,
    HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS planes of one head of q, k or v: of each the rows i and i + HALF, turned by its angle if not of v.

    Those of k and v are written into the slot `length` of their buffers; where there is none, nowhere.
    """
    head, plane = tl.program_id(0) * ROWS // HALF, tl.program_id(0) * ROWS % HALF
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
    pairs = owned(w, stride, row, last, ROWS) + owned(w, stride, row + HALF, last, ROWS)
    found = products(x, scale, pairs, eps, True, 2 * ROWS, D, BLOCK, EARLY)
    for r in tl.static_range(ROWS):
        one = scaled(found[r], w_scale, row + r, SCALED)
        two = scaled(found[ROWS + r], w_scale, row + HALF + r, SCALED)
        angle = tl.where(head < HEADS + KV, tl.load(angles + plane + r), 0.0)
        cos, sin = tl.cos(angle), tl.sin(angle)
        tl.store(place + plane + r, (one * cos - two * sin).to(out.dtype.element_ty), mask=room)
        tl.store(place + plane + r + HALF, (two * cos + one * sin).to(out.dtype.element_ty), mask=room)


@triton.jit
@no_type_check
def geglu_matvec(
    x, scale, gate, gate_scale, up, up_scale, out, gate_stride, up_stride, eps,
    OUT: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    rows = owned(gate, gate_stride, first, OUT, ROWS) + owned(up, up_stride, first, OUT, ROWS)
    found = products(x, scale, rows, eps, True, 2 * ROWS, D, BLOCK, EARLY)
    for r in tl.static_range(ROWS):
        if first + r < OUT:
            g = scaled(found[r], gate_scale, first + r, SCALED)
            u = scaled(found[ROWS + r], up_scale, first + r, SCALED)
            tl.store(out + first + r, (gelu(g) * u).to(out.dtype.element_ty))


@triton.jit
@no_type_check
def seen(length, slots, window):
    """The first key that is seen, and the one behind the last."""
    end = tl.minimum(tl.load(length) + 1, slots).to(tl.int32)
    return tl.maximum(end - window, 0), end


@triton.jit
@no_type_check
def attend_chunk(
    q, k, v, length, peaks, sums, parts, k_slot, k_head, v_slot, v_head, slots, window, scale, cap,
    G: tl.constexpr, H: tl.constexpr, CHUNKS: tl.constexpr, CAP: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The heads of one kv head over CHUNK keys: the largest score, the sum of the weights below it, and their values.

    A chunk of which nothing is seen writes nothing.
    """
    chunk, kv = tl.program_id(0), tl.program_id(1)
    awaited(EARLY)
    begin, end = seen(length, slots, window)
    key = chunk * CHUNK + tl.arange(0, CHUNK)
    if (chunk * CHUNK < end) & ((chunk + 1) * CHUNK > begin):
        group, column = tl.arange(0, GROUP), tl.arange(0, HEAD)
        live, real = (key >= begin) & (key < end), column < H
        inside = live[:, None] & real[None, :]
        place = key.to(tl.int64)[:, None]
        head = kv * G + group
        mine = (group < G)[:, None] & real[None, :]
        queries = tl.load(q + head[:, None] * H + column[None, :], mask=mine, other=0.0)
        values = tl.load(v + place * v_slot + kv * v_head + column[None, :], mask=inside, other=0.0)
        keys = tl.load(k + place * k_slot + kv * k_head + column[None, :], mask=inside, other=0.0)
        tl.debug_barrier()  # all three are asked for before the first is waited for
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if CAP:
            scores = (2 * tl.sigmoid(2 * scores / cap) - 1) * cap  # tanh
        scores = tl.where(live[None, :], scores, float("-inf"))
        peak = tl.max(scores, axis=1)
        weights = tl.exp(scores - peak[:, None])
        part = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        place = head * CHUNKS + chunk
        tl.store(peaks + place, peak, mask=group < G)
        tl.store(sums + place, tl.sum(weights, axis=1), mask=group < G)
        tl.store(parts + place.to(tl.int64)[:, None] * H + column[None, :], part, mask=mine)


@triton.jit
@no_type_check
def attend_join(
    length, peaks, sums, parts, out, slots, window,
    H: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of one head, from the chunks of which something is seen; others are not read."""
    head, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    awaited(EARLY)
    begin, end = seen(length, slots, window)
    peak, total = -3.0e38, 0.0  # below every score; finite, so that it can be subtracted from itself
    joined = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, CHUNKS, PARTS):
        chunk = first + tl.arange(0, PARTS)
        live, place = (chunk * CHUNK < end) & ((chunk + 1) * CHUNK > begin), head * CHUNKS + chunk
        peaked = tl.load(peaks + place, mask=live, other=float("-inf"))
        summed = tl.load(sums + place, mask=live, other=0.0)
        inside = live[:, None] & (column < H)[None, :]
        part = tl.load(parts + place.to(tl.int64)[:, None] * H + column[None, :], mask=inside, other=0.0)
        higher = tl.maximum(peak, tl.max(peaked, axis=0))
        shrunk, weight = tl.exp(peak - higher), tl.exp(peaked - higher)
        total = total * shrunk + tl.sum(summed * weight, axis=0)
        joined = joined * shrunk + tl.sum(part * weight[:, None], axis=0)
        peak = higher
    joined = tl.where(total > 0, joined / total, 0.0)  # no key is seen
    tl.store(out + head * H + column, joined.to(out.dtype.element_ty), mask=column < H)


@triton.jit
@no_type_check
def attend_spans(
    q, k, v, begin, end, out, k_row, k_slot, k_head, v_row, v_slot, v_head, tokens, slots, scale, cap,
    HEADS: tl.constexpr, KV: tl.constexpr, G: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, CAP: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """QUERIES rows of queries, all heads of one kv head of a token beside one another, over the keys that any sees."""
    row, kv = tl.program_id(1) // KV, tl.program_id(1) % KV
    mine, column = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, HEAD)
    token, head, real = mine // G, kv * G + mine % G, column < H
    here = row.to(tl.int64) * tokens + token
    first = tl.load(begin + here, mask=token < tokens, other=slots)
    last = tl.load(end + here, mask=token < tokens, other=0)
    places, inside = (here * HEADS + head)[:, None] * H + column[None, :], (token < tokens)[:, None] & real[None, :]
    queries = tl.load(q + places, mask=inside, other=0.0)
    k += row.to(tl.int64) * k_row + kv * k_head
    v += row.to(tl.int64) * v_row + kv * v_head
    peak = tl.full(
        [QUERIES], -3.0e38, tl.float32
    )  # below every score; finite, so that it can be subtracted from itself
    total = tl.zeros([QUERIES], tl.float32)
    joined = tl.zeros([QUERIES, HEAD], tl.float32)
    stop = tl.minimum(tl.max(last), slots)
    for start in tl.range(tl.min(first) // KEYS * KEYS, stop, KEYS):
        key = start + tl.arange(0, KEYS)
        live = (key < stop)[:, None] & real[None, :]
        keys = tl.load(k + key.to(tl.int64)[:, None] * k_slot + column[None, :], mask=live, other=0.0)
        values = tl.load(v + key.to(tl.int64)[:, None] * v_slot + column[None, :], mask=live, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if CAP:
            scores = (2 * tl.sigmoid(2 * scores / cap) - 1) * cap  # tanh
        seen = (key[None, :] >= first[:, None]) & (key[None, :] < last[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        shrunk, weights = tl.exp(peak - higher), tl.exp(scores - higher[:, None])
        total = total * shrunk + tl.sum(weights, axis=1)
        joined = joined * shrunk[:, None]
        joined = tl.dot(weights.to(values.dtype), values, joined, input_precision="ieee")
        peak = higher
    joined = tl.where(total[:, None] > 0, joined / total[:, None], 0.0)  # no key is seen
    tl.store(out + places, joined.to(out.dtype.element_ty), mask=inside)
