"""Pictures -> pixels: whatever people have in their folders, as the square of numbers that the encoder was trained on.

Upright (EXIF orientation applied), on white where transparent, 8 bits, RGB, the first frame, resized without keeping
the aspect (as PaliGemma was trained), values in [-1, 1]. Decoding and resizing are Pillow's.

What its type leaves open is decided by what a picture holds, so that different levels never become one black:

    integers of more than 8 bits    levels of 8 bits where none is above 255 (so Pillow reads them), else of 16
    Pillow's floats, mode F         shares in [0, 1] where none is above 1, else levels of 8 bits (so Pillow reads them)
    arrays of floats                shares in [0, 1]
    arrays of integers              uint8 or uint16, of either byte order; others say nothing about their range
    arrays of three axes            the channels are the last

Values outside these ranges are an error. Pillow keeps the upper 8 bits of colours that have 16 in a file.

To read a file takes 8 bytes of memory a pixel, up to 16 in rare modes and as WebP; Pillow opens 89 million pixels.
Nothing that belongs to the whole process is changed: where a file's metadata are damaged, Pillow may warn, and the
caller's filters say what becomes of that.
"""

import io
from collections.abc import Iterator
from math import inf
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from pgfunc.config import Config, SiglipConfig
from pgfunc.errors import ImageError, first_line

Source = str | PathLike | bytes | Image.Image | np.ndarray | Tensor

BAND = 2**20  # pixels that are converted at a time: a whole picture in each mode that it passes takes too much memory
PIECES = 20_000  # in which a header may be read: Pillow joins Exif data, and comments, in time that is their square
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
    """A picture as the encoder takes it: channels first, values in [-1, 1].

    Raises ImageError, naming the file, for what is missing, corrupt, truncated or a decompression bomb.
    """
    side = cfg.vision.image_size
    image = open_image(source, side)
    square = image.resize((side, side), Image.Resampling[cfg.resample.upper()])
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


def open_image(source: Source, side: int = 0) -> Image.Image:
    """Any picture as an upright 8-bit RGB image, its first frame if there are several.

    Raises ImageError as `pixels`, and for a strip so long that resizing it to a square of that side takes too much.
    """
    image = decoded(source)
    if Image.MAX_IMAGE_PIXELS is not None and side * max(image.size) > Image.MAX_IMAGE_PIXELS:
        size = f"{image.width} x {image.height}"
        raise ImageError(f"{name_of(source)}: too many pixels in a row ({size}); cut the picture into parts")
    whole = Image.new("RGB", image.size)
    for rows in bands(*image.size):
        whole.paste(_rgb(image.crop((0, rows.start, image.width, rows.stop))), (0, rows.start))
    return whole


