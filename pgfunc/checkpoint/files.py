"""Between files and values: named arrays, and tables that say where in them each parameter lies.

A table is a tree shaped like the parameters whose leaves are `Slot`s. The same table reads (`gather`) and writes
(`arrange`); the formats differ only in their tables and in how they name arrays. Nothing here knows about PaliGemma.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from pgfunc import tree
from pgfunc.checkpoint import keys
from pgfunc.errors import CheckpointError

T = TypeVar("T")

DESCRIBED = "the model that config.json describes"


@dataclass(frozen=True)
class Entry:
    """An array in a file: what its header says, and how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies: the array's key, an index along its leading axes, and the way from there to the tree.

    `pattern` is an einops rearrangement from the stored axes to the parameter's; `axes` gives the sizes that it needs.
    """

    key: str
    index: tuple[int, ...] = ()
    pattern: str = ""
    axes: Mapping[str, int] = field(default_factory=dict)

    def read(self, array: Tensor) -> Tensor:
        part = array[self.index] if self.index else array
        return rearrange(part, self.pattern, **self.axes).contiguous() if self.pattern else part

    def write(self, leaf: Tensor) -> Tensor:
        there, _, here = self.pattern.partition("->")
        return rearrange(leaf, f"{here}->{there}", **self.axes) if self.pattern else leaf


def arrange(table: Any, params: Any) -> dict[str, Tensor]:
    """Key -> array, as the table stores the parameters; parts of one array are stacked."""
    parts: dict[str, dict[tuple[int, ...], Tensor]] = defaultdict(dict)
    leaves = tree.flatten(params)
    for path, slot in tree.flatten(table).items():
        parts[slot.key][slot.index] = slot.write(leaves[path])
    return {key: _stack(parts[key]) for key in parts}


def _stack(parts: dict[tuple[int, ...], Tensor]) -> Tensor:
    if () in parts:
        return parts[()]
    ordered = [parts[index] for index in sorted(parts)]
    leading = [size + 1 for size in max(parts)]
    assert prod(leading) == len(ordered), "a table fills each array whole"
    return torch.stack(ordered).reshape(*leading, *ordered[0].shape)


def gather(
    table: T,
    abstract: T,
    entries: Mapping[str, Entry],
    where: str,
    dtype: torch.dtype | None,
    device: torch.device,
    model: str = DESCRIBED,
) -> T:
    """The parameters from the arrays that the table names; on the meta device nothing is read.

    Arrays that no model reads (`keys.UNREAD`) are left out.
    Raises CheckpointError for a key that is missing or too many, and for a wrong shape, naming key and both shapes.
    `where` and `model` are what an error calls the file, and what its arrays were expected to be.
    """
    expected = arrange(table, abstract)
    entries = keys.read(entries, expected, where)
    check(expected, entries, where, model)
    if dtype is None:
        check_one_dtype(entries, where)
    users: dict[str, list[tuple[str, Slot]]] = defaultdict(list)
    for path, slot in tree.flatten(table).items():
        users[slot.key].append((path, slot))
    leaves = {}
    for key, slots in users.items():
        entry = entries[key]
        array = torch.empty(entry.shape, dtype=entry.dtype, device="meta") if device.type == "meta" else entry.read()
        kind = dtype if castable(entry.dtype) else None
        leaves |= {path: slot.read(array).to(device=device, dtype=kind) for path, slot in slots}
    return tree.replace(abstract, leaves)


def check(expected: Mapping[str, Tensor], entries: Mapping[str, Entry], where: str, model: str = DESCRIBED) -> None:
    """Compare names and shapes with what a file holds."""
    if missing := sorted(expected.keys() - entries.keys()):
        shape = tuple(expected[missing[0]].shape)
        raise CheckpointError(
            f"{where}: {keys.first_of(missing)} is missing, expected shape {shape}; "
            f"the file is incomplete, or not that of {model}"
        )
    if extra := sorted(entries.keys() - expected.keys()):
        shape = entries[extra[0]].shape
        raise CheckpointError(f"{where}: {keys.first_of(extra)} with shape {shape} is not part of {model}")
    for key, entry in entries.items():
        if tuple(entry.shape) != tuple(expected[key].shape):
            raise CheckpointError(f"{where}: {key}: expected {tuple(expected[key].shape)}, found {tuple(entry.shape)}")
        wanted = expected[key].dtype
        if entry.dtype != wanted and not (castable(entry.dtype) and castable(wanted)):
            kind = "floating point numbers" if castable(wanted) else wanted
            raise CheckpointError(f"{where}: {key}: expected {kind}, found {entry.dtype}")


def castable(dtype: torch.dtype) -> bool:
    """Whether numbers of this kind may be loaded as another: the values of quantized weights may not."""
    return dtype.is_floating_point and dtype.itemsize > 1


def check_one_dtype(entries: Mapping[str, Entry], where: str) -> None:
    """Activations meet all weights, so all weights must have one dtype, and the scales of quantized ones."""
    (key, entry), *others = ((key, entry) for key, entry in entries.items() if castable(entry.dtype))
    for other, found in others:
        if found.dtype != entry.dtype:
            raise CheckpointError(f"{where}: {key} is {entry.dtype}, {other} is {found.dtype}; choose one with dtype=")
