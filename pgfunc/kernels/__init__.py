"""Decoding one row on a GPU: the products, norms and attention of a single token, in as few kernels as they take.

Each function is what its eager twin is, `<name>_eager`, a composition of `ops`: the norm is rounded to x's dtype as
there, so both multiply the same numbers; from there on everything is float32 until the result is cast, where the twin
also rounds what lies between. They have no derivative. Every one is an operator that `torch.compile` takes as it is and
a CUDA graph can capture: none looks at a value on the host. Weights are bf16, f16 or f32, with dense rows. Owns how the
work is cut (`TILES`, `CHUNKS`). The code of the kernels is in `device`, and needs Triton, which a call imports.

The model does not call them yet: they run in Triton's interpreter, and are to be measured on a GPU first.

Axes: d width, o outputs, i inputs, f hidden, v vocabulary, n heads, k kv heads, s slots, h head dim.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pgfunc import ops
from pgfunc.errors import DeviceError, SettingError


class Tile(NamedTuple):
    """What a program does at once: so many rows, so many columns of each, by so many warps.

    A warp reads 16 bytes a lane, 256 columns of bf16: at least so many columns a warp, or its lanes read less. Nothing
    is staged: the walk over the columns is unrolled, and loads of several blocks are under way together.
    """

    rows: int
    block: int
    warps: int


class Chunk(NamedTuple):
    """How the keys are shared out: so many to a program, by so many warps; `parts` of them joined at a time."""

    keys: int
    warps: int
    parts: int


# for each kernel, by the least outputs and the least inputs: the first that fits
TILES: dict[str, tuple[tuple[int, int, Tile], ...]] = {
    "matvec": ((8192, 0, Tile(1, 1024, 1)), (0, 8192, Tile(1, 1024, 4)), (0, 0, Tile(1, 1024, 2))),
    "normed_matvec": ((8192, 0, Tile(2, 1024, 2)), (0, 0, Tile(1, 1024, 1))),
    "geglu_matvec": ((0, 0, Tile(1, 1024, 1)),),
    "head_argmax": ((0, 0, Tile(8, 1024, 4)),),
}
# by the least number of slots
CHUNKS: tuple[tuple[int, Chunk], ...] = ((2048, Chunk(64, 8, 64)), (768, Chunk(32, 4, 64)), (0, Chunk(16, 4, 32)))
COLUMNS = 64  # of a head, joined by one program
KEYS = 4096  # of the head's programs, compared at once by 32 warps


def tile(kernel: str, outputs: int, inputs: int) -> Tile:
    """The tile of a kernel for a matrix of this size. A benchmark puts another function here."""
    found = next(tile for o, i, tile in TILES[kernel] if outputs >= o and inputs >= i)
    return found._replace(block=min(found.block, power(inputs)))


def chunk(slots: int, size: int) -> Chunk:
    """The share of the keys for a cache of so many slots, of numbers of `size` bytes. A benchmark puts another here."""
    found = next(chunk for least, chunk in CHUNKS if slots >= least)
    return found._replace(keys=max(16, found.keys * 2 // size))  # float32 takes twice the shared memory


def power(size: int) -> int:
    """The smallest power of two that is not less, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


# --- the functions, each beside its eager twin ------------------------------------------------------------------------


def matvec(x: Float[Tensor, "i"], w: Float[Tensor, "o i"]) -> Float[Tensor, "o"]:
    """w · x."""
    return torch.ops.pgfunc.matvec(x, w, None)


def matvec_eager(x: Float[Tensor, "i"], w: Float[Tensor, "o i"]) -> Float[Tensor, "o"]:
    return ops.linear(x, w)


def matvec_add(x: Float[Tensor, "i"], w: Float[Tensor, "o i"], residual: Float[Tensor, "o"]) -> Float[Tensor, "o"]:
    """residual + w · x. The product is not rounded before it is added."""
    return torch.ops.pgfunc.matvec(x, w, residual)


