"""Tables between checkpoint files and parameter trees. This module knows nothing about PaliGemma or about file formats.

A table is a tree shaped like the parameters. Each leaf is a `Slot`: the key of the array in which that parameter is
stored, an index into that array, and how the axes are rearranged. Two leaves of big_vision's table:

    path in both trees       parameter   leaf of the table                                      array in the file
    projector                (d, e)      Slot("img/head/kernel", (), "e d -> d e")              (e, d)
    language.layers.3.down   (d, f)      Slot("llm/layers/mlp/linear", (3,), "f d -> d f")      (layers, f, d)

The same table serves both directions:

    load    params <---- from_arrays(table, abstract, entries, ...) ---- {key: Entry}
    save    params ----- to_arrays(table, params) ---------------------> {key: Tensor}

To add a layout, write a function that returns its table, and one that lists the arrays of a file as `Entry`s.
`vqvae.py` is the shortest example.
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

IGNORED_DTYPE = torch.int64  # of the Entry of an array that is ignored, if its own dtype is not one of ours
DESCRIBED = "the model that config.json describes"


@dataclass(frozen=True)
class Entry:
    """An array in a file that is not read yet: the shape and dtype in its header, and a function that reads it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Slot:
    """Where a parameter is stored in a file: an array's key, an index into its leading axes, and a rearrangement.

    `pattern` is an einops pattern from the stored axes to the parameter's axes; "" means that they are the same.
    `axes` holds the sizes with which `to_array` splits the axes that the pattern merges.
    """

    key: str
    index: tuple[int, ...] = ()
    pattern: str = ""
    axes: Mapping[str, int] = field(default_factory=dict)

    def from_array(self, array: Tensor) -> Tensor:
        """The parameter that is stored in the file's array."""
        part = array[self.index] if self.index else array
        return rearrange(part, self.pattern, **self.axes).contiguous() if self.pattern else part

    def to_array(self, parameter: Tensor) -> Tensor:
        """The parameter as it is stored at `index` of the file's array; the inverse of `from_array`."""
        stored, _, in_tree = self.pattern.partition("->")
        return rearrange(parameter, f"{in_tree}->{stored}", **self.axes) if self.pattern else parameter


def to_arrays(table: Any, params: Any) -> dict[str, Tensor]:
    """Key -> array, as a file stores the parameters; parameters that share an array are stacked."""
    parts: dict[str, dict[tuple[int, ...], Tensor]] = defaultdict(dict)
    leaves = tree.flatten(params)
    for path, slot in tree.flatten(table).items():
        parts[slot.key][slot.index] = slot.to_array(leaves[path])
    return {key: _stack(parts[key]) for key in parts}


def _stack(parts: dict[tuple[int, ...], Tensor]) -> Tensor:
    if () in parts:
        return parts[()]
    ordered = [parts[index] for index in sorted(parts)]
    leading = [size + 1 for size in max(parts)]
    assert prod(leading) == len(ordered), "a table fills every index of an array"
    return torch.stack(ordered).reshape(*leading, *ordered[0].shape)


def from_arrays(
    table: T,
    abstract: T,
    entries: Mapping[str, Entry],
    where: str,
    dtype: torch.dtype | None,
    device: torch.device,
    model: str = DESCRIBED,
) -> T:
    """The parameters, read from the arrays that the table names; on the meta device no array is read.

    `abstract` is the tree on the meta device, with the expected shapes. Arrays that no model uses (`keys.UNUSED`) are
    ignored. `where` is the file or folder that errors name; `model` says what its arrays are expected to be.
    Raises CheckpointError for a missing key, an unknown key or a wrong shape, naming the key and both shapes.
    """
    expected = to_arrays(table, abstract)
    entries = keys.without_unused(entries, expected, where)
    check_arrays(expected, entries, where, model)
    if dtype is None:
        check_one_dtype(entries, where)
    slots: dict[str, list[tuple[str, Slot]]] = defaultdict(list)
    for path, slot in tree.flatten(table).items():
        slots[slot.key].append((path, slot))
    leaves = {}
    for key, paths_and_slots in slots.items():
        entry = entries[key]
        array = torch.empty(entry.shape, dtype=entry.dtype, device="meta") if device.type == "meta" else entry.read()
        cast = dtype if castable(entry.dtype) else None
        leaves |= {path: slot.from_array(array).to(device=device, dtype=cast) for path, slot in paths_and_slots}
    return tree.replace(abstract, leaves)


def check_arrays(
    expected: Mapping[str, Tensor], entries: Mapping[str, Entry], where: str, model: str = DESCRIBED
) -> None:
    """Raise CheckpointError unless a file holds exactly the expected keys, with their shapes and loadable dtypes."""
    if missing := sorted(expected.keys() - entries.keys()):
        shape = tuple(expected[missing[0]].shape)
        raise CheckpointError(
            f"{where}: {keys.first_of(missing)} is missing, expected shape {shape}; "
            f"the file is incomplete or does not belong to {model}"
        )
    if unknown := sorted(entries.keys() - expected.keys()):
        shape = entries[unknown[0]].shape
        raise CheckpointError(f"{where}: {keys.first_of(unknown)} with shape {shape} is not part of {model}")
    for key, entry in entries.items():
        if tuple(entry.shape) != tuple(expected[key].shape):
            raise CheckpointError(f"{where}: {key}: expected {tuple(expected[key].shape)}, found {tuple(entry.shape)}")
        dtype = expected[key].dtype
        if entry.dtype != dtype and not (castable(entry.dtype) and castable(dtype)):
            numbers = "floating point numbers" if castable(dtype) else dtype
            raise CheckpointError(f"{where}: {key}: expected {numbers}, found {entry.dtype}")


def castable(dtype: torch.dtype) -> bool:
    """Whether an array of this dtype may be cast when it is loaded; the values of quantized weights may not."""
    return dtype.is_floating_point and dtype.itemsize > 1


def check_one_dtype(entries: Mapping[str, Entry], where: str) -> None:
    """Raise CheckpointError unless all weights, and the scales of quantized ones, have one dtype.

    Activations are multiplied by all of them.
    """
    (key, entry), *others = ((key, entry) for key, entry in entries.items() if castable(entry.dtype))
    for other_key, other in others:
        if other.dtype != entry.dtype:
            raise CheckpointError(
                f"{where}: {key} is {entry.dtype}, {other_key} is {other.dtype}; choose one with dtype="
            )