def bands(width: int, height: int) -> Iterator[range]:
    """The rows of a picture, in parts of BAND pixels."""
    step = max(1, BAND // width)
    return (range(top, min(top + step, height)) for top in range(0, height, step))


def decoded(source: Source) -> Image.Image:
    """Any picture upright, in a mode of 8 bits a channel or less."""
    if isinstance(source, (np.ndarray, Tensor)):
        return _from_array(_as_array(source))
    name = name_of(source)
    try:
        if isinstance(source, Image.Image):
            return _shallow(_upright(source))
        with File(_raw(source)) as file, _opened(file) as image:
            check_size(name, *image.size)
            return _shallow(_upright(image))
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: too many pixels ({error}); make the picture smaller first") from error
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture, or of a kind that Pillow does not read") from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise ImageError(f"{name}: cannot be read as a picture ({reason})") from error


def name_of(source: Source) -> str:
    """What a message calls a picture."""
    return str(source) if isinstance(source, (str, PathLike)) else "the given picture"


def check_size(name: str, width: int, height: int) -> None:
    """Raise ImageError for more pixels than Pillow opens without a warning."""
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ImageError(
            f"{name}: too many pixels ({width} x {height} exceed {Image.MAX_IMAGE_PIXELS:,}); make the picture smaller"
        )


class File(io.BufferedReader):
    """A file whose header is read in no more than so many pieces."""

    pieces: float = PIECES

    def read(self, size: int | None = -1, /) -> bytes:
        self.pieces -= 1
        if self.pieces < 0:
            raise ValueError(f"its header is in more than {PIECES:,} pieces")
        return super().read(size)


def _opened(file: File) -> Image.Image:
    """A picture whose header has been read."""
    try:
        image = Image.open(file)
    except UserWarning:  # the caller's filters make errors of warnings: most are of Exif data in a JPEG
        file.seek(0)
        file = File(io.BytesIO(file.read().replace(b"Exif\0\0", b"exif\0\0")))
        image = Image.open(file)
    file.pieces = inf
    return image


def _raw(source: str | PathLike | bytes) -> io.RawIOBase | io.BytesIO:
    """The bytes of a picture; those of a pipe or a device may never end, or never begin."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    path = Path(source)
    if path.exists() and not path.is_file():
        raise ValueError("it is a folder, a pipe or a device; expected a file")
    return io.FileIO(path)


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; as it lies where that cannot be read."""
    # to decode PostScript Pillow starts Ghostscript, where there is one, and it may never end
    if image.format == "EPS" and getattr(image, "tile", None):
        raise ValueError("PostScript is a program, convert it to PNG first")
    image.load()
    if 0 in image.size:
        raise ValueError(f"its size is {image.width} x {image.height}")
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the metadata are damaged, the pixels are not
        turn = None
    return image if turn is None else image.transpose(turn)


def _shallow(image: Image.Image) -> Image.Image:
    """The picture, in levels of 8 bits where it has other numbers."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    numbers = np.asarray(image)
    levels = _eight_bits(numbers)
    if (clear := image.info.get("transparency")) is not None:  # a level, which stands for no colour
        levels[numbers == clear] = 255
    return Image.fromarray(levels)


def _eight_bits(numbers: np.ndarray) -> np.ndarray:
    """Numbers that are no 8-bit levels, as such: rounded from 16 bits and from shares, cut from floats as by Pillow."""
    least, most = numbers.min(), numbers.max()
    floats = numbers.dtype.kind == "f"
    limit = 255 if floats else 65_535
    if not (least >= 0 and most <= limit):
        raise ValueError(f"its levels are {least} to {most}, expected 0 to {limit:,}; scale them first")
    levels = np.empty(numbers.shape, np.uint8)
    for rows in bands(numbers[0].size, len(numbers)):
        part = numbers[rows.start : rows.stop]
        if floats:
            levels[rows.start : rows.stop] = (part * 255).round() if most <= 1 else part
        else:  # 257 x level is level
            levels[rows.start : rows.stop] = (part // 257 + (part % 257 > 128)) if most > 255 else part
    return levels


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # Pillow knows no shorter way
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _as_array(source: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(source, np.ndarray):
        return source
    try:
        tensor = source.detach().cpu().resolve_conj().resolve_neg()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # numpy has no bfloat16
    except Exception as error:  # sparse, quantized, without values
        raise ImageError(f"a tensor that is no array of numbers ({first_line(error)})") from error


def _from_array(array: np.ndarray) -> Image.Image:
    """An array of height x width (x 1, 3 or 4 channels): integers are levels, floating point numbers lie in [0, 1]."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        first = "; channels first? permute(1, 2, 0)" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ImageError(
            f"an array of shape {array.shape} is not a picture; expected height x width (x 1, 3 or 4){first}"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise ImageError("a picture of floating point numbers must lie in [0, 1]; divide 8-bit levels by 255")
        array = _eight_bits(array)
    elif np.issubdtype(array.dtype, np.uint16):  # of either byte order
        array = _eight_bits(array)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ImageError(f"an array of {array.dtype} is not a picture; expected uint8, uint16, bool or floating point")
    return Image.fromarray(array)
