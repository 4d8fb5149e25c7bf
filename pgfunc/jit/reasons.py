"""Why a function was compiled again: how the call differs from the most similar one that already has code.

A call is described by lines, label -> value, such as `token -> int64[2] on cpu`. This module knows nothing about
models.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pgfunc.jit.arguments import ArgumentSpec, Layout, dense_strides
from pgfunc.tree import join

MAX_DIFFERENCES = 3  # that a reason lists
CONTEXT = ("autocast on CPUs", "autocast on CUDA", "deterministic algorithms", "the precision of float32 products",
           "the default dtype", "the default device", "the number of threads")  # fmt: skip

Description = dict[str, str]


def compile_context() -> tuple[Any, ...]:
    """The settings of PyTorch that change what operations do, in the order of `CONTEXT`."""
    autocast = (torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda"))
    precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    return *autocast, *precision, torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()


def describe(
    specs: Mapping[str, ArgumentSpec], donated: str | None, layouts: Sequence[Layout], context: Sequence[Any]
) -> Description:
    """Describe a call by its arguments, the donated cache and the settings of PyTorch.

    `layouts` are those of the cache's buffers and, last, of its length. They are empty if nothing is donated.
    """
    lines: Description = dict(zip(CONTEXT, map(str, context), strict=True))
    for name, spec in specs.items():
        tensors, constants = iter(spec.layouts), iter(spec.constants)
        leaves = [Verbatim(show_layout(next(tensors))) if each else next(constants) for each in spec.is_tensor]
        for path, leaf in pytree.tree_leaves_with_path(pytree.tree_unflatten(leaves, spec.structure)):
            lines |= dict(lines_of(".".join(filter(None, (name, join(path)))), leaf))
    if layouts:  # all buffers have the same layout
        lines[f"{donated}'s buffers"], lines[f"{donated}'s lengths"] = map(show_layout, (layouts[0], layouts[-1]))
    return lines


class Verbatim(str):
    """Text whose `repr` is the text itself."""

    __repr__ = str.__str__


def show_layout(layout: Layout) -> str:
    """A tensor's layout as text: `int64[2, 5] on cpu`."""
    size, stride, dtype, device = layout
    gaps = "" if stride == dense_strides(size) else f" with strides {list(stride)}"
    return f"{str(dtype).removeprefix('torch.')}{list(size)}{gaps} on {device}"


def lines_of(label: str, value: Any) -> Iterator[tuple[str, str]]:
    """One line for a value, or one for each field of a dataclass."""
    if not is_dataclass(value) or isinstance(value, type):
        yield label, repr(value)
        return
    for field in fields(value):
        yield from lines_of(f"{label}.{field.name}", getattr(value, field.name))


def difference(new: Description, earlier: Sequence[Description]) -> str:
    """How a call differs from the most similar earlier one; "" if there is no earlier one."""
    if not earlier:
        return ""
    nearest = min(earlier, key=lambda old: len(differing_labels(new, old)))
    labels = differing_labels(new, nearest)
    reasons = [f"{label} is {new.get(label, 'absent'):.60}, was {nearest.get(label, 'absent'):.60}" for label in labels]
    if len(labels) > MAX_DIFFERENCES:
        reasons[MAX_DIFFERENCES:] = [f"and {len(labels) - MAX_DIFFERENCES} more differences"]
    return "; ".join(reasons) or "an argument has another structure, or shares a tensor with another argument"


def differing_labels(new: Description, old: Description) -> list[str]:
    return [label for label in {**new, **old} if new.get(label) != old.get(label)]
