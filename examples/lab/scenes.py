"""Scenes of coloured shapes whose truth is known, and the same scenes with one thing changed.

    scenes = draw(100, things=2)
    painted = paint(scenes)                                         # pictures, and the pixels of each thing
    other = paint([recoloured(scene, 0, "blue") for scene in scenes])    # nothing else changes

All shapes of a scene have different outlines and different colours, so "what color is the star?" has one answer. The
scenes are drawn as those that the shipped checkpoint was trained on, but with seeds of their own, without signs and
photographs. Axes: s scenes, k things of a scene (in the order of `Scene.things`), y and x pixels.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from examples.tiny import render, shapes, world
from examples.tiny import scenes as tiny
from examples.tiny.scenes import Catalog, Scene

SIDE = 224
STREAM = 20  # of seeds, which the splits of the training data do not have
AT_ONCE = 50  # scenes that are painted together


class Painted(NamedTuple):
    """Pictures, and the visible pixels of each thing in them; those of a missing thing are all False."""

    pictures: list[Image.Image]
    masks: Bool[Tensor, "s k y x"]


@cache
def material() -> tuple[Catalog, render.Bank]:
    """The outlines of the shapes, and the combinations of colour and outline that training never showed."""
    known = world.small()
    return known.catalog._replace(photos={"train": [], "test": []}), known.bank("cpu")


def draw(count: int, things: int = 2, seed: int = 0) -> list[Scene]:
    """Scenes with so many shapes, 1 to 4, none of which touches the edge of the picture."""
    return [_draw(things, np.random.default_rng((STREAM, seed, i))) for i in range(count)]


def _draw(count: int, rng: np.random.Generator) -> Scene:
    known, _ = material()
    while True:
        colours, outlines = (rng.choice(list(each), count, replace=False) for each in (shapes.COLOURS, shapes.OUTLINES))
        names = [f"{colour} {outline}" for colour, outline in zip(colours, outlines, strict=True)]
        things, boxes = [], []
        for name in names if tiny.familiar(known, names) else []:
            if thing := tiny.place(known, "S0", name, tiny.SIZES[count], boxes, rng):
                things.append(thing)
                boxes.append((*thing.centre, *thing.reach))
        if len(things) == count:
            return Scene(tuple(things), None, tiny.background(known, "S0", rng))


def recoloured(scene: Scene, number: int, colour: str) -> Scene:
    """The scene in which one thing has another colour."""
    thing = scene.things[number]
    tint = tiny.tint_of(colour, False, np.random.default_rng(0))
    thing = thing._replace(name=f"{colour} {outline(scene, number)}", colour=colour, tint=tint)
    return scene._replace(things=(*scene.things[:number], thing, *scene.things[number + 1 :]))


def without(scene: Scene, number: int) -> Scene:
    """The scene without one thing."""
    return scene._replace(things=(*scene.things[:number], *scene.things[number + 1 :]))


def outline(scene: Scene, number: int) -> str:
    """The name of a thing's outline: `star`."""
    return scene.things[number].name.split(" ")[1]


def colour_question(scene: Scene, number: int = 0) -> str:
    """The prompt that asks for a thing's colour."""
    return f"answer en what color is the {outline(scene, number)}?"


def paint(scenes: Sequence[Scene]) -> Painted:
    """Paint the scenes. Scene number i has the same noise in every list."""
    _, bank = material()
    pictures, masks = [], []
    for first in range(0, len(scenes), AT_ONCE):
        part = [*scenes[first : first + AT_ONCE]]
        painted = render.render(bank, render.layout(part), SIDE, seed=first)
        pictures += [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in painted.pixels]
        masks.append(painted.masks)
    return Painted(pictures, torch.cat(masks))
