"""Pictures and text -> a Prompt, in the layout that PaliGemma was trained on.

    [image tokens] <bos> prefix \\n | suffix <eos>

The tokens left of the bar attend to each other in both directions; those right of it are causal. The newline is
tokenized separately, as in big_vision: in one string, a prefix that ends in a newline would merge with it.

A prefix may begin with one `<image>` per picture, as for transformers' processor; these markers are removed.
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

MARKERS = re.compile(f"(\\s*{tokenizer.IMAGE})+(<bos>)?")

Text = str | Sequence[int]  # text, or its token ids


class Model(NamedTuple):
    """A checkpoint in memory. Without a tokenizer, the model still runs on token ids."""

    cfg: Config
    params: Params
    tokenizer: Tokenizer | None

    def __repr__(self) -> str:
        return tree.summary(self)


class Row(NamedTuple):
    """One row of a batch, before it is converted to tensors."""

    images: tuple[image.Source, ...]
    prefix: Text
    suffix: Text | None


def prepare(model: Model, images: image.Pictures, prefixes: Any, suffixes: Any = None) -> Prompt:
    """The Prompt of a batch, on the model's device; rows are padded on the right.

    If all rows have the same pictures, `pixels` stores them once, with a first stride of 0, and they are encoded once.
    Clone such `pixels` before you edit them or use forward-mode AD.

    images: one entry per row, which is a picture or a list of 0..n pictures; or a single picture for all rows. Each is
    a path, an http or https address, encoded bytes, a PIL image, an array or a tensor, see `image`.
    prefixes, suffixes: one text per row, or one text for all rows. `<image>` markers at the start of a prefix are
    removed, see `unmarked`. A row may have token ids instead of text; the ids of a prefix then include bos and newline.
    Raises PromptError if the rows have different numbers of pictures, or if a row does not fit the model's positions.
    """
    rows = as_rows(images, prefixes, suffixes)
    if len({len(row.images) for row in rows}) > 1:
        raise PromptError("the rows of one prompt have different numbers of pictures; prepare them separately")
    cfg, device = model.cfg, model.params.projector.device
    if device.type == "meta":
        raise PromptError("this model is on the meta device and has no weights; load it on another device")
    tokens = [(prefix_ids(model, row.prefix, len(row.images)), _suffix(model, row.suffix)) for row in rows]
    width = max(len(prefix) + len(suffix) for prefix, suffix in tokens)
    check_fits(cfg, len(rows[0].images), width)
    side = cfg.vision.image_size
    sources = [source for row in rows for source in row.images]
    distinct = {id(source): source for source in sources}  # a picture in several rows is decoded once
    pixels = {key: image.pixels(source, cfg) for key, source in distinct.items()}
    shared = len({tuple(map(id, row.images)) for row in rows}) == 1  # all rows have the same pictures
    stored = rows[0].images if shared else sources
    stacked = (
        torch.stack([pixels[id(source)] for source in stored])
        if stored
        else torch.empty(0, dtype=torch.float32, device="cpu")
    )
    stacked = stacked.to(device).reshape(1 if shared else len(rows), len(rows[0].images), 3, side, side)

    def padded(values: list[list[Any]], value: Any) -> Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in values], device=device)

    return Prompt(
        pixels=stacked.expand(len(rows), -1, -1, -1, -1),
        tokens=padded([[*prefix, *suffix] for prefix, suffix in tokens], cfg.pad),
        valid=padded([[True] * (len(prefix) + len(suffix)) for prefix, suffix in tokens], False),
        causal=padded([[False] * len(prefix) + [True] * len(suffix) for prefix, suffix in tokens], False),
    )


def as_rows(images: Any, prefixes: Any, suffixes: Any = None) -> list[Row]:
    """The rows of a batch: a single picture or text is repeated in every row.

    Raises PromptError if the lists have different lengths, or if there are no rows.
    """
    columns = {
        "pictures": images if _is_list(images) else None,
        "prefixes": texts_per_row("prefixes", prefixes),
        "suffixes": texts_per_row("suffixes", suffixes, optional=True),
    }
    lengths = {name: len(rows) for name, rows in columns.items() if rows is not None}
    if len(set(lengths.values())) > 1:
        raise PromptError(f"{', '.join(f'{n} {name}' for name, n in lengths.items())}: give one of each per row")
    count = next(iter(lengths.values()), 1)
    if not count:
        raise PromptError("no rows: give at least one picture and one prefix")
    pictures = columns["pictures"] or [images] * count
    prefixes = columns["prefixes"] or [prefixes] * count
    suffixes = columns["suffixes"] or [suffixes] * count
    return [
        Row(tuple(row) if _is_list(row) else (row,), prefix, suffix)
        for row, prefix, suffix in zip(pictures, prefixes, suffixes, strict=True)
    ]


def _is_list(images: Any) -> bool:
    """Whether this is a list of pictures, and not a picture."""
    return isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray, memoryview))


def texts_per_row(name: str, value: Any, optional: bool = False) -> Sequence[Text | None] | None:
    """The texts of the rows, or None if the value is one text for all rows. With `optional`, a row's text may be None.

    Raises PromptError, which names the argument, if the value is neither texts nor token ids.
    """
    if _is_text(value):
        return None
    for row in value if isinstance(value, (list, tuple)) else [value]:
        if not _is_text(row) and not (optional and row is None):
            raise PromptError(
                f"{name} are text or lists of token ids, one for all rows or one per row; found {row!r:.60}"
            )
    return value


def _is_text(value: Any) -> bool:
    ids = isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(id, int) for id in value)
    return isinstance(value, str) or ids


def prefix_ids(model: Model, prefix: Text, pictures: int) -> list[int]:
    """The token ids of a prefix: bos, the text and a newline; token ids are returned as they are."""
    if not isinstance(prefix, str):
        return text_ids(model, prefix)
    return [model.cfg.bos, *text_ids(model, unmarked(prefix, pictures)), tokenizer_of(model).newline]


def unmarked(prefix: str, pictures: int) -> str:
    """The prefix without the markers at its start: one `<image>` per picture, and then a `<bos>` if there is one.

    Raises PromptError if the number of `<image>` markers is not the number of pictures. In other positions `<image>`
    and `<bos>` are ordinary text.
    """
    markers = MARKERS.match(prefix)
    if not markers:
        return prefix
    count = markers[0].count(tokenizer.IMAGE)
    if count != pictures:
        raise PromptError(
            f"{prefix!r:.60} begins with {count} <image> for {pictures} picture{'s' * (pictures != 1)}; "
            "leave <image> out, it is added automatically"
        )
    return prefix[markers.end() :]


def _suffix(model: Model, suffix: Text | None) -> list[int]:
    return [] if suffix is None else [*text_ids(model, suffix), model.cfg.eos]


def text_ids(model: Model, text: Text) -> list[int]:
    """The token ids of a text; token ids are returned unchanged. Raises PromptError for an id that is not a token."""
    ids = tokenizer.encode(tokenizer_of(model), text) if isinstance(text, str) else list(text)
    if invalid := [id for id in ids if not model.cfg.text.has(id)]:
        raise PromptError(invalid_id_message(model.cfg, invalid[0], isinstance(text, str)))
    return ids


def invalid_id_message(cfg: Config, id: int, tokenized: bool) -> str:
    """Why an id is not a token of the model. `tokenized`: the id is from the tokenizer, not from the caller."""
    if id == cfg.image:
        remedy = "it is <image>: leave it out, image tokens are added automatically"
    elif tokenized:
        remedy = "the tokenizer has tokens that the embedding has no rows for; is it the tokenizer of another model?"
    else:
        remedy = "is it a token id of another model?"
    inside = 0 <= id < cfg.text.vocab
    return f"token id {id} is {'no token' if inside else f'outside 0..{cfg.text.vocab - 1}'}; {remedy}"


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's tokenizer. Raises PromptError if it has none."""
    if model.tokenizer is None:
        raise PromptError(f"this model {tokenizer.MISSING}; give token ids, or load it with tokenizer=")
    return model.tokenizer


def check_fits(cfg: Config, pictures: int, tokens: int) -> None:
    """Raise PromptError if a row with this many pictures and text tokens is longer than the model's positions."""
    if pictures * cfg.vision.tokens + tokens > cfg.text.positions:
        raise PromptError(
            f"{pictures} x {cfg.vision.tokens} image tokens and {tokens} of text do not fit "
            f"{cfg.text.positions} positions; shorten the text"
        )
