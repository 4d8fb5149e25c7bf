"""PaliGemma (Beyer et al. 2024) and PaliGemma 2 (Steiner et al. 2024): pictures and text in, logits out.

The sequence of a row is its image tokens, then its text; `Prompt` holds both. `forward` gives the logits of a whole
prompt, `prefill` those of its last token and a cache of the prompt; `extend` and `decode` continue a cache. All are
pure functions of (params, inputs, cfg). Axes: b batch, i pictures per row, p patches, t text tokens, s sequence,
d width, e width of the vision encoder, v vocabulary.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pgfunc import gemma, masks, siglip, tree
from pgfunc.cache import Cache, Empty, check_room
from pgfunc.config import Config
from pgfunc.errors import SettingError
from pgfunc.lowering import lowered, transformed
from pgfunc.ops import linear
from pgfunc.taps import Tap, Wrap, asks, identity, plain, within


class Params(NamedTuple):
    """The parameters: two towers and the linear map between them."""

    vision: siglip.Params
    projector: Float[Tensor, "d e"]
    projector_bias: Float[Tensor, "d"]
    language: gemma.Params

    def __repr__(self) -> str:
        return tree.summary(self)


class Prompt(NamedTuple):
    """The input. Tokens are bos, prefix, newline (then suffix, eos) and padding; `causal` marks suffix tokens."""

    pixels: Float[Tensor, "b i 3 y x"]  # in [-1, 1]
    tokens: Int[Tensor, "b t"]
    valid: Bool[Tensor, "b t"]
    causal: Bool[Tensor, "b t"]

    def __repr__(self) -> str:
        return tree.summary(self)


class Embedded(NamedTuple):
    """A prompt as vectors: image tokens, then text tokens."""

    x: Float[Tensor, "b s d"]
    valid: Bool[Tensor, "b s"]
    causal: Bool[Tensor, "b s"]


def abstract(cfg: Config) -> Params:
    """The parameter tree on the meta device, which has paths and shapes but no memory."""
    sizes = {"d": cfg.text.width, "e": cfg.vision.width}
    return tree.abstract(Params, sizes, vision=siglip.abstract(cfg.vision), language=gemma.abstract(cfg.text))


def init(cfg: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> Params:
    """Random parameters to train from, see `tree.init`."""
    return tree.init(abstract(cfg), seed, dtype)


def names(cfg: Config) -> list[str]:
    """What a tap may get from the model, in order."""
    blocks = [f"language.{i}.{name}" for i in range(cfg.text.layers) for name in gemma.TAPS]
    return [*siglip.names(cfg.vision), "projector", "language.embed", *blocks, "language.out", "logits"]


def encode_images(
    params: Params, pixels: Float[Tensor, "b i 3 y x"], cfg: Config, tap: Tap = identity, wrap: Wrap = plain
) -> Float[Tensor, "b ip d"]:
    """The pictures of each row -> image tokens in the language model's width, picture after picture.

    `wrap` is applied to the vision encoder's `block`. Pictures that all rows share (`prepare`) are encoded once, unless
    a tap asks for their activations: it gets those of every row.
    """
    batch, pictures = pixels.shape[:2]
    differentiated = pixels.requires_grad or transformed()  # then each row has a gradient of its own
    shared = batch > 1 and pixels.stride(0) == 0 and not differentiated
    if shared and not asks(tap, *siglip.names(cfg.vision), "projector"):
        return encode_images(params, pixels[:1], cfg, wrap=wrap).expand(batch, -1, -1)
    if not pictures:
        return pixels.new_empty((batch, 0, cfg.text.width), dtype=params.projector.dtype)
    x = siglip.encode_image(params.vision, rearrange(pixels, "b i c y x -> (b i) c y x"), cfg.vision, tap, wrap)
    x = tap("projector", linear(x, params.projector, params.projector_bias))
    return rearrange(x, "(b i) p d -> b (i p) d", i=pictures)


def join(params: Params, image: Float[Tensor, "b ip d"], prompt: Prompt, cfg: Config) -> Embedded:
    """Encoded pictures and the text of a prompt as one sequence. The pictures belong to the bidirectional prefix."""
    # only text is scaled by sqrt(width): image tokens are the projector's output (big_vision paligemma.py)
    text = gemma.embed(params.language, prompt.tokens, cfg.text)
    valid, causal = flags(prompt, image.shape[1])
    return Embedded(torch.cat([image, text], dim=1), valid, causal)


def flags(prompt: Prompt, image_tokens: int) -> tuple[Bool[Tensor, "b s"], Bool[Tensor, "b s"]]:
    """The flags `valid` and `causal` of a whole sequence: so many image tokens, then the text."""
    present = prompt.valid.new_ones(prompt.valid.shape[0], image_tokens)
    return torch.cat([present, prompt.valid], dim=1), torch.cat([~present, prompt.causal], dim=1)


def forward(
    params: Params, prompt: Prompt, cfg: Config, tap: Tap = identity, wrap: Wrap = plain
) -> Float[Tensor, "b t v"]:
    """The logits at every text position, in float32; those at padded positions have no meaning.

    `wrap` is applied to the blocks of both towers and to `gemma.unembed`. A tap gets the language model's activations
    in the order of positions, see `left_align`, but `language.out` and `logits` in the prompt's.
    """
    x = hidden(params, encode_images(params, prompt.pixels, cfg, tap, wrap), prompt, cfg, tap, wrap)
    return wrap(gemma.unembed)(params.language, x[:, x.shape[1] - prompt.tokens.shape[1] :], cfg.text, tap)


def hidden(
    params: Params, image: Float[Tensor, "b ip d"], prompt: Prompt, cfg: Config, tap: Tap = identity, wrap: Wrap = plain
) -> Float[Tensor, "b s d"]:
    """The language model's output at every position of a prompt, for its encoded pictures and its text."""
    x, _, _ = left_align(join(params, image, prompt, cfg))
    return hidden_from(params, tap("language.embed", x), prompt, cfg, 0, tap, wrap)


