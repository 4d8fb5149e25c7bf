"""What the findings share: the model, their options, and intervals of confidence over scenes."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

import pgfunc as pg
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
    """`estimate` for each column of the axes behind the scenes."""
    return [estimates(each) for each in values.unbind(1)] if values.dim() > 1 else estimate(values)  # pyright: ignore


def options(doc: str | None, arguments: list[str] | None, scenes: int = 100) -> argparse.Namespace:
    """The command line of a finding: `--scenes`, `--seed`, and `--out`, the folder of its picture."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--scenes", type=int, default=scenes, metavar="N", help=f"default: {scenes}")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes; default: 0")
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="FOLDER", help="where the picture goes")
    return parser.parse_args(arguments)


def load() -> pg.Model:
    """The shipped checkpoint in float32."""
    return pg.load(dtype="float32", device="cpu")


def batches(count: int, size: int = 25) -> list[slice]:
    """Slices that cover so many rows."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def token(model: pg.Model, word: str) -> int:
    """The id of a word that is one token, such as a colour, `yes` or `no`."""
    (one,) = text_ids(model, word)
    return one