def matvec_add_eager(
    x: Float[Tensor, "i"], w: Float[Tensor, "o i"], residual: Float[Tensor, "o"]
) -> Float[Tensor, "o"]:
    return residual + ops.linear(x, w)


def normed_matvec(
    x: Float[Tensor, "d"], scale: Float[Tensor, "d"], w: Float[Tensor, "o d"], eps: float
) -> Float[Tensor, "o"]:
    """w · rms_norm(x)."""
    return torch.ops.pgfunc.normed_matvec(x, scale, w, eps)


def normed_matvec_eager(
    x: Float[Tensor, "d"], scale: Float[Tensor, "d"], w: Float[Tensor, "o d"], eps: float
) -> Float[Tensor, "o"]:
    return ops.linear(ops.rms_norm(x, scale, eps), w)


def geglu_matvec(
    x: Float[Tensor, "d"], scale: Float[Tensor, "d"], gate: Float[Tensor, "f d"], up: Float[Tensor, "f d"], eps: float
) -> Float[Tensor, "f"]:
    """gelu(gate · rms_norm(x)) times up · rms_norm(x). Neither product is rounded before, as the twin's are."""
    return torch.ops.pgfunc.geglu_matvec(x, scale, gate, up, eps)


def geglu_matvec_eager(
    x: Float[Tensor, "d"], scale: Float[Tensor, "d"], gate: Float[Tensor, "f d"], up: Float[Tensor, "f d"], eps: float
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
) -> Float[Tensor, "n h"]:
    """Attention of the last of `length` tokens, whose own key is among them, to the first `length` slots of a cache.

        length 4, slots 6  sees  1 1 1 1 . .        window 2 sees  . . 1 1 . .

    A cap or window of 0 is none. What lies in slots that are not seen is not read, and of a program that finds nothing
    else to do, the launch is the cost. Weights are rounded to v's dtype before they are divided by their sum; the twin
    rounds them after. Nothing seen gives zeros.
    """
    return torch.ops.pgfunc.attend_one(q, k, v, length, scale, cap, window)


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
    seen = (key < length) & (key >= length - (window or k.shape[0]))
    return ops.attend(q[None, None], k[None], v[None], seen[None, None], scale, cap)[0, 0]


def head_argmax(
    x: Float[Tensor, "d"], norm_scale: Float[Tensor, "d"], embed: Float[Tensor, "v d"], eps: float, cap: float = 0.0
) -> Int[Tensor, ""]:
    """The row of the head with the largest logit, the first of equals once rounded to embed's dtype, as the twin's are.

    The softcap, being monotone, is left out: it could only make equals of logits that differ.
    """
    return torch.ops.pgfunc.head_argmax(x, norm_scale, embed, eps)


def head_argmax_eager(
    x: Float[Tensor, "d"], norm_scale: Float[Tensor, "d"], embed: Float[Tensor, "v d"], eps: float, cap: float = 0.0
) -> Int[Tensor, ""]:
    logits = ops.widen(ops.linear(ops.rms_norm(x, norm_scale, eps), embed))
    return (ops.softcap(logits, cap) if cap else logits).argmax()


# --- the operators: how they are launched, and what they give where nothing is computed -------------------------------


def code() -> ModuleType:
    try:
        from pgfunc.kernels import device
    except ImportError:
        raise DeviceError("these kernels need Triton, which is not installed: pip install triton") from None
    return device


def dense(*tensors: Tensor) -> None:
    """Raise SettingError where the elements of a row do not lie side by side, as the kernels read them."""
    for x in tensors:
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise SettingError(f"strides {x.stride()} of a tensor of shape {tuple(x.shape)}, expected dense rows")


