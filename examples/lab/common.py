"""What the findings share: the model, their options, runs of many rows, and intervals of confidence over scenes.

Axes: s scenes, p image tokens, t image and text tokens, d width.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import pgfunc as pg
from pgfunc import lab, paligemma
from pgfunc.prompt import text_ids

IMAGES = Path(__file__).parent.parent / "images" / "lab"
DRAWS = 10_000  # resamples of the bootstrap


class Estimate(NamedTuple):
    """A mean over scenes, and its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def estimate(values: Float[Tensor, "s"] | Bool[Tensor, "s"]) -> Estimate:
    """The mean of one value for each scene, with the percentile interval of a bootstrap over scenes (seed 0)."""
    x = values.double().numpy()
    chosen = np.random.default_rng(0).integers(len(x), size=(DRAWS, len(x)))
    low, high = np.percentile(x[chosen].mean(1), [2.5, 97.5])
    return Estimate(float(x.mean()), float(low), float(high))


def estimates(values: Float[Tensor, "s *n"] | Bool[Tensor, "s *n"]) -> list[Any]:
    """`estimate` for each column of the axes after the scenes."""
    return [estimates(each) for each in values.unbind(1)] if values.dim() > 1 else estimate(values)  # pyright: ignore


def options(doc: str | None, arguments: list[str] | None, scenes: int = 100) -> argparse.Namespace:
    """The command line of a finding: `--scenes`, `--seed`, and `--out`, the folder of its picture."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--scenes", type=int, default=scenes, metavar="N", help=f"default: {scenes}")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes; default: 0")
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="FOLDER", help="where the picture goes")
    return parser.parse_args(arguments)


def save(figure: Any, path: Path) -> None:
    """Write a picture, into a new folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def load() -> pg.Model:
    """The shipped checkpoint in float32."""
    return pg.load(dtype="float32", device="cpu")


def batches(count: int, size: int = 25) -> list[slice]:
    """Slices that cover so many rows."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def rows(prompt: pg.Prompt, which: slice) -> pg.Prompt:
    """Some rows of a prompt."""
    return pg.Prompt(*(each[which] for each in prompt))


@torch.no_grad()
def encode(model: pg.Model, prompt: pg.Prompt, *names: str) -> dict[str, Float[Tensor, "s p d"]]:
    """These activations of the vision encoder, and the image tokens: `projector`."""
    run = lab.capture(paligemma.encode_images, "projector", *names)
    parts = [run(model.params, prompt.pixels[each], model.cfg)[1] for each in batches(len(prompt.pixels))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def language_input(
    params: pg.Params, image: Float[Tensor, "s p d"], prompt: pg.Prompt, cfg: pg.Config
) -> Float[Tensor, "s t d"]:
    """`language.0.resid_pre` for these image tokens and the text of a prompt, from which `lab.resume` continues."""
    return paligemma.left_align(paligemma.join(params, image, prompt, cfg)).x


def last_token(prompt: pg.Prompt, image_tokens: int) -> Int[Tensor, "s 1"]:
    """The position of the last token of each row, whose logits are those of the answer."""
    return image_tokens + prompt.valid.sum(1, keepdim=True) - 1


@torch.no_grad()
def answers(
    model: pg.Model, image: Float[Tensor, "s p d"], prompt: pg.Prompt, queries: Int[Tensor, "s q"]
) -> Float[Tensor, "s q v"]:
    """The logits at these positions, for these image tokens instead of the pictures."""
    logits = []
    for each in batches(len(image)):
        part = rows(prompt, each)
        x = language_input(model.params, image[each], part, model.cfg)
        logits.append(lab.resume(model.params, part, model.cfg, 0, x, queries=queries[each]))
    return torch.cat(logits)


def token(model: pg.Model, word: str) -> int:
    """The id of a word that is one token, such as a colour, `yes` or `no`."""
    (one,) = text_ids(model, word)
    return one
