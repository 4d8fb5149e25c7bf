"""Pictures -> pixels: whatever people have in their folders, as the square of numbers that the encoder was trained on.

Upright (EXIF orientation applied), on white where transparent, 8 bits, RGB, resized without keeping the aspect (as
PaliGemma was trained), values in [-1, 1]. Decoding and resizing are Pillow's; as with Pillow, a file of floating point
numbers (mode F) holds levels of 0 to 255. An array of them lies in [0, 1].
"""

import io
import warnings
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pgfunc.config import Config, SiglipConfig
from pgfunc.errors import ImageError, first_line

Source = str | PathLike | bytes | Image.Image | np.ndarray | Tensor


def pixels(source: Source, cfg: Config | SiglipConfig) -> Float[Tensor, "3 y x"]:
    """A picture as the encoder takes it: channels first, values in [-1, 1].

    Raises ImageError, naming the file, for what is missing, corrupt, truncated or a decompression bomb.
    """
    side = cfg.vision.image_size
    image = open_image(source).resize((side, side), Image.Resampling[cfg.resample.upper()])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def open_image(source: Source) -> Image.Image:
    """Any picture as an upright 8-bit RGB image, its first frame if there are several."""
    if isinstance(source, (np.ndarray, Tensor)):
        return from_array(_as_array(source))
    name = str(source) if isinstance(source, (str, PathLike)) else "the given picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata: what counts is that the pixels decode
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return _rgb(_upright(source))
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source)) as image:
                return _rgb(_upright(image))
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: too many pixels ({error}); make the picture smaller first") from error
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture, or of a kind that Pillow does not read") from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
        raise ImageError(f"{name}: cannot be read as a picture ({first_line(error)})") from error


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; as it lies where that cannot be read."""
    # to decode PostScript Pillow starts Ghostscript, where there is one, and it may never end
    if image.format == "EPS" and getattr(image, "tile", None):
        raise ValueError("PostScript is a program, convert it to PNG first")
    image.load()
    if 0 in image.size:
        raise ValueError(f"its size is {image.width} x {image.height}")
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as with warnings: the metadata are damaged, the pixels are not
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # Pillow knows no shorter way
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """16-bit levels -> 8-bit ones, rounded: 257 x level is level. Never wider than 16 bits: pictures are large."""
    levels = values.clip(0, 65_535).astype(np.uint16)
    return (levels // 257 + (levels % 257 > 128)).astype(np.uint8)


def _as_array(source: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(source, np.ndarray):
        return source
    source = source.detach().cpu()
    return (source.float() if source.is_floating_point() else source).numpy()  # numpy has no bfloat16


def from_array(array: np.ndarray) -> Image.Image:
    """An array of height x width (x 1, 3 or 4 channels): integers are levels, floating point numbers lie in [0, 1]."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(f"an array of shape {array.shape} is not a picture; expected height x width (x 1, 3 or 4)")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise ImageError("a picture of floating point numbers must lie in [0, 1]; divide 8-bit levels by 255")
        array = (array * 255).round().astype(np.uint8)
    elif np.issubdtype(array.dtype, np.uint16):  # of either byte order
        array = _eight_bits(array)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ImageError(f"an array of {array.dtype} is not a picture; expected uint8, uint16, bool or floating point")
    return _rgb(Image.fromarray(array))
