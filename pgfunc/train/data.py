"""Data for fine-tuning: JSON Lines with picture, prefix and suffix; all lines are checked before training starts.

    {"image": "dog.jpg", "prefix": "caption en", "suffix": "a dog on a sofa"}

`image` may be a list. Paths are relative to the file's folder, or to the folder `images`. Roboflow exports this format,
and big_vision reads it; but big_vision's own example data have no prefix, because its config adds "caption en". The
examples of a batch are a function of (seed, step), so there is no state to save.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pgfunc.errors import DataError, ImageError, PromptError
from pgfunc.files.jsonlines import check_texts, pictures, read_lines
from pgfunc.image import open_image
from pgfunc.paligemma import Prompt
from pgfunc.prompt import Model, prepare, tokenizer_of

KEYS = "image, prefix and suffix"  # of a line, for messages

# misspelled location and mask tokens: in brackets with a number, or with one bracket and all digits
TOKEN_LIKE = re.compile(
    r"(?:<|&lt;)[\s/]*(?:loc|seg)[\s_:=#+.-]*\d[\d\s_+.-]*/?(?:>|&gt;)"
    r"|<(?:loc\d{4}|seg\d{3})(?![\w>])|(?<![\w<])(?:loc\d{4}|seg\d{3})>"
    r"|<(?:loc|seg)(?:none|nan|\{[^{}]*\}|>\d+</(?:loc|seg))>|<segment\d+>|\[(?:loc\d{4}|seg\d{3})\]",
    re.IGNORECASE,
)


class Example(NamedTuple):
    """A line of the file. `where` names the file and the line number, for messages."""

    where: str
    images: tuple[Path, ...]
    prefix: str
    suffix: str


def read(path: str | Path, images: str | Path | None = None) -> list[Example]:
    """The examples of a file, in order, without blank lines. Pictures are in the folder `images`, or beside the file.

    Raises DataError, naming file and line, if a line is not UTF-8 or not JSON, or a key is missing or of another type.
    """
    folder = Path(path).parent if images is None else Path(images)
    return [parse(row, where, folder) for where, row in read_lines(path, KEYS)]


def parse(row: dict[str, Any], where: str, folder: Path) -> Example:
    """The example in one line. Raises DataError as `read` does."""
    for key in ("image", "prefix", "suffix"):
        if key not in row:
            raise DataError(f"{where}: {key} is missing; a line has {KEYS}")
    images = pictures(row, where, folder, "each epoch reads it again")
    for key in ("prefix", "suffix"):
        check_texts(where, key, [row[key]])
    return Example(where, images, row["prefix"], row["suffix"])


def check(model: Model, examples: Iterable[Example]) -> None:
    """Decode every picture and prepare every text, as training will.

    Raises DataError, naming file and line, if a picture is missing or unreadable, a text is too long for the model's
    positions, or a token is misspelled (see `check_tokens`).
    """
    decoded: set[Path] = set()
    blank = np.zeros((1, 1, 3), dtype=np.uint8)  # in place of pictures that are decoded already
    for example in examples:
        try:
            for image in set(example.images) - decoded:
                open_image(image, model.cfg.vision.image_size)
            decoded |= set(example.images)
            prepare(model, [[blank] * len(example.images)], [example.prefix], [example.suffix])
            check_tokens(model, example)
        except (ImageError, PromptError) as error:
            raise DataError(f"{example.where}: {error}") from error


def check_tokens(model: Model, example: Example) -> None:
    """Raise DataError if a location or mask code is not a token, or if a text begins or ends with bos, eos or pad.

    The model would learn a misspelled token letter by letter. Training adds bos and eos itself; in a text they are
    ordinary characters.
    """
    backend = tokenizer_of(model).backend
    control = [backend.id_to_token(id) for id in (model.cfg.bos, model.cfg.eos, model.cfg.pad)]
    for key, text in {"prefix": example.prefix, "suffix": example.suffix}.items():
        for piece in (match[0] for match in TOKEN_LIKE.finditer(text)):
            if backend.token_to_id(piece) is None:
                raise DataError(
                    f"{example.where}: {key} has {piece!r}, which is not a token; "
                    "locations are <loc0000> to <loc1023>, mask codes <seg000> to <seg127>"
                )
        for token in filter(None, control):
            if text.strip().startswith(token) or text.strip().endswith(token):
                raise DataError(f"{example.where}: {key} begins or ends with {token}; leave it out, training adds it")


def order(seed: int, epoch: int, count: int) -> list[int]:
    """The order in which an epoch reads `count` examples, each once."""
    return np.random.default_rng((seed, epoch)).permutation(count).tolist()


def batch(seed: int, step: int, size: int, count: int) -> list[int]:
    """The indices of the examples of a step, counted from 0. The last batch of an epoch may be smaller."""
    epoch, index = divmod(step, steps_per_epoch(size, count))
    return order(seed, epoch, count)[index * size : (index + 1) * size]


def steps_per_epoch(size: int, count: int) -> int:
    """The number of batches in an epoch."""
    return -(-count // size)


def prompts(model: Model, examples: Sequence[Example], parts: int = 1) -> Iterable[Prompt]:
    """A batch as prompts, in about `parts` equal parts. The rows of one prompt have the same number of pictures."""
    for indices in np.array_split(np.arange(len(examples)), min(parts, len(examples))):
        part = [examples[i] for i in indices]
        for count in sorted({len(row.images) for row in part}):
            rows = [row for row in part if len(row.images) == count]
            yield prepare(model, [row.images for row in rows], [row.prefix for row in rows],
                          [row.suffix for row in rows])  # fmt: skip
