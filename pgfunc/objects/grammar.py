"""The text that a model writes about objects: location tokens, segmentation tokens and labels. Knows nothing of pixels.

Two objects, the first with a mask:

    <loc0102><loc0204><loc0511><loc0767><seg011>...<seg097> cat ; <loc0000><loc0512><loc1023><loc1023> bus
      ymin     xmin     ymax     xmax   16 mask codes      label

A location token `<loc0000>` ... `<loc1023>` holds one edge of the box. A coordinate x in [0, 1] is written as
round(1023 x) and read as location / 1023, as big_vision does, so 0 and 1023 are the edges of the picture. (Some readers
divide by 1024.) A segmentation token `<seg000>` ... `<seg127>` holds one of the 16 codes that `vqvae` makes of the part
of the mask inside the box, scaled to 64 x 64.

`write` writes exactly this form. `read` also accepts variations that models write and that other readers accept:

    text    =  piece (";" piece)*
    piece   =  (object [spaces, newlines or commas])*      no separator is needed between two objects
    object  =  location location location location code* label      spaces may stand between tokens
    label   =  the text up to the next token or ";"; it may be empty

If a piece begins with text and ends with tokens, each label stands before its tokens: `cat <loc0102>...`.

Every complete box is kept, whatever stands beside it. `malformed` lists the rest, with the reason:

    fewer or more than four locations, or one above 1023          `<loc0001><loc0002> cat`
    ymin >= ymax or xmin >= xmax
    text or segmentation tokens without locations of their own    `a cat in the grass`

Eight adjacent locations are two boxes, and the label belongs to the second. Five adjacent locations are malformed,
except at the end of the text: there the token limit has cut off the second box, and the first is kept. A text may also
be cut off within its last label. `unique` drops an object that repeats the label and the box of an earlier one, because
models can loop.
"""

import re
from collections.abc import Iterable
from itertools import chain, groupby, pairwise
from typing import NamedTuple

from pgfunc.errors import PromptError

STEPS = 1023  # the largest location
LOCATION, CODE = re.compile("<loc([0-9]{4})>"), re.compile("<seg([0-9]{3})>")
TOKEN = re.compile("<(?:loc[0-9]{4}|seg[0-9]{3})>")
ADJACENT_LOCATIONS = re.compile("(?:<loc[0-9]{4}>)+")
TOKEN_RUN = re.compile(r"(?:<loc[0-9]{4}>\s*)+(?:<seg[0-9]{3}>\s*)*|(?:<seg[0-9]{3}>\s*)+")  # locations, then codes
SPACE = "".join(filter(str.isspace, map(chr, range(0x3001))))  # the characters that `str.strip` removes


class WellFormed(NamedTuple):
    """The text of one object, and its parts."""

    piece: str
    label: str
    locations: tuple[int, ...]  # ymin, xmin, ymax, xmax, each 0 to 1023
    codes: tuple[int, ...]  # of the mask; any number of them
    starts: tuple[int, ...]  # the index in the text at which each location token begins

    @property
    def places(self) -> tuple[int, ...]:
        """The former name of `locations`."""
        return self.locations


class Malformed(NamedTuple):
    """A piece of text that is not an object."""

    piece: str
    reason: str


def malformed(text: str) -> list[Malformed]:
    """The pieces of a text that give no box, with the reason; empty if the whole text is well formed."""
    return [item for item in read(text) if isinstance(item, Malformed)]


def well_formed(text: str) -> list[WellFormed]:
    """The objects in a text."""
    return [item for item in read(text) if isinstance(item, WellFormed)]


def write(locations: Iterable[int], label: str, codes: Iterable[int] = ()) -> str:
    """The text of one object. Raises PromptError if the label could not be read back."""
    return f"{token_text(locations, codes)} {check_label(label)}".rstrip()


def token_text(locations: Iterable[int], codes: Iterable[int] = ()) -> str:
    """Location tokens, then segmentation tokens."""
    return "".join([f"<loc{location:04d}>" for location in locations] + [f"<seg{code:03d}>" for code in codes])


