"""Functions of functions: `capture` returns activations, `edit` replaces them, `names` lists them."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import _pytree as pytree

from pgfunc import taps
from pgfunc.errors import SettingError
from pgfunc.lab.naming import Log, Shape, axes_of, check_known, describe, matches, matches_any
from pgfunc.taps import Tap, identity


def capture(fn: Callable[..., Any], *patterns: str) -> Callable[..., Any]:
    """A function with the arguments of `fn` that returns `(result, {name: activation})`; `tap` is passed by name.

    `patterns` are names, or patterns of `fnmatch`: `capture(pg.forward, "language.*.z")`. Raises SettingError if a
    pattern matches nothing, or if an activation passes twice, as in a loop.
    """

    @wraps(fn)
    def captured(*args: Any, tap: Tap = identity, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        recorder = Recorder(patterns, tap)
        result = fn(*args, tap=recorder, **kwargs)
        recorder.log.check(patterns)
        recorder.finished = True
        return result, recorder.seen

    return with_tap_by_name(captured, fn)


def edit(fn: Callable[..., Any], changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Callable[..., Any]:
    """A function with the arguments of `fn` that replaces activations; `tap` is passed by name.

    `changes` has, for each name or pattern of `fnmatch`, a pure function from the activation to its replacement.
    Raises SettingError if a pattern matches nothing, or if a replacement has another shape or dtype.
    """
    patterns = tuple(changes)

    @wraps(fn)
    def edited(*args: Any, tap: Tap = identity, **kwargs: Any) -> Any:
        log = Log()
        result = fn(*args, tap=Edits(patterns, tuple(changes.values()), tap, log), **kwargs)
        log.check(patterns)
        return result

    return with_tap_by_name(edited, fn)


def with_tap_by_name(wrapper: Callable[..., Any], fn: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper, with the signature of `fn`, in which `tap` has a default, and it and what follows have names."""
    if torch.compiler.is_compiling():  # nobody reads the signature there, and torch 2.11 cannot trace `inspect`
        return wrapper
    signature = inspect.signature(fn)
    parameters = [*signature.parameters.values()]
    at = [*signature.parameters, "tap"].index("tap")
    later = [p.replace(kind=p.KEYWORD_ONLY) if p.kind == p.POSITIONAL_OR_KEYWORD else p for p in parameters[at + 1 :]]
    tap = Parameter("tap", Parameter.KEYWORD_ONLY, default=identity)
    parameters = sorted([*parameters[:at], *later, tap], key=lambda p: p.kind)  # **kwargs stay last
    wrapper.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return wrapper


def edits(changes: Mapping[str, Callable[[Tensor], Tensor]], tap: Tap = identity) -> "Edits":
    """The tap of `edit`, as a value: `pg.generate(..., tap=edits({"language.3.resid_post": add(vector)}))`.

    It is a tree whose leaves are the tensors of `put`, `add` and `block`, so compiled code takes it as an argument.
    Another tap gets the edited values. `generate`, `stream` and `score` check its names; for one call, use `edit`.
    """
    return Edits(tuple(changes), tuple(changes.values()), tap)


class Edits(NamedTuple):
    """A tap that replaces activations."""

    patterns: tuple[str, ...]
    changes: tuple[Callable[[Tensor], Tensor], ...]
    outer: Tap = identity
    log: Log | tuple[()] = ()

    def asks(self, name: str) -> bool:
        if isinstance(self.log, Log):
            self.log.offered.add(name)
        return matches_any(name, self.patterns) or taps.asks(self.outer, name)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if isinstance(self.log, Log):
            self.log.passed.add(name)
        for pattern, change in zip(self.patterns, self.changes, strict=True):
            if matches(name, pattern):
                new = change(x)
                if not isinstance(new, Tensor) or new.shape != x.shape or new.dtype != x.dtype:
                    raise SettingError(f"the edit of {name} returns {describe(new)}, expected {describe(x)}")
                x = new
        return self.outer(name, x)

    def bind(self, names: list[str]) -> "Edits":
        """The tap for a loop of calls that have these names. Raises SettingError if a pattern matches none."""
        check_known(self.patterns, names, names)
        if isinstance(self.log, Log):
            self.log.checked = True
        return self._replace(log=(), outer=taps.bind(self.outer, names))


class Recorder:
    """A tap that keeps activations."""

    def __init__(self, patterns: tuple[str, ...], outer: Tap):
        self.patterns, self.outer, self.log = patterns, outer, Log()
        self.finished = False  # then a backward pass recomputes activations, which are not kept
        self.seen: dict[str, Tensor] = {}

    def asks(self, name: str) -> bool:
        self.log.offered.add(name)
        return matches_any(name, self.patterns) or taps.asks(self.outer, name)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        self.log.passed.add(name)
        if not self.finished and matches_any(name, self.patterns):
            if name in self.seen:
                raise SettingError(f"{name} passes twice in this call: capture a function that computes it once")
            self.seen[name] = x
        return self.outer(name, x)

    def bind(self, names: list[str]) -> "Recorder":
        raise SettingError("a loop computes each activation many times: capture pg.prefill, pg.extend or pg.decode")


def names(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Shape]:
    """The activations of a call of `fn`, in order: `{name: Shape}`. Nothing is computed, and no memory is allocated.

    Raises SettingError if `fn` reads tensors that are not arguments.
    """
    shapes: dict[str, Shape] = {}

    class Lister:
        def asks(self, name: str) -> bool:
            return True

        def __call__(self, name: str, x: Tensor) -> Tensor:
            shapes[name] = Shape(x.shape, axes_of(name, x.dim()))
            return x

    meta_args, meta_kwargs = pytree.tree_map_only(Tensor, lambda x: x.detach().to("meta"), (args, kwargs))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        try:
            fn(*meta_args, tap=Lister(), **meta_kwargs)
        except RuntimeError as error:
            if not isinstance(error, DataDependentOutputException) and "device" not in str(error).lower():
                raise
            raise SettingError("names needs every tensor as an argument; the function closes over some") from None
    return shapes
