"""Text <-> token ids, by the `tokenizers` package and a checkpoint's `tokenizer.json`.

A user's text never becomes a control token: `<bos>`, `<eos>`, `<pad>`, `<unk>` and `<image>` are spelled out. All other
tokens that a tokenizer defines are one id, as transformers reads them, and are written in answers, special or not:
`<loc0000>`..`<loc1023>` (places in a picture), `<seg000>`..`<seg127>` (mask codes), and what a fine-tune has added.
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
from pgfunc.tokenizer.special import declared

FILE = "tokenizer.json"
MISSING = (
    "was loaded without a tokenizer.json; where there is a tokenizer.model or spiece.model, transformers' "
    "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) makes one of it"
)
IMAGE = "<image>"
KNOWN = ("<pad>", "<eos>", "<bos>", "<unk>")  # to every model from the start: where one is missing, none is made up
CONTROL = (*KNOWN, IMAGE)
MOST_BYTES = 2**28  # of a tokenizer.json; Gemma's has an eighth of it
IDS, LARGE = 10**7, re.compile(r":\s*[0-9]{8}")  # more ids than any model has, and what a larger one looks like
BYTE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True, repr=False)
class Reader:
    """A backend as its file describes it, and the ids that text never becomes. A copy reads as the original does."""

    backend: Backend
    control: frozenset[int]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.backend.get_vocab_size():,} tokens)"

    @cached_property
    def spelling(self) -> Backend:
        """The backend that spells control tokens out, made for the first text that has one."""
        raw = json.loads(self.backend.to_str())
        for token in raw["added_tokens"]:
            token["special"] = token["id"] in self.control
        backend = Backend.from_str(json.dumps(raw))
        backend.encode_special_tokens = True  # special tokens are text then
        return backend

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: not `spelling`, for a copy of a backend loses `encode_special_tokens`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, repr=False)
class Tokenizer(Reader):
    """A loaded `tokenizer.json`: reads text, and writes all ids but the control tokens."""

    newline: int


def load(path: Path, control: Iterable[int] = ()) -> Tokenizer:
    """Read a `tokenizer.json`. `control` are ids that are control tokens whatever their names."""
    return made(read(path), str(path), control)


def read(path: Path) -> Backend:
    """The backend in a file, and in it the tokens that the files beside it define."""
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: missing")
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise ValueError(f"expected a file of at most {MOST_BYTES:,} bytes")
        content = path.read_bytes()
        text = content.decode(json.detect_encoding(content))
        if (factor := growth.of_file(text)) > growth.MOST:
            raise ValueError(f"its rules make a text up to {factor:,} times as long")
        with panics_are_errors():
            backend = Backend.from_str(text)
            # to copy a tokenizer or to save it, the package counts up to the largest id; all ids are asked for only
            # where one may be large: of Gemma's vocabulary that takes as long as to read it
            if LARGE.search(text) and (last := max(backend.get_vocab().values(), default=0)) >= IDS:
                raise ValueError(f"has a token of id {last}, expected less than {IDS}")
            more = declared(path.parent, backend.get_added_tokens_decoder()) if path.name == FILE else []
            backend.add_tokens([token for token in more if token.content not in KNOWN])
    except CheckpointError:
        raise
    except Exception as error:  # the package raises bare Exception, and quotes the file, newlines included
        raise CheckpointError(f"{path}: not a tokenizer ({' '.join(str(error).split())})") from error
    return backend


def wrap(backend: Backend, where: str) -> Tokenizer:
    """A tokenizer from a copy of a backend."""
    return made(Backend.from_str(backend.to_str()), where)


def made(backend: Backend, where: str, control: Iterable[int] = ()) -> Tokenizer:
    """A tokenizer from a backend of its own."""
    fix(backend)
    try:
        newline = ids_of(backend, "\n")
    except PromptError as error:
        raise CheckpointError(f"{where}: {error}; download it again") from error
    if len(newline) != 1:
        raise CheckpointError(f"{where}: a newline is {len(newline)} tokens, expected one as in PaliGemma's tokenizer")
    return Tokenizer(backend, control_of(backend) | frozenset(control), newline[0])


def fix(backend: Backend) -> None:
    """Let a backend read a text alone, whole, and always the same way."""
    backend.no_padding()
    backend.no_truncation()
    if isinstance(backend.model, BPE):
        backend.model.dropout = None  # else merges are left out at random


def control_of(backend: Backend) -> frozenset[int]:
    """The ids of the control tokens that a backend has."""
    return frozenset(id for name in CONTROL if (id := backend.token_to_id(name)) is not None)


def readable(tokenizer: Tokenizer, rows: int) -> list[int]:
    """The ids below `rows` that are tokens other than `<image>`."""
    token = tokenizer.backend.id_to_token
    return [id for id in range(rows) if token(id) not in (None, IMAGE)]


def encode(reader: Reader, text: str) -> list[int]:
    """The ids of a text, with nothing added before or after."""
    ids = ids_of(reader.backend, text)
    return ids if reader.control.isdisjoint(ids) else ids_of(reader.spelling, text)


def ids_of(backend: Backend, text: str) -> list[int]:
    """The ids of a text, by a backend alone."""
    try:
        with panics_are_errors():
            return backend.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the package raises bare Exception where a file promises a token that it lacks
        raise PromptError(f"{text!r} is not text that can be encoded ({error})") from error


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """Where a pattern of a file takes too long the package panics: that is no Exception, and it is said on stderr."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # which cannot be imported
            raise
        raise RuntimeError(str(error)) from error


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of token ids; control tokens leave no trace, and bytes that are not UTF-8 become U+FFFD."""
    return "".join(pieces(tokenizer, ids))


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of token ids as it grows, in whole characters: a token that ends within one waits for the next."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for id in ids:
        if text := decoder.decode(token_bytes(tokenizer, id)):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest


def token_bytes(tokenizer: Tokenizer, id: int) -> bytes:
    """The bytes that a token stands for: one for a byte token such as `<0x0A>`, none for a control token."""
    if id in tokenizer.control:
        return b""
    if byte := BYTE.fullmatch(tokenizer.backend.id_to_token(id) or ""):
        return bytes.fromhex(byte[1])
    try:
        with panics_are_errors():
            return tokenizer.backend.decode([id], skip_special_tokens=False).encode()
    except Exception as error:  # a bare one where the file's decoder cannot do its work
        raise CheckpointError(f"the tokenizer cannot write token {id} ({error}); download it again") from error
