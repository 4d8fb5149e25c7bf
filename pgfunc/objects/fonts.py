"""Text in any script: fonts are tried in turn, first the user's, then Pillow's own, then those of the system.

Pillow's own font has hardly more than ASCII. A text is drawn in the first font that has all of its characters; if there
is none, each character is drawn in the first font that has it. A character that no font has is drawn as an empty box,
and `missing` returns it.
"""

import os
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pgfunc.errors import SettingError, first_line

PILLOW_FONT = ""  # stands for Pillow's own font, which has no file name
STYLES = ("bold", "black", "heavy", "light", "thin", "italic", "oblique", "mono", "condensed", "narrow", "serif",
          "math")  # fmt: skip
NONCHARACTER = "\U0010ffff"  # no font has a glyph for it
TEST_SIZE = 20  # the size in pixels at which glyphs are compared

Font = ImageFont.FreeTypeFont


class FallbackFont:
    """A list of fonts at one size, measured as Pillow measures one font."""

    def __init__(self, size: int, file: str | os.PathLike | None = None):
        """Raises SettingError if the file is not a font."""
        self.files = candidates(file)
        self.font = cache(lambda name: open_font(name, size))
        self.getmetrics = self.font(self.files[0]).getmetrics

    def getlength(self, text: str) -> float:
        """The width of a text in pixels."""
        return sum(self.font(file).getlength(part) for file, part in runs(text, self.files))

    def write(self, pen: ImageDraw.ImageDraw, left: int, top: int, text: str, color: str) -> None:
        """Draw one line of text with its top left corner at (left, top)."""
        baseline, x = top + self.getmetrics()[0], float(left)
        for file, part in runs(text, self.files):
            pen.text((x, baseline), part, fill=color, font=self.font(file), anchor="ls")
            x += self.font(file).getlength(part)


def missing(text: str, file: str | os.PathLike | None = None) -> str:
    """The characters of a text that no font has, each once."""
    files = candidates(file)
    return "".join(c for c in dict.fromkeys(text) if needs_font(c) and not any(has_glyph(name, c) for name in files))


def candidates(file: str | os.PathLike | None) -> tuple[str, ...]:
    """The font files in the order in which they are tried. Raises SettingError if `file` is not a font."""
    if file is None:
        return PILLOW_FONT, *installed()
    try:
        path = str(Path(file).resolve())
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is not a file")
        open_font(path, TEST_SIZE)
    except (OSError, ValueError, TypeError) as error:
        raise SettingError(
            f"{file}: cannot be read as a font ({first_line(error)}); expected .ttf, .otf, .ttc"
        ) from error
    return path, PILLOW_FONT, *installed()


def runs(text: str, files: tuple[str, ...]) -> list[tuple[str, str]]:
    """A text cut into parts, each with the file of the font in which it is drawn."""
    visible = [c for c in text if needs_font(c)]
    complete = next((name for name in files if all(has_glyph(name, c) for c in visible)), None)
    if complete is not None:
        return [(complete, text)]
    fonts = [PILLOW_FONT]
    for c in text:
        fonts.append(next((name for name in files if has_glyph(name, c)), PILLOW_FONT) if needs_font(c) else fonts[-1])
    grouped = groupby(zip(fonts[1:], text, strict=True), key=lambda pair: pair[0])
    return [(name, "".join(c for _, c in pairs)) for name, pairs in grouped]


def needs_font(character: str) -> bool:
    """Whether a character has a glyph of its own; spaces, marks and joiners use the font of the one before them."""
    return unicodedata.category(character)[0] not in "MCZ"


@lru_cache(maxsize=100_000)
def has_glyph(file: str, character: str) -> bool:
    """Whether a font has a glyph for a character: it is not blank and differs from the font's missing glyph."""
    try:
        pixels = glyph(file, character)
    except (OSError, ValueError):  # a damaged file, or a bitmap font of another size
        return False
    return any(pixels) and pixels != missing_glyph(file)


@cache
def missing_glyph(file: str) -> bytes:
    """The pixels that a font shows for a character that it lacks."""
    return glyph(file, NONCHARACTER)


def glyph(file: str, character: str) -> bytes:
    """The pixels of a character in a font."""
    picture = Image.new("L", (2 * TEST_SIZE, 2 * TEST_SIZE))
    corner = (TEST_SIZE // 2, TEST_SIZE // 2)
    ImageDraw.Draw(picture).text(corner, character, fill=255, font=open_font(file, TEST_SIZE))
    return picture.tobytes()


def open_font(file: str, size: int) -> Font:
    """A font of this size in pixels."""
    font = ImageFont.truetype(file, size) if file != PILLOW_FONT else ImageFont.load_default(size)
    assert isinstance(font, Font), "Pillow is built with FreeType"
    return font


@cache
def installed() -> tuple[str, ...]:
    """The font files of the system, upright regular ones first; without "LastResort", which has only placeholders."""

    def order(path: Path) -> tuple[int, int, str]:
        return sum(style in path.stem.lower() for style in STYLES), len(path.stem), str(path)

    paths = {path for folder in folders() for ending in ("ttf", "otf", "ttc") for path in folder.rglob(f"*.{ending}")}
    return tuple(str(path) for path in sorted(paths, key=order) if path.stem != "LastResort")


def folders() -> Iterator[Path]:
    """The folders in which this system keeps fonts."""
    home = Path(os.environ.get("HOME") or os.environ.get("USERPROFILE") or os.devnull)
    if sys.platform == "win32":
        yield Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts")
        yield home / "AppData/Local/Microsoft/Windows/Fonts"
    elif sys.platform == "darwin":
        yield from (Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts")
    else:
        shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        yield from (Path(folder, "fonts") for folder in shared.split(":"))
        yield from (home / ".local/share/fonts", home / ".fonts")
