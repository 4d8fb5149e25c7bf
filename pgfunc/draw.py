"""Boxes, labels and masks on a picture, by Pillow.

Lines and letters grow with the picture. A label stands at its box, inside the picture, where it hides the fewest other
labels; one that is wider than the picture is cut short. Letters are those of Pillow's own font: Latin ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from jaxtyping import Bool
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pgfunc.detect import Box, Detection
from pgfunc.segment import Segment

# apart in hue and lightness, the most different first (Okabe & Ito 2008, and four more)
COLOURS = ((230, 159, 0), (0, 114, 178), (0, 158, 115), (213, 94, 0), (204, 121, 167), (86, 180, 233), (240, 228, 66),
           (148, 0, 211), (124, 252, 0), (255, 255, 255))  # fmt: skip
OPACITY = 0.45  # of a mask

Colour = tuple[int, int, int]


class Plate(NamedTuple):
    """A label, set: its text, and the rectangle that it fills, in pixels."""

    text: str
    left: int
    top: int
    right: int
    bottom: int


def objects(picture: Image.Image, found: Sequence[Detection | Segment]) -> Image.Image:
    """A copy of an RGB picture with what was found on it; labels have a colour each, in order of appearance."""
    names = list(dict.fromkeys(item.label for item in found))
    colours = [COLOURS[names.index(item.label) % len(COLOURS)] for item in found]
    picture = picture.copy()
    line = max(1, round(min(picture.size) / 140))
    for item, colour in zip(found, colours, strict=True):
        if isinstance(item, Segment):
            shade(picture, item.mask.cpu(), colour, line)
    pen = ImageDraw.Draw(picture)
    for item, colour in zip(found, colours, strict=True):
        outline(pen, item.box, colour, line, picture.size)
    font = ImageFont.load_default(max(9, round(min(picture.size) / 28)))
    for plate, colour in zip(plates(picture.size, found, font, line), colours, strict=True):
        write(pen, plate, colour, font, line)
    return picture


def shade(picture: Image.Image, mask: Bool[Tensor, "y x"], colour: Colour, line: int) -> None:
    """Lay a translucent colour over the mask, and its edge, with a dark line inside, on top; in place."""
    picture.paste(colour, (0, 0), stencil(mask, OPACITY))
    picture.paste((0, 0, 0), (0, 0), stencil(edge(mask, line + max(1, line // 3))))
    picture.paste(colour, (0, 0), stencil(edge(mask, line)))


def stencil(mask: Bool[Tensor, "y x"], opacity: float = 1.0) -> Image.Image:
    return Image.fromarray((mask.numpy() * round(255 * opacity)).astype(np.uint8))


def edge(mask: Bool[Tensor, "y x"], width: int) -> Bool[Tensor, "y x"]:
    """What of the mask lies within so many pixels of its outside."""
    outside = F.max_pool2d((~mask).float()[None], 2 * width + 1, stride=1, padding=width)[0]
    return mask & (outside > 0)


def outline(pen: ImageDraw.ImageDraw, box: Box, colour: Colour, line: int, size: tuple[int, int]) -> None:
    """Draw the edges of a box inside the picture, with a dark line inside that shows where the colour does not."""
    left, top = (min(max(round(low), 0), side - 1) for low, side in zip((box.xmin, box.ymin), size, strict=True))
    right, bottom = (
        min(max(round(high) - 1, first), side - 1)
        for high, first, side in zip((box.xmax, box.ymax), (left, top), size, strict=True)
    )
    if line > 1:
        pen.rectangle((left, top, right, bottom), outline=(0, 0, 0), width=line + max(1, line // 3))
    pen.rectangle((left, top, right, bottom), outline=colour, width=line)


def plates(size: tuple[int, int], found: Sequence[Detection | Segment], font, line: int) -> list[Plate]:
    """Where each label stands: of eight spots at its box, the one where it covers least of the labels before it."""
    placed: list[Plate] = []
    for item in found:
        text = shortened(caption(item), font, size[0] - 2 * line)
        width, height = round(font.getlength(text)) + 2 * line, min(sum(font.getmetrics()) + line, size[1])
        box = item.box
        corners = [
            (round(x), round(y))
            for y in (box.ymin - height, box.ymin, box.ymax - height, box.ymax)
            for x in (box.xmin, box.xmax - width)
        ]
        inside = [(min(max(x, 0), size[0] - width), min(max(y, 0), size[1] - height)) for x, y in corners]
        spots = [Plate(text, x, y, x + width, y + height) for x, y in inside]
        placed.append(min(spots, key=lambda spot: sum(overlap(spot, other) for other in placed)))
    return placed


def caption(item: Detection | Segment) -> str:
    """The label on one line, with the confidence in percent if there is one."""
    return " ".join([*item.label.split(), *([] if item.confidence is None else [f"{item.confidence:.0%}"])])


def shortened(text: str, font, width: int) -> str:
    """The text, cut to fit."""
    if font.getlength(text) <= width:
        return text
    return next((cut for end in range(len(text), 0, -1) if font.getlength(cut := text[:end] + "…") <= width), "")


def overlap(one: Plate, other: Plate) -> int:
    """The pixels that two labels share."""
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.bottom, other.bottom) - max(one.top, other.top)
    return max(width, 0) * max(height, 0)


def write(pen: ImageDraw.ImageDraw, plate: Plate, colour: Colour, font, line: int) -> None:
    """Draw a label in black or white, whichever is seen better on its colour."""
    if plate.text:
        red, green, blue = colour
        bright = 0.299 * red + 0.587 * green + 0.114 * blue > 128  # luma, ITU-R BT.601
        pen.rectangle((plate.left, plate.top, plate.right - 1, plate.bottom - 1), fill=colour)
        pen.text((plate.left + line, plate.top + line // 2), plate.text, fill="black" if bright else "white", font=font)
