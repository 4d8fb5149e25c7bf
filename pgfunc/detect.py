"""Boxes in text, the way PaliGemma writes them: read, write, and the prompts that ask for a box or begin with one.

    <loc0102><loc0204><loc0511><loc0767> cat ; <loc0000><loc0512><loc1023><loc1023> bus

The four places are ymin, xmin, ymax, xmax. A place is round(x · 1023) of a coordinate x in [0, 1] and is read back as
place / 1023, as big_vision does: 0 and 1023 are the edges of the picture. (Some readers divide by 1024.)

`render` writes just that. `read` takes what models write and other readers take, too:

    text    =  piece (";" piece)*
    piece   =  (object [spaces, newlines or commas])*          nothing need stand between two objects
    object  =  place place place place code* label             spaces may stand between places
    label   =  text up to the next place or code or ";"; "" where there is none

A piece that begins with text and ends with places or codes has each label in front of its places: `cat <loc0102>...`.

Every box that is whole is kept, whatever stands beside it, and all the rest is named by `malformed`:

    fewer or more than four places, or above 1023       `<loc0001><loc0002> cat`
    ymin >= ymax or xmin >= xmax
    text or mask codes with no places of their own      `a cat in the grass`

Eight places that touch are two boxes, and the label is the second's. Five are none, unless the text ends there: it was
then cut off at the token limit, within the second box. A label may have lost its end there. The same label in the same
place again is left out: models loop.
"""

import codecs
import re
from collections.abc import Iterable, Sequence
from itertools import chain, groupby, pairwise
from math import exp, inf, isfinite
from numbers import Real
from typing import Any, NamedTuple

from pgfunc import tokenizer as tokenizers
from pgfunc.errors import PromptError, SettingError
from pgfunc.generate import Completion
from pgfunc.prompt import TASKS
from pgfunc.tokenizer import Tokenizer

STEPS = 1023  # places along each side, less one
PLACE, WORD = re.compile("<loc([0-9]{4})>"), re.compile("<(?:loc[0-9]{4}|seg[0-9]{3})>")
CODE, TOUCHING = re.compile("<seg([0-9]{3})>"), re.compile("(?:<loc[0-9]{4}>)+")
WORDS = re.compile(r"(?:<loc[0-9]{4}>\s*)+(?:<seg[0-9]{3}>\s*)*|(?:<seg[0-9]{3}>\s*)+")  # places, and codes behind them
SPACE = "".join(filter(str.isspace, map(chr, range(0x3001))))  # what `str.strip` takes away


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
    check_size(width, height)
    return [Detection(item.label, to_box(item.places, width, height)) for item in unique(written(text))]


def malformed(text: str) -> list[Malformed]:
    """The pieces of a text that give no box, with the reason; empty for a text that is well formed."""
    return [item for item in read(text) if isinstance(item, Malformed)]


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


def write(places: Iterable[int], label: str, codes: Iterable[int] = ()) -> str:
    """One object as text."""
    return f"{words(places, codes)} {checked(label)}".rstrip()


def words(places: Iterable[int], codes: Iterable[int] = ()) -> str:
    """Places and mask codes as text."""
    return "".join([f"<loc{place:04d}>" for place in places] + [f"<seg{code:03d}>" for code in codes])


def checked(label: str) -> str:
    """The label, if it can be read back from a text."""
    if not isinstance(label, str):
        raise PromptError(f"a label is {label!r:.80}, expected text")
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
    """The pieces of a text, in order: what each is, or why it is nothing. Only spaces, commas and ";" are in none."""
    if not isinstance(text, str):
        raise PromptError(f"boxes are read from text, such as the .text of a completion; found {text!r:.80}")
    return [_piece(text, *span) for part in re.finditer("[^;]+", text) for span in _spans(text, *part.span())]


def _spans(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Where the objects between two semicolons begin and end."""
    words = list(WORDS.finditer(text, start, end))
    firsts = [_firsts(text, *each.span()) for each in words]
    around = SPACE + "," if sum(map(len, firsts)) > 1 else SPACE
    if words and text[start : words[0].start()].strip(around) and not text[words[-1].end() : end].strip(around):
        # labels stand in front: an object ends behind its words
        cuts = [cut for each, first in zip(words, firsts, strict=True) for cut in (*first[1:], each.end())]
    else:
        cuts = [cut for first in firsts for cut in first]
    spans = [_stripped(text, *span, around) for span in pairwise([start, *cuts, end])]
    return [(start, end) for start, end in spans if start < end]


def _firsts(text: str, start: int, end: int) -> list[int]:
    """Where in a run of places and codes each object begins."""
    rows = [
        [place.start() for place in PLACE.finditer(text, *touching.span())]
        for touching in TOUCHING.finditer(text, start, end)
    ]
    firsts: list[int] = []
    for short, group in groupby(rows, key=lambda row: len(row) < 4):
        for row in [list(chain(*group))] if short else group:
            cut_off = row[-1] + len("<loc0000>") == len(text.rstrip())
            firsts += row[::4] if len(row) % 4 == 0 or cut_off else row[:1]
    return firsts or [start]


def _stripped(text: str, start: int, end: int, around: str) -> tuple[int, int]:
    piece = text[start:end].lstrip(around)
    return end - len(piece), end - len(piece) + len(piece.rstrip(around))


def _piece(text: str, start: int, end: int) -> Written | Malformed:
    piece, found = text[start:end], list(PLACE.finditer(text, start, end))
    places = tuple(int(place[1]) for place in found)
    if reason := _fault(places):
        return Malformed(piece, reason)
    codes = tuple(int(code) for code in CODE.findall(piece))
    return Written(piece, WORD.sub("", piece).strip(), places, codes, tuple(place.start() for place in found))


def _fault(places: tuple[int, ...]) -> str:
    if len(places) != 4:
        return f"{len(places)} places, expected 4"
    if max(places) > STEPS:
        return f"place {max(places)} is above {STEPS}"
    if places[0] >= places[2] or places[1] >= places[3]:
        return f"corners {places[:2]} and {places[2:]} are not top left and bottom right"
    return ""


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
