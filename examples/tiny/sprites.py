"""Sprites: one curated table, one drawing function for each source, one file with all sprites.

Owns the columns of the table, the reading of each package's pictures, the fit into a square of 128 px, and the layout
of `sprites.npz`. Knows nothing about downloading (`fetch.py`), scenes or models.
"""

import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

SIDE, LONGEST = 128, 124
TABLE = Path(__file__).with_name("sprites.csv")
SPLITS = ("train", "unseen", "style", "photo")


class Row(NamedTuple):
    label: str
    source: str
    file: str  # a path, a code point or an icon's name within the package
    licence: str
    author: str  # or the catalogue, if it names nobody
    split: str  # one of SPLITS; or "scene", a whole photograph and no sprite


class Pack(NamedTuple):
    rgba: UInt8[np.ndarray, "n 128 128 4"]  # premultiplied: colour <= alpha
    label: Int[np.ndarray, "n"]  # index into classes
    split: np.ndarray  # one of SPLITS
    source: np.ndarray
    name: np.ndarray  # file within the source
    classes: tuple[str, ...]


def read_table(path: Path = TABLE) -> list[Row]:
    with path.open(newline="") as lines:
        return [Row(*line) for line in list(csv.reader(lines))[1:]]


def class_names(rows: list[Row]) -> list[str]:
    return sorted({row.label for row in rows if row.split == "train"})


# --- how each source is drawn ----------------------------------------------------------------------------------------


def _svg(text: str) -> Image.Image:
    # imported here: only building the pack needs it
    import resvg_py  # pyright: ignore[reportMissingImports]

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=text, width=256, height=256))))


@cache
def _icons(path: Path) -> dict:
    return json.loads(path.read_text())


