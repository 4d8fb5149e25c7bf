"""The laws of what stands in a text: its ids, boxes and masks, written and read again within exact bounds."""

from math import inf
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from pgfunc.laws.law import law
from pgfunc.laws.strategies import Strategies
from pgfunc.laws.system import Edges, System

STEPS = 1023  # from the first place along a side to the last
PLACES, CODES = 16, 128  # codes a mask, and how many there are to choose from


class Words(NamedTuple):
    text: str


class Between(NamedTuple):
    """The word of a place or of a mask code in a text."""

    left: str
    word: str
    right: str


class Boxes(NamedTuple):
    """Labels, each with where its box lies: shares of the picture's sides."""

    width: int
    height: int
    objects: tuple[tuple[str, Edges], ...]


class Places(NamedTuple):
    """Labels, each with the places of its box as they stand in a text."""

    width: int
    height: int
    objects: tuple[tuple[str, tuple[int, int, int, int]], ...]


class Masks(NamedTuple):
    """Labels, each with the mask of a random ellipse."""

    width: int
    height: int
    labels: tuple[str, ...]
    seed: int


class Codes(NamedTuple):
    masks: int
    seed: int


def words(system: System, strategies: Strategies) -> SearchStrategy[Words]:
    return st.builds(Words, strategies.text)


def between(system: System, strategies: Strategies) -> SearchStrategy[Between]:
    places = st.integers(0, STEPS).map("<loc{:04d}>".format) | st.integers(0, CODES - 1).map("<seg{:03d}>".format)
    return st.builds(Between, strategies.text, places, strategies.text)


def sides(first: Any, second: Any) -> Any:
    """What belongs to the edges of a box: top, left, bottom, right."""
    (top, bottom), (left, right) = first, second
    return top, left, bottom, right


def objects(labels: SearchStrategy[str], span: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """A few labels, none twice, each with a box of two spans."""
    each = st.tuples(labels, st.builds(sides, span, span))
    return st.lists(each, max_size=4, unique_by=lambda pair: pair[0]).map(tuple)


def boxes(system: System, strategies: Strategies) -> SearchStrategy[Boxes]:
    span, side = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), st.integers(1, 5000)
    return st.builds(Boxes, side, side, objects(strategies.labels, span))


def places(system: System, strategies: Strategies) -> SearchStrategy[Places]:
    span = st.lists(st.integers(0, STEPS), min_size=2, max_size=2, unique=True).map(sorted)
    return st.builds(Places, st.integers(1, 5000), st.integers(1, 5000), objects(strategies.labels, span))


def ellipses(system: System, strategies: Strategies) -> SearchStrategy[Masks]:
    side, labels = st.integers(1, 120), st.lists(strategies.labels, max_size=2, unique=True).map(tuple)
    return st.builds(Masks, side, side, labels, strategies.seeds)


def codes(system: System, strategies: Strategies) -> SearchStrategy[Codes]:
    return st.builds(Codes, st.integers(1, 9), strategies.seeds)


# --- text -------------------------------------------------------------------------------------------------------------


@law("The text of the ids of a text is that text, but for ▁, which stands for a space.",
     needs="to_ids to_text", domain=words)  # fmt: skip
def text_comes_back(system: System, example: Words) -> float:
    return float(system.to_text(system.to_ids(example.text)) != example.text.replace("▁", " "))


@law("A place or a mask code is one token, whatever stands beside it.", needs="to_ids", domain=between)
def places_and_codes_are_one_token(system: System, example: Between) -> float:
    left, word, right = map(system.to_ids, example)
    return float(len(word) != 1 or system.to_ids("".join(example)) != [*left, *word, *right])


# --- boxes and masks --------------------------------------------------------------------------------------------------


def moved(found: Edges, expected: Edges, width: int, height: int) -> float:
    """How far an edge is from where it was, of what it may be: half a step, or one where the box is thinner than one.

    A box is never without area, so that a thin one is made a step thick.
    """
    errors = []
    for low, high, side in ((0, 2, height), (1, 3, width)):
        step = side / STEPS
        allowed = step / 2 if expected[high] - expected[low] >= step else step
        errors += [abs(found[edge] - expected[edge]) / allowed for edge in (low, high)]
    return worst(errors)


