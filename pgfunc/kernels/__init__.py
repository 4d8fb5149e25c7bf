"""Decoding one row on a GPU: the products, norms and attention of a single token, in as few kernels as they take.

Each function is what its eager twin is, `<name>_eager`, a composition of `ops`: the norm is rounded to x's dtype as
there, so both multiply the same numbers; from there on everything is float32 until the result is cast, where the twin
also rounds what lies between. They have no derivative. Every one is an operator that `torch.compile` takes as it is and
a CUDA graph can capture: none looks at a value on the host. Weights are bf16, f16 or f32, with dense rows. Owns how the
work is cut (`TILES`, `CHUNKS`). The code of the kernels is in `device`, and needs Triton, which a call imports.

`block` puts them together; the model calls it where it `serves`.

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
    "matvec": ((8192, 0, Tile(1, 1024, 1)), (0, 8192, Tile(1, 1024, 4)), (0, 0, Tile(2, 1024, 1))),
    "normed_matvec": ((8192, 0, Tile(1, 2048, 1)), (0, 0, Tile(1, 1024, 1))),
    "rotated_qkv": ((0, 0, Tile(1, 1024, 4)),),
    "geglu_matvec": ((0, 0, Tile(1, 2048, 4)),),
}
# by the least number of slots
CHUNKS: tuple[tuple[int, Chunk], ...] = ((768, Chunk(64, 4, 64)), (0, Chunk(16, 4, 32)))
COLUMNS = 64  # of a head of attention, joined by one program


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
    return torch.ops.pgfunc.matvec(x, w, None, None, 0.0)


def matvec_eager(x: Float[Tensor, "i"], w: Float[Tensor, "o i"]) -> Float[Tensor, "o"]:
    return ops.linear(x, w)


def matvec_add(x: Float[Tensor, "i"], w: Float[Tensor, "o i"], residual: Float[Tensor, "o"]) -> Float[Tensor, "o"]:
    """residual + w · x. The product is not rounded before it is added."""
    return torch.ops.pgfunc.matvec(x, w, None, residual, 0.0)


def matvec_add_eager(
    x: Float[Tensor, "i"], w: Float[Tensor, "o i"], residual: Float[Tensor, "o"]
) -> Float[Tensor, "o"]:
    return residual + ops.linear(x, w)


def normed_matvec(
    x: Float[Tensor, "d"], scale: Float[Tensor, "d"], w: Float[Tensor, "o d"], eps: float
) -> Float[Tensor, "o"]:
    """w · rms_norm(x)."""
    return torch.ops.pgfunc.matvec(x, w, scale, None, eps)


def normed_matvec_eager(
    x: Float[Tensor, "d"], scale: Float[Tensor, "d"], w: Float[Tensor, "o d"], eps: float
) -> Float[Tensor, "o"]:
    return ops.linear(ops.rms_norm(x, scale, eps), w)


def rotated_qkv(
    x: Float[Tensor, "d"],
    scale: Float[Tensor, "d"],
    q: Float[Tensor, "nh d"],
    k: Float[Tensor, "kh d"],
    v: Float[Tensor, "kh d"],
    angles: Float[Tensor, "1 1 half"],
    eps: float,
) -> Float[Tensor, "nkk h"]:
    """q, k and v of rms_norm(x), head after head; those of q and k are turned by the angle of each of their planes."""
    return torch.ops.pgfunc.rotated_qkv(x, scale, q, k, v, angles, eps)


def rotated_qkv_eager(
    x: Float[Tensor, "d"],
    scale: Float[Tensor, "d"],
    q: Float[Tensor, "nh d"],
    k: Float[Tensor, "kh d"],
    v: Float[Tensor, "kh d"],
    angles: Float[Tensor, "1 1 half"],
    eps: float,
) -> Float[Tensor, "nkk h"]:
    normed = ops.rms_norm(x, scale, eps)
    q, k, v = (ops.linear(normed, w).unflatten(0, (1, 1, -1, 2 * angles.shape[-1])) for w in (q, k, v))
    return torch.cat([ops.rotate(q, angles), ops.rotate(k, angles), v], dim=2)[0, 0]


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
    """Attention of the token in slot `length` of a cache, where its own key is, to that slot and those before it.

        length 3, slots 6  sees  1 1 1 1 . .        window 2 sees  . . 1 1 . .

    A cap or window of 0 is none. What lies in slots that are not seen is not read, and of a program that finds nothing
    else to do, the launch is the cost. Weights are rounded to v's dtype before they are divided by their sum; the twin
    rounds them after.
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
    seen = (key <= length) & (key > length - (window or k.shape[0]))
    return ops.attend(q[None, None], k[None], v[None], seen[None, None], scale, cap)[0, 0]


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
    return lambda *given, **more: run(*given, **settings, **early(w), **more)


