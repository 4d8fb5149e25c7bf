"""The Gemma language model (Gemma Team 2024; big_vision `models/ppp/gemma.py`): embed, run, unembed.

One block serves Gemma 1 and Gemma 2 by fields of the config, and `run` serves prefill and decode, which differ only in
the number of tokens. It knows nothing about pictures. Axes: b batch, t query, s key, d width, f hidden, v vocabulary;
`nh` and `kh` are heads, or kv heads, and head dim fused.
"""

from functools import reduce
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from pgfunc import ops, tree
from pgfunc.cache import Cache, append, pad, slots_behind
from pgfunc.config import TextConfig
from pgfunc.errors import SettingError
from pgfunc.kernels import block as kernel_block
from pgfunc.masks import Masks, Span
from pgfunc.ops import identity, linear, plain, rms_norm, widen

Allowed = range | Int[Tensor, "r"] | None  # the tokens that have logits; None: all


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
    """`embed` is read by `embed` and, tied, by `unembed`."""

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
    given = {} if cfg.post_norms else {"post_attention_norm": (), "post_mlp_norm": ()}
    layers = tuple(tree.abstract(Layer, sizes, **given) for _ in range(cfg.layers))
    return tree.abstract(Params, sizes, layers=layers)


def embed(p: Params, ids: Int[Tensor, "b t"], cfg: TextConfig) -> Float[Tensor, "b t d"]:
    """Token ids -> vectors, times the square root of the width."""
    x = ops.look_up(ids, p.embed)
    # the factor is rounded to the weights' dtype first: 45.25 for 2048 in bf16 (big_vision gemma.py, Embedder.encode)
    return x * torch.full((), cfg.width**0.5, dtype=x.dtype, device=x.device)


def unembed(
    p: Params, x: Float[Tensor, "*b d"], cfg: TextConfig, tap=identity, allowed: Allowed = None
) -> Float[Tensor, "*b v"]:
    """The final norm, the tied head and the final softcap: the only place that makes logits.

    The product with the head has the parameters' precision; what follows is float32, or wider. Ids that are no tokens,
    such as `<image>`, have -inf. With `allowed` only the logits of those tokens are made, in their order, and only
    their rows of the head are read: a range is a view of it. Raises SettingError as `head_rows`.
    """
    rows = head_rows(allowed, cfg)
    head = tree.map(lambda part: part[rows], p.embed)  # a tensor, or the parts of a quantized one
    if kernel_block.serves(x, tap, head):
        logits = kernel_block.head(x, p.norm, head, cfg.eps, made=isinstance(rows, Tensor))
    else:
        logits = linear(tap("language.out", rms_norm(x, p.norm, cfg.eps)), head)
    logits = widen(logits)
    logits = ops.softcap(logits, cfg.final_softcap) if cfg.final_softcap else logits
    return tap("logits", without_masked(logits, rows, cfg) if cfg.masked else logits)


def head_rows(allowed: Allowed, cfg: TextConfig) -> slice | Int[Tensor, "r"]:
    """The rows of the head of the tokens that are allowed.

    Raises SettingError for a range with a step, or outside the vocabulary; ids are taken as they are.
    """
    if not isinstance(allowed, range):
        return slice(cfg.vocab) if allowed is None else allowed
    if allowed.step != 1 or not 0 <= allowed.start < allowed.stop <= cfg.vocab:
        raise SettingError(f"allowed is {allowed}, expected one or more of the tokens 0 to {cfg.vocab - 1}, in a row")
    return slice(allowed.start, allowed.stop)


def without_masked(
    logits: Float[Tensor, "*b r"], rows: slice | Int[Tensor, "r"], cfg: TextConfig
) -> Float[Tensor, "*b r"]:
    """The logits of these rows of the head, with -inf for ids that are no tokens."""
    here = logits.device
    ids = torch.arange(cfg.vocab, device=here)[rows] if isinstance(rows, slice) else rows.to(here)
    masked = ((ids >= first) & (ids < end) for first, end in cfg.masked)
    return logits.masked_fill(reduce(torch.logical_or, masked), float("-inf"))


