"""The names of activations, their axes, and patterns of names."""

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch

from pgfunc import gemma, siglip
from pgfunc.errors import SettingError

AXES = {  # of the activations outside of blocks
    "vision.embed": "b p d",
    "vision.out": "b p d",
    "vision.vector": "b e",
    "projector": "b p d",
    "language.embed": "b t d",
    "language.out": "b t d",
    "logits": "b t v",
    "text.embed": "b p d",
    "text.out": "b p d",
    "text.vector": "b e",
}


class Shape(tuple[int, ...]):
    """The shape of an activation, with the names of its axes: `sizes["n"]` is the number of heads."""

    axes: tuple[str, ...]

    def __new__(cls, sizes: Iterable[int], axes: Sequence[str]) -> "Shape":
        shape = super().__new__(cls, sizes)
        shape.axes = tuple(axes)
        return shape

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.axes, self, strict=True))

    def __repr__(self) -> str:
        return " ".join(f"{axis}={size}" for axis, size in self.sizes.items())


def axes_of(name: str, dims: int) -> list[str]:
    """The axes of an activation. Those of a name that is not the package's are numbered."""
    part, _, last = name.rpartition(".")
    blocks = gemma.TAPS if part.startswith("language.") else siglip.TAPS
    axes = AXES.get(name, blocks.get(last, "")).split()
    return axes if len(axes) == dims else [f"axis{i}" for i in range(dims)]


@torch.compiler.assume_constant_result
def matches(name: str, pattern: str) -> bool:
    """Whether a name matches a pattern of `fnmatch`: `language.*.z`. A constant in compiled code."""
    return fnmatchcase(name, pattern)


class Log:
    """The names that passed through a tap during a call, and those that the model asked for."""

    def __init__(self):
        self.passed: set[str] = set()
        self.offered: set[str] = set()
        self.checked = False  # the patterns were checked before the call

    def check(self, patterns: Iterable[str]) -> None:
        """Raise SettingError if a pattern matched nothing that passed."""
        if not self.checked:
            check_known(patterns, self.passed, self.passed | self.offered)


def check_known(patterns: Iterable[str], names: Collection[str], similar: Collection[str]) -> None:
    """Raise SettingError for the first pattern that matches none of these names; it lists similar ones."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            near = get_close_matches(pattern, sorted(similar), 3, cutoff=0.0)
            raise SettingError(f"{pattern!r} matches no activation of this call; similar: {', '.join(near) or 'none'}")
