"""The files that detect and segment write, drawings and COCO's JSON: where they go, and how they are written.

All names are checked before anything is computed. Nothing here knows how objects are found.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from pgfunc.cli.options import check_file
from pgfunc.errors import SettingError
from pgfunc.files import atomic
from pgfunc.files.atomic import replacing
from pgfunc.files.outputs import check_apart, resolved, write_errors
from pgfunc.names import is_url

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF")  # of a drawing


def drawing_paths(images: Sequence[str], out: Path | None, inputs: Sequence[str | Path | None]) -> dict[str, Path]:
    """Picture -> file of its drawing; empty without --out. With several pictures, `out` is a folder.

    Raises SettingError if a drawing cannot be written, would replace an input, or would replace another drawing.
    """
    if out is None:
        return {}
    if len(images) == 1 and not out.is_dir():
        if image_format(out) not in Image.SAVE:
            raise SettingError(f"--out {out}: not a kind of picture that can be written; end the name in .png or .jpg")
        paths = {images[0]: out}
    else:
        if out.exists() and not out.is_dir():
            raise SettingError(f"--out {out}: is a file; several pictures need a folder")
        paths = {image: out / drawing_name(image) for image in images}
    check_apart(paths.values(), inputs, "--out")
    for image, path in paths.items():
        if list(paths.values()).count(path) > 1:
            raise SettingError(f"--out {out}: {image} and another picture would both be {path}")
    if not out.is_dir():
        check_file(out)
    return paths


def drawing_name(image: str) -> str:
    """The file name of a picture's drawing: the picture's own name, or with .png if its format is not in FORMATS."""
    path = Path(urlsplit(image).path if is_url(image) else image)
    format = image_format(path)
    return path.name if format in FORMATS and format in Image.SAVE else f"{path.stem or 'picture'}.png"


def image_format(path: Path) -> str | None:
    """Pillow's format for the suffix of a file name; None if it knows none."""
    return Image.registered_extensions().get(path.suffix.lower())


def check_coco(path: Path, inputs: Sequence[str | Path | None], drawings: Mapping[str, Path]) -> None:
    """Raise SettingError if the file for --coco cannot be written, or is an input or a drawing."""
    check_file(path)
    check_apart([path], inputs, "--coco")
    if resolved(path) in map(resolved, drawings.values()):
        raise SettingError(f"--coco {path}: is the picture that --out writes; give another name")


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format of its suffix, and make its folder if necessary."""
    with write_errors(path, also=(ValueError, KeyError)):  # Pillow raises these for what a format cannot hold
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            picture.save(file, Image.registered_extensions()[path.suffix.lower()])


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with write_errors(path):
        atomic.write_text(path, text)
