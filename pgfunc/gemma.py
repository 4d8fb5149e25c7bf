"""The Gemma language model (Gemma Team 2024; big_vision `models/ppp/gemma.py`): embed, run, unembed.

One block computes Gemma 1 and Gemma 2, by fields of the config. `run` is both prefill and decode, which differ only in
the number of tokens. This module knows nothing about pictures. Axes: b batch, t token, q query, s key, d width,
f hidden, v vocabulary, r rows of the head; `nh` and `kh` are heads (or kv heads) and head dim fused.
"""

from functools import reduce
from typing import Any, NamedTuple, TypeVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from pgfunc import ops, tree
from pgfunc.cache import Cache, Empty, Past, append_layer, by_layer
from pgfunc.config import TextConfig
from pgfunc.errors import SettingError
from pgfunc.lowering import lowered
from pgfunc.masks import Mask, Masks, prepared
from pgfunc.ops import Rotation, linear, linear_many, rms_norm, upcast
from pgfunc.taps import Tap, Wrap, identity, plain, within

Allowed = range | Int[Tensor, "r"] | None  # the tokens that get logits; None: all
Queries = Int[Tensor, "b q"] | tuple[()]  # the indices of the tokens that are computed; (): all
T = TypeVar("T", bound=Any)
TAPS = {  # what a tap gets from each block, in order, with its axes; n all query heads
    "resid_pre": "b t d",
    "attn_in": "b t d",
    "q": "b t n h",
    "k": "b t k h",
    "v": "b t k h",
    "rot_q": "b t n h",
    "rot_k": "b t k h",
    "mask": "b t s",
    "attn_scores": "b n t s",
    "pattern": "b n t s",
    "z": "b t n h",
    "attn_out": "b t d",
    "resid_mid": "b t d",
    "mlp_in": "b t d",
    "gate": "b t f",
    "up": "b t f",
    "mlp_hidden": "b t f",
    "mlp_out": "b t d",
    "resid_post": "b t d",
}


class Layer(NamedTuple):
    """One layer. The scales of the norms are raw: 1 is added at use. Matrices may be quantized, see `quant`."""

    attention_norm: Float[Tensor, "d"]
    q: Float[Tensor, "nh d"]
    k: Float[Tensor, "kh d"]
    v: Float[Tensor, "kh d"]
    out: Float[Tensor, "d nh"]
    post_attention_norm: Float[Tensor, "d"]  # () in Gemma 1
    mlp_norm: Float[Tensor, "d"]
    gate: Float[Tensor, "f d"]
    up: Float[Tensor, "f d"]
    down: Float[Tensor, "d f"]
    post_mlp_norm: Float[Tensor, "d"]  # () in Gemma 1

    def __repr__(self) -> str:
        return tree.summary(self)


class Params(NamedTuple):
    """`embed` is the embedding table. The function `embed` looks up its rows; `unembed` multiplies by it (tied)."""

    embed: Float[Tensor, "v d"]
    layers: tuple[Layer, ...]
    norm: Float[Tensor, "d"]

    def __repr__(self) -> str:
        return tree.summary(self)


def abstract(cfg: TextConfig) -> Params:
    """The parameter tree on the meta device."""
    sizes = {
        "d": cfg.width,
        "nh": cfg.heads * cfg.head_dim,
        "kh": cfg.kv_heads * cfg.head_dim,
        "f": cfg.hidden,
        "v": cfg.vocab + cfg.padding,
    }
    absent = {} if cfg.post_norms else {"post_attention_norm": (), "post_mlp_norm": ()}
    layers = tuple(tree.abstract(Layer, sizes, **absent) for _ in range(cfg.layers))
    return tree.abstract(Params, sizes, layers=layers)


def embed(p: Params, ids: Int[Tensor, "b t"], cfg: TextConfig) -> Float[Tensor, "b t d"]:
    """Token ids -> vectors, times the square root of the width."""
    x = ops.embedding(ids, p.embed)
    # the factor is rounded to the weights' dtype first: 45.25 for 2048 in bf16 (big_vision gemma.py, Embedder.encode)
    return x * torch.full((), cfg.width**0.5, dtype=x.dtype, device=x.device)


