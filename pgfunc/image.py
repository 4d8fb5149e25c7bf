"""Pictures -> pixels: any picture file, PIL image or array becomes the square tensor that the encoder was trained on.

The picture is made upright (its EXIF orientation is applied), blended onto white where it is transparent, converted to
8-bit RGB and resized without keeping the aspect ratio (as PaliGemma was trained); values are scaled to [-1, 1]. An
animation gives its first frame. Pillow decodes and resizes.

If the type does not tell the range of the values, the largest value does:

    integers of more than 8 bits    8-bit levels if none is above 255 (as Pillow reads them), else 16-bit levels
    Pillow's floats, mode F         fractions in [0, 1] if none is above 1, else 8-bit levels (as Pillow reads them)
    arrays of floats                fractions in [0, 1]
    arrays of integers              uint8 or uint16, of either byte order; other dtypes do not tell their range
    arrays of three axes            the last axis is the channels

Values outside these ranges are an error. If a file has 16 bits per color channel, Pillow keeps the upper 8.

A text that begins with http:// or https:// is an address, and its bytes are fetched (`files.web`, with its limits).
Reading a file takes 8 bytes of memory per pixel, and up to 16 for WebP and rare modes; Pillow opens 89 million pixels.
This module changes no state of the process. If a file has damaged metadata, Pillow may warn; the caller's warning
filters decide what happens then.
"""

import io
from collections.abc import Iterator, Sequence
from math import inf
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from pgfunc.config import Config, SiglipConfig
from pgfunc.errors import ImageError, first_line
from pgfunc.files.web import fetch
from pgfunc.names import is_url

# one picture: a path or an http(s) address, encoded bytes, or decoded pixels
Source = str | PathLike | bytes | Image.Image | np.ndarray | Tensor
Pictures = Source | Sequence[Source | Sequence[Source]]  # of all rows, or a list with a picture or pictures per row

BAND = 2**20  # pixels converted at a time: the conversion has several steps, and each would copy the whole picture
MAX_READS = 20_000  # calls of read for one header: Pillow takes quadratic time to join EXIF blocks and comments
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip  Exif 2.3, tag 274


def pixels(source: Source, cfg: Config | SiglipConfig) -> Float[Tensor, "3 y x"]:
    """The pixels of a picture, as the encoder takes them: channels first, values in [-1, 1].

    Raises ImageError, which names the file, if it is missing, corrupt, truncated or a decompression bomb.
    """
    levels, _ = square(source, cfg)
    return normalize(torch.from_numpy(levels))


def square(source: Source, cfg: Config | SiglipConfig) -> tuple[UInt8[np.ndarray, "y x 3"], tuple[int, int]]:
    """The 8-bit levels of a picture, resized to the square that the encoder takes; and its own width and height.

    Raises ImageError like `pixels`.
    """
    side = cfg.vision.image_size
    image = open_image(source, side)
    return np.array(image.resize((side, side), Image.Resampling[cfg.resample.upper()])), image.size


def normalize(levels: UInt8[Tensor, "*b y x 3"]) -> Float[Tensor, "*b 3 y x"]:
    """8-bit levels -> values in [-1, 1], channels first. Gives the same numbers on every device."""
    # by a tensor: on a GPU, PyTorch multiplies by the inverse of a plain number, which rounds in another way
    half = torch.full((), 127.5, device=levels.device)
    return rearrange(levels, "... y x c -> ... c y x").float() / half - 1


def open_image(source: Source, side: int = 0) -> Image.Image:
    """A picture as an upright 8-bit RGB image; an animation gives its first frame.

    Raises ImageError like `pixels`, and also if the picture is so long and narrow that resizing it to a square with
    this side would take too much memory.
    """
    image = decode(source)
    if Image.MAX_IMAGE_PIXELS is not None and side * max(image.size) > Image.MAX_IMAGE_PIXELS:
        size = f"{image.width} x {image.height}"
        raise ImageError(f"{name_of(source)}: too long and narrow ({size}); cut the picture into parts")
    upright = Image.new("RGB", image.size)
    if image.mode == "RGB" and not image.has_transparency_data:  # most photos
        upright.paste(image)
        return upright
    for rows in bands(*image.size):
        upright.paste(_to_rgb(image.crop((0, rows.start, image.width, rows.stop))), (0, rows.start))
    return upright


