"""What a model found in one picture: the objects, the text that it wrote, and the picture to draw them on."""

from collections.abc import Sequence
from io import BytesIO
from os import PathLike
from typing import Any, Literal, NamedTuple

from PIL import Image

from pgfunc.generate import Completion
from pgfunc.objects import draw
from pgfunc.objects.boxes import Detection
from pgfunc.objects.grammar import Malformed
from pgfunc.objects.masks import Segment


class Result(NamedTuple):
    """The objects in a picture, in pixels, and what they were read from. Notebooks show the drawing."""

    objects: list[Any]  # Detection from `detect.find`, Segment from `segment.find`
    malformed: list[Malformed]  # the pieces of the text that are not objects
    prompt: str
    text: str
    finish: Literal["eos", "length"]  # "length": the text was cut off, so objects may be missing
    picture: Image.Image  # upright and RGB

    def draw(self, font: str | PathLike | None = None, confidence: bool = True) -> Image.Image:
        """A copy of the picture with the objects drawn on it; the options are those of `draw.objects`."""
        return draw.objects(self.picture, self.objects, font, confidence)

    def _repr_png_(self) -> bytes:
        """The drawing, for notebooks."""
        buffer = BytesIO()
        self.draw().save(buffer, "PNG")
        return buffer.getvalue()

    def __repr__(self) -> str:
        found = ", ".join(draw.caption(item, confidence=True) for item in self.objects) or "nothing found"
        return f"Result({found:.400}; {len(self.malformed)} malformed, {self.finish})"


def result(
    objects: Sequence[Detection | Segment],
    malformed: list[Malformed],
    prompt: str,
    answer: Completion,
    picture: Image.Image,
    min_confidence: float,
) -> Result:
    """The result of one answer, without the objects below a confidence."""
    return Result(confident(objects, min_confidence), malformed, prompt, answer.text, answer.finish, picture)


def confident(objects: Sequence[Any], min_confidence: float) -> list[Any]:
    """The objects that are not below a confidence; an unknown confidence counts as 0."""
    return [item for item in objects if not (item.confidence or 0.0) < min_confidence]  # nan is not hidden
