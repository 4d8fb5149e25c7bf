"""The worst cases of an evaluation as one HTML page, which needs no other file, no network and no JavaScript.

The pictures are inside the page, scaled. For `detect` and `segment`, the true objects are drawn in one color and those
of the answer in another.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from pgfunc.errors import ImageError, escape_controls
from pgfunc.evaluation.rows import OBJECTS, truths
from pgfunc.evaluation.tasks import Case, Evaluation
from pgfunc.image import open_image
from pgfunc.objects import detect, draw, segment, vqvae
from pgfunc.objects.detect import Box, Detection
from pgfunc.objects.segment import Segment

TEMPLATE = Path(__file__).with_name("page.html")
SIDE = 480  # the longer side of a picture on the page, in pixels; a drawing is enlarged to it, for thin lines
TRUE, ANSWERED = (86, 180, 233), (230, 159, 0)  # blue and orange, which color-blind people tell apart (Okabe & Ito)
LONGEST = 2000  # characters of a text on the page

Objects = Sequence[Detection | Segment]


class Shown(NamedTuple):
    """A case as the page shows it; all texts are safe to show."""

    where: str
    pictures: list[tuple[str, str]]  # the data of each as a URI, and its description
    prompt: str
    expected: list[str]
    answer: list[str]
    text: str  # the answer as the model wrote it, if `answer` is its objects
    error: str
    score: str


def render(
    evaluation: Evaluation,
    cases: Sequence[Case],
    title: str,
    metrics: Sequence[Sequence[str]],
    vq: vqvae.Params | None = None,
) -> str:
    """The page of these cases. `title` names the data and the model; `metrics` are the rows of the table to show.

    `vq`: the mask decoder, for `segment`.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    colors = {"true": "#" + bytes(TRUE).hex(), "answered": "#" + bytes(ANSWERED).hex()}
    located = evaluation.task in OBJECTS
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        task=evaluation.task, title=visible(title), scored=evaluation.scored, total=len(evaluation.cases),
        metrics=metrics, located=located, colors=colors,
        cases=[show_objects(case, vq) if located else show_text(case) for case in cases],
    )  # fmt: skip


def show_text(case: Case) -> Shown:
    """A case whose answer is text."""
    pictures = [(data_uri(fit(picture)), f"the picture {name}") for name, picture in readable(case)]
    answer = [case.completion.text] if case.completion else []
    return shown(case, pictures, list(dict.fromkeys(case.row.references)), answer, "")


def show_objects(case: Case, vq: vqvae.Params | None) -> Shown:
    """A case whose answer is objects, which are drawn on the first picture; they are listed in its pixels."""
    readable_pictures = readable(case)
    if not case.completion or not readable_pictures:
        expected = case.row.references if case.row.objects is None else map(line, truths(case.row, None, vq))
        return shown(case, [], list(expected), [], "")
    text, ((name, picture), *more) = case.completion.text, readable_pictures
    true = truths(case.row, picture.size, vq)
    answered = read(text, picture.size, vq)
    alt = f"{name} with {len(true)} true objects and {len(answered)} of the answer"
    pictures = [(data_uri(drawing(picture, true, answered)), alt)]
    pictures += [(data_uri(fit(one)), f"the picture {title}") for title, one in more]
    return shown(case, pictures, list(map(line, true)), list(map(line, answered)), text)


def shown(case: Case, pictures: list[tuple[str, str]], expected: list[str], answer: list[str], text: str) -> Shown:
    """A case with its texts made safe to show."""
    return Shown(
        visible(case.row.where), [(uri, visible(alt)) for uri, alt in pictures], visible(case.row.prefix),
        list(map(visible, expected)), list(map(visible, answer)), visible(text), visible(case.error),
        f"{case.score:.3f}",
    )  # fmt: skip


def readable(case: Case) -> list[tuple[str, Image.Image]]:
    """The pictures of a case that can be read, with their file names."""
    pictures = []
    for path in case.row.images:
        try:
            pictures.append((path.name, open_image(path)))
        except ImageError:
            continue  # the case has the error
    return pictures


def read(text: str, size: tuple[int, int], vq: vqvae.Params | None) -> Objects:
    """The objects in a text, in a picture of this width and height."""
    return segment.parse(text, *size, vq) if vq else detect.parse(text, *size)


def drawing(picture: Image.Image, true: Objects, answered: Objects) -> Image.Image:
    """The picture in the size of the page, with the true objects and, above them, those of the answer."""
    scale = SIDE / max(picture.size)
    large = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    items = [scaled(item, picture.size, large.size) for item in (*true, *answered)]
    return draw.objects(large, items, colors=[TRUE] * len(true) + [ANSWERED] * len(answered))


def scaled(item: Detection | Segment, before: tuple[int, int], after: tuple[int, int]) -> Detection | Segment:
    """An object of a picture after the picture is resized."""
    x, y = after[0] / before[0], after[1] / before[1]
    item = item._replace(box=Box(item.box.ymin * y, item.box.xmin * x, item.box.ymax * y, item.box.xmax * x))
    return item._replace(mask=resized(item.mask, after)) if isinstance(item, Segment) else item


def resized(mask: Bool[Tensor, "y x"], size: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """A mask in another size."""
    image = Image.fromarray(mask.cpu().numpy()).resize(size, Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(image))


def fit(picture: Image.Image) -> Image.Image:
    """The picture, made smaller if it is larger than the page shows it."""
    smaller = picture.copy()
    smaller.thumbnail((SIDE, SIDE))
    return smaller


def data_uri(picture: Image.Image) -> str:
    """A picture as a URI that contains it, in JPEG."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def line(item: Detection | Segment) -> str:
    """An object as one line of text."""
    ymin, xmin, ymax, xmax = item.box
    pixels = f", {int(item.mask.count_nonzero())} pixels" if isinstance(item, Segment) else ""
    return f"{item.label}: x {xmin:.0f}–{xmax:.0f}, y {ymin:.0f}–{ymax:.0f}{pixels}"


def visible(text: str) -> str:
    """A text without characters that would hide or reverse it, and cut off if it is very long."""
    text = escape_controls(text, keep="\n")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