def bands(width: int, height: int) -> Iterator[range]:
    """The rows of a picture, split into parts of about `BAND` pixels."""
    step = max(1, BAND // width)
    return (range(top, min(top + step, height)) for top in range(0, height, step))


def decode(source: Source) -> Image.Image:
    """A picture made upright, in a mode with at most 8 bits per channel."""
    if isinstance(source, (np.ndarray, Tensor)):
        return _from_array(_as_array(source))
    name = name_of(source)
    try:
        if isinstance(source, Image.Image):
            return _to_8_bits(_upright(source))
        with HeaderReader(_open_bytes(source)) as file, _open_header(file) as image:
            check_size(name, *image.size)
            return _to_8_bits(_upright(image))
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: too many pixels ({error}); make the picture smaller first") from error
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture, or in a format that Pillow does not read") from None
    except Exception as error:  # a damaged file can make Pillow's decoders raise any exception
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise ImageError(f"{name}: cannot be read as a picture ({reason})") from error


def name_of(source: Source) -> str:
    """The name of a picture in error messages."""
    return str(source) if isinstance(source, (str, PathLike)) else "the given picture"


def check_size(name: str, width: int, height: int) -> None:
    """Raise ImageError if a picture has more pixels than Pillow opens without a warning."""
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ImageError(
            f"{name}: too many pixels ({width} x {height} exceed {Image.MAX_IMAGE_PIXELS:,}); make the picture smaller"
        )


class HeaderReader(io.BufferedReader):
    """A file that raises ValueError after `MAX_READS` reads. The limit is lifted when the header has been read."""

    reads_left: float = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ValueError(f"its header is in more than {MAX_READS:,} pieces")
        return super().read(size)


def _open_header(file: HeaderReader) -> Image.Image:
    """The picture in a file: its header is read, its pixels are not yet decoded."""
    try:
        image = Image.open(file)
    except UserWarning:  # the caller turns warnings into errors; most warnings are about the EXIF data of a JPEG
        file.seek(0)
        file = HeaderReader(io.BytesIO(file.read().replace(b"Exif\0\0", b"exif\0\0")))  # Pillow then skips these data
        image = Image.open(file)
    file.reads_left = inf
    return image


def _open_bytes(source: str | PathLike | bytes) -> io.RawIOBase | io.BytesIO:
    """The encoded bytes of a picture. Pipes and devices are refused: reading one may never end."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str) and is_url(source):
        return io.BytesIO(fetch(source))
    path = Path(source)
    if path.exists() and not path.is_file():
        raise ValueError("it is a folder, a pipe or a device; expected a file")
    return io.FileIO(path)


def _upright(image: Image.Image) -> Image.Image:
    """The decoded picture, rotated by its EXIF orientation if that can be read."""
    # Pillow runs Ghostscript, if it is installed, to decode PostScript, and that may never end
    if image.format == "EPS" and getattr(image, "tile", None):
        raise ValueError("PostScript is a program, convert it to PNG first")
    image.load()
    if 0 in image.size:
        raise ValueError(f"its size is {image.width} x {image.height}")
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # only the metadata are damaged; the pixels are decoded
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """The picture with 8-bit levels; only modes I, F and I;16 are converted."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    levels = _to_8_bit_levels(values)
    if (transparent := image.info.get("transparency")) is not None:  # all pixels with this value are transparent
        levels[values == transparent] = 255
    return Image.fromarray(levels)


def _to_8_bit_levels(values: np.ndarray) -> np.ndarray:
    """8-bit levels: 16-bit levels and fractions are rounded, floats above 1 are truncated as Pillow truncates them."""
    least, most = values.min(), values.max()
    floats = values.dtype.kind == "f"
    limit = 255 if floats else 65_535
    if not (least >= 0 and most <= limit):
        raise ValueError(f"its levels are {least} to {most}, expected 0 to {limit:,}; scale them first")
    levels = np.empty(values.shape, np.uint8)
    for rows in bands(values[0].size, len(values)):
        part = values[rows.start : rows.stop]
        if floats:
            levels[rows.start : rows.stop] = (part * 255).round() if most <= 1 else part
        else:  # the 16-bit level 257 n is the 8-bit level n
            levels[rows.start : rows.stop] = (part // 257 + (part % 257 > 128)) if most > 255 else part
    return levels


def _to_rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB, blended onto white where it is transparent."""
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # no La to RGBA in Pillow
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _as_array(source: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(source, np.ndarray):
        return source
    try:
        tensor = source.detach().cpu().resolve_conj().resolve_neg()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # numpy has no bfloat16
    except Exception as error:  # a sparse, quantized or meta tensor
        raise ImageError(f"a tensor that cannot become an array of numbers ({first_line(error)})") from error


def _from_array(array: np.ndarray) -> Image.Image:
    """The picture in an array of height x width (x 1, 3 or 4 channels): integer levels, or floats in [0, 1]."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        first = "; channels first? permute(1, 2, 0)" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ImageError(
            f"an array of shape {array.shape} is not a picture; expected height x width (x 1, 3 or 4){first}"
        )
    floats = np.issubdtype(array.dtype, np.floating)
    if floats and not (array.min() >= 0 and array.max() <= 1):
        raise ImageError("a picture of floating point numbers must lie in [0, 1]; divide 8-bit levels by 255")
    if floats or np.issubdtype(array.dtype, np.uint16):  # of either byte order
        array = _to_8_bit_levels(array)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ImageError(f"an array of {array.dtype} is not a picture; expected uint8, uint16, bool or floating point")
    return Image.fromarray(array)
