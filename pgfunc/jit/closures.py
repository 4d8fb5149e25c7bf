"""What a function closes over, its globals included: compiled code reads it at each call, as it reads its arguments.

PyTorch finds out which tensors and numbers a function reads while it compiles it, and names each by an expression such
as `fn.__closure__[0].cell_contents`. Those expressions are kept. Tensors may be exchanged for others of their shape;
for anything else that is not what it was, the code is not the right one. Knows nothing about models.
"""

import re
from collections.abc import Iterable, Sized
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from pgfunc.errors import SettingError
from pgfunc.jit.arguments import shape

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
        except Exception:  # what held it is another
            return None
        return [x for x in values if isinstance(x, Tensor)] if kinds_of(values) == self.kinds else None


def closed(guards: Iterable[Any], scope: dict[str, Any]) -> Closed:
    """What is closed over, by the checks that PyTorch would make before each call of compiled code.

    `scope` has the names in the expressions. Raises SettingError for a tensor that cannot be read by its expression.
    """
    guarded = {guard.name: guard.value for guard in guards if foreign(guard.name)}
    values = {name: found_by(name, scope) for name in guarded}
    for name, value in guarded.items():
        if isinstance(value, Tensor) and values[name] is not value:
            raise SettingError(f"the function closes over a tensor ({name}) that may change: give it as an argument")
    # what is another object at each look, as a slot of a class may be, says nothing
    names = tuple(
        name
        for name, value in values.items()
        if not isinstance(value, Exception) and kind(value) == kind(found_by(name, scope))
    )
    code = compile(f"({''.join(f'{name}, ' for name in names)})", "<closed over>", "eval")
    return Closed(names, code, scope, kinds_of([values[name] for name in names]))


def found_by(name: str, scope: dict[str, Any]) -> Any:
    """What an expression gives, or the error that it is."""
    try:
        return eval(name, scope)
    except Exception as error:  # it is PyTorch's, which may use what is not in the scope
        return error


def foreign(name: str) -> bool:
    """Whether an expression begins at the user's function, at what is fixed among its arguments, or at a global of the
    user's module."""
    if name.startswith(("fn", "G['___unnamed_scope")):
        return True
    if name.startswith("kinds["):
        return ".fixed[" in name
    module = MODULE.match(name)
    return bool(module) and module[1] not in LIBRARIES


def kinds_of(values: Iterable[Any]) -> list[Any]:
    """What code is compiled for: the kind of each value, and which tensors are one."""
    values = [*values]
    tensors = [id(x) for x in values if isinstance(x, Tensor)]
    return [*map(kind, values), [*map(tensors.index, tensors)]]


def kind(value: Any) -> Any:
    """What code is compiled for: a tensor's shape, a number, what a container holds, or the object itself."""
    if isinstance(value, Tensor):
        return shape(value)
    if isinstance(value, PLAIN):
        return type(value), repr(value)  # -0.0 == 0.0, and nan is not nan
    if isinstance(value, MethodType):
        return Same(value.__func__), Same(value.__self__)
    if isinstance(value, (set, frozenset, dict)):
        return type(value), [*value]
    if isinstance(value, Sized) and isinstance(value, Iterable):
        return type(value), len(value)
    return Same(value), type(value), [*getattr(value, "__dict__", ())]


def reachable(functions: Iterable[Any]) -> tuple[list[Tensor], list[Any]]:
    """The tensors that functions which run as they are may read beside their arguments, and the kinds of all else.

    They lie in the cells, defaults, globals and attributes of the functions, and of the functions and objects in those.
    """
    tensors: list[Tensor] = []
    kinds: list[Any] = []
    seen: set[int] = set()
    waiting = [*functions]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or (not isinstance(value, Tensor) and of_library(value)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            tensors.append(value)
        kinds.append(kind(value))
        waiting += held(value)
    return tensors, kinds


def of_library(value: Any) -> bool:
    """Whether a value is a module, a class, or a function of a library, which nobody changes."""
    module = value.__module__ if isinstance(value, (FunctionType, BuiltinFunctionType)) else type(value).__module__
    return isinstance(value, (ModuleType, type)) or (
        callable(value)
        and not isinstance(value, (partial, MethodType))
        and str(module).split(".")[0] in LIBRARIES - {"builtins"}
    )


def held(value: Any) -> list[Any]:
    """What a function or an object has."""
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]  # an empty cell has none
        globals_ = [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *globals_]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, (list, tuple)):
        return [*value]
    if isinstance(value, dict):
        return [*value.values()]
    return [] if isinstance(value, (Tensor, *PLAIN)) else [*getattr(value, "__dict__", {}).values()]
