"""Objects as they stand in a text: the grammar of places, mask codes and labels. Nothing here knows about pixels.

    <loc0102><loc0204><loc0511><loc0767> cat ; <loc0000><loc0512><loc1023><loc1023> bus

`write` writes just that. `read` takes what models write and other readers take, too:

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

import re
from collections.abc import Iterable
from itertools import chain, groupby, pairwise
from typing import NamedTuple

from pgfunc.errors import PromptError

STEPS = 1023  # places along each side, less one
PLACE, WORD = re.compile("<loc([0-9]{4})>"), re.compile("<(?:loc[0-9]{4}|seg[0-9]{3})>")
CODE, TOUCHING = re.compile("<seg([0-9]{3})>"), re.compile("(?:<loc[0-9]{4}>)+")
WORDS = re.compile(r"(?:<loc[0-9]{4}>\s*)+(?:<seg[0-9]{3}>\s*)*|(?:<seg[0-9]{3}>\s*)+")  # places, and codes behind them
SPACE = "".join(filter(str.isspace, map(chr, range(0x3001))))  # what `str.strip` takes away


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


def malformed(text: str) -> list[Malformed]:
    """The pieces of a text that give no box, with the reason; empty for a text that is well formed."""
    return [item for item in read(text) if isinstance(item, Malformed)]


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
