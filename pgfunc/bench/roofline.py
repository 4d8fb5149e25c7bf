"""The floor of a stage: the least time that it can take on a machine.

A stage must read its bytes and compute its FLOPs (a multiply-add is two). Its floor is the longer of two times: that
of its bytes at the memory's bandwidth, and that of its FLOPs at the rate of a large matrix product. Work counts matrix
products, attention, every weight once, keys and values. It leaves out norms, softmax and activations, which fuse with
the products. This module measures nothing: `measuring` does.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from pgfunc import gemma, tree
from pgfunc.config import Config, TextConfig
from pgfunc.paligemma import Params


class Work(NamedTuple):
    """What a stage must compute and read."""

    flops: int
    nbytes: int


class Machine(NamedTuple):
    """How fast a device is."""

    bandwidth: float  # bytes/s
    rate: float  # FLOP/s


def vision_work(params: Params, cfg: Config, batch: int) -> Work:
    """The vision encoder and the projector, for one picture in each row."""
    v = cfg.vision
    layer = 4 * v.width**2 + 2 * v.width * v.hidden + 2 * v.tokens * v.width  # projections, MLP, attention
    token = 3 * v.patch**2 * v.width + v.layers * layer + v.width * cfg.text.width
    return Work(2 * batch * v.tokens * token, tree.nbytes((params.vision, params.projector, params.projector_bias)))


def prefill_work(params: Params, cfg: Config, batch: int, tokens: int) -> Work:
    """The prefill of one picture and `tokens` text tokens in each row: every token attends to every token."""
    vision, length = vision_work(params, cfg, batch), cfg.vision.tokens + tokens
    language = language_work(params.language, cfg.text, batch, length, [length] * cfg.text.layers)
    return Work(vision.flops + language.flops, vision.nbytes + language.nbytes)


def decode_work(params: Params, cfg: Config, batch: int, length: int) -> Work:
    """One decode step after `length` tokens in each row.

    Reads every weight of the language model, including the tied head, and the keys and values that the token attends
    to, including its own.
    """
    text = cfg.text
    keys = [min(length + 1, text.window) if text.windowed(i) else length + 1 for i in range(text.layers)]
    return language_work(params.language, text, batch, 1, keys)


def language_work(p: gemma.Params, cfg: TextConfig, batch: int, new_tokens: int, keys: list[int]) -> Work:
    """The language model on `new_tokens` tokens in each row, and the logits of the last one.

    In layer i each token attends to `keys[i]` keys. In the last layer only the last token is computed; the others
    contribute keys and values.
    """
    heads, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    queries = [new_tokens] * (cfg.layers - 1) + [1]
    query_macs = sum(count * (cfg.width * (2 * heads + 3 * cfg.hidden) + 2 * heads * attended)
                     for count, attended in zip(queries, keys, strict=True))  # fmt: skip
    flops = 2 * batch * (query_macs + new_tokens * cfg.layers * cfg.width * 2 * kv + cfg.width * cfg.vocab)
    padding = tree.nbytes(p.embed) * cfg.padding // (cfg.vocab + cfg.padding)  # rows that the head does not read
    cache = 2 * batch * kv * sum(keys) * p.norm.element_size()
    return Work(flops, tree.nbytes(p) - padding + cache)


def floor(work: Iterable[Work], machine: Machine) -> float:
    """The least seconds that the pieces of work take, one after another."""
    return math.fsum(max(piece.flops / machine.rate, piece.nbytes / machine.bandwidth) for piece in work)
