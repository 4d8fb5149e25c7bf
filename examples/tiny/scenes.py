"""Scenes: things at their positions, a background and perhaps a sign. Everything is a function of a seed.

Owns the splits, the held-out combinations and the placement. Knows nothing about pixels (`render`), and no words except
names (`texts`).

    S0  new scenes
    S1  each scene has a combination that never occurs in training: a colour of a shape, or two classes side by side
    S2  unseen instances of the classes
    S3  photographic cut-outs, on photographs; training has no cut-outs and has not seen these photographs
    style  the classes in an icon set that training does not have
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from examples.tiny import plates, shapes
from examples.tiny.chance import pick, weighted

SPLITS = {"train": 0, "S0": 1, "S1": 2, "S2": 3, "S3": 4, "style": 5}
SPRITES = {"train": "train", "S0": "train", "S1": "train", "S2": "unseen", "S3": "photo", "style": "style"}
HELD_OUT = 0.12  # the share of class pairs that are held out
SIZES = {
    0: (0, 0),
    1: (0.3, 0.8),
    2: (0.28, 0.58),
    3: (0.25, 0.48),
    4: (0.22, 0.42),
}  # number of things -> their sizes, as shares of the picture's side
CROWDS = (0.06, 0.25, 0.31, 0.22, 0.16)  # the shares of scenes with 0 to 4 things
GROUNDS = {"photo": 0.35, "noise": 0.25, "gradient": 0.2, "flat": 0.2}  # the shares of backgrounds
SMALLEST = 0.16
GREY = np.array([[0.299, 0.587, 0.114]] * 3)  # a colour -> its luma
SIGNED = 0.6  # the share of scenes with things that also have a sign
OVERLAP = 0.15  # the largest share of the smaller box that two things may share
KNOTS, WARP = 5, 0.05  # knots along each side of a texture, and how far a knot moves, as a share of half that side


class Catalog(NamedTuple):
    """The parts of scenes. Textures are numbered, first the sprites, then the shapes."""

    names: tuple[str, ...]  # the classes
    sprites: dict[str, dict[str, list[int]]]  # sprite split -> class -> textures
    extent: Float[np.ndarray, "n 2"]  # width and height of the opaque part, as fractions of the texture
    photos: dict[str, list[int]]  # "train" and "test" -> numbers of background photographs
    pairs: Bool[np.ndarray, "c c"]  # class pairs that never occur in training
    coloured: frozenset[tuple[str, str]]  # (colour, shape) that never occur in training
    fonts: tuple[Path, ...]
    words: plates.Words  # for signs


class Thing(NamedTuple):
    name: str  # "cat", "red star"
    colour: str  # "" for a sprite
    texture: int
    centre: tuple[float, float]  # x, y as fractions of the picture
    reach: tuple[float, float]  # half the width and height of the box around it
    theta: Float[np.ndarray, "2 3"]  # picture -> texture, both from -1 to 1
    warp: Float[
        np.ndarray, "2 k k"
    ]  # offsets in x and y at which the texture is read, at its knots, smooth between them
    tint: Float[np.ndarray, "3 3"]  # the texture's red, green and blue -> the picture's


class Sign(NamedTuple):
    text: str
    pixels: UInt8[np.ndarray, "y x 4"]
    corner: tuple[int, int]  # y, x in pixels


class Background(NamedTuple):
    tones: UInt8[np.ndarray, "3 16 16"]  # enlarged smoothly
    photo: int  # -1: none
    crop: Float[np.ndarray, "2 3"]
    grain: float  # standard deviation of the noise, in grey levels


class Scene(NamedTuple):
    things: tuple[Thing, ...]  # later ones are in front
    sign: Sign | None
    background: Background


def catalog(names, sprites, extent, photos, fonts: tuple[Path, ...], words: plates.Words) -> Catalog:
    """Choose what is held out, by one draw with a fixed seed over all combinations."""
    rng = np.random.default_rng(27)
    upper = np.triu(rng.random((len(names), len(names))) < HELD_OUT, 1)
    every = [(colour, shape) for colour in shapes.COLOURS for shape in shapes.OUTLINES]
    chosen = np.random.default_rng(27).choice(len(every), 12, replace=False)
    coloured = frozenset(every[i] for i in chosen)
    return Catalog(tuple(names), sprites, extent, photos, upper | upper.T, coloured, fonts, words)


def draw(cat: Catalog, split: str, index: int, side: int = 224) -> Scene:
    """Scene number `index` of a split; a scene of S1 is drawn again if its held-out combination does not fit."""
    rng = np.random.default_rng((SPLITS[split], index))
    while True:
        scene = _attempt(cat, split, side, rng)
        if split != "S1" or not familiar(cat, [thing.name for thing in scene.things]):
            return scene


def _attempt(cat: Catalog, split: str, side: int, rng: np.random.Generator) -> Scene:
    crowd = weighted(rng, range(5), CROWDS)
    if split == "S1":
        crowd = max(crowd, 2)
    sign = _sign(cat, rng, split, side) if crowd == 0 or rng.random() < SIGNED else None
    boxes = [] if sign is None else [_sign_box(sign, side)]
    things = []
    for name in _names(cat, split, crowd, rng):
        if (thing := place(cat, split, name, SIZES[crowd], boxes, rng)) is not None:
            things.append(thing)
            boxes.append((*thing.centre, *thing.reach))
    if not things and sign is None:  # nothing that was drawn fits
        sign = _sign(cat, rng, split, side)
    return Scene(tuple(things), sign, background(cat, split, rng))


def _names(cat: Catalog, split: str, count: int, rng: np.random.Generator) -> list[str]:
    """The names of a scene. Held-out combinations occur only in S1, and there in every scene."""
    names = _held_out_names(cat, split, rng) if split == "S1" else []
    while len(names) < count:
        again = names and split != "S1" and rng.random() < 0.15
        name = pick(rng, names) if again else _name(cat, split, rng)
        if split == "S1" or allowed(cat, names, name):
            names.append(name)
    rng.shuffle(names)
    return names


def _name(cat: Catalog, split: str, rng: np.random.Generator) -> str:
    if split in ("train", "S0", "S1") and rng.random() < 0.3:
        colours, outlines = list(shapes.COLOURS), list(shapes.OUTLINES)
        while (pair := (pick(rng, colours), pick(rng, outlines))) in cat.coloured:
            pass
        return " ".join(pair)
    return pick(rng, _classes(cat, split))


def _classes(cat: Catalog, split: str) -> list[str]:
    return list(cat.sprites[SPRITES[split]])


def _held_out_names(cat: Catalog, split: str, rng: np.random.Generator) -> list[str]:
    """A held-out combination of colour and shape, or a held-out pair of classes."""
    if rng.random() < 0.4:
        pair = pick(rng, sorted(cat.coloured))
        return [" ".join(pair)]
    known = _classes(cat, split)
    while True:
        first, second = (str(name) for name in rng.choice(known, 2, replace=False))
        if cat.pairs[cat.names.index(first), cat.names.index(second)]:
            return [first, second]


def familiar(cat: Catalog, names: list[str]) -> bool:
    """Whether no combination among the names is held out."""
    return all(allowed(cat, names[:i], name) for i, name in enumerate(names))


def allowed(cat: Catalog, names: list[str], name: str) -> bool:
    """Whether no held-out combination arises when `name` joins `names`."""
    if name not in cat.names:
        return tuple(name.split(" ")) not in cat.coloured
    number = cat.names.index(name)
    return not any(cat.pairs[number, cat.names.index(other)] for other in names if other in cat.names)


def place(cat: Catalog, split: str, name: str, sizes, boxes, rng: np.random.Generator) -> Thing | None:
    """A thing at a random position with little overlap; None if the picture is full."""
    sprite, varied = name in cat.names, name in cat.names and split == "train"
    colour, shape = ("", "") if sprite else name.split(" ")
    known = cat.sprites[SPRITES[split]][name] if sprite else [_plain(cat, shape)]
    texture = pick(rng, known)
    tilt, stretch, lean = (25, 0.16, 0.12) if varied else (20 if sprite else shapes.TILT[shape], 0.08, 0.0)
    size = rng.uniform(*sizes)
    while size > SMALLEST:
        forward = _turned(rng.uniform(-tilt, tilt), rng.normal(0, lean), size * np.exp(rng.normal(0, stretch, 2)))
        across, down = (abs(forward) @ cat.extent[texture] / 2).tolist()
        if centre := _free((across, down), boxes, rng):
            if sprite and rng.random() < 0.5:
                forward = forward * [-1, 1]
            warp = rng.normal(0, WARP if varied else 0, (2, KNOTS, KNOTS)).astype(np.float32)
            tint = tint_of(colour, varied, rng)
            return Thing(name, colour, texture, centre, (across, down), _theta(centre, forward), warp, tint)
        size *= 0.88
    return None


def _turned(degrees: float, lean: float, axes: Float[np.ndarray, "2"]) -> Float[np.ndarray, "2 2"]:
    """The map from a texture to the picture that scales, leans and turns a thing, in this order."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cos, lean * cos - sin], [sin, lean * sin + cos]]) * axes