def worst(errors: list[float]) -> float:
    """The largest, 0 where there is none; nan where one is."""
    return float(torch.tensor([0.0, *errors], dtype=torch.float64).max())


@law("A box that is written and read keeps its label, and no edge moves by more than half a step of 1/1023.",
     needs="write_boxes read_boxes", domain=boxes, within=1.0 + 1e-9,
     reason="halves of a step; float64")  # fmt: skip
def a_box_comes_back_within_half_a_step(system: System, example: Boxes) -> float:
    width, height, objects = example
    given = [(label, scaled(box, width, height)) for label, box in objects]
    found = system.read_boxes(system.write_boxes(given, width, height), width, height)
    if [label for label, _ in found] != [label for label, _ in given]:
        return inf
    return worst([moved(mine[1], theirs[1], width, height) for mine, theirs in zip(found, given, strict=True)])


@law("Places are 1,023rds of a side, and the text of boxes that are read is written again as it was.",
     needs="write_boxes read_boxes", domain=places, within=1e-12, reason="float64")  # fmt: skip
def text_of_boxes_comes_back(system: System, example: Places) -> float:
    width, height, objects = example
    text = " ; ".join(" ".join(["".join(f"<loc{place:04d}>" for place in at), label]).strip() for label, at in objects)
    found = system.read_boxes(text, width, height)
    if len(found) != len(objects) or system.write_boxes(found, width, height) != text:
        return inf
    expected = [scaled([place / STEPS for place in at], width, height) for _, at in objects]
    pairs = [pair for (_, mine), theirs in zip(found, expected, strict=True) for pair in zip(mine, theirs, strict=True)]
    return worst([abs(one - other) / max(width, height) for one, other in pairs])


def scaled(shares: Any, width: int, height: int) -> Any:
    return tuple(share * side for share, side in zip(shares, (height, width) * 2, strict=True))


@law("A mask that is written and read keeps its label and its box, up to half a step, and has no pixel outside it.",
     needs="write_masks read_masks", domain=ellipses, within=1.0 + 1e-9,
     reason="halves of a step; float64")  # fmt: skip
def a_mask_comes_back_inside_its_box(system: System, example: Masks) -> float:
    width, height = example.width, example.height
    given = [(label, ellipse(width, height, example.seed + i)) for i, label in enumerate(example.labels)]
    found = system.read_masks(system.write_masks(given), width, height)
    if [label for label, _, _ in found] != [label for label, _ in given]:
        return inf
    errors = []
    for (_, box, mask), (_, before) in zip(found, given, strict=True):
        inside = before.any(1)[:, None] & before.any(0)  # of an ellipse: its tightest box
        (top, left), (bottom, right) = ((inside.nonzero()[at] + add).double().tolist() for at, add in ((0, 0), (-1, 1)))
        outside = inf if mask.shape != inside.shape or (mask & ~inside).any() else 0.0
        errors += [outside, moved(box, (top, left, bottom, right), width, height)]
    return worst(errors)


def ellipse(width: int, height: int, seed: int) -> Tensor:
    """The mask of a random ellipse, of a pixel at least."""
    a, b, c, d = torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
    y, x = torch.arange(height)[:, None] - int(a * height), torch.arange(width) - int(b * width)
    return (y / (1 + c * height / 2)) ** 2 + (x / (1 + d * width / 2)) ** 2 < 1


@law("The features that stand for mask codes are encoded as these codes.", needs="features codes", domain=codes)
def mask_codes_come_back(system: System, example: Codes) -> float:
    generator = torch.Generator().manual_seed(example.seed)
    given = torch.randint(0, CODES, (example.masks, PLACES), generator=generator)
    return float((system.codes(system.features(given)) != given).sum())


TEXTS = (
    text_comes_back, places_and_codes_are_one_token, a_box_comes_back_within_half_a_step, text_of_boxes_comes_back,
    a_mask_comes_back_inside_its_box, mask_codes_come_back,
)  # fmt: skip