def hidden_from(
    params: Params,
    x: Float[Tensor, "b s d"],
    prompt: Prompt,
    cfg: Config,
    first: int,
    tap: Tap = identity,
    wrap: Wrap = plain,
    queries: gemma.Queries = (),
) -> Float[Tensor, "b q d"]:
    """`hidden`, computed from the input of layer `first`, which is left-aligned. The output has the prompt's order.

    If `queries` is given, the output has only these positions of the left-aligned sequence, and the last layer computes
    only those.
    """
    valid, causal = flags(prompt, x.shape[1] - prompt.tokens.shape[1])
    order = valid_first(valid)
    positions, seen, _ = positions_and_masks(*gemma.pick((valid, causal), order), cfg)
    x, _ = gemma.run(params.language, x, positions, seen, cfg.text, (), tap, wrap, queries, first)
    return x if isinstance(queries, Tensor) else gemma.pick(x, order.argsort(dim=-1))


def prefill(
    params: Params,
    prompt: Prompt,
    cfg: Config,
    size: int,
    tap: Tap = identity,
    allowed: gemma.Allowed = None,
    wrap: Wrap = plain,
) -> tuple[Float[Tensor, "b v"], Cache]:
    """The logits at each row's last valid token, and a cache of the prompt with free slots for `size` more tokens.

    `allowed`, here and in `extend` and `decode`: the tokens that get logits, see `gemma.unembed`. `wrap` is applied to
    the blocks of both towers, to `embed_and_mask` and to `gemma.unembed`. Raises SettingError for a negative size.
    """
    gemma.head_rows(allowed, cfg.text)  # raises before anything is computed
    check_size(size)
    image = encode_images(params, prompt.pixels, cfg, tap, wrap)
    return prefill_encoded(params, image, prompt, cfg, size, tap, allowed, wrap)


def prefill_encoded(
    params: Params,
    image: Float[Tensor, "b ip d"],
    prompt: Prompt,
    cfg: Config,
    size: int,
    tap: Tap = identity,
    allowed: gemma.Allowed = None,
    wrap: Wrap = plain,
) -> tuple[Float[Tensor, "b v"], Cache]:
    """`prefill`, for pictures that `encode_images` has encoded. The prompt's pixels are not read."""
    check_size(size)
    text = prompt._replace(pixels=())  # not the declared type: a compiled `embed_and_mask` takes no pictures
    x, positions, seen, length = wrap(embed_and_mask)(params, image, text, cfg, tap)
    last, empty = rearrange(length - 1, "b -> b 1"), Empty(x.shape[1] + size)
    tapped = within(f"language.{cfg.text.layers - 1}", tap, gemma.TAPS) is not identity  # then it gets all tokens
    x, kv = gemma.run(params.language, x, positions, seen, cfg.text, empty, tap, wrap, () if tapped else last)
    x = gemma.pick(x, last) if tapped else x
    cache = Cache(tuple(k for k, _ in kv), tuple(v for _, v in kv), length)
    logits = wrap(gemma.unembed)(params.language, x, cfg.text, tap, allowed)
    return rearrange(logits, "b 1 v -> b v"), cache


