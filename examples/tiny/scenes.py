"""Scenes of coloured shapes: what is in them, how they look, what can be said of them.

Owns the vocabulary of shapes and colours, the held-out combinations, the splits, the renderer, captions and questions.
Everything is a function of a seed. Knows nothing about models, tokens or training. Texts are in American English, as
PaliGemma's own training data are.
"""

import colorsys
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40), "orange": (245, 140, 25), "yellow": (246, 222, 50), "green": (45, 155, 60),
    "cyan": (60, 205, 220), "blue": (40, 80, 205), "purple": (130, 55, 170), "pink": (246, 140, 190),
    "brown": (120, 72, 38), "black": (22, 22, 22), "white": (246, 246, 246), "gray": (132, 132, 132),
}  # fmt: skip
# of the shorter side; the gaps are meant
SIZES = {"small": (0.21, 0.25), "medium": (0.31, 0.37), "large": (0.46, 0.56)}
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
SPLITS = {"train": 0, "S0": 1, "S1": 2, "crowd": 3}


class Object(NamedTuple):
    shape: str
    colour: str
    size: str
    box: tuple[float, float, float, float]  # ymin, xmin, ymax, xmax as fractions of the picture
    outline: Float[np.ndarray, "n 2"]  # x, y as fractions of the picture
    tone: tuple[int, int, int]


class Background(NamedTuple):
    kind: str  # flat, gradient or noise
    tones: Float[np.ndarray, "2 3"]
    angle: float
    grain: float
    seed: int


class Scene(NamedTuple):
    objects: tuple[Object, ...]
    background: Background
    aspect: float  # width / height


class Question(NamedTuple):
    kind: str  # color, count, existence or position
    text: str
    answer: str


# --- shapes: outlines inside the unit disc, y down -------------------------------------------------------------------


def _arc(start: float, stop: float, radius: float = 1.0, centre: float = 0.0) -> Float[np.ndarray, "n 2"]:
    turn = np.linspace(start, stop, 40)
    return np.stack([centre + radius * np.cos(turn), radius * np.sin(turn)], -1)


def _spokes(radii: list[float], start: float) -> Float[np.ndarray, "n 2"]:
    turn = start + np.arange(len(radii)) * 2 * np.pi / len(radii)
    return np.asarray(radii)[:, None] * np.stack([np.cos(turn), np.sin(turn)], -1)


def _heart() -> Float[np.ndarray, "n 2"]:
    t = np.linspace(0, 2 * np.pi, 60)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -2.5 - y], -1) / 17


_ARM = np.array(
    [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]
)
_RIGHT = np.pi / 2
OUTLINES = {
    "circle": _arc(0, 2 * np.pi, 0.95),
    "square": _spokes([1.15] * 4, np.pi / 4),
    "triangle": _spokes([1.1] * 3, -_RIGHT),
    "star": _spokes([1.1, 0.46] * 5, -_RIGHT),
    "heart": _heart(),
    "cross": _ARM / 3,
    "ring": np.concatenate([_arc(0, 2 * np.pi), _arc(2 * np.pi, 0, 0.55)]),  # the seam has no width
    "moon": np.concatenate([_arc(0.9, 2 * np.pi - 0.9), _arc(2 * np.pi - 1.35, 1.35, 0.8, 0.45)]),
}
TILT = {"circle": 180, "ring": 180, "square": 12, "triangle": 20, "star": 36, "heart": 20, "cross": 15, "moon": 35}
PAIRS = [(colour, shape) for colour in COLOURS for shape in OUTLINES]
# the first seeds leave some shape with five unseen colours; with this one no shape and no colour lacks more than two
HELD_OUT = [PAIRS[i] for i in sorted(np.random.default_rng(27).choice(len(PAIRS), 12, replace=False))]
TRAINED = [pair for pair in PAIRS if pair not in HELD_OUT]


# --- drawing a scene from random numbers -----------------------------------------------------------------------------


def _place(pair: tuple[str, str], size: str, frame: np.ndarray, rng: np.random.Generator) -> Object:
    colour, shape = pair
    turn = np.deg2rad(rng.uniform(-TILT[shape], TILT[shape]))
    spin = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    outline = OUTLINES[shape] @ spin
    outline = (outline - (outline.max(0) + outline.min(0)) / 2) * rng.uniform(*SIZES[size]) / np.ptp(outline, 0).max()
    reach = outline.max(0) + 0.02
    outline = (outline + rng.uniform(reach, frame - reach)) / frame
    (xmin, ymin), (xmax, ymax) = outline.min(0), outline.max(0)
    tone = np.clip(COLOURS[colour] + rng.normal(0, 5, 3) + rng.normal(0, 7), 0, 255).astype(int)
    return Object(shape, colour, size, (ymin, xmin, ymax, xmax), outline, tuple(tone.tolist()))


