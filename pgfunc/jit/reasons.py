"""Why a function was compiled again: what differs from the nearest of the calls that it has code for.

A call is described by lines, label -> value, such as `token -> int64[2] on cpu`. Knows nothing about models.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch.utils import _pytree as pytree

from pgfunc.jit.arguments import Kind, strides
from pgfunc.tree import join

MOST = 3  # differences that a reason names
SETTINGS = ("autocast on CPUs", "autocast on CUDA", "deterministic algorithms", "the precision of float32 products",
            "the default dtype", "the default device", "the number of threads")  # fmt: skip

Description = dict[str, str]


def described(
    kinds: Mapping[str, Kind], donated: str | None, buffers: Sequence[Any], settings: Sequence[Any]
) -> Description:
    """The lines of a call: its arguments, the donated cache by its first buffer and its lengths, PyTorch's settings."""
    lines: Description = dict(zip(SETTINGS, map(str, settings), strict=True))
    for name, kind in kinds.items():
        moving, fixed = iter(kind.shapes), iter(kind.fixed)
        leaves = [Shown(tensor(next(moving))) if moves else next(fixed) for moves in kind.moving]
        for path, leaf in pytree.tree_leaves_with_path(pytree.tree_unflatten(leaves, kind.structure)):
            lines |= dict(spelled(".".join(filter(None, (name, join(path)))), leaf))
    named = zip(("buffers", "lengths"), buffers, strict=False)  # where nothing is donated there are none
    return lines | {f"{donated}'s {name}": tensor(shape) for name, shape in named}


class Shown(str):
    """Text that is shown as it is."""

    __repr__ = str.__str__


def tensor(shape: tuple[Any, ...]) -> str:
    """A tensor as `arguments.shape` gives it: `int64[2, 5] on cpu`."""
    size, stride, dtype, device = shape
    gaps = "" if stride == strides(size) else f" with strides {list(stride)}"
    return f"{str(dtype).removeprefix('torch.')}{list(size)}{gaps} on {device}"


def spelled(label: str, value: Any) -> Iterator[tuple[str, str]]:
    """A line for a value, or for each field of a dataclass."""
    if not is_dataclass(value) or isinstance(value, type):
        yield label, repr(value)
        return
    for field in fields(value):
        yield from spelled(f"{label}.{field.name}", getattr(value, field.name))


def difference(new: Description, earlier: Sequence[Description]) -> str:
    """What is otherwise than in the nearest of the earlier calls; "" where there is none."""
    if not earlier:
        return ""
    nearest = min(earlier, key=lambda old: len(differing(new, old)))
    labels = differing(new, nearest)
    said = [f"{label} is {new.get(label, 'absent'):.60}, was {nearest.get(label, 'absent'):.60}" for label in labels]
    if len(labels) > MOST:
        said[MOST:] = [f"and {len(labels) - MOST} more differences"]
    return "; ".join(said) or "an argument is of another structure, or shares a tensor with another one"


def differing(new: Description, old: Description) -> list[str]:
    return [label for label in {**new, **old} if new.get(label) != old.get(label)]
