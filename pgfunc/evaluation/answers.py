"""The model's answers to many rows. A row that cannot be answered has an error in place of a completion."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from pgfunc.errors import ImageError, PgfuncError, PromptError
from pgfunc.generate import Completion, generate
from pgfunc.image import open_image
from pgfunc.prompt import Model

AT_ONCE = 16  # rows in a batch


class Result(NamedTuple):
    """The answer to a row, or the error; and the width and the height of each of its pictures."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  a tuple has a method of this name
    row: Any
    completion: Completion | None
    error: PgfuncError | None
    sizes: tuple[tuple[int, int], ...]


def generate_many(model: Model, rows: Iterable[Any], max_new_tokens: int) -> Iterator[Result]:
    """Answer each (pictures, prefix), greedily, in batches. Raises SettingError if max_new_tokens is not positive."""
    numbered = enumerate(rows)
    while batch := list(islice(numbered, AT_ONCE)):
        opened = [(index, row, open_row(model, row)) for index, row in batch]
        ready = [(index, row, pictures) for index, row, pictures in opened if not isinstance(pictures, PgfuncError)]
        yield from (Result(i, row, None, bad, ()) for i, row, bad in opened if isinstance(bad, PgfuncError))
        yield from answer(model, ready, max_new_tokens)


def open_row(model: Model, row: Any) -> Any:
    """The pictures of a row, or the error of one that cannot be read."""
    sources = row[0] if isinstance(row[0], (list, tuple)) else [row[0]]
    try:
        return [open_image(source, model.cfg.vision.image_size) for source in sources]
    except ImageError as error:
        return error


def answer(model: Model, ready: list[tuple[int, Any, Any]], max_new_tokens: int) -> list[Result]:
    """The results of rows whose pictures are open. If one prompt does not fit, each row is run by itself."""
    try:
        images, prefixes = [pictures for _, _, pictures in ready], [row[1] for _, row, _ in ready]
        completions = generate(model, images, prefixes, max_new_tokens) if ready else []
    except PromptError as error:
        if len(ready) == 1:
            return [Result(*ready[0][:2], None, error, ())]
        return [result for one in ready for result in answer(model, [one], max_new_tokens)]
    return [
        Result(index, row, completion, None, tuple(picture.size for picture in pictures))
        for (index, row, pictures), completion in zip(ready, completions, strict=True)
    ]
