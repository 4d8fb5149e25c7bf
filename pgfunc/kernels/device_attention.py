"""The code that runs on the GPU, in Triton: the attention of one token to a cache, and of a prompt.

`device` explains EARLY, and what a program may read before `awaited`.
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
    """The query heads of one kv head over CHUNK keys, for COLUMNS columns of the values; the last program combines all.

    A program returns at once if the query does not see its chunk. If the query sees no slot, chunk 0 runs. The kernel
    before, `norm_qkv_rope`, writes only q and slot `length` of the buffers, and this one starts only after all kernels
    before that are done (HOLD). So the slots before `length` may be read while `norm_qkv_rope` still runs.
    """
    chunk, kv, slices = tl.program_id(0), tl.program_id(1), tl.num_programs(2)
    end = tl.minimum(tl.load(length) + 1, slots).to(tl.int32)
    begin = tl.maximum(end - window, 0)
    first_chunk, last_chunk = begin // CHUNK, tl.maximum(end - 1, begin) // CHUNK
    if (chunk >= first_chunk) & (chunk <= last_chunk):
        key, column = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, HEAD)
        value_column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        head = kv * G + tl.arange(0, GROUP)
        is_head = tl.arange(0, GROUP) < G
        k += kv * k_head
        v += kv * v_head
        older, newest = (key >= begin) & (key < end - 1), tl.maximum(end - 1, 0).to(tl.int64)
        keys = tl.load(
            k + key.to(tl.int64)[:, None] * k_slot + column[None, :],
            mask=older[:, None] & (column < H)[None, :],
            other=0.0,
        )
        values = tl.load(
            v + key.to(tl.int64)[:, None] * v_slot + value_column[None, :],
            mask=older[:, None] & (value_column < H)[None, :],
            other=0.0,
        )
        awaited(EARLY)
        seen = (key >= begin) & (key < end)
        new_key = tl.load(k + newest * k_slot + column, mask=column < H, other=0.0)
        new_value = tl.load(v + newest * v_slot + value_column, mask=value_column < H, other=0.0)
        queries = tl.load(
            q + head[:, None] * H + column[None, :], mask=is_head[:, None] & (column < H)[None, :], other=0.0
        )
        is_new = (key == end - 1)[:, None]
        keys, values = tl.where(is_new, new_key[None, :], keys), tl.where(is_new, new_value[None, :], values)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if CAP:
            scores = (2 * tl.sigmoid(2 * scores / cap) - 1) * cap  # tanh
        scores = tl.where(seen[None, :], scores, float("-inf"))
        peak = tl.maximum(tl.max(scores, axis=1), LEAST)
        weights = tl.exp(scores - peak[:, None])
        total = tl.maximum(tl.sum(weights, axis=1), 1e-30)  # not 0 if nothing is seen
        partial = tl.dot(weights.to(values.dtype), values, input_precision="ieee") / total[:, None]
        tl.store(sizes + head * CHUNKS + chunk, peak + tl.log(total), mask=is_head)
        inside = is_head[:, None] & (value_column < H)[None, :]
        tl.store(
            parts + (head * CHUNKS + chunk).to(tl.int64)[:, None] * H + value_column[None, :], partial, mask=inside
        )
        tl.debug_barrier()  # all warps have stored before the program is counted
        done = tl.atomic_add(arrivals + kv * slices + tl.program_id(2), 1, sem="acq_rel")
        if done == last_chunk - first_chunk:
            peak = tl.full([GROUP], LEAST, tl.float32)
            total = tl.zeros([GROUP], tl.float32)
            combined = tl.zeros([GROUP, COLUMNS], tl.float32)
            for start in range(first_chunk, last_chunk + 1, PARTS):
                partials, logs, new_peak = (), (), peak
                for i in tl.static_range(PARTS):  # start all loads before the first result is used
                    is_part, index = is_head & (start + i <= last_chunk), head * CHUNKS + start + i
                    log = tl.load(sizes + index, mask=is_part, other=float("-inf"))
                    pointers = parts + index.to(tl.int64)[:, None] * H + value_column[None, :]
                    partials = partials + (
                        tl.load(pointers, mask=is_part[:, None] & (value_column < H)[None, :], other=0.0),
                    )
                    logs, new_peak = logs + (log,), tl.maximum(new_peak, log)
                rescale = tl.exp(peak - new_peak)
                total, combined, peak = total * rescale, combined * rescale[:, None], new_peak
                for i in tl.static_range(PARTS):
                    weight = tl.exp(logs[i] - peak)
                    total += weight
                    combined += partials[i] * weight[:, None]
            combined *= tl.where(is_head, 1 / total, 0.0)[:, None]
            tl.store(out + head[:, None] * H + value_column[None, :], combined.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def prefill_attention(
    q, k, v, begin, end, out, q_row, q_token, q_head, k_row, k_slot, k_head, v_row, v_slot, v_head, tokens, slots,
    scale, cap,
    HEADS: tl.constexpr, KV: tl.constexpr, G: tl.constexpr, H: tl.constexpr, HEAD: tl.constexpr, CAP: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """QUERIES queries, over the keys that any of them sees. The query heads of a token and kv head are adjacent."""
    row, kv = tl.program_id(1) // KV, tl.program_id(1) % KV
    query, column = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, HEAD)
    token, head, is_column = query // G, kv * G + query % G, column < H
    token_index = row.to(tl.int64) * tokens + token
    first_key = tl.load(begin + token_index, mask=token < tokens, other=slots)
    end_key = tl.load(end + token_index, mask=token < tokens, other=0)
    inside = (token < tokens)[:, None] & is_column[None, :]
    q += row.to(tl.int64) * q_row
    queries = tl.load(
        q + (token.to(tl.int64) * q_token + head * q_head)[:, None] + column[None, :], mask=inside, other=0.0
    )
    k += row.to(tl.int64) * k_row + kv * k_head
    v += row.to(tl.int64) * v_row + kv * v_head
    peak = tl.full([QUERIES], LEAST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    combined = tl.zeros([QUERIES, HEAD], tl.float32)
    stop = tl.minimum(tl.max(end_key), slots)
    factor = 2 * scale / cap if CAP else scale * LOG2_E  # exp2 is faster than exp
    # all queries of this program see all keys from `inner` to `outer`, exclusive: these need no mask
    inner, outer = tl.max(tl.where(token < tokens, first_key, 0)), tl.min(tl.where(token < tokens, end_key, slots))
    for start in tl.range(tl.min(first_key) // KEYS * KEYS, stop, KEYS):
        key = start + tl.arange(0, KEYS)
        readable = (key < stop)[:, None] & is_column[None, :]
        keys = tl.load(k + key.to(tl.int64)[:, None] * k_slot + column[None, :], mask=readable, other=0.0)
        values = tl.load(v + key.to(tl.int64)[:, None] * v_slot + column[None, :], mask=readable, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * factor
        if CAP:
            scores = (2 * tl.sigmoid(scores) - 1) * (cap * LOG2_E)  # tanh
        if (start < inner) | (start + KEYS > outer):
            seen = (key[None, :] >= first_key[:, None]) & (key[None, :] < end_key[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        rescale, weights = tl.exp2(peak - new_peak), tl.exp2(scores - new_peak[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        combined = combined * rescale[:, None]
        combined = tl.dot(weights.to(values.dtype), values, combined, input_precision="ieee")
        peak = new_peak
    combined *= tl.where(total > 0, 1 / total, 0.0)[:, None]  # 0 where no key is seen
    pointers = (token_index * HEADS + head)[:, None] * H + column[None, :]
    tl.store(out + pointers, combined.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def rope_to_cache(
    q, k, v, angles, q_out, k_out, v_out,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, tokens, slots,
    HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr,
    QS: tl.constexpr, KS: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """One slot of the cache: the rotated q and k of its token, and its v. Slots after the last token get zeros."""
    slot, row, has_token = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(0) < tokens
    plane = tl.arange(0, PLANES)
    is_plane = plane < HALF
    angle = tl.load(angles + (row * tokens + slot) * HALF + plane, mask=is_plane & has_token, other=0.0)
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    kv, heads = tl.arange(0, KS), tl.arange(0, QS)
    kv_mask, q_mask = (kv < KV)[:, None] & is_plane[None, :], (heads < HEADS)[:, None] & is_plane[None, :] & has_token
    pointers = q + row * q_row + slot * q_token + heads[:, None] * q_head + plane[None, :]
    q_lower = tl.load(pointers, mask=q_mask, other=0.0).to(tl.float32)
    q_upper = tl.load(pointers + HALF, mask=q_mask, other=0.0).to(tl.float32)
    pointers = k + row * k_row + slot * k_token + kv[:, None] * k_head + plane[None, :]
    k_lower = tl.load(pointers, mask=kv_mask & has_token, other=0.0).to(tl.float32)
    k_upper = tl.load(pointers + HALF, mask=kv_mask & has_token, other=0.0).to(tl.float32)
    pointers = v + row * v_row + slot * v_token + kv[:, None] * v_head + plane[None, :]
    v_lower = tl.load(pointers, mask=kv_mask & has_token, other=0.0)
    v_upper = tl.load(pointers + HALF, mask=kv_mask & has_token, other=0.0)
    pointers = q_out + ((row * tokens + slot) * HEADS + heads)[:, None] * 2 * HALF + plane[None, :]
    tl.store(pointers, (q_lower * cos - q_upper * sin).to(q_out.dtype.element_ty), mask=q_mask)
    tl.store(pointers + HALF, (q_upper * cos + q_lower * sin).to(q_out.dtype.element_ty), mask=q_mask)
    pointers = ((row * slots + slot) * KV + kv)[:, None] * 2 * HALF + plane[None, :]
    tl.store(k_out + pointers, (k_lower * cos - k_upper * sin).to(k_out.dtype.element_ty), mask=kv_mask)
    tl.store(k_out + pointers + HALF, (k_upper * cos + k_lower * sin).to(k_out.dtype.element_ty), mask=kv_mask)
    tl.store(v_out + pointers, v_lower, mask=kv_mask)
    tl.store(v_out + pointers + HALF, v_upper, mask=kv_mask)
