"""Boxes, labels and masks on a picture, by Pillow. What it costs grows with the pixels of the picture, and no faster.

Lines and letters grow with the picture. Boxes have the colour of their label, masks a colour each. A label stands at
its box, inside the picture, where it hides least of other labels, then of objects; one that is wider than the picture
is cut short. Labels hide an eighth of the picture at most: many have smaller letters, and what then has no room, as in
pictures of 32 pixels, is left out.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import product
from os import PathLike
from typing import NamedTuple
from unicodedata import category

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw
from torch import Tensor

from pgfunc.errors import SettingError
from pgfunc.image import Source, open_image
from pgfunc.objects.detect import Box, Detection, checked_objects, edges
from pgfunc.objects.fonts import Letters
from pgfunc.objects.segment import Segment, check_mask, extent

# apart in hue and lightness, the most different first (Okabe & Ito 2008, and four more)
COLOURS = ((230, 159, 0), (0, 114, 178), (0, 158, 115), (213, 94, 0), (204, 121, 167), (86, 180, 233), (240, 228, 66),
           (148, 0, 211), (124, 252, 0), (255, 255, 255))  # fmt: skip
OPACITY = 0.45  # of a mask
HIDDEN, SMALLEST = 1 / 8, 9  # of a picture, by labels; pixels, of letters
UNPRINTED = ("Cc", "Cs", "Co", "Cn")  # categories of characters

Colour = tuple[int, int, int]


class Plate(NamedTuple):
    """A label, set: its text, and the rectangle that it fills, in pixels."""

    text: str
    left: int
    top: int
    right: int
    bottom: int


def objects(
    picture: Source,
    found: Sequence[Detection | Segment],
    font: str | PathLike | None = None,
    confidence: bool = False,
) -> Image.Image:
    """A copy of a picture, upright and RGB, with what was found on it.

    font: a file whose letters come before those of `letters`; confidence: whether labels end in it, in percent.
    Raises SettingError for a box that is not finite and for a mask of another picture's size.
    """
    drawn, found = open_image(picture), checked_objects(found)
    for item in found:
        check(item, drawn.size)
    keys = [number if isinstance(item, Segment) else item.label for number, item in enumerate(found)]
    colour_of = dict(zip(dict.fromkeys(keys), palette(len(set(keys))), strict=True))
    colours = [colour_of[key] for key in keys]
    line = max(1, round(min(drawn.size) / 140))
    for item, colour in zip(found, colours, strict=True):
        if isinstance(item, Segment):
            shade(drawn, item.mask.cpu(), colour, line)
    pen = ImageDraw.Draw(drawn)
    for item, colour in zip(found, colours, strict=True):
        outline(pen, item.box, colour, line, drawn.size)
    captions = [caption(item, confidence) for item in found]
    letters = fitting(captions, font, drawn.size, line)
    placed = plates(drawn.size, [item.box for item in found], captions, letters, line)
    for plate, colour in zip(placed, colours, strict=True):
        if plate:
            write(pen, plate, colour, letters, line)
    return drawn


def check(item: Detection | Segment, size: tuple[int, int]) -> None:
    """Raise SettingError for what cannot be drawn on a picture of that size."""
    edges(item.box)
    if isinstance(item, Segment):
        check_mask(item.mask)
        if item.mask.shape != size[::-1]:
            shape = " x ".join(map(str, item.mask.shape))
            raise SettingError(f"the mask of {item.label!r:.80} is {shape}, the picture {size[1]} x {size[0]} pixels")


def palette(count: int) -> list[Colour]:
    """Colours that are told apart: after the first ten, each is the one that is farthest from those before it."""
    levels = np.array(np.meshgrid(*[range(0, 256, 51)] * 3, indexing="ij")).reshape(3, -1).T
    left = levels[levels.max(1) > 128].astype(int)  # edges are drawn on black
    nearest = np.full(len(left), np.inf)
    colours = list(COLOURS[:count])
    for place in range(count):
        if place == len(colours):
            best = left[nearest.argmax()]
            colours.append((int(best[0]), int(best[1]), int(best[2])))
        nearest = np.minimum(nearest, distance(left, np.array(colours[place])))
    return colours


def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How different colours look, squared: RGB, the weights those of the mean red ("redmean", T. Riemersma)."""
    red, green, blue = np.moveaxis((one - other) ** 2, -1, 0)
    mean = (one[..., 0] + other[..., 0]) / 2
    return (2 + mean / 256) * red + 4 * green + (2 + (255 - mean) / 256) * blue


