"""The code that runs on the GPU, in Triton: what one program of each kernel reads, computes and writes.

A program owns ROWS rows of a matrix and walks over their D columns, BLOCK at a time; the walk is unrolled, for D is
known when it is compiled. Weights are asked for one block ahead, the first before `awaited`. Sums are float32. Rows
beyond the last are the last again, and are not written. Knows nothing about PyTorch: `pgfunc.kernels` calls it.

With EARLY (Hopper's programmatic dependent launch) a kernel starts while the one before it still runs. Every program
waits in `awaited` before it reads what a kernel made or writes anything, so that what a kernel after it finds is that
all before are done; the weights, which no kernel makes, are asked for above.
"""

from typing import no_type_check  # the shape checks of the tests must not wrap what Triton reads

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # pyright: ignore[reportMissingImports]


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
def tile(places, stride, rows, start: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of these rows of a matrix, which are read once: they give way to what is read again."""
    columns = start + tl.arange(0, BLOCK)[None, :]
    places += rows.to(tl.int64)[:, None] * stride + columns
    if start + BLOCK <= D:
        part = tl.load(places, eviction_policy="evict_first")
    else:
        part = tl.load(places, mask=columns < D, other=0.0, eviction_policy="evict_first")
    return part


@triton.jit
@no_type_check
def piece(places, start: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of a vector, as a row in float32."""
    columns = start + tl.arange(0, BLOCK)[None, :]
    if start + BLOCK <= D:
        part = tl.load(places + columns, eviction_policy="evict_last")
    else:
        part = tl.load(places + columns, mask=columns < D, other=0.0, eviction_policy="evict_last")
    return part.to(tl.float32)


@triton.jit
@no_type_check
def inverse_rms(x, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    squares = tl.zeros([1, BLOCK], tl.float32)
    for start in tl.static_range(0, D, BLOCK):
        part = piece(x, start, D, BLOCK)
        squares += part * part
    return tl.rsqrt(tl.sum(squares) / D + eps)


@triton.jit
@no_type_check
def normed(x, scale, inverse, start: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """A piece of the normalised vector, rounded to its dtype as `ops.rms_norm` does, in float32."""
    part = piece(x, start, D, BLOCK) * inverse * (1 + piece(scale, start, D, BLOCK))
    return part.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
@no_type_check
def normed_products(
    x, scale, w, stride, rows, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    ahead = tile(w, stride, rows, 0, D, BLOCK)
    awaited(EARLY)
    inverse = inverse_rms(x, eps, D, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.static_range(0, D, BLOCK):
        here = ahead
        if start + BLOCK < D:
            ahead = tile(w, stride, rows, start + BLOCK, D, BLOCK)
        total += here.to(tl.float32) * normed(x, scale, inverse, start, D, BLOCK)
    return tl.sum(total, axis=1)


@triton.jit
@no_type_check
def two_normed_products(
    x, scale, w, w_stride, w_rows, u, u_stride, u_rows, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`normed_products` of rows of two matrices, or of one, in one walk over the vector."""
    w_ahead, u_ahead = tile(w, w_stride, w_rows, 0, D, BLOCK), tile(u, u_stride, u_rows, 0, D, BLOCK)
    awaited(EARLY)
    inverse = inverse_rms(x, eps, D, BLOCK)
    w_total = tl.zeros([ROWS, BLOCK], tl.float32)
    u_total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.static_range(0, D, BLOCK):
        w_here, u_here = w_ahead, u_ahead
        if start + BLOCK < D:
            w_ahead = tile(w, w_stride, w_rows, start + BLOCK, D, BLOCK)
            u_ahead = tile(u, u_stride, u_rows, start + BLOCK, D, BLOCK)
        part = normed(x, scale, inverse, start, D, BLOCK)
        w_total += w_here.to(tl.float32) * part
        u_total += u_here.to(tl.float32) * part
    return tl.sum(w_total, axis=1), tl.sum(u_total, axis=1)


@triton.jit
@no_type_check
def products(x, w, stride, rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    ahead = tile(w, stride, rows, 0, D, BLOCK)
    awaited(EARLY)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.static_range(0, D, BLOCK):
        here = ahead
        if start + BLOCK < D:
            ahead = tile(w, stride, rows, start + BLOCK, D, BLOCK)
        total += here.to(tl.float32) * piece(x, start, D, BLOCK)
    return tl.sum(total, axis=1)


@triton.jit
@no_type_check
def owned(OUT: tl.constexpr, ROWS: tl.constexpr):
    """The rows of this program, and those of them that it writes."""
    mine = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return tl.minimum(mine, OUT - 1), mine < OUT


@triton.jit
@no_type_check
def matvec(
    x, w, residual, out, stride,
    OUT: tl.constexpr, D: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    rows, mine = owned(OUT, ROWS)
    found = products(x, w, stride, rows, D, ROWS, BLOCK, EARLY)
    if ADD:
        found += tl.load(residual + rows).to(tl.float32)
    tl.store(out + rows, found.to(out.dtype.element_ty), mask=mine)


@triton.jit
@no_type_check
def normed_matvec(
    x, scale, w, out, stride, eps,
    OUT: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    rows, mine = owned(OUT, ROWS)
    found = normed_products(x, scale, w, stride, rows, eps, D, ROWS, BLOCK, EARLY)
    tl.store(out + rows, found.to(out.dtype.element_ty), mask=mine)


@triton.jit
@no_type_check
def rotated_qkv(
    x, scale, q, k, v, angles, out, q_stride, k_stride, v_stride, eps,
    HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS planes of one head of q, k or v: of each the rows i and i + HALF, turned by its angle if not of v."""
    first = tl.program_id(0) * ROWS
    head, plane = first // HALF, first % HALF + tl.arange(0, ROWS)
    w, stride, start_head = q, q_stride, 0
    if head >= HEADS:
        w, stride, start_head = k, k_stride, HEADS
    if head >= HEADS + KV:
        w, stride, start_head = v, v_stride, HEADS + KV
    rows = (head - start_head) * 2 * HALF + plane
    one, two = two_normed_products(x, scale, w, stride, rows, w, stride, rows + HALF, eps, D, ROWS, BLOCK, EARLY)
    angle = tl.where(head < HEADS + KV, tl.load(angles + plane), 0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    place = out + head * 2 * HALF + plane
    tl.store(place, (one * cos - two * sin).to(out.dtype.element_ty))
    tl.store(place + HALF, (two * cos + one * sin).to(out.dtype.element_ty))


@triton.jit
@no_type_check
def geglu_matvec(
    x, scale, gate, up, out, gate_stride, up_stride, eps,
    OUT: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    rows, mine = owned(OUT, ROWS)
    g, u = two_normed_products(x, scale, gate, gate_stride, rows, up, up_stride, rows, eps, D, ROWS, BLOCK, EARLY)
    # (1 + tanh(y)) / 2 = sigmoid(2y); 1.5957691 is twice the square root of 2/π
    found = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g)) * u
    tl.store(out + rows, found.to(out.dtype.element_ty), mask=mine)


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