def check_size(size: int) -> None:
    """Raise SettingError for a negative number of free slots."""
    if size < 0:
        raise SettingError(f"size is {size}, expected room for 0 or more tokens")


def embed_and_mask(
    params: Params, image: Float[Tensor, "b ip d"], prompt: Prompt, cfg: Config, tap: Tap
) -> tuple[Float[Tensor, "b s d"], Int[Tensor, "b s"], masks.Masks, Int[Tensor, "b"]]:
    """The language model's input for a prompt: vectors, positions, masks, and the length of each row."""
    x, valid, causal = left_align(join(params, image, prompt, cfg))
    return tap("language.embed", x), *positions_and_masks(valid, causal, cfg)


def positions_and_masks(
    valid: Bool[Tensor, "b s"], causal: Bool[Tensor, "b s"], cfg: Config
) -> tuple[Int[Tensor, "b s"], masks.Masks, Int[Tensor, "b"]]:
    """For left-aligned rows: the positions, the masks, and the length of each row."""
    seen = lowered(masks.left_aligned_prompt)(valid, causal, cfg.text.window)
    return masks.positions(valid), seen, valid.sum(-1)


def left_align(embedded: Embedded) -> Embedded:
    """Move the valid tokens of each row to the front, in order, so that slot s of the cache is position s."""
    order = valid_first(embedded.valid)
    x = torch.take_along_dim(embedded.x, rearrange(order, "b s -> b s 1"), dim=1)
    return Embedded(x, embedded.valid.take_along_dim(order, 1), embedded.causal.take_along_dim(order, 1))


def valid_first(valid: Bool[Tensor, "b s"]) -> Int[Tensor, "b s"]:
    """The indices of each row's valid tokens, in order, then those of its padding."""
    return (~valid).long().argsort(dim=-1, stable=True)


def extend(
    params: Params,
    tokens: Int[Tensor, "b t"],
    cache: Cache,
    cfg: Config,
    tap: Tap = identity,
    allowed: gemma.Allowed = None,
    wrap: Wrap = plain,
) -> tuple[Float[Tensor, "b t v"], Cache]:
    """Append t suffix tokens to each row. Returns their logits and a new cache; the given cache does not change.

    Raises CacheFullError if a row has too few free slots, and TokenError for an id outside the vocabulary, if the host
    can read the values without waiting. Otherwise the logits of such a token, and all later ones of its row, are nan;
    `Cache.overflowed` marks only the rows without free slots.
    """
    count = tokens.shape[1]
    check_room(cache.length, count, cache.slots)
    seen = lowered(masks.cached)(cache.length, count, cache.slots, cfg.text.window)
    positions = rearrange(cache.length, "b -> b 1") + torch.arange(count, device=tokens.device)
    x = gemma.embed(params.language, tokens, cfg.text)
    x = tap("language.embed", torch.where(rearrange(positions < cache.slots, "b t -> b t 1"), x, torch.nan))
    x, kv = gemma.run(params.language, x, positions, seen, cfg.text, cache, tap, wrap)
    cache = Cache(tuple(k for k, _ in kv), tuple(v for _, v in kv), cache.length + count)
    return wrap(gemma.unembed)(params.language, x, cfg.text, tap, allowed), cache


def decode(
    params: Params,
    token: Int[Tensor, "b"],
    cache: Cache,
    cfg: Config,
    tap: Tap = identity,
    allowed: gemma.Allowed = None,
    wrap: Wrap = plain,
) -> tuple[Float[Tensor, "b v"], Cache]:
    """Append one token to each row. Returns the logits after it and a new cache; the given cache does not change.

    Prefilling n + 1 tokens equals prefilling n and decoding one, wherever the suffix is split.
    """
    logits, cache = extend(params, rearrange(token, "b -> b 1"), cache, cfg, tap, allowed, wrap)
    return rearrange(logits, "b 1 v -> b v"), cache