def unembed(
    p: Params, x: Float[Tensor, "*b d"], cfg: TextConfig, tap: Tap = identity, allowed: Allowed = None
) -> Float[Tensor, "*b r"]:
    """The final norm, the tied head and the final softcap: the only function that computes logits.

    The product with the head has the parameters' precision; the rest is in float32, or wider. Ids that are not tokens,
    such as `<image>`, get -inf. If `allowed` is given, only the logits of those tokens are computed, in their order,
    and only their rows of the head are read; a range is a view of the head. Raises SettingError like `head_rows`.
    """
    rows = head_rows(allowed, cfg)
    logits = upcast(lowered(head)(p, x, rows, cfg, tap))
    logits = ops.softcap(logits, cfg.final_softcap) if cfg.final_softcap else logits
    return tap("logits", mask_non_tokens(logits, rows, cfg) if cfg.masked else logits)


def head(
    p: Params, x: Float[Tensor, "*b d"], rows: slice | Int[Tensor, "r"], cfg: TextConfig, tap: Tap
) -> Float[Tensor, "*b r"]:
    """The final norm, and the product with these rows of the tied head."""
    w = tree.map(lambda part: part[rows], p.embed)  # a tensor, or the parts of a quantized matrix
    return linear(tap("language.out", rms_norm(x, p.norm, cfg.eps)), w)


def head_rows(allowed: Allowed, cfg: TextConfig) -> slice | Int[Tensor, "r"]:
    """The rows of the head that belong to the allowed tokens.

    Raises SettingError for a range that has a step or leaves the vocabulary. Ids are not checked.
    """
    if not isinstance(allowed, range):
        return slice(cfg.vocab) if allowed is None else allowed
    if allowed.step != 1 or not 0 <= allowed.start < allowed.stop <= cfg.vocab:
        raise SettingError(f"allowed is {allowed}, expected one or more consecutive tokens of 0 to {cfg.vocab - 1}")
    return slice(allowed.start, allowed.stop)


def mask_non_tokens(
    logits: Float[Tensor, "*b r"], rows: slice | Int[Tensor, "r"], cfg: TextConfig
) -> Float[Tensor, "*b r"]:
    """The logits of these rows of the head, with -inf for ids that are not tokens."""
    device = logits.device
    ids = torch.arange(cfg.vocab, device=device)[rows] if isinstance(rows, slice) else rows.to(device)
    masked = ((ids >= first) & (ids < end) for first, end in cfg.masked)
    return logits.masked_fill(reduce(torch.logical_or, masked), float("-inf"))


def run(
    p: Params,
    x: Float[Tensor, "b t d"],
    positions: Int[Tensor, "b t"],
    masks: Masks,
    cfg: TextConfig,
    cache: Cache | Empty | tuple[()] = (),
    tap: Tap = identity,
    wrap: Wrap = plain,
    queries: Queries = (),
    first: int = 0,
) -> tuple[Float[Tensor, "b q d"], tuple[tuple[Tensor, Tensor], ...]]:
    """All layers over t new tokens: their output and, for each layer of a cache, its keys and values.

    Without a cache, the tokens attend to one another, and no keys and values are kept. With a cache, each layer first
    appends their keys and values at each row's length, and returns the whole buffers. `wrap` is applied to `block`. If
    `queries` is given, the output has only those tokens, and the last layer computes only those. If `first` is given, x
    is the input of that layer, and the layers before it are left out.
    """
    rotation = ops.rotation(lowered(ops.angles)(positions, cfg.head_dim, cfg.theta))
    masks, pasts, kv = lowered(prepared)(masks, x.dtype), by_layer(cache, x.shape[1], len(p.layers)), []
    for i in range(first, len(p.layers)):
        mask = masks.window if cfg.windowed(i) else masks.full
        layer_tap, layer_queries = within(f"language.{i}", tap, TAPS), queries if i == len(p.layers) - 1 else ()
        x, layer_kv = wrap(lowered(block))(p.layers[i], x, rotation, mask, cfg, pasts[i], layer_tap, layer_queries)
        if cache:
            kv.append(layer_kv)
    return (x if first < len(p.layers) else pick(x, queries)), tuple(kv)


