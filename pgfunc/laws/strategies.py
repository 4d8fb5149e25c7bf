"""What laws are checked on: small configurations, parameters, prompts and their splits, text, pictures, logits.

Plain data that prints as it is: an example holds lengths and a seed instead of tensors, so that it is small, can be
shrunk, and says what it is.
"""

import re
from dataclasses import replace
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image
from torch import Tensor

from pgfunc import paligemma, tree
from pgfunc.config import Config, TextConfig, VisionConfig
from pgfunc.paligemma import Params
from pgfunc.prompt import Prompt

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(["float64", "float32", "bfloat16", "float16"])

# --- prompts ----------------------------------------------------------------------------------------------------------


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


class Split(NamedTuple):
    """Prompts that are prefilled up to so many tokens a row, and decoded from there."""

    rows: Rows
    at: tuple[int, ...]


def splits(rows: SearchStrategy[Rows]) -> SearchStrategy[Split]:
    """Rows that have a token of suffix at least, each cut before one."""

    def of(rows: Rows) -> SearchStrategy[Split]:
        places = (st.integers(p, p + s - 1) for p, s in zip(rows.prefix, rows.suffix, strict=True))
        return st.builds(Split, st.just(rows), st.tuples(*places))

    return rows.flatmap(of)


# --- text and pictures ------------------------------------------------------------------------------------------------

# control tokens, what looks like a place or a byte, what tokenizers and terminals read in a way of their own
names = st.sampled_from([
    "<pad>", "<eos>", "<bos>", "<unk>", "<image>", "<mask>", "<bos", "<<bos>>", "bos>", "<loc0000>", "<loc1023>",
    "<loc1024>", "<loc1>", "<seg000>", "<seg127>", "<0x41>", "\n", "\r\n", "\t", " ", "▁", "\x00", "\x1b[0m",
    "\ufeff", "\u202e", "\u200d", "e\u0301", "\ufffd", "0", "a",
])  # fmt: skip
hostile = st.text() | st.lists(names | st.text(max_size=5)).map("".join)

WORD = re.compile("<(?:loc[0-9]{4}|seg[0-9]{3})>")
# of an object in a text, where a semicolon ends it
labels = (st.text(max_size=12) | hostile).map(str.strip).filter(lambda text: ";" not in text and not WORD.search(text))

MODES = [
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16",
    "I;16L", "I;16B",
]  # fmt: skip


class Picture(NamedTuple):
    """A picture of one of Pillow's modes, of random bytes."""

    mode: str
    width: int
    height: int
    seed: int


pictures = st.builds(Picture, st.sampled_from(MODES), st.integers(1, 70), st.integers(1, 70), seeds)


def picture(given: Picture) -> Image.Image:
    size = (given.width, given.height)
    generator = torch.Generator().manual_seed(given.seed)
    count = len(Image.new(given.mode, size).tobytes())
    return Image.frombytes(given.mode, size, bytes(torch.randint(0, 256, (count,), generator=generator).tolist()))


# --- numbers ----------------------------------------------------------------------------------------------------------

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
    text: SearchStrategy[str] = hostile
    labels: SearchStrategy[str] = labels
    pictures: SearchStrategy[Picture] = pictures
    dtypes: SearchStrategy[str] = dtypes
    # bits of a weight, and how many inputs of an output share a step (0: all)
    formats: SearchStrategy[tuple[int, int]] = st.sampled_from([(8, 0), (4, 128), (4, 64), (4, 32)])
    losses: SearchStrategy[str] = st.sampled_from(["softmax", "sigmoid"])


# --- networks ---------------------------------------------------------------------------------------------------------


@st.composite
def configs(draw) -> Config:
    """Small networks with every variant of a block: heads that share keys, softcaps, a window, norms of what is added,
    learned and rotary positions of patches, every filter that resizes pictures."""
    kv_heads, caps = draw(st.sampled_from([1, 2, 4])), st.sampled_from([0.0, 2.0])
    text = TextConfig(
        vocab=64, padding=3, width=16, layers=draw(st.integers(1, 3)), heads=4, kv_heads=kv_heads, head_dim=8,
        hidden=24, query_scale=8**-0.5, attention_softcap=draw(caps), final_softcap=draw(caps.map(lambda cap: 2 * cap)),
        window=draw(st.sampled_from([0, 2, 5])), post_norms=draw(st.booleans()),
    )  # fmt: skip
    vision = VisionConfig(width=24, layers=2, heads=2, hidden=32, image_size=28, patch=14)
    vision = replace(vision, position=draw(st.sampled_from(["learned", "rope2d"])))
    filters = st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"])
    return Config(vision, text, image=64, resample=draw(filters))


def parameters(cfg: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> Params:
    """Random parameters whose vectors are not zero either, so that every leaf matters."""
    generator = torch.Generator().manual_seed(seed)

    def moved(leaf: Tensor) -> Tensor:
        return leaf + 0.2 * torch.randn(leaf.shape, generator=generator).to(dtype) if leaf.dim() == 1 else leaf

    return tree.map(moved, paligemma.init(cfg, seed, dtype))
