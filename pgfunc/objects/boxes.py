"""Objects with boxes in pixels, as data, and what makes them valid. Knows nothing of models or their text."""

from collections.abc import Iterable
from math import inf, isfinite
from numbers import Real
from typing import Any, NamedTuple

from pgfunc.errors import SettingError


class Box(NamedTuple):
    """A rectangle in pixels, measured from the top left corner of the picture; in PaliGemma's order."""

    ymin: float
    xmin: float
    ymax: float
    xmax: float


class Detection(NamedTuple):
    """An object and its box."""

    label: str
    box: Box
    confidence: float | None = None  # see `detect.with_confidence`


def check_size(width: int, height: int) -> None:
    """Raise SettingError unless width and height are positive finite numbers."""
    if not all(isinstance(side, Real) and 0 < side < inf for side in (width, height)):
        raise SettingError(f"a picture of {width!r:.40} x {height!r:.40} pixels; expected a positive width and height")


def check_objects(objects: Iterable[Any]) -> list[Any]:
    """The objects as a list. Raises SettingError unless each has a label and a Box."""
    items = list(objects) if isinstance(objects, Iterable) else [objects]
    for item in items:
        if not (isinstance(getattr(item, "label", None), str) and isinstance(getattr(item, "box", None), Box)):
            raise SettingError(f"found {item!r:.80}, expected Detection(label, Box(ymin, xmin, ymax, xmax))")
    return items


def edges(box: Box) -> tuple[float, ...]:
    """ymin, xmin, ymax and xmax as floats. Raises SettingError unless they are four finite numbers."""
    try:
        ymin, xmin, ymax, xmax = map(float, box)
    except (TypeError, ValueError):
        raise SettingError(f"{box!r:.80} is not a box; expected Box(ymin, xmin, ymax, xmax)") from None
    if not all(map(isfinite, (ymin, xmin, ymax, xmax))):
        raise SettingError(f"{box} is not a box; its edges are not finite")
    return ymin, xmin, ymax, xmax