def early(x: Tensor) -> dict[str, bool]:
    """Whether a kernel may start while the one before still runs, as Triton wants to hear it: from Hopper on it may."""
    able = x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if able else {"EARLY": False}


# one operator for every product: of one that it meets first deep in a model, inductor 2.11 writes out all before it
@torch.library.custom_op("pgfunc::matvec", mutates_args=())
def _matvec(x: Tensor, w: Tensor, scale: Tensor | None, residual: Tensor | None, eps: float) -> Tensor:
    dense(*(each for each in (x, w, scale, residual) if each is not None))
    out = x.new_empty(w.shape[0])
    if scale is not None:
        launch("normed_matvec", w, tile("normed_matvec", *w.shape))(x, scale, w, out, w.stride(0), eps)
        return out
    run = launch("matvec", w, tile("matvec", *w.shape))
    run(x, w, x if residual is None else residual, out, w.stride(0), ADD=residual is not None)
    return out


@torch.library.custom_op("pgfunc::rotated_qkv", mutates_args=())
def _rotated_qkv(x: Tensor, scale: Tensor, q: Tensor, k: Tensor, v: Tensor, angles: Tensor, eps: float) -> Tensor:
    dense(x, scale, q, k, v, angles)
    h = 2 * angles.shape[-1]
    out, cut = x.new_empty((q.shape[0] + k.shape[0] + v.shape[0]) // h, h), tile("rotated_qkv", *q.shape)
    rows = min(cut.rows, h // 2 & -(h // 2))  # of one head: a power of two that divides its planes
    code().rotated_qkv[(out.numel() // 2 // rows,)](
        x, scale, q, k, v, angles, out, q.stride(0), k.stride(0), v.stride(0), eps,
        HEADS=q.shape[0] // h, KV=k.shape[0] // h, HALF=h // 2, D=len(x),
        ROWS=rows, BLOCK=cut.block, num_warps=cut.warps, **early(q),
    )  # fmt: skip
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
        GROUP=power(group), HEAD=power(h), num_warps=share.warps, **early(q),
    )  # fmt: skip
    code().attend_join[(heads, -(-h // columns))](
        length, peaks, sums, parts, out, slots, window,
        H=h, CHUNKS=count, CHUNK=share.keys, PARTS=share.parts, COLUMNS=columns, num_warps=share.warps, **early(q),
    )  # fmt: skip
    return out


_matvec.register_fake(lambda x, w, scale, residual, eps: x.new_empty(w.shape[0]))
_rotated_qkv.register_fake(
    lambda x, scale, q, k, v, angles, eps: x.new_empty(
        (q.shape[0] + k.shape[0] + v.shape[0]) // (2 * angles.shape[-1]), 2 * angles.shape[-1]
    )
)
_geglu_matvec.register_fake(lambda x, scale, gate, up, eps: x.new_empty(gate.shape[0]))
_attend_one.register_fake(lambda q, k, v, length, scale, cap, window: q.new_empty(q.shape))