def launch(kernel: str, w: Tensor, tile: Tile) -> Callable[..., None]:
    """The kernel on as many programs as the rows of w take, with what it needs to know of the sizes."""
    outputs, inputs = w.shape
    settings = {"OUT": outputs, "D": inputs, "ROWS": tile.rows, "BLOCK": tile.block, "num_warps": tile.warps}
    run = getattr(code(), kernel)[(-(-outputs // tile.rows),)]
    return lambda *given, **more: run(*given, **settings, **more)


@torch.library.custom_op("pgfunc::matvec", mutates_args=())
def _matvec(x: Tensor, w: Tensor, residual: Tensor | None) -> Tensor:
    dense(x, w, *(() if residual is None else (residual,)))
    out = x.new_empty(w.shape[0])
    run = launch("matvec", w, tile("matvec", *w.shape))
    run(x, w, x if residual is None else residual, out, w.stride(0), ADD=residual is not None)
    return out


@torch.library.custom_op("pgfunc::normed_matvec", mutates_args=())
def _normed_matvec(x: Tensor, scale: Tensor, w: Tensor, eps: float) -> Tensor:
    dense(x, scale, w)
    out = x.new_empty(w.shape[0])
    launch("normed_matvec", w, tile("normed_matvec", *w.shape))(x, scale, w, out, w.stride(0), eps)
    return out


@torch.library.custom_op("pgfunc::geglu_matvec", mutates_args=())
def _geglu_matvec(x: Tensor, scale: Tensor, gate: Tensor, up: Tensor, eps: float) -> Tensor:
    dense(x, scale, gate, up)
    out = x.new_empty(gate.shape[0])
    run = launch("geglu_matvec", gate, tile("geglu_matvec", *gate.shape))
    run(x, scale, gate, up, out, gate.stride(0), up.stride(0), eps)
    return out


@torch.library.custom_op("pgfunc::attend_one", mutates_args=())
def _attend_one(q: Tensor, k: Tensor, v: Tensor, length: Tensor, scale: float, cap: float, window: int) -> Tensor:
    q = q.contiguous()
    dense(k, v)
    (heads, h), (slots, kv_heads, _), share = q.shape, k.shape, chunk(k.shape[0], k.element_size())
    count, group = -(-slots // share.keys), heads // kv_heads
    peaks, sums = q.new_empty(2, heads, count, dtype=torch.float32)
    parts, out = q.new_empty(heads, count, h, dtype=torch.float32), torch.empty_like(q)
    window, columns = window or slots, min(COLUMNS, power(h))
    code().attend_chunk[(count, kv_heads)](
        q, k, v, length, peaks, sums, parts, *k.stride()[:2], *v.stride()[:2], slots, window, scale, cap,
        G=group, H=h, CHUNKS=count, CAP=cap > 0, CHUNK=share.keys,
        GROUP=power(group), HEAD=power(h), num_warps=share.warps,
    )  # fmt: skip
    code().attend_join[(heads, -(-h // columns))](
        length, peaks, sums, parts, out, slots, window,
        H=h, CHUNKS=count, CHUNK=share.keys, PARTS=share.parts, COLUMNS=columns, num_warps=share.warps,
    )  # fmt: skip
    return out


@torch.library.custom_op("pgfunc::head_argmax", mutates_args=())
def _head_argmax(x: Tensor, scale: Tensor, embed: Tensor, eps: float) -> Tensor:
    dense(x, scale, embed)
    cut = tile("head_argmax", *embed.shape)
    count = -(-embed.shape[0] // cut.rows)
    keys, token = (x.new_empty(size, dtype=torch.int64) for size in ((count,), ()))
    launch("head_keys", embed, cut)(x, scale, embed, keys, embed.stride(0), eps)
    code().best_row[(1,)](keys, token, COUNT=count, BLOCK=min(KEYS, power(count)), num_warps=32)
    return token


_matvec.register_fake(lambda x, w, residual: x.new_empty(w.shape[0]))
_normed_matvec.register_fake(lambda x, scale, w, eps: x.new_empty(w.shape[0]))
_geglu_matvec.register_fake(lambda x, scale, gate, up, eps: x.new_empty(gate.shape[0]))
_attend_one.register_fake(lambda q, k, v, length, scale, cap, window: q.new_empty(q.shape))
_head_argmax.register_fake(lambda x, scale, embed, eps: x.new_empty((), dtype=torch.int64))
