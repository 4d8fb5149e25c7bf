"""The free variables of a function, globals included. Compiled code reads them at each call, as it reads arguments.

While PyTorch compiles a function it finds out which tensors and numbers the function reads, and names each by an
expression such as `fn.__closure__[0].cell_contents`. We keep those expressions and evaluate them before each call. A
tensor may be replaced by another one of the same layout; if anything else changed, the code is not valid for this call.
This module knows nothing about models.
"""

import re
from collections.abc import Iterable, Sized
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from pgfunc.errors import SettingError
from pgfunc.jit.arguments import layout

UNNAMED = re.compile(r"G\['(___unnamed_scope_\w+)'\]")
MODULE = re.compile(r"G\['__import_(\w+?)(?:_dot_\w+)?'\]")
LIBRARIES = frozenset({"pgfunc", "torch", "einops", "numpy", "builtins", "math", "typing"})
PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Identity(NamedTuple):
    """Wraps an object, and equals only a wrapper of the same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.value is other.value

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class FreeVariables(NamedTuple):
    """What compiled code reads besides its arguments."""

    expressions: tuple[str, ...]
    code: CodeType  # evaluates all expressions to a tuple
    scope: dict[str, Any]
    expected: list[Any]  # the fingerprints that the code was compiled for

    def tensors(self) -> list[Tensor] | None:
        """The tensors among the current values; None if the code is not valid for these values."""
        if not self.expressions:
            return []
        try:
            values = eval(self.code, self.scope)  # the expressions are PyTorch's
        except Exception:  # the object that held the value was replaced
            return None
        return [x for x in values if isinstance(x, Tensor)] if fingerprints(values) == self.expected else None


def free_variables(guards: Iterable[Any], scope: dict[str, Any]) -> FreeVariables:
    """The free variables, found in the guards that PyTorch would check before each call of compiled code.

    `scope` defines the names in the expressions. Raises SettingError if a tensor cannot be read by its expression.
    """
    guarded = {guard.name: guard.value for guard in guards if is_user_value(guard.name, scope["G"])}
    values = {name: evaluate(name, scope) for name in guarded}
    for name, value in guarded.items():
        if isinstance(value, Tensor) and values[name] is not value:
            raise SettingError(f"the function closes over a tensor ({name}) that may change: pass it as an argument")
    # an expression that gives a new object at each evaluation, such as a property, cannot be checked
    expressions = tuple(
        name
        for name, value in values.items()
        if not isinstance(value, Exception) and fingerprint(value) == fingerprint(evaluate(name, scope))
    )
    code = compile(f"({''.join(f'{name}, ' for name in expressions)})", "<free variables>", "eval")
    return FreeVariables(expressions, code, scope, fingerprints([values[name] for name in expressions]))


def evaluate(expression: str, scope: dict[str, Any]) -> Any:
    """The value of an expression, or the exception that it raises."""
    try:
        return eval(expression, scope)
    except Exception as error:  # PyTorch's expression may use names that the scope does not have
        return error


def is_user_value(expression: str, namespace: dict[str, Any]) -> bool:
    """Whether an expression reads the user's function, a constant argument, or a global of a user's module.

    `namespace` is the G of the expressions. PyTorch adds to it the globals of functions that belong to no module; the
    constructor of a NamedTuple is one, and nobody changes its globals.
    """
    if expression.startswith("fn"):
        return True
    if unnamed := UNNAMED.match(expression):
        return not str(namespace[unnamed[1]].get("__name__")).startswith("namedtuple_")
    if expression.startswith("specs["):
        return ".constants[" in expression
    module = MODULE.match(expression)
    return bool(module) and module[1] not in LIBRARIES


def fingerprints(values: Iterable[Any]) -> list[Any]:
    """What code is compiled for: the fingerprint of each value, and which tensors are the same object."""
    values = [*values]
    tensors = [id(x) for x in values if isinstance(x, Tensor)]
    return [*map(fingerprint, values), [*map(tensors.index, tensors)]]


def fingerprint(value: Any) -> Any:
    """A tensor's layout, a number itself, a container's type and size, or the identity of any other object."""
    if isinstance(value, Tensor):
        return layout(value)
    if isinstance(value, PLAIN):
        return type(value), repr(value)  # -0.0 == 0.0, and nan is not nan
    if isinstance(value, MethodType):
        return Identity(value.__func__), Identity(value.__self__)
    if isinstance(value, ModuleType):  # a notebook adds names to its module; those that are read have expressions
        return Identity(value)
    if isinstance(value, (set, frozenset, dict)):
        return type(value), [*value]
    if isinstance(value, Sized) and isinstance(value, Iterable):
        return type(value), len(value)
    return Identity(value), type(value), [*getattr(value, "__dict__", ())]


def reachable(functions: Iterable[Any]) -> tuple[list[Tensor], list[Any]]:
    """All tensors that functions may read besides their arguments, and the fingerprints of everything they may read.

    Used for functions that run eagerly, because PyTorch reports no guards for them. Follows cells, defaults, globals
    and attributes, recursively.
    """
    tensors: list[Tensor] = []
    reached: list[Any] = []  # fingerprints
    visited: set[int] = set()
    pending = [*functions]
    while pending:
        value = pending.pop()
        if id(value) in visited or (not isinstance(value, Tensor) and is_library_value(value)):
            continue
        visited.add(id(value))
        if isinstance(value, Tensor):
            tensors.append(value)
        reached.append(fingerprint(value))
        pending += members(value)
    return tensors, reached


def is_library_value(value: Any) -> bool:
    """Whether a value is a module, a class or a library's function, which we assume nobody changes."""
    module = value.__module__ if isinstance(value, (FunctionType, BuiltinFunctionType)) else type(value).__module__
    return isinstance(value, (ModuleType, type)) or (
        callable(value)
        and not isinstance(value, (partial, MethodType))
        and str(module).split(".")[0] in LIBRARIES - {"builtins"}
    )


def members(value: Any) -> list[Any]:
    """The values that a function or an object refers to."""
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]  # skip empty cells
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
