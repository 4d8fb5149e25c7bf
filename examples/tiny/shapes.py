"""Plain shapes in plain colours, which bind an attribute to a thing. Owns their names, outlines and masks."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40), "orange": (245, 140, 25), "yellow": (246, 222, 50), "green": (45, 155, 60),
    "cyan": (60, 205, 220), "blue": (40, 80, 205), "purple": (130, 55, 170), "pink": (246, 140, 190),
    "brown": (120, 72, 38), "black": (22, 22, 22), "white": (246, 246, 246), "gray": (132, 132, 132),
}  # fmt: skip
_RIGHT = np.pi / 2


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
OUTLINES = {  # inside the unit disc, y down
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


def mask(name: str, side: int) -> UInt8[np.ndarray, "y x"]:
    """The coverage of each pixel; the outline fits into the square as a sprite does."""
    outline = OUTLINES[name]
    low, high = outline.min(0), outline.max(0)
    fine = 4 * side
    points = ((outline - (low + high) / 2) / np.ptp(outline, 0).max() * 124 / 128 + 0.5) * fine
    canvas = Image.new("L", (fine, fine))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points], fill=255)
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX))
