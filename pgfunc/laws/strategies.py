"""Strategies that draw the examples of laws: small configurations, parameters, prompts, splits, text, pictures, logits.

An example is plain data: lengths and a seed instead of tensors, so that it can be shrunk and prints legibly.
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
    """A batch of prompts: the numbers of prefix and suffix tokens of each row, and what all rows share."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    images: int = 1
    padding: int = 0  # columns after the longest row
    seed: int = 0  # for tokens and pixels

    @property
    def lengths(self) -> tuple[int, ...]:
        """The tokens of each row."""
        return tuple(p + s for p, s in zip(self.prefix, self.suffix, strict=True))


def prompt(rows: Rows, vocab: int, image_size: int) -> Prompt:
    """The prompt of these rows, with random pixels and random tokens, also at padded positions."""
    generator = torch.Generator().manual_seed(rows.seed)
    lengths, starts = (torch.tensor(side)[:, None] for side in (rows.lengths, rows.prefix))
    position = torch.arange(max(rows.lengths) + rows.padding)
    batch = len(rows.prefix)
    return Prompt(
        pixels=torch.rand(batch, rows.images, 3, image_size, image_size, generator=generator) * 2 - 1,
        tokens=torch.randint(0, vocab, (batch, len(position)), generator=generator),
        valid=position < lengths,
        causal=(position >= starts) & (position < lengths),
    )


@st.composite
def ragged(draw, rows: int = 3, prefix: int = 4, suffix: int = 5, images: int = 2, padding: int = 2) -> Rows:
    """Batches of at most these sizes. Each row has at least 1 prefix token and may have no suffix."""
    sizes = draw(st.lists(st.tuples(st.integers(1, prefix), st.integers(0, suffix)), min_size=1, max_size=rows))
    shared = draw(st.integers(0, images)), draw(st.integers(0, padding)), draw(seeds)
    return Rows(tuple(p for p, _ in sizes), tuple(s for _, s in sizes), *shared)


class Split(NamedTuple):
    """Prompts of which the first `at` tokens of each row are prefilled, and the rest is decoded."""

    rows: Rows
    at: tuple[int, ...]


def splits(rows: SearchStrategy[Rows]) -> SearchStrategy[Split]:
    """Splits of rows that all have a suffix; each row is split before one of its suffix tokens."""

    def of(rows: Rows) -> SearchStrategy[Split]:
        positions = (st.integers(p, p + s - 1) for p, s in zip(rows.prefix, rows.suffix, strict=True))
        return st.builds(Split, st.just(rows), st.tuples(*positions))

    return rows.flatmap(of)


# --- text and pictures ------------------------------------------------------------------------------------------------

# control tokens, text that looks like a <loc> token or a byte, and text that tokenizers and terminals treat specially
fragments = st.sampled_from([
    "<pad>", "<eos>", "<bos>", "<unk>", "<image>", "<mask>", "<bos", "<<bos>>", "bos>", "<loc0000>", "<loc1023>",
    "<loc1024>", "<loc1>", "<seg000>", "<seg127>", "<0x41>", "\n", "\r\n", "\t", " ", "▁", "\x00", "\x1b[0m",
    "\ufeff", "\u202e", "\u200d", "e\u0301", "\ufffd", "0", "a",
])  # fmt: skip
hostile = st.text() | st.lists(fragments | st.text(max_size=5)).map("".join)

TOKEN = re.compile("<(?:loc[0-9]{4}|seg[0-9]{3})>")
# labels of objects in a text, where a semicolon ends an object
labels = (st.text(max_size=12) | hostile).map(str.strip).filter(lambda text: ";" not in text and not TOKEN.search(text))

MODES = [
    "1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16",
    "I;16L", "I;16B",
]  # fmt: skip


class Picture(NamedTuple):
    """A picture in one of Pillow's modes: random bytes, or in modes I and F random levels of 16 and of 8 bits."""

    mode: str
    width: int
    height: int
    seed: int


pictures = st.builds(Picture, st.sampled_from(MODES), st.integers(1, 70), st.integers(1, 70), seeds)


def picture(example: Picture) -> Image.Image:
    """The picture that the example describes."""
    size = (example.width, example.height)
    generator = torch.Generator().manual_seed(example.seed)
    if example.mode in ("I", "F"):  # random bytes would not be valid levels
        share = torch.rand(example.height, example.width, generator=generator)
        levels = (share * 65_535).int() if example.mode == "I" else share * 255
        return Image.fromarray(levels.numpy())
    count = len(Image.new(example.mode, size).tobytes())
    return Image.frombytes(example.mode, size, bytes(torch.randint(0, 256, (count,), generator=generator).tolist()))


# --- numbers ----------------------------------------------------------------------------------------------------------

# small whole numbers tie often, and none dominates; -inf is a token that was excluded before
whole, wide = st.integers(-3, 3).map(float), st.floats(-30, 30, width=32)
styles = [st.lists(logit, min_size=1, max_size=12) for logit in (whole, wide, whole | wide | st.just(float("-inf")))]


class Strategies(NamedTuple):
    """The strategies that laws draw examples from. An implementation that accepts less needs narrower ones."""

    rows: SearchStrategy[Rows] = ragged()
    seeds: SearchStrategy[int] = seeds
    logits: SearchStrategy[tuple[float, ...]] = (
        st.one_of(styles).filter(lambda row: max(row) > float("-inf")).map(tuple)
    )
    text: SearchStrategy[str] = hostile
    labels: SearchStrategy[str] = labels
    pictures: SearchStrategy[Picture] = pictures
    dtypes: SearchStrategy[str] = dtypes
    # bits of a weight, and the number of inputs that share a step (0: all)
    formats: SearchStrategy[tuple[int, int]] = st.sampled_from([(8, 0), (4, 128), (4, 64), (4, 32)])
    losses: SearchStrategy[str] = st.sampled_from(["softmax", "sigmoid"])


# --- networks ---------------------------------------------------------------------------------------------------------


@st.composite
def configs(draw) -> Config:
    """Small networks with every variant of a block: shared keys, softcaps, a window, post-norms, learned and rotary
    positions of patches, and every resize filter."""
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
    """Random parameters in which vectors are not zero either, so that every leaf affects the logits."""
    generator = torch.Generator().manual_seed(seed)

    def perturbed(leaf: Tensor) -> Tensor:
        return leaf + 0.2 * torch.randn(leaf.shape, generator=generator).to(dtype) if leaf.dim() == 1 else leaf

    return tree.map(perturbed, paligemma.init(cfg, seed, dtype))
