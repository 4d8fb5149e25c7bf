"""Boxes in text, the way PaliGemma writes them: read, write, and the prompts that ask for a box or begin with one.

    <loc0102><loc0204><loc0511><loc0767> cat ; <loc0000><loc0512><loc1023><loc1023> bus

The four places are ymin, xmin, ymax, xmax. A place is round(x · 1023) of a coordinate x in [0, 1] and is read back as
place / 1023, as big_vision does: 0 and 1023 are the edges of the picture. (Some readers divide by 1024.)

Models also write what is not quite that. One piece between semicolons never spoils another; it gives

    fewer or more than four places, a place above 1023      nothing, and `malformed` names it
    ymin >= ymax or xmin >= xmax                            nothing, and `malformed` names it
    text without places, or in front of them                nothing, and `malformed` names it
    no label, as models write that were asked for one       a box whose label is ""
    mask codes between places and label                     the box; the mask is `segment`'s
    the same label in the same place again                  nothing more: models loop
    nothing                                                 nothing

A text that was cut off at the token limit ends in one of these, or in a label of which the end is missing.
"""

import re
from collections.abc import Iterable, Sequence
from math import exp
from typing import NamedTuple

from pgfunc import tokenizer as tokenizers
from pgfunc.errors import PromptError
from pgfunc.generate import Completion
from pgfunc.prompt import TASKS
from pgfunc.tokenizer import Tokenizer

STEPS = 1023  # places along each side, less one
PLACE, WORD = re.compile("<loc([0-9]{4})>"), re.compile("<(?:loc[0-9]{4}|seg[0-9]{3})>")
OBJECT = re.compile(r"\s*(?:<loc[0-9]{4}>\s*)+(?P<codes>(?:<seg[0-9]{3}>\s*)*)(?P<label>.*)", re.DOTALL)


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


class Written(NamedTuple):
    """An object as it stands in a text."""

    piece: str
    label: str
    places: tuple[int, ...]  # four, each 0 to 1023
    codes: tuple[int, ...]  # of its mask, however many there are
    starts: tuple[int, ...]  # where in the text each place begins


class Malformed(NamedTuple):
    """A piece of text that is no object."""

    piece: str
    reason: str


def parse(text: str, width: int, height: int) -> list[Detection]:
    """The boxes in a text, in pixels of a picture of that size; `malformed` has what was left out."""
    return [Detection(item.label, to_box(item.places, width, height)) for item in unique(written(text))]


def malformed(text: str) -> list[Malformed]:
    """The pieces of a text that give no box, with the reason; empty for a text that is well formed."""
    return [item for item in read(text) if isinstance(item, Malformed)]


def render(detections: Iterable[Detection], width: int, height: int) -> str:
    """The text of some boxes: the inverse of `parse`, up to half a step at each edge.

    Edges outside the picture are moved onto its border, and a box thinner than a step is made a step thick. Raises
    PromptError for a label that could not be read back.
    """
    return " ; ".join(write(to_places(found.box, width, height), found.label) for found in detections)


def with_confidence(completion: Completion, tokenizer: Tokenizer, width: int, height: int) -> list[Detection]:
    """`parse`, with a confidence for each box: the geometric mean of the probabilities of its four place tokens.

    It is how sure the model was, at temperature 1, of exactly these four places when it had to write them; so a large
    fuzzy object scores lower than a small sharp one. It is neither the probability that the object is there, nor
    calibrated, and knows nothing of the label. None where a place was spelled in other tokens.
    """
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
    if not labels or "" in labels:
        raise PromptError(f"labels are {labels!r}, expected a list of what to look for")
    return " ; ".join(checked(label) for label in labels)


def region(box: Box, width: int, height: int, task: str = TASKS["caption"]) -> str:
    """The prompt about a part of the picture, whose size is given in pixels: its four places, then the task."""
    return f"{words(to_places(box, width, height))} {task}"


def to_box(places: Sequence[int], width: int, height: int) -> Box:
    """Four places -> pixels."""
    return Box(*(place / STEPS * side for place, side in zip(places, (height, width) * 2, strict=True)))


def to_places(box: Box, width: int, height: int) -> tuple[int, ...]:
    """Pixels -> the nearest places, of which those of a side are never equal."""
    (top, bottom), (left, right) = _span(box.ymin, box.ymax, height), _span(box.xmin, box.xmax, width)
    return top, left, bottom, right


def _span(low: float | int, high: float | int, side: int) -> tuple[int, int]:
    first, last = (min(max(round(edge / side * STEPS), 0), STEPS) for edge in (low, high))
    if first < last:
        return first, last
    first = min(max(int((low + high) / 2 / side * STEPS), 0), STEPS - 1)
    return first, first + 1


def write(places: Iterable[int], label: str, codes: Iterable[int] = ()) -> str:
    """One object as text."""
    return f"{words(places, codes)} {checked(label)}".rstrip()


def words(places: Iterable[int], codes: Iterable[int] = ()) -> str:
    """Places and mask codes as text."""
    return "".join([f"<loc{place:04d}>" for place in places] + [f"<seg{code:03d}>" for code in codes])


def checked(label: str) -> str:
    """The label, if it can be read back from a text."""
    if ";" in label or label != label.strip() or WORD.search(label):
        raise PromptError(f"label {label!r} cannot be written: no ';', no places, no space at its ends")
    return label


def written(text: str) -> list[Written]:
    """The objects in a text."""
    return [item for item in read(text) if isinstance(item, Written)]


def unique(objects: Iterable[Written]) -> list[Written]:
    """The objects without repetitions of a label in its place; the first stays."""
    first: dict[tuple[str, tuple[int, ...]], Written] = {}
    for item in objects:
        first.setdefault((item.label, item.places), item)
    return list(first.values())


def read(text: str) -> list[Written | Malformed]:
    """The pieces of a text, in order: what each is, or why it is nothing."""
    return [_piece(piece) for piece in re.finditer("[^;]+", text) if piece[0].strip()]


def _piece(piece: re.Match[str]) -> Written | Malformed:
    found = list(PLACE.finditer(piece.string, *piece.span()))
    places, whole = tuple(int(place[1]) for place in found), OBJECT.fullmatch(piece[0])
    if reason := _fault(places, whole):
        return Malformed(piece[0].strip(), reason)
    assert whole, "without faults"
    codes = tuple(int(code) for code in re.findall("[0-9]+", whole["codes"]))
    return Written(piece[0].strip(), whole["label"].strip(), places, codes, tuple(place.start() for place in found))


def _fault(places: tuple[int, ...], whole: re.Match[str] | None) -> str:
    if len(places) != 4:
        return f"{len(places)} places, expected 4"
    if not whole or WORD.search(whole["label"]):
        return "text before or between places"
    if max(places) > STEPS:
        return f"place {max(places)} is above {STEPS}"
    if places[0] >= places[2] or places[1] >= places[3]:
        return f"corners {places[:2]} and {places[2:]} are not top left and bottom right"
    return ""


def place_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[int, float]:
    """Where in the text a place token begins -> its log-probability."""
    return {
        len(tokenizers.decode(tokenizer, completion.tokens[:i])): logprob
        for i, (token, logprob) in enumerate(zip(completion.tokens, completion.logprobs, strict=True))
        if PLACE.fullmatch(tokenizer.backend.id_to_token(token) or "")
    }


def confidence(item: Written, logprobs: dict[int, float]) -> float | None:
    """The geometric mean of the probabilities of an object's places; None unless each is one token."""
    found = [logprobs[start] for start in item.starts if start in logprobs]
    return exp(sum(found) / len(found)) if len(found) == len(item.starts) else None