def check_label(label: str) -> str:
    """Return the label. Raises PromptError if it could not be read back from a text."""
    if not isinstance(label, str):
        raise PromptError(f"a label is {label!r:.80}, expected text")
    if ";" in label or label != label.strip() or TOKEN.search(label):
        raise PromptError(
            f"label {label!r} cannot be written; remove ';', <loc> and <seg> tokens, and spaces at the ends"
        )
    return label


def unique(objects: Iterable[WellFormed]) -> list[WellFormed]:
    """The objects, without those that repeat the label and the locations of an earlier one."""
    first: dict[tuple[str, tuple[int, ...]], WellFormed] = {}
    for item in objects:
        first.setdefault((item.label, item.locations), item)
    return list(first.values())


def read(text: str) -> list[WellFormed | Malformed]:
    """All pieces of a text, in order. Only spaces, commas and ";" between pieces belong to none.

    Raises PromptError if `text` is not a string.
    """
    if not isinstance(text, str):
        raise PromptError(f"boxes are read from text, such as the .text of a completion; found {text!r:.80}")
    return [_piece(text, *span) for part in re.finditer("[^;]+", text) for span in _spans(text, *part.span())]


def _spans(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The start and end of each object in text[start:end], which has no semicolon."""
    runs = list(TOKEN_RUN.finditer(text, start, end))
    starts = [_object_starts(text, *run.span()) for run in runs]
    separators = SPACE + "," if sum(map(len, starts)) > 1 else SPACE
    if runs and text[start : runs[0].start()].strip(separators) and not text[runs[-1].end() : end].strip(separators):
        # each label stands before its tokens, so an object ends where its tokens end
        cuts = [cut for run, first in zip(runs, starts, strict=True) for cut in (*first[1:], run.end())]
    else:
        cuts = [cut for first in starts for cut in first]
    spans = [_strip(text, *span, separators) for span in pairwise([start, *cuts, end])]
    return [(start, end) for start, end in spans if start < end]


def _object_starts(text: str, start: int, end: int) -> list[int]:
    """The index at which each object begins in text[start:end], one run of tokens."""
    rows = [
        [location.start() for location in LOCATION.finditer(text, *adjacent.span())]
        for adjacent in ADJACENT_LOCATIONS.finditer(text, start, end)
    ]
    starts: list[int] = []
    for short, group in groupby(rows, key=lambda row: len(row) < 4):
        for row in [list(chain(*group))] if short else group:
            cut_off = row[-1] + len("<loc0000>") == len(text.rstrip())
            starts += row[::4] if len(row) % 4 == 0 or cut_off else row[:1]
    return starts or [start]


def _strip(text: str, start: int, end: int, characters: str) -> tuple[int, int]:
    """The span of text[start:end] without these characters at its ends."""
    piece = text[start:end].lstrip(characters)
    return end - len(piece), end - len(piece) + len(piece.rstrip(characters))


def _piece(text: str, start: int, end: int) -> WellFormed | Malformed:
    piece, tokens = text[start:end], list(LOCATION.finditer(text, start, end))
    locations = tuple(int(token[1]) for token in tokens)
    if reason := _fault(locations):
        return Malformed(piece, reason)
    codes = tuple(int(code) for code in CODE.findall(piece))
    return WellFormed(piece, TOKEN.sub("", piece).strip(), locations, codes, tuple(token.start() for token in tokens))


def _fault(locations: tuple[int, ...]) -> str:
    """Why these locations are not a box; empty if they are."""
    if len(locations) != 4:
        return f"{len(locations)} location tokens, expected 4"
    if max(locations) > STEPS:
        return f"location {max(locations)} is above {STEPS}"
    if locations[0] >= locations[2] or locations[1] >= locations[3]:
        return f"corners {locations[:2]} and {locations[2:]} are not top left and bottom right"
    return ""
