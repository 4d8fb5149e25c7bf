"""From the fetched packages to the material of scenes: the catalog, which names things, and the textures.

`small` has a few plain drawings instead, so that the whole pipeline runs without a download.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from examples.tiny import fetch, plates, render, scenes, shapes, sprites
from examples.tiny.scenes import Catalog

PHOTO = 256  # pixels along each side of a background
LEAST = 8  # a class needs this many training sprites
OPAQUE = 0.5  # the least opaque share of a sprite's visible part: its mask would not have the rest


class World(NamedTuple):
    catalog: Catalog
    textures: UInt8[Tensor, "n 4 128 128"]
    photos: UInt8[Tensor, "p 3 z z"]

    def bank(self, device: torch.device | str) -> render.Bank:
        return render.bank(self.textures, self.photos, device)


def load(folder: Path, more: str = "") -> World:
    """Load the folder that `examples.tiny.fetch` wrote. `more` adds a class that has too few sprites otherwise.

    The last training sprite of that class counts as unseen.
    """
    pack = sprites.load(folder / "sprites.npz")
    solid = opaque(pack.rgba[..., 3])
    names = usable(pack, solid) + ([more] if more else [])
    numbers = {name: pack.classes.index(name) for name in names}
    known = {}
    for split in sprites.SPLITS:
        of_split = np.where(solid & (pack.split == split), pack.label, -1)
        by_name = {name: np.flatnonzero(of_split == number).tolist() for name, number in numbers.items()}
        known[split] = {name: textures for name, textures in by_name.items() if textures}
    if more:
        known["unseen"][more] = [known["train"][more].pop()]
    pictures = fetch.load_backgrounds(folder / "backgrounds.npz")
    photos = np.stack([np.asarray(Image.fromarray(picture).resize((PHOTO, PHOTO))) for picture in pictures.rgb])
    grounds = {split: np.flatnonzero(pictures.split == split).tolist() for split in ("train", "test")}
    signs = tuple(sorted((folder / "fonts").iterdir())), plates.split((folder / "words.txt").read_text().split())
    return assemble(names, known, pack.rgba, photos, grounds, *signs)


def usable(pack: sprites.Pack, solid: Bool[np.ndarray, "n"]) -> list[str]:
    """The classes with enough sprites, without shape names: a class `star` would have two meanings."""
    sizes = np.bincount(pack.label[solid & (pack.split == "train")], minlength=len(pack.classes))
    return [n for n, size in zip(pack.classes, sizes, strict=True) if size >= LEAST and n not in shapes.OUTLINES]


def small() -> World:
    """Four classes, each drawn in four tones from two shapes; two noisy photographs; Pillow's own font; few words."""
    names, masks = ("box", "cup", "kite", "leaf"), list(shapes.OUTLINES)
    drawn, known = [], {split: {} for split in sprites.SPLITS}
    for i, name in enumerate(names):
        for split, level in (("train", 90), ("unseen", 150), ("style", 180), ("photo", 210)):
            alpha = shapes.mask(masks[2 * i], 128)
            tone = np.where(shapes.mask(masks[2 * i + 1], 128) > 127, level, 255 - level)
            known[split][name] = [len(drawn)]
            drawn.append(np.stack([(tone * (alpha / 255)).astype(np.uint8)] * 3 + [alpha], -1))
    photos = np.random.default_rng(0).integers(0, 256, (2, PHOTO, PHOTO, 3)).astype(np.uint8)
    return assemble(names, known, np.stack(drawn), photos, {"train": [0], "test": [1]}, (),
                    plates.split(plates.frequencies()))  # fmt: skip


def assemble(
    names, known, rgba: UInt8[np.ndarray, "n 128 128 4"], photos, numbers, fonts: tuple[Path, ...], words: plates.Words
) -> World:
    """The sprites, then the shapes, as textures, and their catalog."""
    plain = np.stack([np.repeat(shapes.mask(name, 128)[..., None], 4, -1) for name in shapes.OUTLINES])
    textures = np.concatenate([rgba, plain])
    catalog = scenes.catalog(names, known, extent(textures[..., 3]), numbers, fonts, words)
    as_planes = [rearrange(torch.from_numpy(array), "n y x c -> n c y x").contiguous() for array in (textures, photos)]
    return World(catalog, *as_planes)


def opaque(alpha: UInt8[np.ndarray, "n y x"]) -> Bool[np.ndarray, "n"]:
    """Whether most of a sprite's visible part is opaque, unlike a drinking glass."""
    return (alpha > 127).sum((1, 2)) > OPAQUE * (alpha > 20).sum((1, 2))


def extent(alpha: UInt8[np.ndarray, "n y x"]) -> Float[np.ndarray, "n 2"]:
    """Width and height of the box around the texture's centre that contains the opaque part, as fractions."""
    solid, side = alpha > 127, alpha.shape[-1]
    distance = np.abs(np.arange(side) - (side - 1) / 2) + 0.5
    return np.stack([(solid.any(axis) * distance).max(-1) for axis in (1, 2)], -1) * 2 / side
