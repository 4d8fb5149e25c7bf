"""The laws of text: token ids, boxes and masks that are written to a text are read back, within exact bounds."""

from math import inf
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from pgfunc.laws.law import law
from pgfunc.laws.strategies import Strategies
from pgfunc.laws.system import Edges, System

STEPS = 1023  # between the first and the last <loc> position along a side
CODES_PER_MASK, CODEBOOK_SIZE = 16, 128


class Text(NamedTuple):
    """A text."""

    text: str


class Between(NamedTuple):
    """A `<loc....>` or `<seg...>` token between two texts."""

    left: str
    token: str
    right: str


class Boxes(NamedTuple):
    """Labels with boxes, whose edges are shares of the picture's sides."""

    width: int
    height: int
    objects: tuple[tuple[str, Edges], ...]


class LocBoxes(NamedTuple):
    """Labels with boxes, whose edges are the numbers of `<loc....>` tokens."""

    width: int
    height: int
    objects: tuple[tuple[str, tuple[int, int, int, int]], ...]


class Masks(NamedTuple):
    """Labels, and the seed of a random elliptic mask for each."""

    width: int
    height: int
    labels: tuple[str, ...]
    seed: int


class RandomCodes(NamedTuple):
    """The number of masks with random codes, and their seed."""

    masks: int
    seed: int


def texts(system: System, strategies: Strategies) -> SearchStrategy[Text]:
    return st.builds(Text, strategies.text)


def between(system: System, strategies: Strategies) -> SearchStrategy[Between]:
    locations, codes = st.integers(0, STEPS), st.integers(0, CODEBOOK_SIZE - 1)
    tokens = locations.map("<loc{:04d}>".format) | codes.map("<seg{:03d}>".format)
    return st.builds(Between, strategies.text, tokens, strategies.text)


def box_edges(vertical: Any, horizontal: Any) -> Any:
    """The edges of a box, in the order top, left, bottom, right, from its two spans."""
    (top, bottom), (left, right) = vertical, horizontal
    return top, left, bottom, right


def objects(labels: SearchStrategy[str], span: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """Up to four different labels with boxes."""
    labeled = st.tuples(labels, st.builds(box_edges, span, span))
    return st.lists(labeled, max_size=4, unique_by=lambda pair: pair[0]).map(tuple)


def boxes(system: System, strategies: Strategies) -> SearchStrategy[Boxes]:
    span, side = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), st.integers(1, 5000)
    return st.builds(Boxes, side, side, objects(strategies.labels, span))


def loc_boxes(system: System, strategies: Strategies) -> SearchStrategy[LocBoxes]:
    span = st.lists(st.integers(0, STEPS), min_size=2, max_size=2, unique=True).map(sorted)
    return st.builds(LocBoxes, st.integers(1, 5000), st.integers(1, 5000), objects(strategies.labels, span))


def ellipses(system: System, strategies: Strategies) -> SearchStrategy[Masks]:
    side, labels = st.integers(1, 120), st.lists(strategies.labels, max_size=2, unique=True).map(tuple)
    return st.builds(Masks, side, side, labels, strategies.seeds)


def random_codes(system: System, strategies: Strategies) -> SearchStrategy[RandomCodes]:
    return st.builds(RandomCodes, st.integers(1, 9), strategies.seeds)


# --- text -------------------------------------------------------------------------------------------------------------


@law("Decoding the token ids of a text gives that text, except that ▁ becomes a space.",
     needs="to_ids to_text", domain=texts)  # fmt: skip
def text_comes_back(system: System, example: Text) -> float:
    return float(system.to_text(system.to_ids(example.text)) != example.text.replace("▁", " "))


@law("A <loc....> or <seg...> word is one token, whatever text is beside it.", needs="to_ids", domain=between)
def places_and_codes_are_one_token(system: System, example: Between) -> float:
    left, token, right = map(system.to_ids, example)
    return float(len(token) != 1 or system.to_ids("".join(example)) != [*left, *token, *right])


# --- boxes and masks --------------------------------------------------------------------------------------------------


def edge_error(actual: Edges, expected: Edges, width: int, height: int) -> float:
    """The largest change of an edge, as a share of the allowed change.

    Half a step is allowed, or a whole step if the box is thinner than a step: a box must have an area, so a thin one is
    made one step thick.
    """
    errors = []
    for low, high, side in ((0, 2, height), (1, 3, width)):
        step = side / STEPS
        allowed = step / 2 if expected[high] - expected[low] >= step else step
        errors += [abs(actual[edge] - expected[edge]) / allowed for edge in (low, high)]
    return largest(errors)