def centre(thing: Object) -> Float[np.ndarray, "2"]:
    """x, y as fractions of the picture."""
    ymin, xmin, ymax, xmax = thing.box
    return np.array([(xmin + xmax) / 2, (ymin + ymax) / 2])


def _apart(a: Object, b: Object, gap: float = 0.03) -> bool:
    return any(a.box[i] > b.box[i + 2] + gap or b.box[i] > a.box[i + 2] + gap for i in (0, 1))


def _clear(objects: list[Object], frame: np.ndarray) -> bool:
    """Whether the objects keep apart and their order or relation is beyond doubt."""
    if not all(_apart(a, b) for i, a in enumerate(objects) for b in objects[:i]):
        return False
    if len(objects) == 2:
        low, high = np.sort(np.abs((centre(objects[0]) - centre(objects[1])) * frame))
        return high > 1.5 * low
    return len(objects) == 1 or np.diff(sorted(centre(o)[0] for o in objects)).min() > 0.12


def _background(tones: list[tuple[int, int, int]], rng: np.random.Generator) -> Background:
    """Muted colours; of 24 candidates the first that stands off from every object, else the one that does best."""
    draws = zip(rng.uniform(size=(24, 2)), rng.uniform(0, 0.35, (24, 2)), rng.uniform(0.12, 0.97, (24, 2)), strict=True)
    pairs = 255 * np.array([[colorsys.hsv_to_rgb(*hsv) for hsv in zip(*draw, strict=True)] for draw in draws])
    shades = np.stack([pairs[:, 0], pairs.mean(1), pairs[:, 1]], 1)
    distance = np.linalg.norm(shades[:, :, None] - np.array(tones), axis=-1).min((1, 2))
    best = int(np.argmax(distance > 85)) if distance.max() > 85 else int(distance.argmax())
    kind = str(rng.choice(["flat", "gradient", "noise"]))
    return Background(kind, pairs[best], rng.uniform(0, 2 * np.pi), rng.uniform(0, 4), int(rng.integers(2**31)))


def draw(rng: np.random.Generator, first: list[tuple[str, str]]) -> Scene:
    """One to three objects, no combination twice; the first comes from `first`, the rest from the trained ones."""
    aspect = float(np.exp(rng.uniform(-0.3, 0.3)))
    frame = np.array([aspect, 1.0]) / min(aspect, 1.0)
    pairs = [first[rng.integers(len(first))]]
    for _ in range(rng.choice(3, p=[0.3, 0.4, 0.3])):
        rest = [pair for pair in TRAINED if pair not in pairs]
        pairs.append(rest[rng.integers(len(rest))])
    while True:
        # two objects never share a size, since the larger one is named first
        sizes = rng.permutation(list(SIZES))[: len(pairs)] if len(pairs) < 3 else rng.choice(["small", "medium"], 3)
        objects = [_place(pair, str(size), frame, rng) for pair, size in zip(pairs, sizes, strict=True)]
        if _clear(objects, frame):
            return Scene(tuple(objects), _background([o.tone for o in objects], rng), aspect)


def crowd(rng: np.random.Generator) -> Scene:
    """As many trained combinations as find room in thirty attempts: more to look at than there is to say."""
    aspect = float(np.exp(rng.uniform(-0.3, 0.3)))
    frame = np.array([aspect, 1.0]) / min(aspect, 1.0)
    objects: list[Object] = []
    for _ in range(30):
        pair, size = TRAINED[rng.integers(len(TRAINED))], rng.choice(list(SIZES), p=[0.5, 0.35, 0.15])
        thing = _place(pair, str(size), frame, rng)
        objects += [thing] if all(_apart(thing, other) for other in objects) else []
    return Scene(tuple(objects), _background([o.tone for o in objects], rng), aspect)


def sample(split: str, index: int) -> Scene:
    """The scene of that number: every scene of `S1` has a held-out combination, those of all other splits have none."""
    rng = np.random.default_rng((SPLITS[split], index))
    return crowd(rng) if split == "crowd" else draw(rng, HELD_OUT if split == "S1" else TRAINED)


# --- pictures --------------------------------------------------------------------------------------------------------


