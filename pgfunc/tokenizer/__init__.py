"""Text <-> token ids, with the `tokenizers` package and the `tokenizer.json` of a checkpoint.

User text never becomes a control token: `<bos>`, `<eos>`, `<pad>`, `<unk>` and `<image>` are encoded as ordinary text.
All other tokens that a tokenizer defines are one id, as in transformers, and are decoded, whether special or not:
`<loc0000>`..`<loc1023>` (positions in a picture), `<seg000>`..`<seg127>` (mask codes), and the tokens of a fine-tune.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from pgfunc.errors import CheckpointError, PromptError
from pgfunc.tokenizer import growth
from pgfunc.tokenizer.special import tokens_to_add

FILE = "tokenizer.json"
MISSING = (
    "was loaded without a tokenizer.json; if there is a tokenizer.model or spiece.model, convert it with transformers' "
    "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
)
IMAGE = "<image>"
BASIC = ("<pad>", "<eos>", "<bos>", "<unk>")  # every model has these; a missing one is never added
CONTROL = (*BASIC, IMAGE)
MAX_BYTES = 2**28  # of a tokenizer.json; Gemma's has an eighth of this
MAX_IDS, LARGE_ID = 10**7, re.compile(r":\s*[0-9]{8}")  # more ids than any model has, and the JSON of a larger id
BYTE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True, repr=False)
class Reader:
    """A backend and its control ids, which no text is encoded to. A copy encodes like the original."""

    backend: Backend
    control: frozenset[int]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.backend.get_vocab_size():,} tokens)"

    @cached_property
    def spelling(self) -> Backend:
        """A backend that encodes control tokens as ordinary text. Made when the first text contains one."""
        backend = Backend.from_str(json.dumps(self.content()))
        backend.encode_special_tokens = True  # encodes special tokens as text
        return backend

    def content(self) -> dict[str, Any]:
        """The content of a `tokenizer.json` in which the control tokens, and no others, are special."""
        raw = json.loads(self.backend.to_str())
        for token in raw["added_tokens"]:
            token["special"] = token["id"] in self.control
        return raw

    def __getstate__(self) -> dict[str, Any]:
        """The fields, without `spelling`: a copied backend would lose `encode_special_tokens`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, repr=False)
class Tokenizer(Reader):
    """A loaded `tokenizer.json`: encodes text, and decodes all ids except control tokens, which become ""."""

    newline: int


def load(path: Path, control: Iterable[int] = ()) -> Tokenizer:
    """Read a `tokenizer.json`. `control` has further ids to treat as control tokens, whatever their names.

    Raises CheckpointError if the file is missing, is not a tokenizer, or does not encode a newline as one token.
    """
    return from_backend(read(path), str(path), control)


def read(path: Path) -> Backend:
    """The backend in a file, with the tokens that other files in the same folder define. Raises CheckpointError."""
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: missing")
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise ValueError(f"expected a file of at most {MAX_BYTES:,} bytes")
        content = path.read_bytes()
        text = content.decode(json.detect_encoding(content))
        if (factor := growth.factor(text)) > growth.MAX_FACTOR:
            raise ValueError(f"its rules make a text up to {factor:,} times as long")
        with panics_are_errors():
            backend = Backend.from_str(text)
            # the package counts up to the largest id when it copies or saves a tokenizer. All ids are read only if one
            # may be large: for Gemma's vocabulary that takes as long as reading the file
            if LARGE_ID.search(text) and (last := max(backend.get_vocab().values(), default=0)) >= MAX_IDS:
                raise ValueError(f"has a token of id {last}, expected less than {MAX_IDS}")
            declared = tokens_to_add(path.parent, backend.get_added_tokens_decoder()) if path.name == FILE else []
            backend.add_tokens([token for token in declared if token.content not in BASIC])
    except CheckpointError:
        raise
    except Exception as error:  # the package raises bare Exception, and quotes the file, newlines included
        raise CheckpointError(f"{path}: not a tokenizer ({' '.join(str(error).split())})") from error
    return backend


def wrap(backend: Backend, where: str) -> Tokenizer:
    """A tokenizer that uses a copy of a backend. `where` names the backend in error messages."""
    return from_backend(Backend.from_str(backend.to_str()), where)


def from_backend(backend: Backend, where: str, control: Iterable[int] = ()) -> Tokenizer:
    """A tokenizer from a backend, whose settings are changed in place.

    Raises CheckpointError, which names `where`, if a newline is not one token.
    """
    normalize_settings(backend)
    try:
        newline = ids_of(backend, "\n")
    except PromptError as error:
        raise CheckpointError(f"{where}: {error}; download it again") from error
    if len(newline) != 1:
        raise CheckpointError(f"{where}: a newline is {len(newline)} tokens, expected one as in PaliGemma's tokenizer")
    return Tokenizer(backend, control_of(backend) | frozenset(control), newline[0])


def normalize_settings(backend: Backend) -> None:
    """Turn off padding, truncation and random merges, so that the same text always gives the same ids."""
    backend.no_padding()
    backend.no_truncation()
    if isinstance(backend.model, BPE):
        backend.model.dropout = None  # dropout would skip merges at random


def control_of(backend: Backend) -> frozenset[int]:
    """The ids of a backend's control tokens."""
    return frozenset(id for name in CONTROL if (id := backend.token_to_id(name)) is not None)


def readable(tokenizer: Tokenizer, rows: int) -> list[int]:
    """The ids below `rows` that are tokens, without `<image>`."""
    token = tokenizer.backend.id_to_token
    return [id for id in range(rows) if token(id) not in (None, IMAGE)]


def encode(reader: Reader, text: str) -> list[int]:
    """The token ids of a text; no bos or eos is added. Raises PromptError for text that cannot be encoded."""
    ids = ids_of(reader.backend, text)
    return ids if reader.control.isdisjoint(ids) else ids_of(reader.spelling, text)


def ids_of(backend: Backend, text: str) -> list[int]:
    """The ids that a backend encodes a text to. Control tokens in the text become control ids."""
    try:
        with panics_are_errors():
            return backend.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the package raises a bare Exception if the file refers to a token that it lacks
        raise PromptError(f"{text!r} is not text that can be encoded ({error})") from error


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """Turn a Rust panic, which is not an Exception, into a RuntimeError.

    The package panics, and prints that to stderr, if a regular expression of the file takes too long.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the type cannot be imported
            raise
        raise RuntimeError(str(error)) from error


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of token ids. Control tokens are left out, and bytes that are not UTF-8 become U+FFFD."""
    return "".join(pieces(tokenizer, ids))


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of token ids, piece by piece, in whole characters: a token that ends inside one waits for the next."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for id in ids:
        if text := decoder.decode(token_bytes(tokenizer, id)):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest


def token_bytes(tokenizer: Tokenizer, id: int) -> bytes:
    """The bytes of a token: one byte for a byte token such as `<0x0A>`, and no bytes for a control token.

    Raises CheckpointError if the decoder in the tokenizer's file fails.
    """
    if id in tokenizer.control:
        return b""
    if byte := BYTE.fullmatch(tokenizer.backend.id_to_token(id) or ""):
        return bytes.fromhex(byte[1])
    try:
        with panics_are_errors():
            return tokenizer.backend.decode([id], skip_special_tokens=False).encode()
    except Exception as error:  # a bare Exception if the decoder in the file fails
        raise CheckpointError(f"the tokenizer cannot write token {id} ({error}); download it again") from error