def _free(reach: tuple[float, float], boxes, rng: np.random.Generator) -> tuple[float, float] | None:
    """A random centre for a box inside the picture with little overlap; None if it is too large or eight tries fail."""
    if max(reach) > 0.5:
        return None
    for x, y in rng.random((8, 2)).tolist():
        centre = reach[0] + x * (1 - 2 * reach[0]), reach[1] + y * (1 - 2 * reach[1])
        if all(_shared((*centre, *reach), box) <= OVERLAP for box in boxes):
            return centre
    return None


def _plain(cat: Catalog, shape: str) -> int:
    return len(cat.extent) - len(shapes.OUTLINES) + list(shapes.OUTLINES).index(shape)


def _theta(centre: tuple[float, float], forward: Float[np.ndarray, "2 2"]) -> Float[np.ndarray, "2 3"]:
    """The inverse map, from the picture to the texture, of a thing mapped by `forward` and placed at `centre`."""
    (a, b), (c, d) = forward.tolist()
    x, y, size = 1 - 2 * centre[0], 1 - 2 * centre[1], a * d - b * c  # a 2 x 2 inverse: numpy's takes longer to call
    rows = (d, -b, d * x - b * y), (-c, a, a * y - c * x)
    return np.array(rows, np.float32) / np.float32(size)


