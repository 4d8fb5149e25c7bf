"""Data for fine-tuning: JSON Lines of picture, prefix and suffix, read and checked whole before training starts.

    {"image": "dog.jpg", "prefix": "caption en", "suffix": "a dog on a sofa"}

`image` may be a list; its paths are relative to the file's folder, or to another one. Roboflow exports this format, and
big_vision reads it; but in big_vision's own example data the prefix is missing, its config adds "caption en". What a
batch holds is a function of (seed, step): there is no state to lose.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pgfunc.errors import DataError, ImageError, PromptError
from pgfunc.image import open_image
from pgfunc.paligemma import Prompt
from pgfunc.prompt import Model, prepare, tokenizer_of

# what people write who mean a place or a mask code: in brackets and with a number, or with one bracket and all digits
MEANT = re.compile(
    r"(?:<|&lt;)[\s/]*(?:loc|seg)[\s_:=#+.-]*\d[\d\s_+.-]*/?(?:>|&gt;)"
    r"|<(?:loc\d{4}|seg\d{3})(?![\w>])|(?<![\w<])(?:loc\d{4}|seg\d{3})>"
    r"|<(?:loc|seg)(?:none|nan|\{[^{}]*\}|>\d+</(?:loc|seg))>|<segment\d+>|\[(?:loc\d{4}|seg\d{3})\]",
    re.IGNORECASE,
)


class Example(NamedTuple):
    """A line of the file. `where` is the file and the line's number, for messages."""

    where: str
    images: tuple[Path, ...]
    prefix: str
    suffix: str


def read(path: str | Path, images: str | Path | None = None) -> list[Example]:
    """The examples of a file, in its order; blank lines are none. Pictures lie in `images`, else beside the file.

    Raises DataError, naming file and line, for what is not UTF-8, not JSON, or not of the three keys and their types.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: cannot be read, it is no file")
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    folder = path.parent if images is None else Path(images)
    found = [parse(line, f"{path}:{i}", folder) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{path}: empty; expected a line of JSON an example, with image, prefix and suffix")
    return found


def parse(line: bytes, where: str, folder: Path) -> Example:
    """One line."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON in UTF-8 ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with image, prefix and suffix, found {_short(row)}")
    for key in ("image", "prefix", "suffix"):
        if key not in row:
            raise DataError(f"{where}: {key} is missing; a line has image, prefix and suffix")
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    for key, values in {"image": images, "prefix": [row["prefix"]], "suffix": [row["suffix"]]}.items():
        if wrong := [value for value in values if not isinstance(value, str)]:
            raise DataError(f"{where}: {key} is {_short(wrong[0])}, expected text")
    return Example(where, tuple(folder / image for image in images), row["prefix"], row["suffix"])


def check(model: Model, examples: Iterable[Example]) -> None:
    """Decode every picture and fit every text into the model's positions, as training will.

    Raises DataError, naming file and line, for a picture that is missing or unreadable, a text that is too long, and
    what would be learned letter by letter though a token is meant, see `check_tokens`.
    """
    seen: set[Path] = set()
    blank = np.zeros((1, 1, 3), dtype=np.uint8)  # in place of pictures that were decoded already
    for example in examples:
        try:
            for image in set(example.images) - seen:
                open_image(image, model.cfg.vision.image_size)
            seen |= set(example.images)
            prepare(model, [[blank] * len(example.images)], [example.prefix], [example.suffix])
            check_tokens(model, example)
        except (ImageError, PromptError) as error:
            raise DataError(f"{example.where}: {error}") from error


def check_tokens(model: Model, example: Example) -> None:
    """Raise DataError for a place or mask code that is no token, and for a bos, eos or pad around a text.

    Training adds the latter itself, and spells out those in the text.
    """
    backend = tokenizer_of(model).backend
    around = [backend.id_to_token(id) for id in (model.cfg.bos, model.cfg.eos, model.cfg.pad)]
    for key, text in {"prefix": example.prefix, "suffix": example.suffix}.items():
        for piece in (found[0] for found in MEANT.finditer(text)):
            if backend.token_to_id(piece) is None:
                raise DataError(
                    f"{example.where}: {key} has {piece!r}, which is no token; "
                    "places are <loc0000> to <loc1023>, mask codes <seg000> to <seg127>"
                )
        for token in filter(None, around):
            if text.strip().startswith(token) or text.strip().endswith(token):
                raise DataError(f"{example.where}: {key} begins or ends with {token}; leave it out, training adds it")


def order(seed: int, epoch: int, count: int) -> list[int]:
    """The order in which `count` examples are read in an epoch: each once."""
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


def batch(seed: int, step: int, size: int, count: int) -> list[int]:
    """The examples of a step, from 0. The last batch of an epoch is as small as what is left."""
    epoch, place = divmod(step, steps_per_epoch(size, count))
    return order(seed, epoch, count)[place * size : (place + 1) * size]


def steps_per_epoch(size: int, count: int) -> int:
    """The batches of an epoch."""
    return -(-count // size)


def prompts(model: Model, examples: Sequence[Example], parts: int = 1) -> Iterable[Prompt]:
    """A batch as prompts, in about `parts` equal parts; examples with different numbers of pictures go apart."""
    for places in np.array_split(np.arange(len(examples)), min(parts, len(examples))):
        rows = [examples[place] for place in places]
        for count in sorted({len(row.images) for row in rows}):
            alike = [row for row in rows if len(row.images) == count]
            yield prepare(model, [row.images for row in alike], [row.prefix for row in alike],
                          [row.suffix for row in alike])  # fmt: skip


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