def largest(errors: list[float]) -> float:
    """The largest error; 0 if there are none, nan if one of them is nan."""
    return float(torch.tensor([0.0, *errors], dtype=torch.float64).max())


@law("A box that is written to text and read keeps its label, and no edge moves by more than half a step of 1/1023.",
     needs="write_boxes read_boxes", domain=boxes, within=1.0 + 1e-9,
     reason="in units of the allowed change; float64")  # fmt: skip
def a_box_comes_back_within_half_a_step(system: System, example: Boxes) -> float:
    width, height, objects = example
    expected = [(label, scaled(box, width, height)) for label, box in objects]
    actual = system.read_boxes(system.write_boxes(expected, width, height), width, height)
    if [label for label, _ in actual] != [label for label, _ in expected]:
        return inf
    pairs = zip(actual, expected, strict=True)
    return largest([edge_error(one, other, width, height) for (_, one), (_, other) in pairs])


@law("<loc....> counts 1/1023 of a side, and boxes that are read from a text are written as the same text.",
     needs="write_boxes read_boxes", domain=loc_boxes, within=1e-12, reason="float64")  # fmt: skip
def text_of_boxes_comes_back(system: System, example: LocBoxes) -> float:
    width, height, objects = example
    text = " ; ".join(" ".join(["".join(f"<loc{loc:04d}>" for loc in locs), label]).strip() for label, locs in objects)
    read = system.read_boxes(text, width, height)
    if len(read) != len(objects) or system.write_boxes(read, width, height) != text:
        return inf
    expected = [scaled([loc / STEPS for loc in locs], width, height) for _, locs in objects]
    pairs = [pair for (_, box), edges in zip(read, expected, strict=True) for pair in zip(box, edges, strict=True)]
    return largest([abs(one - other) / max(width, height) for one, other in pairs])


def scaled(shares: Any, width: int, height: int) -> Any:
    """A box in pixels, from one in shares of the picture's sides."""
    return tuple(share * side for share, side in zip(shares, (height, width) * 2, strict=True))


@law("A mask that is written and read keeps its label, keeps its box up to half a step, and has no pixel outside it.",
     needs="write_masks read_masks", domain=ellipses, within=1.0 + 1e-9,
     reason="in units of the allowed change; float64")  # fmt: skip
def a_mask_comes_back_inside_its_box(system: System, example: Masks) -> float:
    width, height = example.width, example.height
    drawn = [(label, ellipse(width, height, example.seed + i)) for i, label in enumerate(example.labels)]
    read = system.read_masks(system.write_masks(drawn), width, height)
    if [label for label, _, _ in read] != [label for label, _ in drawn]:
        return inf
    errors = []
    for (_, box, mask), (_, before) in zip(read, drawn, strict=True):
        inside = before.any(1)[:, None] & before.any(0)  # the bounding box of the ellipse
        (top, left), (bottom, right) = ((inside.nonzero()[at] + add).double().tolist() for at, add in ((0, 0), (-1, 1)))
        outside = inf if mask.shape != inside.shape or (mask & ~inside).any() else 0.0
        errors += [outside, edge_error(box, (top, left, bottom, right), width, height)]
    return largest(errors)


def ellipse(width: int, height: int, seed: int) -> Tensor:
    """The mask of a random ellipse, at least one pixel large."""
    a, b, c, d = torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
    y, x = torch.arange(height)[:, None] - int(a * height), torch.arange(width) - int(b * width)
    return (y / (1 + c * height / 2)) ** 2 + (x / (1 + d * width / 2)) ** 2 < 1


@law("The codes of the features of mask codes are the same mask codes.", needs="features codes", domain=random_codes)
def mask_codes_come_back(system: System, example: RandomCodes) -> float:
    generator = torch.Generator().manual_seed(example.seed)
    codes = torch.randint(0, CODEBOOK_SIZE, (example.masks, CODES_PER_MASK), generator=generator)
    return float((system.codes(system.features(codes)) != codes).sum())


TEXTS = (
    text_comes_back, places_and_codes_are_one_token, a_box_comes_back_within_half_a_step, text_of_boxes_comes_back,
    a_mask_comes_back_inside_its_box, mask_codes_come_back,
)  # fmt: skip
