"""Boxes, labels and masks drawn on a picture with Pillow. The cost grows no faster than the number of pixels.

Lines and letters are larger in larger pictures. Boxes with the same label have the same color; every mask has its own.
A label is put beside or inside its box, within the picture, where it covers least of other labels, then of boxes. A
label wider than the picture is truncated. Labels hide at most an eighth of the picture: if there are many, their
letters are smaller, and labels that still do not fit are left out, as in pictures of 32 pixels.
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
from pgfunc.objects.boxes import Box, Detection, check_objects, edges
from pgfunc.objects.fonts import FallbackFont
from pgfunc.objects.masks import Segment, bounds, check_mask

# distinct in hue and lightness, the most different first (Okabe & Ito 2008, and four more)
COLORS = ((230, 159, 0), (0, 114, 178), (0, 158, 115), (213, 94, 0), (204, 121, 167), (86, 180, 233), (240, 228, 66),
           (148, 0, 211), (124, 252, 0), (255, 255, 255))  # fmt: skip
COLOURS = COLORS  # a former name, which stays for callers outside
OPACITY = 0.45  # of a mask
MAX_LABEL_AREA = 1 / 8  # of the picture, for all labels together
MIN_FONT_SIZE = 9  # pixels
UNPRINTABLE = ("Cc", "Cs", "Co", "Cn")  # Unicode categories

Color = tuple[int, int, int]


class Label(NamedTuple):
    """The text of a label and the rectangle that it fills, in pixels; right and bottom are exclusive."""

    text: str
    left: int
    top: int
    right: int
    bottom: int


def objects(
    picture: Source,
    items: Sequence[Detection | Segment],
    font: str | PathLike | None = None,
    confidence: bool = False,
    colors: Sequence[Color] = (),
) -> Image.Image:
    """A copy of the picture, upright and RGB, with these objects drawn on it.

    font: a font file to try first (see `fonts`); confidence: whether a label ends with the confidence in percent;
    colors: one for each object, in place of those that this module chooses.
    Raises SettingError if a box is not finite or a mask has another size than the picture.
    """
    drawing, items = open_image(picture), check_objects(items)
    for item in items:
        check(item, drawing.size)
    colors = colors or colors_of(items)
    line = max(1, round(min(drawing.size) / 140))
    for item, color in zip(items, colors, strict=True):
        if isinstance(item, Segment):
            draw_mask(drawing, item.mask.cpu(), color, line)
    pen = ImageDraw.Draw(drawing)
    for item, color in zip(items, colors, strict=True):
        draw_box(pen, item.box, color, line, drawing.size)
    captions = [caption(item, confidence) for item in items]
    label_font = choose_font(captions, font, drawing.size, line)
    labels = place_labels(drawing.size, [item.box for item in items], captions, label_font, line)
    for label, color in zip(labels, colors, strict=True):
        if label:
            draw_label(pen, label, color, label_font, line)
    return drawing


def check(item: Detection | Segment, size: tuple[int, int]) -> None:
    """Raise SettingError unless the object can be drawn on a picture of this size."""
    edges(item.box)
    if isinstance(item, Segment):
        check_mask(item.mask)
        if item.mask.shape != size[::-1]:
            shape = " x ".join(map(str, item.mask.shape))
            raise SettingError(f"the mask of {item.label!r:.80} is {shape}, the picture {size[1]} x {size[0]} pixels")


def colors_of(items: Sequence[Detection | Segment]) -> list[Color]:
    """The color of each object: one for each label of boxes, and one for each mask."""
    keys = [number if isinstance(item, Segment) else item.label for number, item in enumerate(items)]
    color_of = dict(zip(dict.fromkeys(keys), palette(len(set(keys))), strict=True))
    return [color_of[key] for key in keys]


def palette(count: int) -> list[Color]:
    """Distinct colors: `COLORS`, then each time the color that is farthest from all before it."""
    levels = np.array(np.meshgrid(*[range(0, 256, 51)] * 3, indexing="ij")).reshape(3, -1).T
    candidates = levels[levels.max(1) > 128].astype(int)  # no dark ones: edges are drawn beside a black line
    nearest = np.full(len(candidates), np.inf)
    colors = list(COLORS[:count])
    for number in range(count):
        if number == len(colors):
            best = candidates[nearest.argmax()]
            colors.append((int(best[0]), int(best[1]), int(best[2])))
        nearest = np.minimum(nearest, distance(candidates, np.array(colors[number])))
    return colors


def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How different two colors look, squared: RGB, weighted by the mean red ("redmean", T. Riemersma)."""
    red, green, blue = np.moveaxis((one - other) ** 2, -1, 0)
    mean = (one[..., 0] + other[..., 0]) / 2
    return (2 + mean / 256) * red + 4 * green + (2 + (255 - mean) / 256) * blue


