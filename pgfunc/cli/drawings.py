"""The files that detect and segment write, drawings and COCO's JSON: where they go, and how they are written.

All names are checked before anything is computed. Nothing here knows how objects are found.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from pgfunc.cli.inputs import Inputs, Item, is_folder
from pgfunc.cli.options import check_file
from pgfunc.errors import SettingError
from pgfunc.files import atomic
from pgfunc.files.atomic import replacing
from pgfunc.files.outputs import check_apart, resolved, write_errors

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF")  # of a drawing


Drawings = Callable[[Item], Path]


def drawing_paths(
    inputs: Inputs, out: Path | None, folder: Path | None, read: Sequence[str | Path | None]
) -> Drawings | None:
    """Where the drawing of each picture goes: the file `out` for a single one, or else a folder; None: nowhere.

    Raises SettingError if a drawing cannot be written, would replace a file of `read` or a picture, or would replace
    another drawing, as far as the pictures are known before they are read.
    """
    if out is None and folder is None:
        return None
    if out is not None and folder is not None:
        raise SettingError(f"--out {out} and --draw {folder} both say where drawings go; give one of them")
    target, option = (out, "--out") if folder is None else (folder, "--draw")
    assert target is not None
    if inputs.single and out is not None and not out.is_dir():
        if image_format(out) not in Image.SAVE:
            raise SettingError(f"--out {out}: not a kind of picture that can be written; end the name in .png or .jpg")
        drawings = lambda item: target  # noqa: E731
    else:
        if target.exists() and not target.is_dir():
            raise SettingError(f"{option} {target}: is a file; several pictures need a folder")
        drawings = lambda item: target / drawing_name(item.drawing)  # noqa: E731
    check_drawings(inputs, drawings, option, target, read)
    if not target.is_dir():
        check_file(target)
    return drawings


def check_drawings(
    inputs: Inputs, drawings: Drawings, option: str, target: Path, read: Sequence[str | Path | None]
) -> None:
    """Raise SettingError if a drawing would replace an input, or another drawing."""
    drawn: dict[Path, Item] = {}
    for item in inputs.items if inputs.total is not None else ():
        path = drawings(item)
        if path in drawn and drawn[path].source != item.source:
            raise SettingError(f"{option} {target}: {drawn[path].image} and another picture would both be {path}")
        drawn[path] = item
    sources = [item.source for item in drawn.values()]
    check_apart(drawn, [*sources, *(name for name in read if name not in inputs.arguments)], option)


def drawing_name(name: str) -> str:
    """The file name of a picture's drawing: the picture's own name, or with .png if its format is not in FORMATS."""
    path = Path(name)
    format = image_format(path)
    if format in FORMATS and format in Image.SAVE:
        return name
    return str(path.with_suffix(".png")) if path.name else "picture.png"  # an address may have no name


def image_format(path: Path) -> str | None:
    """Pillow's format for the suffix of a file name; None if it knows none."""
    return Image.registered_extensions().get(path.suffix.lower())


def check_coco(path: Path, inputs: Inputs, read: Sequence[str | Path | None], drawings: Drawings | None) -> None:
    """Raise SettingError if the file for --coco cannot be written, or is an input or a drawing."""
    check_file(path)
    check_apart([path], files_of(inputs, read), "--coco")
    known = inputs.items if inputs.total is not None and drawings else ()
    if resolved(path) in {resolved(drawings(item)) for item in known if drawings}:
        raise SettingError(f"--coco {path}: is the picture that --out writes; give another name")


def files_of(inputs: Inputs, read: Sequence[str | Path | None]) -> list[str | Path | None]:
    """The files that are read, without folders of pictures: results may be written into those."""
    return [name for name in read if name is None or name not in inputs.arguments or not is_folder(str(name))]


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format of its suffix, and make its folder if necessary."""
    with write_errors(path, also=(ValueError, KeyError)):  # Pillow raises these for what a format cannot hold
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            picture.save(file, Image.registered_extensions()[path.suffix.lower()])


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with write_errors(path):
        atomic.write_text(path, text)
