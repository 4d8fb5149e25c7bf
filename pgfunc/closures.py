"""What a function closes over, its globals included: compiled code reads it at each call, as it reads its arguments.

PyTorch finds out which tensors and numbers a function reads while it compiles it, and names each by an expression such
as `fn.__closure__[0].cell_contents`. Those expressions are kept. Tensors may be exchanged for others of their shape;
for anything else that is not what it was, the code is not the right one. Knows nothing about models.
"""

import re
from collections.abc import Iterable
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from pgfunc.arguments import shape
from pgfunc.errors import SettingError

# the checks that PyTorch would make of what may change: tensors, constants, which function it is, lengths, keys
WATCHED = frozenset({
    "TENSOR_MATCH", "CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH", "ID_MATCH", "CLOSURE_MATCH",
    "FUNCTION_MATCH", "SEQUENCE_LENGTH", "DICT_LENGTH", "DICT_KEYS_MATCH", "DICT_CONTAINS",
})  # fmt: skip
MODULE = re.compile(r"G\['__import_(\w+?)(?:_dot_\w+)?'\]")
LIBRARIES = frozenset({"pgfunc", "torch", "einops", "numpy", "builtins", "math", "typing"})
PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Same(NamedTuple):
    """An object, which is equal to itself alone."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class Closed(NamedTuple):
    """What compiled code reads beside its arguments."""

    names: tuple[str, ...]
    code: CodeType  # gives the values, as a tuple
    scope: dict[str, Any]
    kinds: list[Any]  # what of the values the code is for

    def tensors(self) -> list[Tensor] | None:
        """The tensors as they are now; None where the code is not for what is closed over now."""
        if not self.names:
            return []
        try:
            values = eval(self.code, self.scope)  # an expression of PyTorch's own
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # what held it is another
            return None
        return [x for x in values if isinstance(x, Tensor)] if [*map(kind, values)] == self.kinds else None


def closed(guards: Iterable[Any], scope: dict[str, Any]) -> Closed:
    """What is closed over, by the checks that PyTorch would make before each call of compiled code.

    `scope` has the names in the expressions. Raises SettingError for a tensor that cannot be read by its expression.
    """
    values = {guard.name: guard.value for guard in guards if guard.guard_type in WATCHED and foreign(guard.name)}
    names = tuple(name for name, value in values.items() if found_by(name, scope) is value)
    for name, value in values.items():
        if isinstance(value, Tensor) and name not in names:
            raise SettingError(f"the function closes over a tensor ({name}) that may change: give it as an argument")
    code = compile(f"({''.join(f'{name}, ' for name in names)})", "<closed over>", "eval")
    return Closed(names, code, scope, [kind(values[name]) for name in names])


def found_by(name: str, scope: dict[str, Any]) -> Any:
    """What an expression gives, or the error that it is."""
    try:
        return eval(name, scope)
    except Exception as error:  # it is PyTorch's, which may use what is not in the scope
        return error


def foreign(name: str) -> bool:
    """Whether an expression begins at the user's function, or at a global of the user's module."""
    if name.startswith("fn"):
        return True
    if name.startswith("kinds["):  # a function among the arguments
        return "__closure__" in name or "__defaults__" in name or "__self__" in name
    module = MODULE.match(name)
    return bool(module) and module[1] not in LIBRARIES


def kind(value: Any) -> Any:
    """What code is compiled for: a tensor's shape, a number, the length of a list, or the object itself."""
    if isinstance(value, Tensor):
        return shape(value)
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, (list, tuple)):
        return type(value), len(value)
    if isinstance(value, dict):
        return type(value), [*value]
    return Same(value)


def reachable(functions: Iterable[Any]) -> list[Tensor]:
    """The tensors that functions which run as they are may read beside their arguments.

    They lie in the cells and defaults of the functions, and of the functions in those.
    """
    found: list[Tensor] = []
    seen: set[int] = set()
    waiting = [*functions]
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Tensor):
                found.append(value)
            waiting += pytree.tree_leaves(held(value))
    return found


def held(fn: Any) -> list[Any]:
    """What a function has beside its arguments."""
    if isinstance(fn, FunctionType):
        cells = [cell.cell_contents for cell in fn.__closure__ or () if cell != CellType()]  # an empty cell has none
        return [cells, fn.__defaults__ or (), fn.__kwdefaults__ or {}]
    if isinstance(fn, partial):
        return [fn.func, fn.args, fn.keywords]
    if isinstance(fn, MethodType):
        return [fn.__func__, getattr(fn.__self__, "__dict__", {})]
    return []
