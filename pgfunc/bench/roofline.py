"""What a stage of a model cannot do without, and so how long it must take: its floor.

A stage reads its bytes and does its FLOPs (a multiply-add is two), so it takes the longer of bytes over the memory's
bandwidth and FLOPs over the rate of a large matrix product. Counted are matrix products and attention, every weight
once, keys and values; not norms, softmax and activations, which fuse with them. Knows nothing about time: `bench`
measures it.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from pgfunc import gemma, tree
from pgfunc.config import Config, TextConfig
from pgfunc.paligemma import Params


class Work(NamedTuple):
    """What a stage cannot do without."""

    flops: int
    nbytes: int


class Machine(NamedTuple):
    """What a device can do."""

    bandwidth: float  # bytes/s
    rate: float  # FLOP/s


def vision_work(params: Params, cfg: Config, batch: int) -> Work:
    """One picture a row through the vision encoder and the projector."""
    v = cfg.vision
    layer = 4 * v.width**2 + 2 * v.width * v.hidden + 2 * v.tokens * v.width  # projections, MLP, attention
    token = 3 * v.patch**2 * v.width + v.layers * layer + v.width * cfg.text.width
    return Work(2 * batch * v.tokens * token, tree.nbytes((params.vision, params.projector, params.projector_bias)))


def prefill_work(params: Params, cfg: Config, batch: int, tokens: int) -> Work:
    """One picture and so many tokens of text a row: the vision encoder, then a prefix that sees itself whole."""
    vision, length = vision_work(params, cfg, batch), cfg.vision.tokens + tokens
    language = language_work(params.language, cfg.text, batch, length, [length] * cfg.text.layers)
    return Work(vision.flops + language.flops, vision.nbytes + language.nbytes)


def decode_work(params: Params, cfg: Config, batch: int, length: int) -> Work:
    """One token a row behind so many: every weight of the language model, the tied head's included, and the keys and
    values that are seen, its own among them."""
    seen = [min(length + 1, cfg.text.window) if cfg.text.windowed(i) else length + 1 for i in range(cfg.text.layers)]
    return language_work(params.language, cfg.text, batch, 1, seen)


def language_work(p: gemma.Params, cfg: TextConfig, batch: int, new: int, keys: list[int]) -> Work:
    """So many new tokens a row, each attending to so many keys in each layer, and the logits of the last one.

    Of the others the last layer needs only keys and values.
    """
    heads, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    queries = [new] * (cfg.layers - 1) + [1]
    alone = sum(count * (cfg.width * (2 * heads + 3 * cfg.hidden) + 2 * heads * seen)
                for count, seen in zip(queries, keys, strict=True))  # fmt: skip
    flops = 2 * batch * (alone + new * cfg.layers * cfg.width * 2 * kv + cfg.width * cfg.vocab)
    padding = tree.nbytes(p.embed) * cfg.padding // (cfg.vocab + cfg.padding)  # rows that the head leaves out
    cache = 2 * batch * kv * sum(keys) * p.norm.element_size()
    return Work(flops, tree.nbytes(p) - padding + cache)


def floor(work: Iterable[Work], machine: Machine) -> float:
    """The seconds that pieces of work take at least, one after another."""
    return math.fsum(max(one.flops / machine.rate, one.nbytes / machine.bandwidth) for one in work)
