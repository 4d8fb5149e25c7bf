"""Signs with one to three words or numbers on them, to be read. Owns the words and the look of a sign.

About every sixth word never occurs in training; held-out signs use only such words.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import compress
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from examples.tiny.chance import pick, weighted

HEIGHT, WIDTH = 60, 208  # the largest sign in pixels, on a picture of 224


class Words(NamedTuple):
    seen: tuple[str, ...]
    unseen: tuple[str, ...]


@cache
def frequencies() -> dict[str, int]:
    """How often each word of lower-case letters occurs in the manual of Python 3.11."""
    lines = Path(__file__).with_name("words.tsv").read_text().splitlines()
    return {word: int(number) for word, number in (line.split("\t") for line in lines)}


def split(words: Iterable[str]) -> Words:
    """Divide the words of three to eight letters by a hash of each."""
    known = sorted({word for word in words if 3 <= len(word) <= 8})
    unseen = [hashlib.sha256(word.encode()).digest()[0] % 6 == 0 for word in known]
    return Words(tuple(compress(known, (not held_out for held_out in unseen))), tuple(compress(known, unseen)))


def phrase(rng: np.random.Generator, known: Sequence[str]) -> str:
    """One to three items in one case; each item is a word, a number or (rarely) random letters."""
    count = weighted(rng, (1, 2, 3), (0.5, 0.35, 0.15))
    items = [_item(rng, known) for _ in range(count)]
    case = pick(rng, (str.lower, str.upper, str.title))
    return case(" ".join(items))


def _item(rng: np.random.Generator, known: Sequence[str]) -> str:
    kind = rng.random()
    if kind < 0.25:
        return str(int(rng.integers(10 ** int(rng.integers(1, 5)))))
    if kind < 0.4:
        return "".join(pick(rng, ascii_lowercase) for _ in range(int(rng.integers(3, 7))))
    return pick(rng, known)


@cache
def _font(path: Path | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # Pillow's own layout: signs are the same whether Raqm is installed or not
    basic = ImageFont.Layout.BASIC
    return ImageFont.truetype(str(path), size, layout_engine=basic) if path else ImageFont.load_default(size)


def sign(text: str, rng: np.random.Generator, fonts: Sequence[Path]) -> UInt8[np.ndarray, "y x 4"]:
    """The text in a random font, size and colors, premultiplied; Pillow's font if `fonts` is empty."""
    path = pick(rng, fonts) if fonts else None
    size = int(rng.integers(16, 42))
    while True:
        left, top, right, bottom = _font(path, size).getbbox(text)
        margin = 3 + size // 6
        width, height = int(right - left) + 2 * margin, int(bottom - top) + 2 * margin
        scale = min(WIDTH / width, HEIGHT / height)
        if scale >= 1:
            break
        size = min(size - 1, round(size * scale))
    paper, ink = _colours(rng)
    plate = Image.new("RGBA", (width, height))
    draw = ImageDraw.Draw(plate)
    draw.rounded_rectangle((0, 0, width - 1, height - 1), int(rng.integers(0, 8)), fill=(*paper, 255))
    draw.text((margin - left, margin - top), text, font=_font(path, size), fill=(*ink, 255))
    return np.asarray(plate.convert("RGBa"))  # premultiplied


def _colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The colours of plate and letters: one is light and the other dark."""
    light, dark = tuple(rng.integers(170, 256, 3).tolist()), tuple(rng.integers(0, 90, 3).tolist())
    return (light, dark) if rng.random() < 0.6 else (dark, light)
