"""What the commands whose result is text do with each picture: they answer, and they rank candidates."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from PIL.Image import Image

import pgfunc as pg
from pgfunc.cli.options import note_if_cut_off, print_result, read_each
from pgfunc.errors import ImageError, SettingError, escape_controls
from pgfunc.image import open_image


def answer_each(
    model: pg.Model, images: Sequence[str], prefix_for: Callable[[str, Image], str], sampling: dict[str, Any],
    as_json: bool, skipped: list[str],
) -> None:  # fmt: skip
    """Print the model's answer about each picture; the answer about a single picture is printed as it is generated."""
    for image, picture in read_each(images, partial(open_image, side=model.cfg.vision.image_size), skipped):
        prefix = prefix_for(image, picture)
        if len(images) == 1 and not as_json:
            finish = print_stream(pg.stream(model, picture, prefix, **sampling))
        else:
            (answer,) = pg.generate(model, picture, prefix, **sampling)
            print_result({"image": image, "prompt": prefix} | answer._asdict(), as_json, f"{image}: {answer.text}")
            finish = answer.finish
        if not as_json:
            note_if_cut_off(image, finish, sampling["max_new_tokens"])


def print_stream(pieces: Iterable[str]) -> Any:
    """Print the pieces of a text as they come; returns the return value of the generator."""
    iterator = iter(pieces)
    while True:
        try:
            print(escape_controls(next(iterator), keep="\n\t"), end="", flush=True)
        except StopIteration as stop:
            print()
            return stop.value


def parse_box(text: str) -> pg.detect.Box:
    """The box that XMIN,YMIN,XMAX,YMAX describes, in pixels."""
    try:
        left, top, right, bottom = (float(edge) for edge in text.split(","))
    except ValueError:
        raise SettingError(f"--box {text}: expected four numbers XMIN,YMIN,XMAX,YMAX, in pixels") from None
    return pg.detect.Box(top, left, bottom, right)


def region_prefix(box: pg.detect.Box, prefix: str, image: str, picture: Image) -> str:
    """The prefix about a part of a picture. Raises SettingError if the part is empty or not inside the picture."""
    top, left, bottom, right = box
    width, height = picture.size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        text = ",".join(f"{edge:g}" for edge in (left, top, right, bottom))
        raise SettingError(f"--box {text}: is not XMIN,YMIN,XMAX,YMAX inside {image}, of {width} x {height} pixels")
    return pg.detect.region(box, width, height, prefix)


def check_regions(images: Sequence[str], prefix_for: Callable[[str, Image], str]) -> None:
    """Raise SettingError if --box is not inside every picture; called before anything is loaded."""
    for image in images:
        with suppress(ImageError):  # `read_each` reports it
            prefix_for(image, open_image(image))


def rank_each(
    model: pg.Model, images: Sequence[str], prefix: str, candidates: list[str], as_json: bool, skipped: list[str]
) -> None:
    """Print the candidates for each picture, the most probable first."""
    for image, picture in read_each(images, partial(open_image, side=model.cfg.vision.image_size), skipped):
        (scores,) = pg.score(model, picture, prefix, candidates).tolist()
        ranked = sorted(zip(candidates, scores, strict=True), key=lambda pair: -pair[1])
        lines = [f"{image}: {answer}\t{logprob:.4f}" for answer, logprob in ranked]
        print_result({"image": image, "prompt": prefix, "scores": dict(ranked)}, as_json, *lines)
