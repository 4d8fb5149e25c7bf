"""Scenes and texts as batches of arrays, made by worker processes. Blanks are filled once the scenes are rendered.

A template token of `BLANK` or more stands for a number of one thing. Each thing has 20 numbers: four coordinates of its
box, then sixteen codes of its mask.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import pgfunc as pg
from examples.tiny import render, scenes, texts
from examples.tiny.scenes import Catalog, Scene
from pgfunc.tokenizer import Tokenizer

BLANK = 1 << 16
NUMBERS = 20  # for each thing: 4 coordinates and 16 codes
SPELLED = (
    "ocr",
    "sign",
)  # answered letter by letter: the model would guess a token of several letters from known words, not read it


class Texts(NamedTuple):
    """Templates of prompts, padded to one length."""

    tokens: Int[Tensor, "r t"]
    valid: Bool[Tensor, "r t"]
    causal: Bool[Tensor, "r t"]
    scene: Int[Tensor, "r"]  # the index of each row's scene


class Batch(NamedTuple):
    layout: render.Layout
    texts: Texts


class Vocabulary(NamedTuple):
    """A tokenizer and the ids that templates need."""

    tokenizer: Tokenizer
    pad: int
    bos: int
    eos: int
    loc: int  # the id of <loc0000>
    seg: int  # the id of <seg000>


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    ids = tokenizer.backend.get_vocab()
    return Vocabulary(tokenizer, *(ids[name] for name in ("<pad>", "<bos>", "<eos>", "<loc0000>", "<seg000>")))


def template(vocab: Vocabulary, row: texts.Row) -> tuple[list[int], list[int]]:
    """The ids of prefix and suffix, with blanks."""
    owners = iter(row.things)
    prefix = _blanked(vocab, row.prefix, owners)
    suffix = _spelled(vocab, row.suffix) if row.task in SPELLED else _blanked(vocab, row.suffix, owners)
    return [vocab.bos, *prefix, vocab.tokenizer.newline], [*suffix, vocab.eos]


def _spelled(vocab: Vocabulary, text: str) -> list[int]:
    """One token for each letter."""
    return [id for letter in text for id in _ids(vocab.tokenizer, letter)]


@lru_cache(1 << 14)
def _ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Cached, because letters and questions repeat."""
    return tuple(pg.tokenizer.encode(tokenizer, text))


def _blanked(vocab: Vocabulary, text: str, owners: Iterator[int]) -> list[int]:
    """The ids of a text, with blanks; every fourth coordinate begins the box of the next owner."""
    ids, thing, coordinate, code = [], 0, 0, 0
    for id in _ids(vocab.tokenizer, text):
        if id == vocab.loc:
            thing = next(owners) if coordinate % 4 == 0 else thing
            ids.append(BLANK + NUMBERS * thing + coordinate % 4)
            coordinate, code = coordinate + 1, 0
        elif id == vocab.seg:
            ids.append(BLANK + NUMBERS * thing + 4 + code)
            code += 1
        else:
            ids.append(id)
    return ids


def pack(pairs: Sequence[tuple[list[int], list[int]]], owners: Sequence[int], width: int) -> Texts:
    """Prefixes and suffixes as padded rows; `owners` are the scenes of the rows."""
    tokens, ends = np.zeros((len(pairs), width), np.int64), np.zeros((len(pairs), 2), np.int64)
    for i, (prefix, suffix) in enumerate(pairs):
        tokens[i, : len(prefix) + len(suffix)] = prefix + suffix
        ends[i] = len(prefix), len(prefix) + len(suffix)
    position = np.arange(width)
    valid, causal = position < ends[:, 1:], (position >= ends[:, :1]) & (position < ends[:, 1:])
    scene = np.array(owners, np.int64)
    return Texts(*(torch.from_numpy(array) for array in (tokens, valid, causal, scene)))


def fill(
    texts: Texts, boxes: Float[Tensor, "s k 4"], codes: Int[Tensor, "s k 16"], vocab: Vocabulary
) -> Int[Tensor, "r t"]:
    """The tokens, with every blank replaced by the coordinate or code that it stands for."""
    coordinates = vocab.loc + (boxes * 1023).round().long()
    numbers = rearrange(torch.cat([coordinates, vocab.seg + codes], -1), "s k c -> s (k c)")
    known = numbers[texts.scene].gather(1, (texts.tokens - BLANK).clamp(min=0))
    return torch.where(texts.tokens >= BLANK, known, texts.tokens)


class Stream(Dataset):
    """Batch number i, for the workers of a DataLoader; it depends on i only."""

    def __init__(
        self,
        cat: Catalog,
        vocab: Vocabulary,
        text_kind: str,
        size: int,
        prompts: int,
        width: int,
        side: int,
        start: int,
        stride: int = 0,
    ):
        self.cat, self.vocab, self.text_kind, self.size, self.side = cat, vocab, text_kind, size, side
        self.prompts, self.width, self.start, self.stride = prompts, width, start, stride or size

    def __getitem__(self, number: int) -> Batch:
        first = self.start + number * self.stride
        drawn = [scenes.draw(self.cat, "train", first + i, self.side) for i in range(self.size)]
        layout = render.layout(drawn)
        if self.text_kind == "prompts":
            return Batch(layout, self.asked(drawn, first))
        if self.text_kind == "description":
            return Batch(layout, self.described(drawn, first))
        return Batch(layout, pack([], [], self.width))

    def asked(self, drawn: Sequence[Scene], first: int) -> Texts:
        """`prompts` prompts of each scene, drawn from the mix of tasks; prompts that are too long are left out."""
        pairs = []
        for i, scene in enumerate(drawn):
            rng = np.random.default_rng((99, first + i))
            templates = (template(self.vocab, row) for row in texts.rows(scene, self.cat, rng))
            pairs += islice((pair for pair in templates if sum(map(len, pair)) <= self.width), self.prompts)
        return pack(pairs, np.repeat(range(len(drawn)), self.prompts).tolist(), self.width)

    def described(self, drawn: Sequence[Scene], first: int) -> Texts:
        """The text of each scene for the text encoder; two fifths of the scenes are described only in part."""
        ids = []
        for i, scene in enumerate(drawn):
            rng = np.random.default_rng((98, first + i))
            described = texts.partly(scene, rng) if rng.random() < 0.4 else scene
            ids.append(description(self.vocab, described, self.width))
        return pack([(row, []) for row in ids], range(len(drawn)), self.width)


def description(vocab: Vocabulary, scene: Scene, width: int) -> list[int]:
    """The ids of a scene's description: lower case, eos, padding, as SigLIP 2's text encoder reads texts."""
    ids = pg.tokenizer.encode(vocab.tokenizer, texts.description(scene).lower())[: width - 1]
    return [*ids, vocab.eos, *[vocab.pad] * (width - 1 - len(ids))]


def loader(stream: Stream, first: int, last: int, workers: int) -> DataLoader:
    """Batches `first` to `last`, in order."""
    return DataLoader(
        stream, batch_size=None, sampler=range(first, last), num_workers=workers, pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None, worker_init_fn=_single,
    )  # fmt: skip


def _single(worker: int) -> None:
    torch.set_num_threads(1)
