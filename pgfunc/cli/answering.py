"""What the commands that ask the model do with each picture: they complete a prefix."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pgfunc as pg
from pgfunc.cli.inputs import Inputs, Item
from pgfunc.cli.machines import Completer
from pgfunc.cli.options import print_note
from pgfunc.cli.running import Outcome
from pgfunc.errors import PgfuncError, SettingError, escape_controls
from pgfunc.image import open_image


class Query(NamedTuple):
    """What is asked about each picture, and how answers are generated."""

    completer: Completer
    asked: Callable[[Item], str]  # the prefix about the whole picture
    box: pg.detect.Box | None  # the part of each picture that is asked about
    sampling: dict[str, Any]
    batch: int | None

    @property
    def model(self) -> pg.Model:
        return self.completer.model

    def prefix(self, item: Item) -> str:
        """What the model gets. Raises the errors of `region_prefix`."""
        return region_prefix(self.box, self.asked(item), item) if self.box else self.asked(item)


def complete(query: Query, inputs: Inputs, items: Iterable[Item]) -> Iterator[tuple[Item, pg.Result]]:
    """The completion about each picture, as they are ready. A single one is completed alone, as by `pg.generate`."""
    if inputs.single and query.completer.here:
        for item in items:
            picture, prefix = open_image(item.source, query.model.cfg.vision.image_size), query.prefix(item)
            (answer,) = pg.generate(query.model, picture, prefix, **query.sampling)
            yield item, pg.Result(item.number, (item.source, prefix), answer, None, (picture.size,))
        return
    started: dict[int, Item] = {}
    failed: dict[int, PgfuncError] = {}

    def rows() -> Iterator[tuple[str, str | None, int]]:
        for item in items:
            started[item.number] = item
            try:
                prefix = query.prefix(item)
            except PgfuncError as error:  # of a part of the picture that is outside it, or of the picture
                failed[item.number], prefix = error, None
            yield item.source, prefix, item.number

    for result in query.completer.rows(rows(), **query.sampling, batch=query.batch):
        error = failed.pop(result.number, result.error)
        yield started.pop(result.number), result._replace(error=error)


def answer_each(query: Query, inputs: Inputs, items: Iterable[Item]) -> Iterator[Outcome]:
    """The answer about each picture."""
    for item, result in complete(query, inputs, items):
        done = result.completion
        if done is None:
            yield Outcome(item, {"prompt": query.asked(item)}, error=result.error)
        else:
            notes = [cut_off(query)] if done.finish == "length" else []
            yield Outcome(item, {"prompt": result.row[1]} | done._asdict(), [done.text], notes)


def stream_answer(query: Query, item: Item) -> None:
    """Print the answer about one picture as it is generated."""
    picture = open_image(item.source, query.model.cfg.vision.image_size)
    pieces = iter(pg.stream(query.model, picture, query.prefix(item), **query.sampling))
    while True:
        try:
            print(escape_controls(next(pieces), keep="\n\t"), end="", flush=True)
        except StopIteration as stop:
            print()
            if stop.value == "length":
                print_note(f"{item.image}: {cut_off(query)}")
            return


def cut_off(query: Query) -> str:
    """What is noted about an answer that reached the largest number of tokens."""
    most = query.sampling["max_new_tokens"]
    return f"stopped at {most} tokens, perhaps too early; --max-new-tokens allows more"


def parse_box(text: str) -> pg.detect.Box:
    """The box that XMIN,YMIN,XMAX,YMAX describes, in pixels."""
    try:
        left, top, right, bottom = (float(edge) for edge in text.split(","))
    except ValueError:
        raise SettingError(f"--box {text}: expected four numbers XMIN,YMIN,XMAX,YMAX, in pixels") from None
    return pg.detect.Box(top, left, bottom, right)


def region_prefix(box: pg.detect.Box, prefix: str, item: Item) -> str:
    """The prefix about a part of a picture.

    Raises SettingError if the part is empty or not inside the picture, and ImageError if that cannot be read.
    """
    top, left, bottom, right = box
    width, height = open_image(item.source).size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        text = ",".join(f"{edge:g}" for edge in (left, top, right, bottom))
        raise SettingError(
            f"--box {text}: is not XMIN,YMIN,XMAX,YMAX inside {item.image}, of {width} x {height} pixels"
        )
    return pg.detect.region(box, width, height, prefix)


def check_region(box: pg.detect.Box, inputs: Inputs) -> None:
    """Raise SettingError if a part is not inside a single picture; of several, each has its own error."""
    for item in inputs.items if inputs.single else ():
        region_prefix(box, "", item)
