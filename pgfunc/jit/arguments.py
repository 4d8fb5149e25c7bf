"""The arguments of a call as tensors, and what is fixed about them: what code is compiled for. Quick to find again.

A tree of parameters comes back call after call, and to flatten and describe it anew would take longer than a GPU takes
for a token. What was learned of a nested tuple holds as long as it has the same tensors, object by object. Knows
nothing about compilers or caches.
"""

from collections.abc import Sequence, Set
from dataclasses import is_dataclass
from itertools import combinations, compress
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor
from torch.utils import _pytree as pytree

from pgfunc.errors import SettingError

LITTLE = 2**20  # bytes
LEAF = pytree.tree_structure(0)


class Kind(NamedTuple):
    """All about an argument but the numbers in its tensors."""

    structure: pytree.TreeSpec
    moving: tuple[bool, ...]  # which leaves are tensors
    fixed: tuple[Any, ...]  # the other leaves
    types: tuple[Any, ...]  # what tells them apart where they are equal
    shapes: tuple[Any, ...]  # of the tensors, with strides, dtypes and devices

    def rebuilt(self, tensors: list[Tensor]) -> Any:
        """The argument, from tensors of these shapes."""
        moving, fixed = iter(tensors), iter(self.fixed)
        return pytree.tree_unflatten([next(moving if moves else fixed) for moves in self.moving], self.structure)


class Argument(NamedTuple):
    tensors: list[Tensor]
    places: list[int]  # where they lie
    ids: Set[int]  # of the tensors
    kind: int  # the number of its kind
    known: bool  # whether it came before, and is made of the same tensors

    @classmethod
    def of(cls, tensors: list[Tensor], ids: Set[int], kind: int, known: bool) -> "Argument":
        return cls(tensors, [*map(Tensor.data_ptr, tensors)], ids, kind, known)


class Known(NamedTuple):
    """What was learned of an argument's last value: it holds until one of its tensors is gone."""

    parts: list[int]  # their ids
    moving: list[bool]  # which of them are tensors
    held: list[Any]  # the other parts; of tensors, what tells that one is gone
    ids: Set[int]  # of the tensors
    kind: int


class Arguments:
    """The arguments of one function, and the kinds that it has met."""

    def __init__(self):
        self.kinds: list[Kind] = []
        self._numbers: dict[Kind, int] = {}
        self._last: dict[str, Known] = {}

    def read(self, name: str, value: Any) -> Argument:
        """A value of the argument of that name: a tree of tensors and of what can be hashed, else a SettingError."""
        parts: list[Any] = []
        constant = spread(value, parts)
        ids_of_parts, last = [*map(id, parts)], self._last.get(name)
        if constant and last and last.parts == ids_of_parts:
            return Argument.of([*compress(parts, last.moving)], last.ids, last.kind, known=True)
        leaves, structure = ([value], LEAF) if isinstance(value, Tensor) else pytree.tree_flatten(value)
        moving = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        fixed = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        tensors = [as_input(x) for x in given]
        kind = self.number(Kind(structure, moving, fixed, tuple(map(exact, fixed)), tuple(map(shape, tensors))))
        ids = frozenset(map(id, tensors))
        if constant and all(one is other for one, other in zip(given, tensors, strict=True)):
            forget = lambda _: self._last.pop(name, None)  # noqa: E731
            held = [ref(part, forget) if isinstance(part, Tensor) else part for part in parts]
            self._last[name] = Known(ids_of_parts, [isinstance(part, Tensor) for part in parts], held, ids, kind)
        return Argument.of(tensors, ids, kind, known=False)

    def number(self, kind: Kind) -> int:
        try:
            number = self._numbers.setdefault(kind, len(self.kinds))
        except TypeError:
            kinds = ", ".join(sorted({type(leaf).__name__ for leaf in kind.fixed}))
            raise SettingError(f"an argument is neither a tensor nor a value that can be hashed: {kinds}") from None
        if number == len(self.kinds):
            self.kinds.append(kind)
        return number


def exact(value: Any) -> Any:
    """What tells equal values apart: 2 == 2.0 == True, 0.0 == -0.0, and what a dataclass does not compare."""
    return (type(value), repr(value)) if isinstance(value, float) or is_dataclass(value) else type(value)


def spread(value: Any, parts: list[Any]) -> bool:
    """Add to the parts what tells nested tuples apart; False for other containers, which change while they stay."""
    if not isinstance(value, tuple):
        parts.append(value)
        return type(value) not in pytree.SUPPORTED_NODES
    parts += (type(value), len(value))
    constant = True
    for each in value:
        if type(each) is Tensor:  # as nearly all are
            parts.append(each)
        else:
            constant &= spread(each, parts)
    return constant


def repeated(groups: Sequence[tuple[list[Tensor], Set[int]]]) -> tuple[int, ...]:
    """Which of the tensors of all groups are which, where some are the same: code for two that are one is not that for
    two. A group has its tensors and their ids."""
    alone = all(len(ids) == len(tensors) for tensors, ids in groups)
    if alone and all(one.isdisjoint(other) for (_, one), (_, other) in combinations(groups, 2)):
        return ()
    every = [id(x) for tensors, _ in groups for x in tensors]
    return tuple(map(every.index, every))


def as_input(x: Tensor) -> Tensor:
    """A tensor without a gradient, whose strides follow from its shape: where it was cut from must not matter.

    A little one with gaps is made dense: a slice of what grows would be another kind at each call. A large one keeps
    its strides, as one does that has a single copy of many rows.
    """
    x = x.detach() if x.requires_grad or type(x) is not Tensor else x
    if x.is_contiguous():  # but axes of size 1 may have any stride
        dense = strides(x.shape)
        return x if x.stride() == dense else x.as_strided(x.shape, dense)
    without_gaps = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).is_contiguous()
    return x if x.nbytes > LITTLE or 0 in x.stride() or without_gaps else x.contiguous()


def strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Those of a dense tensor, the last axis first."""
    found, step = [], 1
    for size in reversed(sizes):
        found.append(step)
        step *= max(size, 1)
    return tuple(reversed(found))


def shape(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device
