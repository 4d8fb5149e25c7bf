"""The laws of pictures: any picture that Pillow can hold becomes a square of numbers from -1 to 1."""

from math import inf

import torch
from hypothesis.strategies import SearchStrategy
from PIL import Image

from pgfunc.laws.law import law
from pgfunc.laws.strategies import Picture, Strategies, picture
from pgfunc.laws.system import System

PLAIN = ("L", "RGB")  # modes whose bytes are the levels of the channels


def pictures(system: System, strategies: Strategies) -> SearchStrategy[Picture]:
    return strategies.pictures


@law("A picture of any mode and size becomes three square channels of the model's picture size, from -1 to 1.",
     needs="pixels", domain=pictures)  # fmt: skip
def pixels_lie_between_black_and_white(system: System, example: Picture) -> float:
    pixels = system.pixels(picture(example))
    square = pixels.is_floating_point() and pixels.shape == (3, system.image_size, system.image_size)
    return float((pixels.abs().max() - 1).clamp(min=0)) if square and not pixels.isnan().any() else inf


@law("A picture of one color keeps one color; in modes L and RGB its numbers are level / 127.5 - 1.",
     needs="pixels", domain=pictures, within=1e-6, reason="float32")  # fmt: skip
def one_colour_stays_what_it_is(system: System, example: Picture) -> float:
    point = picture(example._replace(width=1, height=1))
    pixels = system.pixels(point.resize((example.width, example.height), Image.Resampling.NEAREST)).flatten(1)
    uneven = pixels.amax(1) - pixels.amin(1)
    if example.mode not in PLAIN:
        return float(uneven.max())
    levels = torch.tensor(list(point.tobytes()))
    return float(torch.maximum(uneven, (pixels[:, 0] - (levels / 127.5 - 1)).abs()).max())


PICTURES = (pixels_lie_between_black_and_white, one_colour_stays_what_it_is)
