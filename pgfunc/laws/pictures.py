"""The laws of pictures: whatever Pillow holds becomes a square of numbers from -1 to 1."""

from math import inf

import torch
from hypothesis.strategies import SearchStrategy
from PIL import Image

from pgfunc.laws.law import law
from pgfunc.laws.strategies import Picture, Strategies, picture
from pgfunc.laws.system import System

PLAIN = ("L", "RGB")  # modes whose levels are those that are meant


def pictures(system: System, strategies: Strategies) -> SearchStrategy[Picture]:
    return strategies.pictures


@law("A picture of any mode and size is a square of the model's size in three channels, from -1 to 1.",
     needs="pixels", domain=pictures)  # fmt: skip
def pixels_lie_between_black_and_white(system: System, example: Picture) -> float:
    found = system.pixels(picture(example))
    square = found.is_floating_point() and found.shape == (3, system.image_size, system.image_size)
    return float((found.abs().max() - 1).clamp(min=0)) if square and not found.isnan().any() else inf


@law("A picture of one colour stays of one colour, which is level / 127.5 - 1.",
     needs="pixels", domain=pictures, within=1e-6, reason="float32")  # fmt: skip
def one_colour_stays_what_it_is(system: System, example: Picture) -> float:
    point = picture(example._replace(width=1, height=1))
    found = system.pixels(point.resize((example.width, example.height), Image.Resampling.NEAREST)).flatten(1)
    uneven = found.amax(1) - found.amin(1)
    if example.mode not in PLAIN:
        return float(uneven.max())
    levels = torch.tensor(list(point.tobytes()))
    return float(torch.maximum(uneven, (found[:, 0] - (levels / 127.5 - 1)).abs()).max())


PICTURES = (pixels_lie_between_black_and_white, one_colour_stays_what_it_is)