def block(
    p: Layer,
    x: Float[Tensor, "b t d"],
    rotation: Rotation,
    mask: Mask,
    cfg: TextConfig,
    past: Past | Empty | tuple[()] = (),
    tap: Tap = identity,
    queries: Queries = (),
) -> tuple[Float[Tensor, "b q d"], tuple[Tensor, Tensor]]:
    """Attention and MLP: each reads a normalized copy of x, and its result is added to x; Gemma 2 first normalizes it.

    If `queries` is given, only those tokens are computed; the others contribute keys and values.
    """
    x = tap("resid_pre", x)
    added, kv = attention(
        p, tap("attn_in", rms_norm(x, p.attention_norm, cfg.eps)), rotation, mask, cfg, past, tap, queries
    )
    x = tap("resid_mid", pick(x, queries) + tap("attn_out", post_norm(added, p.post_attention_norm, cfg.eps)))
    added = mlp(p, tap("mlp_in", rms_norm(x, p.mlp_norm, cfg.eps)), tap)
    return tap("resid_post", x + tap("mlp_out", post_norm(added, p.post_mlp_norm, cfg.eps))), kv


def post_norm(x: Float[Tensor, "b t d"], scale: Float[Tensor, "d"] | tuple[()], eps: float) -> Float[Tensor, "b t d"]:
    """What a sublayer adds to the residual stream: Gemma 2 normalizes it, Gemma 1 does not."""
    return rms_norm(x, scale, eps) if isinstance(scale, Tensor) else x


def attention(
    p: Layer,
    x: Float[Tensor, "b t d"],
    rotation: Rotation,
    mask: Mask,
    cfg: TextConfig,
    past: Past | Empty | tuple[()] = (),
    tap: Tap = identity,
    queries: Queries = (),
) -> tuple[Float[Tensor, "b q d"], tuple[Tensor, Tensor]]:
    """Grouped-query attention with rotary positions (Ainslie et al. 2023): project, rotate, append, attend, project."""
    q, k, v = project(p, x, cfg, tap, queries)
    q, k, v = lowered(rotate_and_append)(q, k, v, rotation, past, queries, tap)
    z = tap("z", ops.attend(q, k, v, pick(mask, queries), cfg.query_scale, cfg.attention_softcap, tap))
    return linear(rearrange(z, "b t n h -> b t (n h)"), p.out), (k, v)


def project(
    p: Layer, x: Float[Tensor, "b t d"], cfg: TextConfig, tap: Tap, queries: Queries
) -> tuple[Float[Tensor, "b q n h"], Float[Tensor, "b t k h"], Float[Tensor, "b t k h"]]:
    """The query heads of `queries`, and the kv heads of all tokens."""
    if isinstance(queries, Tensor):
        q, (k, v) = linear(pick(x, queries), p.q), linear_many(x, (p.k, p.v))
    else:
        q, k, v = linear_many(x, (p.q, p.k, p.v))
    heads = (("q", q, cfg.heads), ("k", k, cfg.kv_heads), ("v", v, cfg.kv_heads))
    q, k, v = (tap(name, rearrange(each, "b t (n h) -> b t n h", n=count)) for name, each, count in heads)
    return q, k, v


def rotate_and_append(
    q: Float[Tensor, "b q n h"],
    k: Float[Tensor, "b t k h"],
    v: Float[Tensor, "b t k h"],
    rotation: Rotation,
    past: Past | Empty | tuple[()],
    queries: Queries,
    tap: Tap,
) -> tuple[Float[Tensor, "b q n h"], Float[Tensor, "b s k h"], Float[Tensor, "b s k h"]]:
    """q and k are rotated. Returns q, then all keys and all values: those of `past`, followed by k and v."""
    q, k = tap("rot_q", ops.rotate(q, pick(rotation, queries))), tap("rot_k", ops.rotate(k, rotation))
    return q, *lowered(append_layer)(k, v, past)


def pick(x: T, queries: Queries) -> T:
    """The tokens of each row at these indices, in each tensor of x; all of them if `queries` is ()."""
    if isinstance(queries, tuple):
        return x
    return tree.map(lambda part: part.take_along_dim(queries[(..., *[None] * (part.dim() - 2))], dim=1), x)


def mlp(p: Layer, x: Float[Tensor, "b t d"], tap: Tap = identity) -> Float[Tensor, "b t d"]:
    """GeGLU (Shazeer 2020): the tanh-GELU of the gate times the up projection, then the down projection."""
    gate, up = linear_many(x, (p.gate, p.up))
    gate = ops.gelu(tap("gate", gate))  # the old value is dropped: three such tensors at once, not four
    hidden = tap("mlp_hidden", gate * tap("up", up))
    return linear(hidden, p.down)
