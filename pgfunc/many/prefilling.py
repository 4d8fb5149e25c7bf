"""Rows of one shape become a cache: each picture is encoded once, however many rows ask about it.

Shapes are few, so that compiled code serves all rows: the tokens of a row are padded to its shape, and a group of rows
is filled up with copies of its last one. A row's shape depends on the row alone, and so do its results.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from pgfunc import image, paligemma
from pgfunc.cache import Cache
from pgfunc.config import Config
from pgfunc.generate import encoded_prefill_step
from pgfunc.jit import jit
from pgfunc.jit.donation import bucket
from pgfunc.many.decoding import to_device
from pgfunc.many.reading import Picture, Request
from pgfunc.paligemma import Prompt
from pgfunc.prompt import Model
from pgfunc.sample import Settings

# a CPU's matrix product may round in another way for another number of rows, but not for another multiple of four:
# measured with MKL in float32 (tests/test_many.py), so that results do not depend on who shares a batch
MULTIPLE = 4

compiled_encode, compiled_prefill = jit(paligemma.encode_images), jit(encoded_prefill_step)


class Shape(NamedTuple):
    """What rows that are prefilled together have in common."""

    pictures: int
    tokens: int  # of text, with padding
    slots: int  # of the cache, for the prompt and the answer


class Ready(NamedTuple):
    """A row whose pictures are read, and the token ids of its prefix."""

    request: Request
    ids: list[int]


class Group(NamedTuple):
    """How rows are prefilled: so many together, and whether compiled."""

    size: int
    compile: bool


def group_for(places: int, compile: bool) -> Group:
    """The groups for so many places: a quarter of them. A larger group would leave more places empty while it waits."""
    return Group(max(min(places, MULTIPLE), places // 4), compile)


def shape_of(ready: Ready, most: int, group: Group, cfg: Config) -> Shape:
    """The shape of a row that gets at most `most` new tokens."""
    pictures, count = len(ready.request.pictures), len(ready.ids)
    tokens = bucket(count, 16) if group.compile else ceil(count / 8) * 8
    return Shape(pictures, tokens, bucket(pictures * cfg.vision.tokens + tokens + most))


def prefill(
    model: Model, rows: Sequence[Ready], shape: Shape, settings: Settings, u: Float[Tensor, "n m"], group: Group
) -> tuple[Int[Tensor, "b"], Float[Tensor, "b"], Cache]:
    """The first token of each row, its log-probability, and the cache; b >= n rows, where the last one is repeated."""
    cfg, device = model.cfg, model.params.projector.device
    encode([picture for row in rows for picture in row.request.pictures], model, group)
    count = rows_together(len(rows), group)
    filled = [*rows, *[rows[-1]] * (count - len(rows))]
    tokens = torch.tensor([row.ids + [cfg.pad] * (shape.tokens - len(row.ids)) for row in filled], device="cpu")
    valid = torch.tensor([[i < len(row.ids) for i in range(shape.tokens)] for row in filled], device="cpu")
    valid = to_device(valid, device)
    prompt = Prompt((), to_device(tokens, device), valid, torch.zeros_like(valid))  # pyright: ignore[reportArgumentType]
    if shape.pictures:
        tokens_of = [picture.tokens for row in filled for picture in row.request.pictures if picture.tokens is not None]
        seen = rearrange(torch.stack(tokens_of), "(b i) p d -> b (i p) d", i=shape.pictures)
    else:
        seen = torch.empty(count, 0, cfg.text.width, dtype=model.params.projector.dtype, device=device)
    first = F.pad(u[:, 0], (0, count - len(u)))
    step = compiled_prefill if group.compile else encoded_prefill_step
    return step(model.params, seen, prompt, cfg, 0, settings, to_device(first, device))


def encode(pictures: Sequence[Picture], model: Model, group: Group) -> None:
    """Fill in the tokens of the pictures that have none."""
    device = model.params.projector.device
    new = list({id(picture): picture for picture in pictures if picture.tokens is None}.values())
    while new:
        size = encoded_together(len(new), group)
        part, new = new[:size], new[size:]
        filled = [*part, *[part[-1]] * (size - len(part))]
        levels = stacked_on(device, [each.levels for each in filled if each.levels is not None])
        pixels = rearrange(image.normalize(levels), "b c y x -> b 1 c y x")
        run = compiled_encode if group.compile else paligemma.encode_images
        for picture, tokens in zip(part, run(model.params, pixels, model.cfg), strict=False):
            picture.tokens, picture.levels = tokens, None


def stacked_on(device: torch.device, levels: Sequence[np.ndarray]) -> UInt8[Tensor, "b y x 3"]:
    """The levels of pictures as one tensor on a device; the host does not wait."""
    pinned = device.type == "cuda"
    stacked = torch.empty((len(levels), *levels[0].shape), dtype=torch.uint8, device="cpu", pin_memory=pinned)
    np.stack(levels, out=stacked.numpy())
    return stacked.to(device, non_blocking=pinned)


def rows_together(count: int, group: Group) -> int:
    """How many rows a group of so many is filled up to."""
    if group.compile:
        return group.size
    return ceil(count / MULTIPLE) * MULTIPLE if group.size > 1 else 1


def encoded_together(count: int, group: Group) -> int:
    """How many of so many pictures are encoded together. Compiled code has two sizes: a group, or a quarter of it."""
    if not group.compile:
        return min(count, group.size)
    quarter = max(1, group.size // 4)
    return group.size if count > group.size - quarter else quarter
