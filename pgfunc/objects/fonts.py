"""The letters of a label, from the fonts that have them: one that is given, Pillow's own, those of the system.

Pillow's own has hardly more than ASCII. A text is written in the first font that has all of its letters; where none
has, each letter is in the first font that has it. What no font has, `missing` names; it is drawn as an empty box.
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

OWN = ""  # in place of a file's name: Pillow's own font
STYLES = ("bold", "black", "heavy", "light", "thin", "italic", "oblique", "mono", "condensed", "narrow", "serif",
          "math")  # fmt: skip
NOBODYS = "\U0010ffff"  # no character
PROBE = 20  # pixels: the size at which fonts are asked

Font = ImageFont.FreeTypeFont


class Letters:
    """Letters of one size; measured as Pillow measures a font's."""

    def __init__(self, size: int, file: str | os.PathLike | None = None):
        """Raises SettingError for a file that is no font."""
        self.files = candidates(file)
        self.font = cache(lambda name: opened(name, size))
        self.getmetrics = self.font(self.files[0]).getmetrics

    def getlength(self, text: str) -> float:
        return sum(self.font(file).getlength(part) for file, part in runs(text, self.files))

    def write(self, pen: ImageDraw.ImageDraw, left: int, top: int, text: str, colour: str) -> None:
        """Write on one line, whose top left corner is given."""
        baseline, x = top + self.getmetrics()[0], float(left)
        for file, part in runs(text, self.files):
            pen.text((x, baseline), part, fill=colour, font=self.font(file), anchor="ls")
            x += self.font(file).getlength(part)


def missing(text: str, file: str | os.PathLike | None = None) -> str:
    """The letters of a text that no font has, each once."""
    files = candidates(file)
    return "".join(c for c in dict.fromkeys(text) if needs_font(c) and not any(has(name, c) for name in files))


def candidates(file: str | os.PathLike | None) -> tuple[str, ...]:
    """The fonts in the order in which they are asked. Raises SettingError for a given file that is no font."""
    if file is None:
        return OWN, *installed()
    try:
        given = str(Path(file).resolve())
        if Path(given).exists() and not Path(given).is_file():
            raise ValueError("it is no file")
        opened(given, PROBE)
    except (OSError, ValueError, TypeError) as error:
        raise SettingError(
            f"{file}: cannot be read as a font ({first_line(error)}); expected .ttf, .otf, .ttc"
        ) from error
    return given, OWN, *installed()


def runs(text: str, files: tuple[str, ...]) -> list[tuple[str, str]]:
    """A text in parts, each with the font that it is written in."""
    letters = [c for c in text if needs_font(c)]
    whole = next((name for name in files if all(has(name, c) for c in letters)), None)
    if whole is not None:
        return [(whole, text)]
    chosen = [OWN]
    for c in text:
        chosen.append(next((name for name in files if has(name, c)), OWN) if needs_font(c) else chosen[-1])
    grouped = groupby(zip(chosen[1:], text, strict=True), key=lambda pair: pair[0])
    return [(name, "".join(c for _, c in pairs)) for name, pairs in grouped]


def needs_font(letter: str) -> bool:
    """Whether a letter has a shape of its own; spaces, marks and joiners go with the letter before them."""
    return unicodedata.category(letter)[0] not in "MCZ"


@lru_cache(maxsize=100_000)
def has(file: str, letter: str) -> bool:
    """Whether a font has a letter: it shows something, and not what it shows in place of letters that it lacks."""
    try:
        shape = drawn(file, letter)
    except (OSError, ValueError):  # a damaged file, or one of bitmaps in another size
        return False
    return any(shape) and shape != placeholder(file)


@cache
def placeholder(file: str) -> bytes:
    """What a font shows in place of letters that it lacks."""
    return drawn(file, NOBODYS)


def drawn(file: str, letter: str) -> bytes:
    """The pixels of a letter."""
    picture = Image.new("L", (2 * PROBE, 2 * PROBE))
    ImageDraw.Draw(picture).text((PROBE // 2, PROBE // 2), letter, fill=255, font=opened(file, PROBE))
    return picture.tobytes()


def opened(file: str, size: int) -> Font:
    font = ImageFont.truetype(file, size) if file != OWN else ImageFont.load_default(size)
    assert isinstance(font, Font), "Pillow is built with FreeType"
    return font


@cache
def installed() -> tuple[str, ...]:
    """The font files of the system, upright regular ones first; without the one whose letters are all placeholders."""

    def styles(path: Path) -> tuple[int, int, str]:
        return sum(style in path.stem.lower() for style in STYLES), len(path.stem), str(path)

    found = {path for folder in folders() for kind in ("ttf", "otf", "ttc") for path in folder.rglob(f"*.{kind}")}
    return tuple(str(path) for path in sorted(found, key=styles) if path.stem != "LastResort")


def folders() -> Iterator[Path]:
    """Where systems keep fonts."""
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
