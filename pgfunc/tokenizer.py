"""Text <-> token ids, by the `tokenizers` package and a checkpoint's `tokenizer.json`.

Ordinary text never becomes a control token: `<bos>`, `<eos>`, `<pad>`, `<unk>` and `<image>` written by a user are
spelled out. `<loc0000>`..`<loc1023>` (places in a picture) and `<seg000>`..`<seg127>` (mask codes) are words of the
prompt language and stay tokens.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend

from pgfunc.errors import CheckpointError, PromptError

CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>")
WORDS = ("<loc", "<seg")
IDS, LARGE = 10**7, re.compile(r":\s*[0-9]{8}")  # more ids than any model has, and what a larger one looks like
BYTE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Tokenizer:
    """A loaded `tokenizer.json` and the ids that it never writes out."""

    backend: Backend
    newline: int
    control: frozenset[int]


def load(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`."""
    return wrap(read(path), str(path))


def read(path: Path) -> Backend:
    """The backend in a file."""
    try:
        text = path.read_text(encoding="utf-8")
        with panics_are_errors():
            backend = Backend.from_str(text)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except Exception as error:  # the package raises bare Exception, and quotes the file, newlines included
        raise CheckpointError(f"{path}: not a tokenizer ({' '.join(str(error).split())})") from error
    # to mark a tokenizer or to save it, the package counts up to the largest id; all ids are asked for only where one
    # may be large: of Gemma's vocabulary that takes as long as to read it
    if LARGE.search(text) and (last := max(backend.get_vocab().values(), default=0)) >= IDS:
        raise CheckpointError(f"{path}: has a token of id {last}, expected less than {IDS}; download it again")
    return backend


def wrap(backend: Backend, where: str) -> Tokenizer:
    """A tokenizer from a backend, with the control tokens made unreachable from text."""
    backend = _marked(backend)
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    try:
        newline = ids_of(backend, "\n")
    except PromptError as error:
        raise CheckpointError(f"{where}: {error}; download it again") from error
    if len(newline) != 1:
        raise CheckpointError(f"{where}: a newline is {len(newline)} tokens, expected one as in PaliGemma's tokenizer")
    control = (backend.token_to_id(name) for name in CONTROL)
    return Tokenizer(backend, newline[0], frozenset(id for id in control if id is not None))


def _marked(backend: Backend) -> Backend:
    """The backend with control tokens marked special, and places and mask codes not; files differ in it."""

    def special(token: str, said: bool) -> bool:
        return token in CONTROL or (said and not token.startswith(WORDS))

    added = backend.get_added_tokens_decoder().values()
    if all(token.special == special(token.content, token.special) for token in added):
        return backend
    raw = json.loads(backend.to_str())  # a mark cannot be taken back on a loaded tokenizer
    for token in raw["added_tokens"]:
        token["special"] = special(token["content"], token["special"])
    return Backend.from_str(json.dumps(raw))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, with nothing added before or after."""
    return ids_of(tokenizer.backend, text)


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