def _fill(background: Background, width: int, height: int) -> Float[np.ndarray, "h w 3"]:
    rng = np.random.default_rng(background.seed)
    first, second = background.tones
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j] - 0.5
    ramp = 0.5 + 0.7 * (x * np.cos(background.angle) + y * np.sin(background.angle))
    if background.kind == "noise":
        coarse = Image.fromarray(rng.uniform(0, 255, (rng.integers(3, 24),) * 2).astype(np.uint8))
        ramp = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / 255
    return first + (ramp[..., None] * (second - first) if background.kind != "flat" else np.zeros((height, width, 1)))


def render(scene: Scene, width: int, height: int, oversample: int = 3) -> UInt8[np.ndarray, "h w 3"]:
    """Stretched to width x height whatever the aspect, as the model's own resize does; drawn large, then averaged."""
    fill = _fill(scene.background, width, height).clip(0, 255).astype(np.uint8)
    canvas = Image.fromarray(fill).resize((width * oversample, height * oversample), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.objects:
        pen.polygon([tuple(point) for point in thing.outline * canvas.size], fill=thing.tone)
    rng = np.random.default_rng(scene.background.seed + 1)
    grain = rng.normal(0, scene.background.grain, (height, width, 1))
    return (np.asarray(canvas.reduce(oversample)) + grain).clip(0, 255).astype(np.uint8)


def picture(scene: Scene, shorter: int = 240) -> Image.Image:
    """The scene as a person would see it, in its own aspect."""
    width, height = (round(shorter * side / min(scene.aspect, 1.0)) for side in (scene.aspect, 1.0))
    return Image.fromarray(render(scene, width, height))


# --- texts -----------------------------------------------------------------------------------------------------------


def name(thing: Object, article: bool = True) -> str:
    words = f"{thing.colour} {thing.shape}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}" if article else words


def relation(a: Object, b: Object, aspect: float) -> str:
    """Where a lies from b, by the axis on which they are further apart."""
    dx, dy = (centre(a) - centre(b)) * (aspect, 1)
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def caption(scene: Scene) -> str:
    """One: its size unless medium. Two: the larger one first, and how it lies. Three: from left to right."""
    if len(scene.objects) == 1:
        (thing,) = scene.objects
        return name(thing) if thing.size == "medium" else f"a {thing.size} {name(thing, article=False)}"
    if len(scene.objects) == 2:
        a, b = sorted(scene.objects, key=lambda o: -list(SIZES).index(o.size))
        return f"{name(a)} {relation(a, b, scene.aspect)} {name(b)}"
    a, b, c = sorted(scene.objects, key=lambda o: centre(o)[0])
    return f"{name(a)}, {name(b)} and {name(c)}"


def _cell(thing: Object) -> str:
    """Top left ... bottom right; empty where the centre is within 0.04 of a border between the nine cells."""
    thirds = centre(thing) * 3
    if np.abs(thirds - np.array([[1], [2]])).min() < 0.12:
        return ""
    column, row = thirds.astype(int)
    return f"{ROWS[row]} {COLUMNS[column]}".strip() or "center"


def _existence(scene: Scene, rng: np.random.Generator) -> Question:
    """Half of the answers are no; where a scene allows it, half of those recombine a colour and a shape of it."""
    present = [(o.colour, o.shape) for o in scene.objects]
    if rng.random() < 0.5:
        pick, answer = present[rng.integers(len(present))], "yes"
    else:
        mixed = [(c, s) for c, _ in present for _, s in present if (c, s) in TRAINED and (c, s) not in present]
        absent = mixed if mixed and rng.random() < 0.5 else [pair for pair in TRAINED if pair not in present]
        pick, answer = absent[rng.integers(len(absent))], "no"
    return Question("existence", f"is there a{'n' if pick[0][0] in 'aeiou' else ''} {' '.join(pick)}?", answer)


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Some of each kind; none of color where no shape stands alone, none of position where each would be in doubt."""
    shapes = [o.shape for o in scene.objects]
    thing = scene.objects[rng.integers(len(scene.objects))]
    alone = [o for o in scene.objects if shapes.count(o.shape) == 1]
    asked = [Question("color", f"what color is the {o.shape}?", o.colour) for o in alone]
    plural = thing.shape + ("es" if thing.shape.endswith("s") else "s")
    asked.append(Question("count", "how many objects are there?", str(len(shapes))))
    asked.append(Question("count", f"how many {plural} are there?", str(shapes.count(thing.shape))))
    asked.append(_existence(scene, rng))
    places = [(o, _cell(o)) for o in scene.objects]
    return asked + [Question("position", f"where is the {name(o, False)}?", cell) for o, cell in places if cell]