def _iconify(folder: str, plate: bool = False) -> Callable[[Path, str], Image.Image]:
    """Draw an icon of a set. `plate`: leave out the first path, a disc behind the thing."""

    def draw(packages: Path, name: str) -> Image.Image:
        icons = _icons(packages / folder / "icons.json")
        icon = icons["icons"][name]
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        body = re.sub("<path[^>]*/>", "", icon["body"], count=1) if plate else icon["body"]
        return _svg(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>')

    return draw


@cache
def _noto(packages: Path) -> ImageFont.FreeTypeFont:
    # 109 is the only size of the font's bitmaps
    folder = packages / "fonts-noto-color-emoji"
    return ImageFont.truetype(next(folder.rglob("NotoColorEmoji.ttf")), 109)


def _glyph(packages: Path, points: str) -> Image.Image:
    """Draw an emoji; `points` are its code points in hexadecimal, joined by dashes."""
    canvas = Image.new("RGBA", (200, 200))
    text = "".join(chr(int(point, 16)) for point in points.split("-"))
    ImageDraw.Draw(canvas).text((20, 20), text, font=_noto(packages), embedded_color=True)
    return canvas


def _member(packages: Path, path: str) -> Image.Image:
    """Open a picture in a zip archive; `path` is catalogue/member."""
    catalogue, member = path.split("/", 1)
    archive = next((packages / "sweethome3d-furniture").rglob(f"{catalogue}.sh3f"))
    with zipfile.ZipFile(archive) as opened:
        return Image.open(io.BytesIO(opened.read(member)))


ICONIFY = (  # sources with the same name as their folder
    *("noto-v1", "noto-svg", "twemoji", "emojione", "fxemoji", "streamline-emojis"),
    *("streamline-ultimate-color", "streamline-stickies-color", "flat-color-icons", "flat-ui", "fluent-color"),
    "meteocons",
)
DRAW: dict[str, Callable[[Path, str], Image.Image]] = {
    "fluent-3d": lambda packages, name: Image.open(packages / f"fluent-emoji-3d/assets/{name}.webp"),
    "fluent-flat": _iconify("fluent-emoji-flat"),
    "noto": _glyph,
    **{source: _iconify(source) for source in ICONIFY},
    "streamline-kameleon-color": _iconify("streamline-kameleon-color", plate=True),
    "tango": lambda packages, name: _svg(
        (packages / f"tango-icon-theme/usr/share/icons/Tango/scalable/{name}.svg").read_text()
    ),
    "openclipart": lambda packages, name: Image.open(
        packages / f"openclipart-png/usr/share/openclipart/png/{name}.png"
    ),
    "sweethome3d": _member,
    "tuxpaint": lambda packages, name: Image.open(
        packages / f"tuxpaint-stamps-default/usr/share/tuxpaint/stamps/{name}.png"
    ),
}


# --- fitting and packing ---------------------------------------------------------------------------------------------


def fit(picture: Image.Image) -> UInt8[np.ndarray, "128 128 4"]:
    """Crop to the visible part, scale its longer side to 124 px, centre it; premultiplied."""
    rgba = np.asarray(picture.convert("RGBA"), np.float32)
    ys, xs = np.nonzero(rgba[..., 3] > 8)
    rgba = rgba[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    rgba[..., :3] *= rgba[..., 3:] / 255
    height, width = rgba.shape[:2]
    scale = LONGEST / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    planes = [Image.fromarray(plane).resize(size, Image.Resampling.LANCZOS) for plane in np.moveaxis(rgba, -1, 0)]
    small = np.stack([np.asarray(plane) for plane in planes], -1).clip(0, 255)
    # Lanczos overshoots: a colour above alpha would show as white dots along edges
    small[..., :3] = np.minimum(small[..., :3], small[..., 3:])
    top, left = (SIDE - size[1]) // 2, (SIDE - size[0]) // 2
    square = np.zeros((SIDE, SIDE, 4), np.uint8)
    square[top : top + size[1], left : left + size[0]] = small.round()
    return square


def encode(pixels: UInt8[np.ndarray, "h w c"], **options: bool | int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", **options)
    return buffer.getvalue()


def write(out: Path, files: list[bytes], columns: dict[str, np.ndarray]) -> None:
    """Save the files as one array of bytes, with the end of each file, and the columns."""
    ends = np.cumsum([len(file) for file in files])
    arrays = {"bytes": np.frombuffer(b"".join(files), np.uint8), "ends": ends, **columns}
    np.savez(out, allow_pickle=False, **arrays)


def split_files(stored: Mapping[str, np.ndarray]) -> list[UInt8[np.ndarray, "h w c"]]:
    """The pictures that `write` stored."""
    data, ends = stored["bytes"].tobytes(), [0, *stored["ends"].tolist()]
    return [np.asarray(Image.open(io.BytesIO(data[a:b]))) for a, b in pairwise(ends)]


def build(packages: Path, out: Path, rows: list[Row]) -> None:
    """Write `out`, which `load` reads."""
    classes = class_names(rows)
    rows = [row for row in rows if row.split in SPLITS]
    # exact: otherwise WebP may change the colour where alpha is zero
    files = [
        encode(fit(DRAW[row.source](packages, row.file)), lossless=True, quality=100, exact=True)
        for row in tqdm(rows, "sprites")
    ]
    columns = {
        "label": np.array([classes.index(row.label) for row in rows], np.int16),
        "split": np.array([row.split for row in rows]),
        "source": np.array([row.source for row in rows]),
        "name": np.array([row.file for row in rows]),
        "classes": np.array(classes),
    }
    write(out, files, columns)


def load(path: Path | str = "runs/tiny/sprites.npz") -> Pack:
    """All sprites, decoded, 64 kB each."""
    with np.load(path) as stored:
        opaque = np.full((SIDE, SIDE), 255, np.uint8)  # WebP drops an alpha channel that is opaque everywhere
        rgba = [pixels if pixels.shape[-1] == 4 else np.dstack([pixels, opaque]) for pixels in split_files(stored)]
        label, split, source, name = (stored[column] for column in ("label", "split", "source", "name"))
        return Pack(np.stack(rgba), label, split, source, name, tuple(stored["classes"].tolist()))
