"""Pictures and texts -> what SigLIP's two encoders take, the way it was trained to read them.

    SigLIP     text in lower case, without ASCII punctuation, one space between words </s> </s> </s> ...
    SigLIP 2   text in lower case <eos> <pad> <pad> ...

The end is always there, and padding, which the encoder reads, fills every text to one length. Which of the two rules
holds is told by the tokenizer's control tokens. Source: big_vision `proj/image_text`; transformers
`tokenization_siglip.py`, `tokenization_siglip2.py`.
"""

import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from tokenizers import Regex, normalizers, processors
from tokenizers import Tokenizer as Backend
from torch import Tensor

from pgfunc import image, tree
from pgfunc.config import SiglipConfig
from pgfunc.errors import CheckpointError, PromptError
from pgfunc.siglip_dual import DualParams
from pgfunc.tokenizer import MISSING, Reader, control_of, fix, read
from pgfunc.tokenizer import encode as plain_ids

PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, repr=False)
class TextTokenizer(Reader):
    """A loaded `tokenizer.json`, the ids that end and fill a text, and whether punctuation is dropped before."""

    eos: int
    pad: int
    bare: bool


class SiglipModel(NamedTuple):
    """A dual encoder in memory. Without a tokenizer it still embeds pictures, and token ids."""

    cfg: SiglipConfig
    params: DualParams
    tokenizer: TextTokenizer | None

    def __repr__(self) -> str:
        return tree.summary(self)


def load_tokenizer(path: Path) -> TextTokenizer:
    """Read a `tokenizer.json`."""
    return made(read(path), str(path))


def wrap(backend: Backend, where: str) -> TextTokenizer:
    """A tokenizer from a copy of a backend."""
    return made(Backend.from_str(backend.to_str()), where)


def made(backend: Backend, where: str) -> TextTokenizer:
    """A tokenizer from a backend of its own."""
    fix(backend)
    eos, pad, end = (backend.token_to_id(name) for name in ("<eos>", "<pad>", "</s>"))
    control = control_of(backend)
    if eos is not None and pad is not None:  # first: Gemma's vocabulary also has </s>, which closes struck-out text
        return TextTokenizer(backend, control, eos, pad, bare=False)
    if end is not None:
        return TextTokenizer(backend, control | {end}, end, end, bare=True)
    raise CheckpointError(f"{where}: has neither </s>, as SigLIP's tokenizer, nor <eos> and <pad>, as SigLIP 2's")


def canonical(text: str, bare: bool) -> str:
    """The text as the model was trained to read it; doing it twice changes nothing."""
    text = text.lower()
    return " ".join(text.replace("▁", " ").translate(PUNCTUATION).split()) if bare else text


def self_contained(tokenizer: TextTokenizer) -> Backend:
    """A backend that makes texts canonical and ends them by itself, for readers who run it alone."""
    rules: list[normalizers.Normalizer] = [normalizers.Lowercase()]
    if tokenizer.bare:
        rules += [normalizers.Replace("▁", " "), normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
                  normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]  # fmt: skip
    raw = json.loads(tokenizer.backend.to_str())
    for token in raw["added_tokens"]:  # those readers spell special tokens out
        token["special"] = token["id"] in tokenizer.control
    own = raw["normalizer"] or {"type": "Sequence", "normalizers": []}
    own = own["normalizers"] if own["type"] == "Sequence" else [own]
    first = [json.loads(rule.__getstate__()) for rule in rules]
    raw["normalizer"] = {"type": "Sequence", "normalizers": own if own[: len(first)] == first else first + own}
    backend = Backend.from_str(json.dumps(raw))
    end = backend.id_to_token(tokenizer.eos)
    backend.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.eos)])
    return backend


def text_ids(model: SiglipModel, texts: Sequence[str]) -> Int[Tensor, "b t"]:
    """The ids of texts, ended and padded, on the model's device.

    Raises PromptError for a text that does not fit, or a model without a tokenizer.
    """
    if isinstance(texts, str):
        raise PromptError(f"texts are a list, found {texts!r:.60}")
    tokenizer, length = model.tokenizer, model.cfg.text.positions
    if tokenizer is None:
        raise PromptError(f"this model {MISSING}, and cannot read text")
    rows = [[*encode(tokenizer, text), tokenizer.eos] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) > length:
            raise PromptError(
                f"{text!r:.60} is {len(row) - 1} tokens, this model has room for {length - 1}; shorten it"
            )
        if max(row) >= model.cfg.text.vocab:
            raise PromptError(
                f"token id {max(row)} is outside 0..{model.cfg.text.vocab - 1}; another model's tokenizer?"
            )
    padded = [row + [tokenizer.pad] * (length - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=model.params.scale.device).reshape(-1, length)


def encode(tokenizer: TextTokenizer, text: str) -> list[int]:
    """The ids of a text, with nothing added."""
    return plain_ids(tokenizer, canonical(text, tokenizer.bare))


def pixels(model: SiglipModel, images: Sequence[image.Source]) -> Float[Tensor, "n 3 y x"]:
    """Pictures as the vision encoder takes them, on the model's device. Raises ImageError, naming the file."""
    side = model.cfg.vision.image_size
    stacked = [image.pixels(source, model.cfg) for source in images]
    found = torch.stack(stacked) if stacked else torch.empty(0, 3, side, side, dtype=torch.float32, device="cpu")
    return found.to(model.params.scale.device)