def tint_of(colour: str, varied: bool, rng: np.random.Generator) -> Float[np.ndarray, "3 3"]:
    """The tone of a shape; for a sprite its brightness and, if varied, its saturation and hue."""
    if colour:
        tone = np.asarray(shapes.COLOURS[colour]) + rng.normal(0, 6, 3) + rng.normal(0, 8)
        return np.diag(np.clip(tone / 255, 0, 1)).astype(np.float32)
    if not varied:
        return (rng.uniform(0.8, 1.1) * np.eye(3)).astype(np.float32)
    hue = rng.uniform(-np.pi, np.pi) if rng.random() < 0.2 else rng.normal(0, 0.15)
    saturation = 0.0 if rng.random() < 0.12 else rng.uniform(0.3, 1.5)
    mixed = (saturation * np.eye(3) + (1 - saturation) * GREY) @ _hue(hue)
    return (rng.uniform(0.6, 1.15) * rng.uniform(0.75, 1.25, (3, 1)) * mixed).astype(np.float32)


def _hue(angle: float) -> Float[np.ndarray, "3 3"]:
    """The rotation of red, green and blue about grey."""
    cos, sin = math.cos(angle), math.sin(angle) / math.sqrt(3)
    same, next_, last = (1 + 2 * cos) / 3, (1 - cos) / 3 - sin, (1 - cos) / 3 + sin
    return np.array([[same, next_, last], [last, same, next_], [next_, last, same]])


def _shared(a, b) -> float:
    """The share of the smaller of two boxes (centre, reach) that the other covers."""
    if abs(a[0] - b[0]) >= a[2] + b[2] or abs(a[1] - b[1]) >= a[3] + b[3]:
        return 0.0
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0] - a[2], b[0] - b[2])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1] - a[3], b[1] - b[3])
    return across * down / (4 * min(a[2] * a[3], b[2] * b[3]))


def _sign(cat: Catalog, rng: np.random.Generator, split: str, side: int) -> Sign:
    text = plates.phrase(rng, cat.words.seen if split == "train" else cat.words.unseen)
    pixels = plates.sign(text, rng, cat.fonts)
    corner = (int(rng.integers(side - pixels.shape[0] + 1)), int(rng.integers(side - pixels.shape[1] + 1)))
    return Sign(text, pixels, corner)


def _sign_box(sign: Sign, side: int) -> tuple[float, float, float, float]:
    height, width = (length / side for length in sign.pixels.shape[:2])
    return sign.corner[1] / side + width / 2, sign.corner[0] / side + height / 2, width / 2, height / 2


def background(cat: Catalog, split: str, rng: np.random.Generator) -> Background:
    """A photograph, smooth noise, a gradient or one colour."""
    kind = "photo" if split == "S3" else weighted(rng, list(GROUNDS), list(GROUNDS.values()))
    tones = _tones(kind, rng)
    known = cat.photos["test" if split == "S3" else "train"]
    photo = pick(rng, known) if kind == "photo" and known else -1
    zoom, (x, y) = rng.uniform(0.3, 0.95), rng.uniform(-1, 1, 2)
    flip = pick(rng, (-1.0, 1.0))
    crop = np.array([[zoom * flip, 0, x * (1 - zoom)], [0, zoom, y * (1 - zoom)]], np.float32)
    return Background(tones, photo, crop, float(rng.exponential(4)))


def _tones(kind: str, rng: np.random.Generator) -> UInt8[np.ndarray, "3 16 16"]:
    """One colour, or variations of it."""
    first, second = rng.integers(0, 256, (2, 3, 1, 1))
    tones = np.broadcast_to(first, (3, 16, 16))
    if kind == "noise":
        tones = rng.integers(0, 256, (3, 16, 16)) * rng.uniform(0.2, 0.9) + first * 0.3
    if kind == "gradient":
        axis, turn = np.linspace(0, 1, 16), rng.uniform(0, 2 * np.pi)
        tones = first + (second - first) * (np.cos(turn) * axis[None] + np.sin(turn) * axis[:, None] + 1) / 3
    return np.clip(tones, 0, 255).astype(np.uint8)
