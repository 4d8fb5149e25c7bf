"""The names of activations, their axes, and patterns of names."""

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

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

MEANINGS = {  # of the activations in each block, in the order of the computation
    "resid_pre": "the residual stream, as it enters the layer",
    "attn_in": "the same, normalized: the input of attention",
    "q": "queries, before rotation",
    "k": "keys, before rotation",
    "v": "values",
    "rot_q": "queries, rotated by their positions",
    "rot_k": "keys, rotated by their positions; the cache holds these",
    "mask": "which query sees which key",
    "attn_scores": "products of queries and keys, scaled and softcapped, not masked",
    "pattern": "the weights of attention: masked softmax of the scores, in float32",
    "z": "the result of each head: its weights times its values",
    "attn_out": "what attention adds to the residual stream, after Gemma 2's norm",
    "resid_mid": "the residual stream between attention and MLP",
    "mlp_in": "the same, normalized: the input of the MLP",
    "gate": "the gate of the MLP, before its GELU",
    "up": "the up projection; in SigLIP before the GELU",
    "mlp_hidden": "the hidden layer of the MLP",
    "mlp_out": "what the MLP adds to the residual stream, after Gemma 2's norm",
    "resid_post": "the residual stream, as it leaves the layer",
}
OUTSIDE = {  # of the activations outside of blocks
    "vision.embed": "patches as vectors, with their positions",
    "vision.out": "the vision encoder's output, normalized",
    "projector": "image tokens, in the width of the language model",
    "language.embed": "the language model's input: image tokens, then text",
    "language.out": "the language model's output, normalized",
    "logits": "the logits",
}
BLOCKS = {"language": gemma.TAPS, "vision": siglip.TAPS}  # SigLIP's text encoder has the names of its vision encoder


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
    """The axes of an activation. They are numbered if the tables have no such name with so many axes."""
    part, _, last = name.rpartition(".")
    blocks = BLOCKS["language" if part.startswith("language.") else "vision"]
    axes = AXES.get(name, blocks.get(last, "")).split()
    return axes if len(axes) == dims else [f"axis{i}" for i in range(dims)]


@torch.compiler.assume_constant_result
def matches(name: str, pattern: str) -> bool:
    """Whether a name matches a pattern of `fnmatch`: `language.*.z`. A constant in compiled code."""
    return fnmatchcase(name, pattern)


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of these patterns."""
    return any(matches(name, pattern) for pattern in patterns)


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


def table() -> str:
    """All activations of PaliGemma as a Markdown table: names, axes, meanings."""
    rows = ["| name | axes | what it is |", "|---|---|---|"]
    rows += [f"| `{name}` | `{AXES[name]}` | {meaning} |" for name, meaning in OUTSIDE.items()]
    for last, meaning in MEANINGS.items():
        shapes = {part: blocks[last] for part, blocks in BLOCKS.items() if last in blocks}
        axes = ", ".join(f"`{axes}`" for axes in dict.fromkeys(shapes.values()))
        parts = ", ".join(f"`{part}.N.{last}`" for part in shapes)
        rows.append(f"| {parts} | {axes} | {meaning} |")
    return "\n".join(rows) + "\n"


def describe(x: Any) -> str:
    """The dtype and shape of a tensor, or the type of another object, for messages."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
