"""Pictures and text -> a Prompt, the way PaliGemma was trained to read them.

    [image tokens] <bos> prefix \\n | suffix <eos>

The newline is tokenised by itself, as big_vision does: in one string a prefix that ends in a newline would merge with
it. What stands left of the bar is the bidirectional prefix; what stands right of it is causal. `TASKS` are the
prefixes of the tasks that have a command, as the mix checkpoints were trained on them.

A prefix may begin with an `<image>` for each picture, as transformers' processor takes it: they are implied.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgfunc import image, tokenizer, tree
from pgfunc.config import Config
from pgfunc.errors import PromptError
from pgfunc.paligemma import Params, Prompt
from pgfunc.tokenizer import Tokenizer

TASKS = {"caption": "caption en", "ask": "answer en {}", "ocr": "ocr", "detect": "detect {}", "segment": "segment {}"}

MARKERS = re.compile(f"(\\s*{tokenizer.IMAGE})+(<bos>)?")

Text = str | Sequence[int]  # text, or the ids that stand for it


class Model(NamedTuple):
    """A checkpoint in memory. Without a tokenizer it still runs on token ids."""

    cfg: Config
    params: Params
    tokenizer: Tokenizer | None

    def __repr__(self) -> str:
        return tree.summary(self)


class Row(NamedTuple):
    """One row of a batch, before it is numbers."""

    images: tuple[image.Source, ...]
    prefix: Text
    suffix: Text | None


def prepare(model: Model, images: Any, prefixes: Any, suffixes: Any = None) -> Prompt:
    """The Prompt of a batch, on the model's device; rows are padded on the right.

    Where several rows have the same pictures, and no others, `pixels` holds them once, with a first stride of 0, and
    they are encoded once: clone it to edit it, or for forward-mode AD.

    images: a row each, which is one picture or a list of 0..n; or a single picture for all rows.
    prefixes, suffixes: a row each, or one text for all rows. `<image>` markers at the start of a prefix are left out,
    see `unmarked`. In place of text a row may have token ids: a prefix's ids then stand for everything from bos to
    newline.
    Raises PromptError when rows have different numbers of pictures, or do not fit the model's positions.
    """
    rows = as_rows(images, prefixes, suffixes)
    if len({len(row.images) for row in rows}) > 1:
        raise PromptError("the rows of one prompt have different numbers of pictures; prepare them apart")
    cfg, device = model.cfg, model.params.projector.device
    if device.type == "meta":
        raise PromptError("this model is on the meta device, where it has shapes and no weights; load it elsewhere")
    tokens = [(_prefix(model, row.prefix, len(row.images)), _suffix(model, row.suffix)) for row in rows]
    width = max(len(prefix) + len(suffix) for prefix, suffix in tokens)
    fits(cfg, len(rows[0].images), width)
    side = cfg.vision.image_size
    sources = [source for row in rows for source in row.images]
    once = {id(source): source for source in sources}  # a picture that stands in several rows is decoded once
    pixels = {key: image.pixels(source, cfg) for key, source in once.items()}
    alike = len({tuple(map(id, row.images)) for row in rows}) == 1
    shown = rows[0].images if alike else sources  # rows with the same pictures share them
    stacked = (
        torch.stack([pixels[id(source)] for source in shown])
        if shown
        else torch.empty(0, dtype=torch.float32, device="cpu")
    )
    stacked = stacked.to(device).reshape(1 if alike else len(rows), len(rows[0].images), 3, side, side)

    def padded(values: list[list[Any]], value: Any) -> Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in values], device=device)

    return Prompt(
        pixels=stacked.expand(len(rows), -1, -1, -1, -1),
        tokens=padded([[*prefix, *suffix] for prefix, suffix in tokens], cfg.pad),
        valid=padded([[True] * (len(prefix) + len(suffix)) for prefix, suffix in tokens], False),
        causal=padded([[False] * len(prefix) + [True] * len(suffix) for prefix, suffix in tokens], False),
    )


def as_rows(images: Any, prefixes: Any, suffixes: Any = None) -> list[Row]:
    """Spread what is given once over all rows, and check that the rest has one length."""
    given = {
        "pictures": images if isinstance(images, (list, tuple)) else None,
        "prefixes": texts("prefixes", prefixes),
        "suffixes": texts("suffixes", suffixes, optional=True),
    }
    lengths = {name: len(rows) for name, rows in given.items() if rows is not None}
    if len(set(lengths.values())) > 1:
        raise PromptError(f"{', '.join(f'{n} {name}' for name, n in lengths.items())}: give one of each a row")
    count = next(iter(lengths.values()), 1)
    if not count:
        raise PromptError("no rows: give at least one picture and one prefix")
    spread = [given["pictures"] or [images] * count, given["prefixes"] or [prefixes] * count]
    spread.append(given["suffixes"] or [suffixes] * count)
    return [Row(tuple(i) if isinstance(i, (list, tuple)) else (i,), p, s) for i, p, s in zip(*spread, strict=True)]


def texts(name: str, value: Any, optional: bool = False) -> Sequence[Text | None] | None:
    """The texts of the rows, or None where one is given for all of them; an optional one may be None in a row."""
    if _is_text(value):
        return None
    for row in value if isinstance(value, (list, tuple)) else [value]:
        if not _is_text(row) and not (optional and row is None):
            raise PromptError(f"{name} are text or lists of token ids, one for all rows or one each; found {row!r:.60}")
    return value


def _is_text(value: Any) -> bool:
    ids = isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(id, int) for id in value)
    return isinstance(value, str) or ids


def _prefix(model: Model, prefix: Text, pictures: int) -> list[int]:
    if not isinstance(prefix, str):
        return text_ids(model, prefix)
    return [model.cfg.bos, *text_ids(model, unmarked(prefix, pictures)), tokenizer_of(model).newline]


def unmarked(prefix: str, pictures: int) -> str:
    """The prefix without the markers that it begins with: an `<image>` for each picture, and a `<bos>` behind them.

    Raises PromptError for another number of them. Elsewhere `<image>` and `<bos>` are text.
    """
    markers = MARKERS.match(prefix)
    if not markers:
        return prefix
    count = markers[0].count(tokenizer.IMAGE)
    if count != pictures:
        raise PromptError(
            f"{prefix!r:.60} begins with {count} <image> for {pictures} picture{'s' * (pictures != 1)}; "
            "leave <image> out, it is implied"
        )
    return prefix[markers.end() :]


def _suffix(model: Model, suffix: Text | None) -> list[int]:
    return [] if suffix is None else [*text_ids(model, suffix), model.cfg.eos]


def text_ids(model: Model, text: Text) -> list[int]:
    """The ids of a text, or the ids that were given in its place."""
    ids = tokenizer.encode(tokenizer_of(model), text) if isinstance(text, str) else list(text)
    if wrong := [id for id in ids if not model.cfg.text.has(id)]:
        raise PromptError(refusal(model.cfg, wrong[0], isinstance(text, str)))
    return ids


def refusal(cfg: Config, id: int, read: bool) -> str:
    """Why an id cannot be part of the text, which was read or given as ids."""
    if id == cfg.image:
        remedy = "it is <image>: leave it out, pictures come first by themselves"
    elif read:
        remedy = "the tokenizer has tokens that the embedding has no rows for; is it another model's?"
    else:
        remedy = "is it another model's?"
    inside = 0 <= id < cfg.text.vocab
    return f"token id {id} is {'no token' if inside else f'outside 0..{cfg.text.vocab - 1}'}; {remedy}"


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's tokenizer; a PromptError where it has none."""
    if model.tokenizer is None:
        raise PromptError(f"this model {tokenizer.MISSING}; give token ids, or load it with tokenizer=")
    return model.tokenizer


def fits(cfg: Config, pictures: int, tokens: int) -> None:
    """Raise PromptError when a row of so many pictures and text tokens is longer than the model's positions."""
    if pictures * cfg.vision.tokens + tokens > cfg.text.positions:
        raise PromptError(
            f"{pictures} x {cfg.vision.tokens} image tokens and {tokens} of text do not fit "
            f"{cfg.text.positions} positions; shorten the text"
        )
