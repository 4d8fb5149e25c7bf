"""`generate_many` as a loop over `generate`, for tests that replace the model by a function."""

from collections.abc import Iterable, Iterator

import pgfunc as pg
from pgfunc.errors import ImageError
from pgfunc.image import open_image


def generate_many(model: pg.Model, rows: Iterable, batch: int | None = None, **sampling) -> Iterator[pg.Result]:
    for picture, prefix, number in rows:
        try:
            opened = open_image(picture)
        except ImageError as error:
            yield pg.Result(number, (picture, prefix, number), None, error, ((0, 0),))
        else:
            (done,) = pg.generate(model, opened, prefix, **sampling)
            yield pg.Result(number, (picture, prefix, number), done, None, (opened.size,))
