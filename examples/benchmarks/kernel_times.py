"""Check the kernels that decode one row, then time them beside cuBLAS and with other settings.

    python examples/benchmarks/kernel_times.py geglu  # those with this in the name; default: all of both 3B

Needs a CUDA device. A CUDA graph makes many calls, each on weights of its own, 400 MB or more in all, so that none are
in the L2 cache. Prints microseconds a call, GB/s of weights (or of live keys and values), and their share of the
bandwidth of a copy (bytes read plus written), which is measured first. `=` marks the setting in
`pgfunc.kernels.tuning`, `*` the fastest setting: edit `TILES`, `CHUNKS` and `SHARES` there. The run ends if an error
against float64 is larger than bf16 explains.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

import pgfunc as pg
from pgfunc import ops
from pgfunc.jit import cuda_graphs
from pgfunc.kernels import calls, reference, tuning
from pgfunc.kernels.calls import KernelMatrix
from pgfunc.kernels.launch import shared_memory
from pgfunc.kernels.tuning import Chunk, Share, Tile
from pgfunc.quant import lowbit

# rows, block and warps; keys, columns, warps and parts; queries, keys, warps and stages
TILES = (
    "1 512 1, 1 1024 1, 1 2048 1, 1 1024 2, 1 2048 2, 1 1024 4, 1 2048 4, 1 4096 4, 2 512 1, 2 1024 1, 2 1024 2, "
    "2 2048 1, 2 2048 2, 2 2048 4, 4 512 1, 4 1024 2, 4 1024 4, 4 2048 2, 4 2048 4, 4 4096 4, 8 1024 4"
)
CHUNKS = "16 64 4 16, 32 32 4 16, 32 64 4 8, 32 64 4 16, 32 128 4 8, 64 64 4 8, 64 64 8 8, 64 128 8 8"
SHARES = (
    "16 64 4 2, 32 32 4 2, 32 64 4 2, 32 64 4 3, 64 32 4 2, 64 32 4 3, 64 32 4 4, 64 64 4 2, 64 32 8 3, 64 64 8 2, "
    "128 32 8 2, 128 32 8 3, 128 64 8 2"
)

FORMATS = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 128}  # bytes a weight


def arguments(shapes: Iterable[tuple[int, ...]], more: tuple, kind: str = "bf16") -> tuple:
    """Tensors of these shapes, matrices scaled to keep lengths and perhaps quantized; then the further arguments."""
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    matrices = [x.mul_(x.shape[-1] ** -0.5) if x.dim() == 2 else x for x in tensors]
    return *(lowbit.quantize(x, kind) if kind != "bf16" and x.dim() == 2 else x for x in matrices), *more


def cases(name: str) -> Iterator[tuple[str, str, int, Callable[[], tuple]]]:
    c = pg.PUBLISHED[name].text
    d, f, v, nh, kh = c.width, c.hidden, c.vocab, c.heads * c.head_dim, c.kv_heads * c.head_dim
    angles, end = torch.rand(1, 1, c.head_dim // 2, device="cuda"), torch.tensor([300], device="cuda")
    more = angles, *arguments([(384, c.kv_heads, c.head_dim)] * 2, (end, c.eps))
    products = {
        "qkv": ("norm_qkv_rope", ((d,), (d,), (nh, d), (kh, d), (kh, d)), more),
        "out": ("matvec", ((nh,), (d, nh), (d,)), ()),
        "geglu": ("norm_geglu", ((d,), (d,), (f, d), (f, d)), (c.eps,)),
        "down": ("matvec", ((f,), (d, f), (d,)), ()),
        "head": ("norm_matvec", ((d,), (d,), (v, d)), (c.eps,)),
    }
    for kind, size in FORMATS.items():
        for part, (fn, shapes, rest) in products.items():
            if kind != "int4" or part != "head":
                make = partial(arguments, shapes, rest, kind)
                yield f"{name} {kind} {part}", fn, int(size * sum(map(prod, shapes))), make
    for slots, length in ((384, 300), (1536, 1100), (6144, 4200), (6144, 300)):
        kv, last = (slots, c.kv_heads, c.head_dim), torch.tensor([length - 1], device="cuda")
        make = partial(arguments, [(c.heads, c.head_dim), kv, kv], (last, c.query_scale, c.attention_softcap))
        yield f"{name} attend {length} of {slots}", "decode_attention", 4 * length * c.kv_heads * c.head_dim, make
    for rows, tokens in ((1, 288), (64, 288), (1, 1088)):
        shapes = [(rows, tokens, heads, c.head_dim) for heads in (c.heads, c.kv_heads, c.kv_heads)]
        limits = [torch.full((rows, tokens), limit, device="cuda") for limit in (0, tokens - 5)]
        make = partial(arguments, shapes, (*limits, c.query_scale, c.attention_softcap))
        size = 2 * prod(shapes[0]) + 2 * sum(map(prod, shapes))
        yield f"{name} spans {tokens}, {rows} rows", "prefill_attention", size, make


def microseconds(fn: Callable[..., Any], copies: list[tuple]) -> float:
    """The time of one call within a graph that uses all copies and makes at least 20 calls."""
    calls, times = copies * ceil(20 / len(copies)), []
    fn(*calls[0])
    run, _ = cuda_graphs.capture(lambda _: [fn(*args) for args in calls], [calls[0][0]])
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(8):
        for step in (begin.record, run, end.record, end.synchronize):
            step()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return min(times[2:])


def error(fn: str, args: tuple) -> float:
    """The norm of the error of a kernel, relative to the norm of the exact result."""
    result = getattr(calls, fn)(*args)
    plain = [lowbit.dequantize(x) if isinstance(x, lowbit.Quantized) else x for x in args]
    exact = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in plain]
    expected = getattr(reference, fn)(*exact)
    return float((result - expected).norm() / expected.norm())


def standard_share(q: Tensor, k: Tensor) -> Share:
    """The setting that `pgfunc.kernels.tuning` uses for the attention of a prompt."""
    return tuning.share(q[..., 0].numel(), tuning.next_power_of_two(q.shape[-1]) * q.element_size(), shared_memory(k))


def measure(name: str, fn: str, size: int, make: Callable[[], tuple], bandwidth: float) -> None:
    copies = [make() for _ in range(max(2, ceil(400e6 / size)))]
    line = f"\n{name}, {size / 1e6:.1f} MB: eager {microseconds(getattr(reference, fn), copies):.1f} us"
    first = next(x for x in copies[0][1:] if not isinstance(x, Tensor) or x.dim() > 1)
    if fn == "decode_attention":
        part, kind, tried, standard = "chunk", Chunk, CHUNKS, tuning.chunk(len(first), 2)
    elif fn == "prefill_attention":
        part, kind, tried, standard = "share", Share, SHARES, standard_share(*copies[0][:2])
    else:
        w = KernelMatrix.of(first)
        part, kind, tried, standard = "tile", Tile, TILES, tuning.tile(fn, w.inputs, w.bits)
        if isinstance(first, Tensor):
            cublas = lambda x, *rest: [ops.linear(x, w) for w in rest if isinstance(w, Tensor) and w.dim() == 2]  # noqa: E731
            line += f", cuBLAS alone {microseconds(cublas, copies):.1f} us"
    print(line)
    original, times = getattr(tuning, part), {}
    numbers: list[Any] = [tuple(map(int, text.split())) for text in tried.split(", ")]
    settings = [kind(*values) for values in numbers]
    if part == "tile" and "int4" not in name:  # rows in one tensor, and in tensors of their own
        settings += [Tile(rows, block, warps, True) for rows, block, warps in numbers if rows > 1]
    for setting in (standard, *settings):
        setattr(tuning, part, lambda *_, setting=setting: setting)
        wrong = error(fn, copies[0])
        assert wrong < 2**-6, f"{name}: {setting} is wrong by {wrong}"  # bf16, rounded three times
        times[setting] = microseconds(getattr(calls, fn), copies)
    setattr(tuning, part, original)
    for setting, time in times.items():
        mark, speed = " ="[setting == standard] + " *"[time == min(times.values())], size / time / 1e3
        share = f"{speed:6.0f} GB/s {speed / bandwidth:6.3f} of a copy"
        print(f" {mark} {tuple(setting)!s:14}{time:8.2f} us {share}", flush=True)


@torch.inference_mode()
def main() -> None:
    copy = torch.empty(2, 10**9, dtype=torch.uint8, device="cuda").unbind()
    bandwidth = 2 * 10**9 / microseconds(lambda x, y: y.copy_(x), [copy]) / 1e3
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: a copy moves {bandwidth:.0f} GB/s")
    for case in (*cases("paligemma-3b-224"), *cases("paligemma2-3b-224")):
        if all(word in case[0] for word in sys.argv[1:]):
            measure(*case, bandwidth)


if __name__ == "__main__":
    main()
