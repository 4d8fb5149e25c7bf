"""The arguments of a call, read as a list of tensors and a spec: everything that compiled code depends on.

Reading must be fast. A tree of parameters is passed at every call, and flattening and describing it each time would
take longer than a GPU takes for a token. So the result of reading a nested tuple is remembered, and is valid while the
tuple holds the same tensor objects. This module knows nothing about compilers or caches.
"""

import inspect
from collections.abc import Callable, Sequence, Set
from dataclasses import is_dataclass
from itertools import combinations, compress
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor
from torch.utils import _pytree as pytree

from pgfunc.errors import SettingError

SMALL = 2**20  # bytes; a smaller tensor with gaps is made dense
LEAF = pytree.tree_structure(0)
LENGTHS: dict[int, int] = {}  # length -> its only int object in `collect_parts`; Python makes a new one from 257 on

Layout = tuple[Any, ...]  # shape, strides, dtype and device of a tensor


class Parameters:
    """The parameters of a function, all of which have names; binds the arguments of a call to them.

    Raises SettingError if the function takes `*args`, `**kwargs` or positional-only arguments.
    """

    def __init__(self, fn: Callable[..., Any]):
        self._signature = inspect.signature(fn)
        parameters = self._signature.parameters.values()
        self.names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if len(self.names) < len(parameters):
            raise SettingError("the function has arguments without a name of their own (*args, **kwargs or before a /)")
        positional = all(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters)
        self._positional = self.names if positional else []
        self._defaults = [p.default for p in parameters] if positional and parameters else []
        required = sum(p.default is inspect.Parameter.empty for p in parameters)
        self._fast_counts = range(max(1, required), len(self._positional) + 1)  # of positional arguments

    def default(self, name: str) -> Any:
        return self._signature.parameters[name].default

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, with defaults for those that are left out."""
        if not kwargs and len(args) in self._fast_counts:  # faster than inspect
            return dict(zip(self._positional, (*args, *self._defaults[len(args) :]), strict=True))
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)


class ArgumentSpec(NamedTuple):
    """Everything about an argument except the numbers in its tensors."""

    structure: pytree.TreeSpec
    is_tensor: tuple[bool, ...]  # for each leaf
    constants: tuple[Any, ...]  # the leaves that are not tensors
    constant_keys: tuple[Any, ...]  # distinguish constants that compare equal
    layouts: tuple[Layout, ...]  # of the tensors

    def rebuild(self, tensors: list[Tensor]) -> Any:
        """The argument, made of tensors with these layouts."""
        tensor, constant = iter(tensors), iter(self.constants)
        return pytree.tree_unflatten([next(tensor if each else constant) for each in self.is_tensor], self.structure)


class Argument(NamedTuple):
    """An argument as it was read."""

    tensors: list[Tensor]
    addresses: list[int]  # of the tensors
    ids: Set[int]  # of the tensors
    spec_index: int
    unchanged: bool  # whether it holds the same tensor objects as the last argument of that name

    @classmethod
    def of(cls, tensors: list[Tensor], ids: Set[int], spec_index: int, unchanged: bool) -> "Argument":
        return cls(tensors, [*map(Tensor.data_ptr, tensors)], ids, spec_index, unchanged)


class LastValue(NamedTuple):
    """What is remembered of the last value of an argument. It is forgotten when one of its tensors dies."""

    part_ids: list[int]
    is_tensor: list[bool]  # for each part
    references: list[Any]  # to the parts, weak ones to tensors
    tensor_ids: Set[int]
    spec_index: int


class ArgumentReader:
    """Reads the arguments of one function, and numbers their specs."""

    def __init__(self):
        self.specs: list[ArgumentSpec] = []
        self._indices: dict[ArgumentSpec, int] = {}
        self._last: dict[str, LastValue] = {}

    def read(self, name: str, value: Any) -> Argument:
        """Read a value of the argument `name`.

        Raises SettingError if a leaf of the tree is neither a tensor nor hashable.
        """
        parts: list[Any] = []
        immutable = collect_parts(value, parts)
        part_ids, last = [*map(id, parts)], self._last.get(name)
        if immutable and last and last.part_ids == part_ids:
            return Argument.of([*compress(parts, last.is_tensor)], last.tensor_ids, last.spec_index, unchanged=True)
        leaves, structure = ([value], LEAF) if isinstance(value, Tensor) else pytree.tree_flatten(value)
        is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        originals = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        constants = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        tensors = [as_input(x) for x in originals]
        constant_keys, layouts = tuple(map(exact_key, constants)), tuple(map(layout, tensors))
        spec_index = self.add_spec(ArgumentSpec(structure, is_tensor, constants, constant_keys, layouts))
        ids = frozenset(map(id, tensors))
        if immutable and all(one is other for one, other in zip(originals, tensors, strict=True)):
            forget = lambda _: self._last.pop(name, None)  # noqa: E731
            references = [ref(part, forget) if isinstance(part, Tensor) else part for part in parts]
            are_tensors = [isinstance(part, Tensor) for part in parts]
            self._last[name] = LastValue(part_ids, are_tensors, references, ids, spec_index)
        return Argument.of(tensors, ids, spec_index, unchanged=False)

    def add_spec(self, spec: ArgumentSpec) -> int:
        """Add a spec if it is new. Returns its index."""
        try:
            index = self._indices.setdefault(spec, len(self.specs))
        except TypeError:
            types = ", ".join(sorted({type(leaf).__name__ for leaf in spec.constants}))
            raise SettingError(f"an argument is neither a tensor nor a value that can be hashed: {types}") from None
        if index == len(self.specs):
            self.specs.append(spec)
        return index


def exact_key(value: Any) -> Any:
    """A key that distinguishes values which compare equal.

    2 == 2.0 == True, 0.0 == -0.0, and a dataclass may leave fields out of its comparison.
    """
    return (type(value), repr(value)) if isinstance(value, float) or is_dataclass(value) else type(value)


def collect_parts(value: Any, parts: list[Any]) -> bool:
    """Append to `parts` the objects whose ids identify a nested tuple: its leaves, and each tuple's type and length.

    Returns False if the value contains another container, whose content may change while its id stays.
    """
    if not isinstance(value, tuple):
        parts.append(value)
        return type(value) not in pytree.SUPPORTED_NODES
    parts += (type(value), LENGTHS.setdefault(len(value), len(value)))
    immutable = True
    for each in value:
        if type(each) is Tensor:  # the usual case
            parts.append(each)
        else:
            immutable &= collect_parts(each, parts)
    return immutable


def aliasing(groups: Sequence[tuple[list[Tensor], Set[int]]]) -> tuple[int, ...]:
    """For each tensor the index of its first occurrence, or () if all tensors are different objects.

    Code that was compiled for one tensor passed twice is wrong for two tensors. A group is a list of tensors and the
    set of their ids.
    """
    distinct = all(len(ids) == len(tensors) for tensors, ids in groups)
    if distinct and all(one.isdisjoint(other) for (_, one), (_, other) in combinations(groups, 2)):
        return ()
    ids = [id(x) for tensors, _ in groups for x in tensors]
    return tuple(map(ids.index, ids))


def as_input(x: Tensor) -> Tensor:
    """The tensor without a gradient, with strides that follow from its shape, so that slices share compiled code.

    A small tensor with gaps is made dense: a slice of a growing tensor would have new strides at each call. A large
    one keeps its strides, and so does one that is expanded.
    """
    x = x.detach() if x.requires_grad or type(x) is not Tensor else x
    if x.is_contiguous():  # but an axis of size 1 may have any stride
        dense = dense_strides(x.shape)
        return x if x.stride() == dense else x.as_strided(x.shape, dense)
    without_gaps = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).is_contiguous()
    return x if x.nbytes > SMALL or 0 in x.stride() or without_gaps else x.contiguous()


def dense_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of this shape."""
    reversed_strides, step = [], 1
    for size in reversed(sizes):
        reversed_strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(reversed_strides))


def layout(x: Tensor) -> Layout:
    return x.shape, x.stride(), x.dtype, x.device
