"""Boxes in text, the way PaliGemma writes them: read, write, and the prompts that ask for a box or begin with one.

    <loc0102><loc0204><loc0511><loc0767> cat ; <loc0000><loc0512><loc1023><loc1023> bus

The four places are ymin, xmin, ymax, xmax. A place is round(x · 1023) of a coordinate x in [0, 1] and is read back as
place / 1023, as big_vision does: 0 and 1023 are the edges of the picture. (Some readers divide by 1024.) `written` has
the grammar: how objects stand in a text, and what is read where models wrote it otherwise.
"""

import codecs
from collections.abc import Iterable, Sequence
from math import exp, inf, isfinite
from numbers import Real
from typing import Any, NamedTuple

from pgfunc import tokenizer as tokenizers
from pgfunc.errors import PromptError, SettingError
from pgfunc.generate import Completion
from pgfunc.objects.grammar import PLACE, STEPS, checked
from pgfunc.objects.grammar import Malformed as Malformed
from pgfunc.objects.grammar import Written as Written
from pgfunc.objects.grammar import malformed as malformed
from pgfunc.objects.grammar import read as read
from pgfunc.objects.grammar import unique as unique
from pgfunc.objects.grammar import words as words
from pgfunc.objects.grammar import write as write
from pgfunc.objects.grammar import written as written
from pgfunc.prompt import TASKS
from pgfunc.tokenizer import Tokenizer


class Box(NamedTuple):
    """A rectangle in pixels of the picture, from its top left corner; in PaliGemma's order."""

    ymin: float
    xmin: float
    ymax: float
    xmax: float


class Detection(NamedTuple):
    """An object and where it is."""

    label: str
    box: Box
    confidence: float | None = None  # see `with_confidence`


def parse(text: str, width: int, height: int) -> list[Detection]:
    """The boxes in a text, in pixels of a picture of that size; `malformed` has what was left out."""
    check_size(width, height)
    return [Detection(item.label, to_box(item.places, width, height)) for item in unique(written(text))]


def render(detections: Iterable[Detection], width: int, height: int) -> str:
    """The text of some boxes: the inverse of `parse`, up to half a step at each edge.

    Edges outside the picture are moved onto its border, and a box thinner than a step is made a step thick. Raises
    PromptError for a label that could not be read back.
    """
    return " ; ".join(write(to_places(item.box, width, height), item.label) for item in checked_objects(detections))


def with_confidence(completion: Completion, tokenizer: Tokenizer, width: int, height: int) -> list[Detection]:
    """`parse`, with a confidence for each box: the geometric mean of the probabilities of its four place tokens.

    It is how sure the model was, at temperature 1, of exactly these four places when it had to write them; so a large
    fuzzy object scores lower than a small sharp one. It is neither the probability that the object is there, nor
    calibrated, and knows nothing of the label. None where a place was spelled in other tokens.
    """
    check_size(width, height)
    logprobs = place_logprobs(completion, tokenizer)
    return [
        Detection(item.label, to_box(item.places, width, height), confidence(item, logprobs))
        for item in unique(written(completion.text))
    ]


def prefix(labels: Sequence[str]) -> str:
    """The prompt that asks for objects: `detect cat ; bus`."""
    return TASKS["detect"].format(wanted(labels))


def wanted(labels: Sequence[str]) -> str:
    """Labels as a prompt has them. Raises PromptError where they name nothing."""
    if not isinstance(labels, (list, tuple)) or not labels or "" in labels:
        raise PromptError(f"labels are {labels!r:.80}, expected a list of what to look for")
    return " ; ".join(checked(label) for label in labels)


def check_size(width: int, height: int) -> None:
    """Raise SettingError for sides that no picture has."""
    if not all(isinstance(side, Real) and 0 < side < inf for side in (width, height)):
        raise SettingError(f"a picture of {width!r:.40} x {height!r:.40} pixels; expected its width, then its height")


def checked_objects(found: Iterable[Any]) -> list[Any]:
    """What was found, if it is objects with a box each; a SettingError otherwise."""
    items = list(found) if isinstance(found, Iterable) else [found]
    for item in items:
        if not (isinstance(getattr(item, "label", None), str) and isinstance(getattr(item, "box", None), Box)):
            raise SettingError(f"found {item!r:.80}, expected Detection(label, Box(ymin, xmin, ymax, xmax))")
    return items


def edges(box: Box) -> tuple[float, ...]:
    """The edges of a box. Raises SettingError where they are not four finite numbers."""
    try:
        ymin, xmin, ymax, xmax = map(float, box)
    except (TypeError, ValueError):
        raise SettingError(f"{box!r:.80} is no box, expected Box(ymin, xmin, ymax, xmax)") from None
    if not all(map(isfinite, (ymin, xmin, ymax, xmax))):
        raise SettingError(f"{box} is no box, its edges are not finite")
    return ymin, xmin, ymax, xmax


def region(box: Box, width: int, height: int, task: str = TASKS["caption"]) -> str:
    """The prompt about a part of the picture, whose size is given in pixels: its four places, then the task."""
    return f"{words(to_places(box, width, height))} {task}"


def to_box(places: Sequence[int], width: int, height: int) -> Box:
    """Four places -> pixels."""
    return Box(*(place / STEPS * side for place, side in zip(places, (height, width) * 2, strict=True)))


def to_places(box: Box, width: int, height: int) -> tuple[int, ...]:
    """Pixels -> the nearest places, of which those of a side are never equal.

    Raises PromptError for a box whose edges are swapped.
    """
    check_size(width, height)
    ymin, xmin, ymax, xmax = edges(box)
    if ymin > ymax or xmin > xmax:
        raise PromptError(f"{box} cannot be written: expected ymin <= ymax and xmin <= xmax")
    (top, bottom), (left, right) = _span(ymin, ymax, height), _span(xmin, xmax, width)
    return top, left, bottom, right


def _span(low: float, high: float, side: int) -> tuple[int, int]:
    first, last = (min(max(round(edge / side * STEPS), 0), STEPS) for edge in (low, high))
    if first < last:
        return first, last
    first = min(max(int((low + high) / 2 / side * STEPS), 0), STEPS - 1)
    return first, first + 1


def place_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[int, float]:
    """Where in the text a place token begins -> its log-probability."""
    if not isinstance(completion, Completion) or not isinstance(tokenizer, Tokenizer):
        kinds = f"{type(completion).__name__} and {type(tokenizer).__name__}"
        raise SettingError(f"a confidence is read from a Completion and the model's tokenizer; found {kinds}")
    found: dict[int, float] = {}
    decoder, written = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
        written += len(decoder.decode(tokenizers.token_bytes(tokenizer, token)))
        place = tokenizer.backend.id_to_token(token) or ""
        if PLACE.fullmatch(place):
            found[written - len(place)] = logprob
    return found


def confidence(item: Written, logprobs: dict[int, float]) -> float | None:
    """The geometric mean of the probabilities of an object's places; None unless each is one token."""
    found = [logprobs[start] for start in item.starts if start in logprobs]
    return exp(sum(found) / len(found)) if len(found) == len(item.starts) else None
