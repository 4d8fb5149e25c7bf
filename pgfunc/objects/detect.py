"""Boxes as text: read them, write them, and write the prompts that ask for a box or begin with one.

    <loc0102><loc0204><loc0511><loc0767> cat ; <loc0000><loc0512><loc1023><loc1023> bus

`grammar` defines the text, and what `parse` accepts beyond this form. Here boxes are in pixels.
"""

import codecs
from collections.abc import Iterable, Sequence
from math import exp, inf, isfinite
from numbers import Real
from typing import Any, NamedTuple

from pgfunc import tokenizer as tokenizers
from pgfunc.errors import PromptError, SettingError
from pgfunc.generate import Completion
from pgfunc.names import TASKS
from pgfunc.objects.grammar import LOCATION, STEPS, check_label
from pgfunc.objects.grammar import Malformed as Malformed
from pgfunc.objects.grammar import WellFormed as WellFormed
from pgfunc.objects.grammar import malformed as malformed
from pgfunc.objects.grammar import read as read
from pgfunc.objects.grammar import token_text as token_text
from pgfunc.objects.grammar import unique as unique
from pgfunc.objects.grammar import well_formed as well_formed
from pgfunc.objects.grammar import write as write
from pgfunc.tokenizer import Tokenizer


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
    confidence: float | None = None  # see `with_confidence`


def parse(text: str, width: int, height: int) -> list[Detection]:
    """The boxes in a text, in pixels of a picture of this size; `malformed` lists the pieces that are left out."""
    check_size(width, height)
    return [Detection(item.label, to_box(item.locations, width, height)) for item in unique(well_formed(text))]


def render(detections: Iterable[Detection], width: int, height: int) -> str:
    """The text of these boxes: the inverse of `parse`, up to half a step of 1/1023 at each edge.

    Edges outside the picture are moved to its border, and a box thinner than one step is made one step thick. Raises
    PromptError if a label could not be read back.
    """
    return " ; ".join(write(to_locations(item.box, width, height), item.label) for item in check_objects(detections))


def with_confidence(completion: Completion, tokenizer: Tokenizer, width: int, height: int) -> list[Detection]:
    """`parse`, with a confidence for each box: the geometric mean of the probabilities of its four location tokens.

    It tells how sure the model was, at temperature 1, of exactly these four locations when it wrote them, so a large
    blurred object scores lower than a small sharp one. It is not the probability that the object exists, is not
    calibrated, and ignores the label. It is None if a location was spelled in several tokens.
    """
    check_size(width, height)
    logprobs = location_logprobs(completion, tokenizer)
    return [
        Detection(item.label, to_box(item.locations, width, height), confidence(item, logprobs))
        for item in unique(well_formed(completion.text))
    ]


def prefix(labels: Sequence[str]) -> str:
    """The prompt that asks for objects: `detect cat ; bus`."""
    return TASKS["detect"].format(join_labels(labels))


def join_labels(labels: Sequence[str]) -> str:
    """Labels in the form that a prompt has: `cat ; bus`. Raises PromptError if a label is empty or there is none."""
    if not isinstance(labels, (list, tuple)) or not labels or "" in labels:
        raise PromptError(f"labels are {labels!r:.80}, expected a list of what to look for")
    return " ; ".join(check_label(label) for label in labels)


def region(box: Box, width: int, height: int, task: str = TASKS["caption"]) -> str:
    """The prompt about a box in a picture of this size in pixels: its four location tokens, then the task."""
    return f"{token_text(to_locations(box, width, height))} {task}"


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


def to_box(locations: Sequence[int], width: int, height: int) -> Box:
    """Four locations -> pixels."""
    return Box(*(location / STEPS * side for location, side in zip(locations, (height, width) * 2, strict=True)))


def to_locations(box: Box, width: int, height: int) -> tuple[int, ...]:
    """Pixels -> the nearest locations, with ymin < ymax and xmin < xmax even for a thin box.

    Raises PromptError if edges are swapped.
    """
    check_size(width, height)
    ymin, xmin, ymax, xmax = edges(box)
    if ymin > ymax or xmin > xmax:
        raise PromptError(f"{box} cannot be written: expected ymin <= ymax and xmin <= xmax")
    (top, bottom), (left, right) = _two_locations(ymin, ymax, height), _two_locations(xmin, xmax, width)
    return top, left, bottom, right


def _two_locations(low: float, high: float, side: int) -> tuple[int, int]:
    """The locations of two opposite edges, at least one step apart."""
    first, last = (min(max(round(edge / side * STEPS), 0), STEPS) for edge in (low, high))
    if first < last:
        return first, last
    first = min(max(int((low + high) / 2 / side * STEPS), 0), STEPS - 1)
    return first, first + 1


def location_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[int, float]:
    """The log-probability of each location token, by the index in the text at which it begins."""
    if not isinstance(completion, Completion) or not isinstance(tokenizer, Tokenizer):
        types = f"{type(completion).__name__} and {type(tokenizer).__name__}"
        raise SettingError(f"a confidence is read from a Completion and the model's tokenizer; found {types}")
    logprobs: dict[int, float] = {}
    decoder, length = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for token_id, logprob in zip(completion.tokens, completion.logprobs, strict=True):
        length += len(decoder.decode(tokenizers.token_bytes(tokenizer, token_id)))
        token = tokenizer.backend.id_to_token(token_id) or ""
        if LOCATION.fullmatch(token):
            logprobs[length - len(token)] = logprob
    return logprobs


def confidence(item: WellFormed, logprobs: dict[int, float]) -> float | None:
    """The geometric mean of the probabilities of an object's locations; None unless each is one token."""
    values = [logprobs[start] for start in item.starts if start in logprobs]
    return exp(sum(values) / len(values)) if len(values) == len(item.starts) else None


# former names, which stay for callers outside
Written, written, words, wanted = WellFormed, well_formed, token_text, join_labels
to_places, place_logprobs = to_locations, location_logprobs
