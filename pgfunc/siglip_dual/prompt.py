"""Pictures and texts -> the inputs of SigLIP's two encoders, in the form that they were trained on.

    SigLIP     text in lower case, without ASCII punctuation, one space between words </s> </s> </s> ...
    SigLIP 2   text in lower case <eos> <pad> <pad> ...

A text always has an end token. Padding, which the encoder reads, extends every text to the same length. The control
tokens of the tokenizer tell which of the two rules applies. Source: big_vision `proj/image_text`; transformers
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
from pgfunc.tokenizer import MISSING, Reader, control_of, normalize_settings, read
from pgfunc.tokenizer import encode as plain_ids

PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, repr=False)
class TextTokenizer(Reader):
    """A loaded `tokenizer.json`, and the rule by which texts are encoded."""

    eos: int
    pad: int
    drop_punctuation: bool  # whether punctuation is removed before a text is encoded


class SiglipModel(NamedTuple):
    """A dual encoder in memory. Without a tokenizer, it still embeds pictures and token ids."""

    cfg: SiglipConfig
    params: DualParams
    tokenizer: TextTokenizer | None

    def __repr__(self) -> str:
        return tree.summary(self)


def load_tokenizer(path: Path) -> TextTokenizer:
    """Read a `tokenizer.json`. Raises CheckpointError if it is not a tokenizer of SigLIP or SigLIP 2."""
    return from_backend(read(path), str(path))


def wrap(backend: Backend, where: str) -> TextTokenizer:
    """A tokenizer that uses a copy of a backend. `where` names the backend in error messages."""
    return from_backend(Backend.from_str(backend.to_str()), where)


def from_backend(backend: Backend, where: str) -> TextTokenizer:
    """A tokenizer from a backend, whose settings are changed in place.

    Raises CheckpointError, which names `where`, if the backend has no end token.
    """
    normalize_settings(backend)
    eos, pad, end = (backend.token_to_id(name) for name in ("<eos>", "<pad>", "</s>"))
    control = control_of(backend)
    if eos is not None and pad is not None:  # tested first: Gemma's vocabulary has </s> too, for struck-out text
        return TextTokenizer(backend, control, eos, pad, drop_punctuation=False)
    if end is not None:
        return TextTokenizer(backend, control | {end}, end, end, drop_punctuation=True)
    raise CheckpointError(f"{where}: has neither </s>, like SigLIP's tokenizer, nor <eos> and <pad>, like SigLIP 2's")


def canonical(text: str, drop_punctuation: bool) -> str:
    """The text in the form that the model was trained on. Applying this twice gives the same text as once."""
    text = text.lower()
    return " ".join(text.replace("▁", " ").translate(PUNCTUATION).split()) if drop_punctuation else text


def self_contained(tokenizer: TextTokenizer) -> Backend:
    """A backend that itself makes texts canonical and adds the end token, for programs that use only the backend."""
    rules: list[normalizers.Normalizer] = [normalizers.Lowercase()]
    if tokenizer.drop_punctuation:
        rules += [normalizers.Replace("▁", " "), normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
                  normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]  # fmt: skip
    raw = tokenizer.content()  # those programs encode special tokens as text
    existing = raw["normalizer"] or {"type": "Sequence", "normalizers": []}
    existing = existing["normalizers"] if existing["type"] == "Sequence" else [existing]
    added = [json.loads(rule.__getstate__()) for rule in rules]
    present = existing[: len(added)] == added
    raw["normalizer"] = {"type": "Sequence", "normalizers": existing if present else added + existing}
    backend = Backend.from_str(json.dumps(raw))
    end = backend.id_to_token(tokenizer.eos)
    backend.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.eos)])
    return backend


def text_ids(model: SiglipModel, texts: Sequence[str]) -> Int[Tensor, "b t"]:
    """The token ids of texts, with end token and padding, on the model's device.

    Raises PromptError if a text is too long, or if the model has no tokenizer.
    """
    if isinstance(texts, str):
        raise PromptError(f"texts must be a list, found {texts!r:.60}")
    tokenizer, length = model.tokenizer, model.cfg.text.positions
    if tokenizer is None:
        raise PromptError(f"this model {MISSING}, and cannot read text")
    rows = [[*encode(tokenizer, text), tokenizer.eos] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) > length:
            raise PromptError(f"{text!r:.60} is {len(row) - 1} tokens, this model reads up to {length - 1}; shorten it")
        if max(row) >= model.cfg.text.vocab:
            raise PromptError(
                f"token id {max(row)} is outside 0..{model.cfg.text.vocab - 1}; is it the tokenizer of another model?"
            )
    padded = [row + [tokenizer.pad] * (length - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=model.params.scale.device).reshape(-1, length)


def encode(tokenizer: TextTokenizer, text: str) -> list[int]:
    """The token ids of a text in canonical form, without end token and padding."""
    return plain_ids(tokenizer, canonical(text, tokenizer.drop_punctuation))


def pixels(model: SiglipModel, images: Sequence[image.Source]) -> Float[Tensor, "n 3 y x"]:
    """The pixels of pictures, on the model's device. Raises ImageError, which names the file."""
    side = model.cfg.vision.image_size
    stacked = [image.pixels(source, model.cfg) for source in images]
    batch = torch.stack(stacked) if stacked else torch.empty(0, 3, side, side, dtype=torch.float32, device="cpu")
    return batch.to(model.params.scale.device)