def shade(picture: Image.Image, mask: Bool[Tensor, "y x"], colour: Colour, line: int) -> None:
    """Lay a translucent colour over the mask, and its edge on top, with a dark line inside; in place."""
    if not mask.any():
        return
    top, left, bottom, right = extent(mask)
    top, left = max(top - 1, 0), max(left - 1, 0)
    part = mask[top : bottom + 1, left : right + 1].numpy()  # with its outside, where there is one
    picture.paste(colour, (left, top), stencil(part, OPACITY))
    if line > 1:
        picture.paste((0, 0, 0), (left, top), stencil(edge(part, line + line // 3)))
    picture.paste(colour, (left, top), stencil(edge(part, line)))


def stencil(mask: Bool[np.ndarray, "y x"], opacity: float = 1.0) -> Image.Image:
    return Image.fromarray(mask * np.uint8(255 * opacity))


def edge(mask: Bool[np.ndarray, "y x"], width: int) -> Bool[np.ndarray, "y x"]:
    """What of the mask lies within so many pixels of its outside."""
    return mask & spread(spread(~mask, width).T, width).T


def spread(there: Bool[np.ndarray, "y x"], width: int) -> Bool[np.ndarray, "y x"]:
    """What lies within so many rows of what is there."""
    reach, width = 0, min(width, len(there) - 1)
    while reach < width:
        step = min(2 * reach + 1, width - reach)  # as far as leaves no gap
        grown = there.copy(order="K")
        grown[step:] |= there[:-step]
        grown[:-step] |= there[step:]
        there, reach = grown, reach + step
    return there


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


def fitting(captions: Sequence[str], font: str | PathLike | None, size: tuple[int, int], line: int) -> Letters:
    """Letters that grow with the picture; down to half as large where many labels would have no room."""
    largest = max(SMALLEST, round(min(size) / 28))
    letters = Letters(largest, font)
    sizes = [extents(text, letters, line) for text in captions if text]
    needed = sum(min(width, size[0]) * height for width, height in sizes)
    scale = min((HIDDEN * size[0] * size[1] / max(needed, 1)) ** 0.5, 1)
    return Letters(max(SMALLEST, round(largest * max(scale, 0.5))), font)


def extents(text: str, font, line: int) -> tuple[int, int]:
    """The width and the height of a label."""
    return round(font.getlength(text)) + 2 * line, sum(font.getmetrics()) + line


def plates(size: tuple[int, int], boxes: Sequence[Box], captions: Sequence[str], font, line: int) -> list[Plate | None]:
    """Where each label stands: above, in, below or beside its box; None for one that is empty or has no room."""
    placed: list[Plate | None] = []
    objects = corners([(box.xmin, box.ymin, box.xmax, box.ymax) for box in boxes]).round()
    room = HIDDEN * size[0] * size[1]
    for box, label in zip(boxes, captions, strict=True):
        text = shortened(label, font, size[0] - 2 * line)
        width, height = extents(text, font, line)
        if not text or height > size[1] or width * height > room:
            placed.append(None)
            continue
        room -= width * height
        rows, columns = (box.ymin - height, box.ymin, box.ymax - height, box.ymax), (box.xmin, box.xmax - width)
        spots = [*product(columns, rows), (box.xmin - width, box.ymin), (box.xmax, box.ymin)]
        spots = [(min(max(round(x), 0), size[0] - width), min(max(round(y), 0), size[1] - height)) for x, y in spots]
        rectangles = corners([(x, y, x + width, y + height) for x, y in spots])
        labels = corners([plate[1:] for plate in placed if plate])
        costs = zip(overlaps(rectangles, labels), overlaps(rectangles, objects), range(len(spots)), strict=True)
        placed.append(Plate(text, *map(int, rectangles[min(costs)[2]])))
    return placed


def corners(rectangles: Sequence[Sequence[int | float]]) -> np.ndarray:
    """Left, top, right and bottom of each."""
    return np.array(rectangles, dtype=float).reshape(-1, 4)


def overlaps(ones: np.ndarray, others: np.ndarray) -> list[float]:
    """The pixels that each of some rectangles shares with the others."""
    low, high = (np.maximum(ones[:, None, :2], others[:, :2]), np.minimum(ones[:, None, 2:], others[:, 2:]))
    return (high - low).clip(min=0).prod(-1).sum(-1).tolist()


def caption(item: Detection | Segment, confidence: bool = False) -> str:
    """The label on one line, without what does not print; with the confidence in percent, if that is asked for."""
    label = " ".join("".join(c if category(c) not in UNPRINTED else " " for c in item.label).split())
    return f"{label} {item.confidence:.0%}".strip() if confidence and item.confidence is not None else label


def shortened(text: str, font, width: int) -> str:
    """The text, cut to fit."""
    if font.getlength(text) <= width:
        return text
    kept = bisect_right(range(1, len(text) + 1), width, key=lambda end: font.getlength(text[:end] + "…"))
    return text[:kept] + "…" if kept else ""


def write(pen: ImageDraw.ImageDraw, plate: Plate, colour: Colour, letters: Letters, line: int) -> None:
    """Draw a label in black or white, whichever is seen better on its colour."""
    red, green, blue = colour
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 128  # luma, ITU-R BT.601
    pen.rectangle((plate.left, plate.top, plate.right - 1, plate.bottom - 1), fill=colour)
    letters.write(pen, plate.left + line, plate.top + line // 2, plate.text, "black" if bright else "white")
