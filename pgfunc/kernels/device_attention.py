"""The code that runs on the GPU, in Triton: attention, of one token to a cache and of a prompt.

See `device` for EARLY, and for what stands above `awaited`.
"""

from typing import no_type_check  # the shape checks of the tests must not wrap what Triton reads

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from pgfunc.kernels.device import awaited


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
    # below every score; finite, so that it can be subtracted from itself
    peak = tl.full([QUERIES], -3.0e38, tl.float32)
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
