"""The code that runs on the GPU, in Triton: the attention of one token to a cache, and of a prompt.

`device` explains EARLY, and what may stand before `awaited`.
"""

from typing import no_type_check  # the shape checks of the tests must not wrap what Triton reads

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from pgfunc.kernels.device import awaited

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-3.0e38)  # below every score; finite, so that it can be subtracted from itself


@triton.jit
@no_type_check
def decode_attention(
    q, k, v, length, arrivals, sizes, parts, out, k_slot, k_head, v_slot, v_head, slots, window, scale, cap,
    G: tl.constexpr, H: tl.constexpr, CHUNKS: tl.constexpr, CAP: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, HEAD: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The heads of one kv head over CHUNK keys, for COLUMNS columns of the values; the last program combines all.

    A program whose chunk is not seen does nothing, except the first. The kernel before, `norm_qkv_rope`, writes only q
    and slot `length` of the buffers, and starts this one when all kernels before it are done (HOLD). So the slots
    before `length` may be read while it still runs.
    """
    chunk, kv, slices = tl.program_id(0), tl.program_id(1), tl.num_programs(2)
    end = tl.minimum(tl.load(length) + 1, slots).to(tl.int32)
    begin = tl.maximum(end - window, 0)
    first, last = begin // CHUNK, tl.maximum(end - 1, begin) // CHUNK
    if (chunk >= first) & (chunk <= last):
        key, column = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, HEAD)
        mine = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        head = kv * G + tl.arange(0, GROUP)
        real = tl.arange(0, GROUP) < G
        k += kv * k_head
        v += kv * v_head
        older, newest = (key >= begin) & (key < end - 1), tl.maximum(end - 1, 0).to(tl.int64)
        keys = tl.load(
            k + key.to(tl.int64)[:, None] * k_slot + column[None, :],
            mask=older[:, None] & (column < H)[None, :],
            other=0.0,
        )
        values = tl.load(
            v + key.to(tl.int64)[:, None] * v_slot + mine[None, :],
            mask=older[:, None] & (mine < H)[None, :],
            other=0.0,
        )
        awaited(EARLY)
        live = (key >= begin) & (key < end)
        new_key = tl.load(k + newest * k_slot + column, mask=column < H, other=0.0)
        new_value = tl.load(v + newest * v_slot + mine, mask=mine < H, other=0.0)
        queries = tl.load(
            q + head[:, None] * H + column[None, :], mask=real[:, None] & (column < H)[None, :], other=0.0
        )
        added = (key == end - 1)[:, None]
        keys, values = tl.where(added, new_key[None, :], keys), tl.where(added, new_value[None, :], values)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if CAP:
            scores = (2 * tl.sigmoid(2 * scores / cap) - 1) * cap  # tanh
        scores = tl.where(live[None, :], scores, float("-inf"))
        peak = tl.maximum(tl.max(scores, axis=1), LEAST)
        weights = tl.exp(scores - peak[:, None])
        total = tl.maximum(tl.sum(weights, axis=1), 1e-30)  # nothing is seen
        part = tl.dot(weights.to(values.dtype), values, input_precision="ieee") / total[:, None]
        tl.store(sizes + head * CHUNKS + chunk, peak + tl.log(total), mask=real)
        inside = real[:, None] & (mine < H)[None, :]
        tl.store(parts + (head * CHUNKS + chunk).to(tl.int64)[:, None] * H + mine[None, :], part, mask=inside)
        tl.debug_barrier()  # the stores of all warps stand before the count
        before = tl.atomic_add(arrivals + kv * slices + tl.program_id(2), 1, sem="acq_rel")
        if before == last - first:
            peak = tl.full([GROUP], LEAST, tl.float32)
            total = tl.zeros([GROUP], tl.float32)
            joined = tl.zeros([GROUP, COLUMNS], tl.float32)
            for start in range(first, last + 1, PARTS):
                found, logs, higher = (), (), peak
                for i in tl.static_range(PARTS):  # all are asked for before the first is waited for
                    there, place = real & (start + i <= last), head * CHUNKS + start + i
                    log = tl.load(sizes + place, mask=there, other=float("-inf"))
                    places = parts + place.to(tl.int64)[:, None] * H + mine[None, :]
                    found = found + (tl.load(places, mask=there[:, None] & (mine < H)[None, :], other=0.0),)
                    logs, higher = logs + (log,), tl.maximum(higher, log)
                shrunk = tl.exp(peak - higher)
                total, joined, peak = total * shrunk, joined * shrunk[:, None], higher
                for i in tl.static_range(PARTS):
                    weight = tl.exp(logs[i] - peak)
                    total += weight
                    joined += found[i] * weight[:, None]
            joined *= tl.where(real, 1 / total, 0.0)[:, None]
            tl.store(out + head[:, None] * H + mine[None, :], joined.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def prefill_attention(
    q, k, v, begin, end, out, q_row, q_token, q_head, k_row, k_slot, k_head, v_row, v_slot, v_head, tokens, slots,
    scale, cap,
    HEADS: tl.constexpr, KV: tl.constexpr, G: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, CAP: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """QUERIES rows of queries, over the keys that any of them sees. Heads of one kv head of a token are adjacent."""
    row, kv = tl.program_id(1) // KV, tl.program_id(1) % KV
    mine, column = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, HEAD)
    token, head, real = mine // G, kv * G + mine % G, column < H
    here = row.to(tl.int64) * tokens + token
    first = tl.load(begin + here, mask=token < tokens, other=slots)
    last = tl.load(end + here, mask=token < tokens, other=0)
    inside = (token < tokens)[:, None] & real[None, :]
    q += row.to(tl.int64) * q_row
    queries = tl.load(
        q + (token.to(tl.int64) * q_token + head * q_head)[:, None] + column[None, :], mask=inside, other=0.0
    )
    k += row.to(tl.int64) * k_row + kv * k_head
    v += row.to(tl.int64) * v_row + kv * v_head
    peak = tl.full([QUERIES], LEAST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    joined = tl.zeros([QUERIES, HEAD], tl.float32)
    stop = tl.minimum(tl.max(last), slots)
    factor = 2 * scale / cap if CAP else scale * LOG2_E  # powers of two are quicker than those of e
    # from here to there all queries see all keys
    inner, outer = tl.max(tl.where(token < tokens, first, 0)), tl.min(tl.where(token < tokens, last, slots))
    for start in tl.range(tl.min(first) // KEYS * KEYS, stop, KEYS):
        key = start + tl.arange(0, KEYS)
        live = (key < stop)[:, None] & real[None, :]
        keys = tl.load(k + key.to(tl.int64)[:, None] * k_slot + column[None, :], mask=live, other=0.0)
        values = tl.load(v + key.to(tl.int64)[:, None] * v_slot + column[None, :], mask=live, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * factor
        if CAP:
            scores = (2 * tl.sigmoid(scores) - 1) * (cap * LOG2_E)  # tanh
        if (start < inner) | (start + KEYS > outer):
            seen = (key[None, :] >= first[:, None]) & (key[None, :] < last[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        shrunk, weights = tl.exp2(peak - higher), tl.exp2(scores - higher[:, None])
        total = total * shrunk + tl.sum(weights, axis=1)
        joined = joined * shrunk[:, None]
        joined = tl.dot(weights.to(values.dtype), values, joined, input_precision="ieee")
        peak = higher
    joined *= tl.where(total > 0, 1 / total, 0.0)[:, None]  # 0 where no key is seen
    places = (here * HEADS + head)[:, None] * H + column[None, :]
    tl.store(out + places, joined.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def rope_to_cache(
    q, k, v, angles, q_out, k_out, v_out,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, tokens, slots,
    HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr,
    QS: tl.constexpr, KS: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """One slot: the rotated q and k of its token, and its v; k and v are 0 in slots behind the last token."""
    slot, row, here = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(0) < tokens
    plane = tl.arange(0, PLANES)
    real = plane < HALF
    angle = tl.load(angles + (row * tokens + slot) * HALF + plane, mask=real & here, other=0.0)
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    kv, heads = tl.arange(0, KS), tl.arange(0, QS)
    inside, there = (kv < KV)[:, None] & real[None, :], (heads < HEADS)[:, None] & real[None, :] & here
    places = q + row * q_row + slot * q_token + heads[:, None] * q_head + plane[None, :]
    one = tl.load(places, mask=there, other=0.0).to(tl.float32)
    two = tl.load(places + HALF, mask=there, other=0.0).to(tl.float32)
    places = k + row * k_row + slot * k_token + kv[:, None] * k_head + plane[None, :]
    key = tl.load(places, mask=inside & here, other=0.0).to(tl.float32)
    key_too = tl.load(places + HALF, mask=inside & here, other=0.0).to(tl.float32)
    places = v + row * v_row + slot * v_token + kv[:, None] * v_head + plane[None, :]
    value = tl.load(places, mask=inside & here, other=0.0)
    value_too = tl.load(places + HALF, mask=inside & here, other=0.0)
    places = q_out + ((row * tokens + slot) * HEADS + heads)[:, None] * 2 * HALF + plane[None, :]
    tl.store(places, (one * cos - two * sin).to(q_out.dtype.element_ty), mask=there)
    tl.store(places + HALF, (two * cos + one * sin).to(q_out.dtype.element_ty), mask=there)
    places = ((row * slots + slot) * KV + kv)[:, None] * 2 * HALF + plane[None, :]
    tl.store(k_out + places, (key * cos - key_too * sin).to(k_out.dtype.element_ty), mask=inside)
    tl.store(k_out + places + HALF, (key_too * cos + key * sin).to(k_out.dtype.element_ty), mask=inside)
    tl.store(v_out + places, value, mask=inside)
    tl.store(v_out + places + HALF, value_too, mask=inside)
