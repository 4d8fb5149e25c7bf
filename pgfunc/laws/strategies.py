"""What laws are checked on: small configurations, parameters, ragged prompts, logits. Plain data that prints as it is.

An example holds lengths and a seed instead of tensors, so that it is small, can be shrunk, and says what it is.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from pgfunc import paligemma, tree
from pgfunc.config import Config, TextConfig, VisionConfig
from pgfunc.paligemma import Params
from pgfunc.prompt import Prompt

seeds = st.integers(0, 2**31)


class Rows(NamedTuple):
    """A batch of prompts: so many tokens of prefix and suffix a row, and what is alike in all."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    images: int = 1
    padding: int = 0  # columns behind the longest row
    seed: int = 0  # of tokens and pixels

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(p + s for p, s in zip(self.prefix, self.suffix, strict=True))


def prompt(rows: Rows, vocab: int, image_size: int) -> Prompt:
    """The rows with random tokens, in padded places too, where they must not matter; random pixels."""
    generator = torch.Generator().manual_seed(rows.seed)
    lengths, starts = (torch.tensor(side)[:, None] for side in (rows.lengths, rows.prefix))
    place = torch.arange(max(rows.lengths) + rows.padding)
    batch = len(rows.prefix)
    return Prompt(
        pixels=torch.rand(batch, rows.images, 3, image_size, image_size, generator=generator) * 2 - 1,
        tokens=torch.randint(0, vocab, (batch, len(place)), generator=generator),
        valid=place < lengths,
        causal=(place >= starts) & (place < lengths),
    )


@st.composite
def ragged(draw, rows: int = 3, prefix: int = 4, suffix: int = 5, images: int = 2, padding: int = 2) -> Rows:
    """At most so many rows, of 1 token of prefix and none of suffix at least."""
    sizes = draw(st.lists(st.tuples(st.integers(1, prefix), st.integers(0, suffix)), min_size=1, max_size=rows))
    more = draw(st.integers(0, images)), draw(st.integers(0, padding)), draw(seeds)
    return Rows(tuple(p for p, _ in sizes), tuple(s for _, s in sizes), *more)


# whole numbers tie, and none is much more probable than others; -inf is a token that something excluded before
whole, wide = st.integers(-3, 3).map(float), st.floats(-30, 30, width=32)
styles = [st.lists(each, min_size=1, max_size=12) for each in (whole, wide, whole | wide | st.just(float("-inf")))]


class Strategies(NamedTuple):
    """What the domains of laws draw from. An implementation that takes less gets narrower ones."""

    rows: SearchStrategy[Rows] = ragged()
    seeds: SearchStrategy[int] = seeds
    logits: SearchStrategy[tuple[float, ...]] = (
        st.one_of(styles).filter(lambda row: max(row) > float("-inf")).map(tuple)
    )


@st.composite
def configs(draw) -> Config:
    """Small networks with every variant of a block: heads that share keys, softcaps, a window, norms of what is added,
    learned and rotary positions of patches."""
    kv_heads, caps = draw(st.sampled_from([1, 2, 4])), st.sampled_from([0.0, 2.0])
    text = TextConfig(
        vocab=64, padding=3, width=16, layers=draw(st.integers(1, 3)), heads=4, kv_heads=kv_heads, head_dim=8,
        hidden=24, query_scale=8**-0.5, attention_softcap=draw(caps), final_softcap=draw(caps.map(lambda cap: 2 * cap)),
        window=draw(st.sampled_from([0, 2, 5])), post_norms=draw(st.booleans()),
    )  # fmt: skip
    vision = VisionConfig(width=24, layers=2, heads=2, hidden=32, image_size=28, patch=14)
    return Config(replace(vision, position=draw(st.sampled_from(["learned", "rope2d"]))), text, image=64)


def parameters(cfg: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> Params:
    """Random parameters whose vectors are not zero either, so that every leaf matters."""
    generator = torch.Generator().manual_seed(seed)

    def moved(leaf: Tensor) -> Tensor:
        return leaf + 0.2 * torch.randn(leaf.shape, generator=generator).to(dtype) if leaf.dim() == 1 else leaf

    return tree.map(moved, paligemma.init(cfg, seed, dtype))