def draw_mask(picture: Image.Image, mask: Bool[Tensor, "y x"], color: Color, line: int) -> None:
    """Draw, in place, a mask in a translucent color, with an opaque edge and a dark line inside the edge."""
    if not mask.any():
        return
    top, left, bottom, right = bounds(mask)
    top, left = max(top - 1, 0), max(left - 1, 0)
    part = mask[top : bottom + 1, left : right + 1].numpy()  # with one pixel around it, which `edge` needs
    picture.paste(color, (left, top), alpha(part, OPACITY))
    if line > 1:
        picture.paste((0, 0, 0), (left, top), alpha(edge(part, line + line // 3)))
    picture.paste(color, (left, top), alpha(edge(part, line)))


def alpha(mask: Bool[np.ndarray, "y x"], opacity: float = 1.0) -> Image.Image:
    """The opacity of each pixel, as Pillow's `paste` expects it."""
    return Image.fromarray(mask * np.uint8(255 * opacity))


def edge(mask: Bool[np.ndarray, "y x"], width: int) -> Bool[np.ndarray, "y x"]:
    """The pixels of the mask that have a pixel outside the mask within `width` rows and columns."""
    return mask & dilate_rows(dilate_rows(~mask, width).T, width).T


def dilate_rows(mask: Bool[np.ndarray, "y x"], width: int) -> Bool[np.ndarray, "y x"]:
    """The pixels that have a pixel of the mask in their column, at most `width` rows away."""
    reach, width = 0, min(width, len(mask) - 1)
    while reach < width:
        step = min(2 * reach + 1, width - reach)  # the largest step that leaves no gap
        grown = mask.copy(order="K")
        grown[step:] |= mask[:-step]
        grown[:-step] |= mask[step:]
        mask, reach = grown, reach + step
    return mask


def draw_box(pen: ImageDraw.ImageDraw, box: Box, color: Color, line: int, size: tuple[int, int]) -> None:
    """Draw the edges of a box inside the picture; a dark line inside them shows where the picture has their color."""
    left, top = (min(max(round(low), 0), side - 1) for low, side in zip((box.xmin, box.ymin), size, strict=True))
    right, bottom = (
        min(max(round(high) - 1, first), side - 1)
        for high, first, side in zip((box.xmax, box.ymax), (left, top), size, strict=True)
    )
    if line > 1:
        pen.rectangle((left, top, right, bottom), outline=(0, 0, 0), width=line + max(1, line // 3))
    pen.rectangle((left, top, right, bottom), outline=color, width=line)


def choose_font(captions: Sequence[str], file: str | PathLike | None, size: tuple[int, int], line: int) -> FallbackFont:
    """A font that is larger in larger pictures, and down to half that size if the labels would not fit otherwise."""
    largest = max(MIN_FONT_SIZE, round(min(size) / 28))
    font = FallbackFont(largest, file)
    sizes = [label_size(text, font, line) for text in captions if text]
    needed = sum(min(width, size[0]) * height for width, height in sizes)
    scale = min((MAX_LABEL_AREA * size[0] * size[1] / max(needed, 1)) ** 0.5, 1)
    return FallbackFont(max(MIN_FONT_SIZE, round(largest * max(scale, 0.5))), file)


def label_size(text: str, font, line: int) -> tuple[int, int]:
    """The width and the height of a label in pixels."""
    return round(font.getlength(text)) + 2 * line, sum(font.getmetrics()) + line


def place_labels(
    size: tuple[int, int], boxes: Sequence[Box], captions: Sequence[str], font, line: int
) -> list[Label | None]:
    """Place each label above, in, below or beside its box; None if it is empty or does not fit."""
    labels: list[Label | None] = []
    outlines = rectangles([(box.xmin, box.ymin, box.xmax, box.ymax) for box in boxes]).round()
    area_left = MAX_LABEL_AREA * size[0] * size[1]
    for box, text in zip(boxes, captions, strict=True):
        text = truncate(text, font, size[0] - 2 * line)
        width, height = label_size(text, font, line)
        if not text or height > size[1] or width * height > area_left:
            labels.append(None)
            continue
        area_left -= width * height
        spots = label_spots(box, width, height, size)
        others = rectangles([other[1:] for other in labels if other])
        costs = zip(overlaps(spots, others), overlaps(spots, outlines), range(len(spots)), strict=True)
        labels.append(Label(text, *map(int, spots[min(costs)[2]])))
    return labels


def label_spots(box: Box, width: int, height: int, size: tuple[int, int]) -> np.ndarray:
    """The rectangles that a label of this size may fill, moved into the picture; the preferred one first."""
    rows, columns = (box.ymin - height, box.ymin, box.ymax - height, box.ymax), (box.xmin, box.xmax - width)
    corners = [*product(columns, rows), (box.xmin - width, box.ymin), (box.xmax, box.ymin)]
    inside = [(min(max(round(x), 0), size[0] - width), min(max(round(y), 0), size[1] - height)) for x, y in corners]
    return rectangles([(x, y, x + width, y + height) for x, y in inside])


def rectangles(sides: Sequence[Sequence[int | float]]) -> np.ndarray:
    """An array [rectangles 4] of left, top, right and bottom."""
    return np.array(sides, dtype=float).reshape(-1, 4)


def overlaps(ones: np.ndarray, others: np.ndarray) -> list[float]:
    """For each rectangle in `ones`, the sum of the areas that it shares with each rectangle in `others`."""
    low, high = (np.maximum(ones[:, None, :2], others[:, :2]), np.minimum(ones[:, None, 2:], others[:, 2:]))
    return (high - low).clip(min=0).prod(-1).sum(-1).tolist()


def caption(item: Detection | Segment, confidence: bool = False) -> str:
    """The label on one line, without unprintable characters; with the confidence in percent if `confidence` is set."""
    label = " ".join("".join(c if category(c) not in UNPRINTABLE else " " for c in item.label).split())
    return f"{label} {item.confidence:.0%}".strip() if confidence and item.confidence is not None else label


def truncate(text: str, font, width: int) -> str:
    """The text, or as much of its beginning as fits with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    length = bisect_right(range(1, len(text) + 1), width, key=lambda end: font.getlength(text[:end] + "…"))
    return text[:length] + "…" if length else ""


def draw_label(pen: ImageDraw.ImageDraw, label: Label, color: Color, font: FallbackFont, line: int) -> None:
    """Draw a label on its color, in black or white, whichever has more contrast."""
    red, green, blue = color
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 128  # luma, ITU-R BT.601
    pen.rectangle((label.left, label.top, label.right - 1, label.bottom - 1), fill=color)
    font.write(pen, label.left + line, label.top + line // 2, label.text, "black" if bright else "white")