def run(
    p: Params,
    x: Float[Tensor, "b t d"],
    positions: Int[Tensor, "b t"],
    masks: Masks,
    cfg: TextConfig,
    cache: Cache | tuple[()] = (),
    tap=identity,
    wrap=plain,
    at: Int[Tensor, "b q"] | tuple[()] = (),
    room: int = 0,
) -> tuple[Float[Tensor, "b q d"], tuple[tuple[Tensor, Tensor], ...]]:
    """All layers over t new tokens; returns their output and, a layer, the keys and values that they attended to.

    Without a cache the tokens see one another, and the keys and values are their own, with `room` for so many more.
    With one they are appended at each row's length first, and what comes back are the cache's buffers after the append.
    `wrap` is applied to `block`. With `at` the output is that of the tokens in these places alone; the last layer makes
    no other.
    """
    fast = wrap is plain and len(cache) > 0 and kernel_block.serves_layers(x, tap, p.layers)
    once = fast or kernel_block.compiled(x)
    angles = (kernel_block.rotation if once else ops.angles)(positions, cfg.head_dim, cfg.theta)
    where = slots_behind(cache.length, x.shape[1], cache.slots) if cache else ()
    seen = []
    for i, layer in enumerate(p.layers):
        mask = masks.window if cfg.windowed(i) else masks.full
        past = (cache.k[i], cache.v[i], where) if cache else ()
        if fast and cache:
            past = cache.k[i], cache.v[i], cache.length
            x, kv = kernel_block.block(layer, x, angles, past, cfg.window if cfg.windowed(i) else 0, cfg)
        else:
            wanted = at if i == len(p.layers) - 1 else ()
            x, kv = wrap(block)(layer, x, angles, mask, cfg, past, ops.within(f"language.{i}", tap), wanted, room)
        seen.append(kv)
    return x, tuple(seen)


def block(
    p: Layer,
    x: Float[Tensor, "b t d"],
    angles: Float[Tensor, "b t half"],
    mask: Bool[Tensor, "b t s"] | Span,
    cfg: TextConfig,
    past=(),
    tap=identity,
    at: Int[Tensor, "b q"] | tuple[()] = (),
    room: int = 0,
) -> tuple[Float[Tensor, "b q d"], tuple[Tensor, Tensor]]:
    """Attention and MLP, each on a normalised copy that is added back; Gemma 2 also normalises what it adds.

    With `at`, of the tokens in these places alone: of others there are keys and values. Without a cache these have
    `room` for so many more.
    """
    added, kv = attention(p, rms_norm(x, p.attention_norm, cfg.eps), angles, mask, cfg, past, tap, at, room)
    x = x if isinstance(at, tuple) else pick(x, at)
    x = tap("resid_mid", x + (rms_norm(added, p.post_attention_norm, cfg.eps) if cfg.post_norms else added))
    added = mlp(p, rms_norm(x, p.mlp_norm, cfg.eps), tap)
    return tap("resid_post", x + (rms_norm(added, p.post_mlp_norm, cfg.eps) if cfg.post_norms else added)), kv


def attention(
    p: Layer,
    x: Float[Tensor, "b t d"],
    angles: Float[Tensor, "b t half"],
    mask: Bool[Tensor, "b t s"] | Span,
    cfg: TextConfig,
    past=(),
    tap=identity,
    at: Int[Tensor, "b q"] | tuple[()] = (),
    room: int = 0,
) -> tuple[Float[Tensor, "b q d"], tuple[Tensor, Tensor]]:
    """Grouped-query attention with rotary positions (Ainslie et al. 2023)."""
    if isinstance(at, Tensor):
        k, v = ops.linears(x, (p.k, p.v))
        q, turn = linear(pick(x, at), p.q), pick(angles, at)
        mask = Span(*(side.gather(1, at) for side in mask)) if isinstance(mask, Span) else pick(mask, at)
    else:
        (q, k, v), turn = ops.linears(x, (p.q, p.k, p.v)), angles
    q = tap("q", rearrange(q, "b t (n h) -> b t n h", n=cfg.heads))
    k, v = (tap(name, rearrange(each, "b t (k h) -> b t k h", k=cfg.kv_heads)) for name, each in (("k", k), ("v", v)))
    if isinstance(mask, Span) and isinstance(at, tuple):
        q, k, v = kernel_block.rotated(q, k, v, angles, room)
        kept = k, v
    else:
        q, k = ops.rotate(q, turn), ops.rotate(k, angles)
        if past:
            k_buffer, v_buffer, where = past
            k, v = append(k_buffer, k, where), append(v_buffer, v, where)
        kept = pad(k, room), pad(v, room)
    how = cfg.query_scale, cfg.attention_softcap
    # a span ends before the empty slots, and then only these buffers need to be made
    out = kernel_block.attend(q, *kept, mask, *how) if isinstance(mask, Span) else ops.attend(q, k, v, mask, *how)
    return tap("attn_out", linear(rearrange(out, "b t n h -> b t (n h)"), p.out)), kept


def pick(x: Shaped[Tensor, "b t r"], at: Int[Tensor, "b q"]) -> Shaped[Tensor, "b q r"]:
    """The tokens in these places of each row."""
    return torch.take_along_dim(x, rearrange(at, "b q -> b q 1"), dim=1)


def mlp(p: Layer, x: Float[Tensor, "b t d"], tap=identity) -> Float[Tensor, "b t d"]:
    """GeGLU (Shazeer 2020): the gate's tanh-GELU times the up projection, then down."""
    gate, up = ops.linears(x, (p.gate, p.up))
    hidden = tap("mlp_hidden", ops.gelu(gate) * up)
    return tap("mlp_out", linear(hidden, p.down))
