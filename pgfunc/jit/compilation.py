"""Functions -> compiled code, by torch.compile: the whole function, or one block at a time. Errors become one line.

A function with a donated cache may only append to it. There are two checks: of the graph of its operations
(`overwriting`), and of an eager run, which must leave the visible slots unchanged.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import einops
import torch
from einops import rearrange
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from pgfunc.cache import Cache
from pgfunc.errors import SettingError, first_line
from pgfunc.jit.arguments import ArgumentSpec
from pgfunc.jit.closures import FreeVariables, free_variables, reachable
from pgfunc.jit.donation import buffers
from pgfunc.jit.overwriting import REORDER, Appends, appends

# tracing how a pattern is parsed took most of a compilation
torch.compiler.allow_in_graph([einops.rearrange, einops.repeat, einops.reduce, einops.einsum])
CONTINUATION = "\0the continuation"  # its placeholder among the results of compiled code


class Code:
    """Compiled code: a function of a list of tensors, which uses the first `count` of them."""

    def __init__(
        self,
        run: Callable[[list[Tensor]], Any],
        count: int,
        free_tensors: Callable[[], list[Tensor] | None],
        appends: list[Appends | None] | None = None,
    ):
        self.run, self.count = run, count
        # the tensors that the code closes over; None if the code is not valid for the current values
        self.free_tensors = free_tensors
        self.appends = [] if appends is None else appends  # what its graph proves, known after the first call

    def __call__(self, tensors: list[Tensor]) -> Any:
        return self.run(tensors[: self.count])


def compile_whole(fn: Callable[..., Any], donate: str | None, specs: dict[str, ArgumentSpec], count: int) -> Code:
    """Compile `fn` to a function of `count` tensors: those of each argument, then those of the donated cache.

    It returns the results of `fn` and the length of the continuation. The continuation's buffers are the donated ones.
    """

    def body(tensors: list[Tensor]):
        arguments, start = {}, 0
        for name, spec in specs.items():
            arguments[name] = spec.rebuild(tensors[start : start + len(spec.layouts)])
            start += len(spec.layouts)
        if donate is None:
            return fn(**arguments), ()
        layers = (len(tensors) - start) // 2
        cache = Cache(tuple(tensors[start : start + layers]), tuple(tensors[start + layers : -1]), tensors[-1])
        results = fn(**arguments, **{donate: cache})
        new = returned_cache(results)
        for old, after in zip(buffers(cache), buffers(new), strict=True):
            old.copy_(after)  # inductor reduces this copy to writing the new slots
        length = new.length.expand_as(cache.length)  # the same; `overwriting` finds both lengths by this operation
        return pytree.tree_map(lambda x: CONTINUATION if x is new else x, results, is_leaf=lambda x: x is new), length

    variables: list[FreeVariables] = []
    found: list[Appends | None] = []

    def drop_guards(guards: list[Any]) -> list[bool]:
        variables[:] = [free_variables(guards, {"fn": fn, "specs": specs, "G": body.__globals__})]
        return [False] * len(guards)

    # checking all guards before each call would take longer than a layer; the caller's key has what they would check
    run = torch_compiled(body, {"guard_filter_fn": drop_guards}, found)
    return Code(run, count, lambda: variables[0].tensors(), found)


def compile_blocks(fn: Callable[..., Any], specs: dict[str, ArgumentSpec], count: int) -> Code:
    """Like `compile_whole`, for a function that takes `wrap`: compiles only what it wraps, once for each shape."""
    wrapped: dict[Callable, Callable] = {}

    def wrap(block: Callable) -> Callable:
        if block not in wrapped:
            wrapped[block] = torch_compiled(block)
        return wrapped[block]

    def body(tensors: list[Tensor]):
        rest = iter(tensors)
        arguments = {name: spec.rebuild([next(rest) for _ in spec.layouts]) for name, spec in specs.items()}
        with torch._dynamo.config.patch(recompile_limit=1000):  # with a tap each layer has its own code
            return fn(**arguments, wrap=wrap), ()

    functions = [fn, *(constant for spec in specs.values() for constant in spec.constants if callable(constant))]
    _, expected = reachable(functions)

    def free_tensors() -> list[Tensor] | None:  # eager code reads them itself, but a CUDA graph needs their addresses
        tensors, fingerprints = reachable(functions)
        return tensors if fingerprints == expected else None

    return Code(body, count, free_tensors)


def torch_compiled(
    fn: Callable, options: dict[str, Any] | None = None, found: list[Appends | None] | None = None
) -> Callable:
    """The function, compiled as one graph. It gets its own code object, as torch limits the versions of each."""
    if not isinstance(fn, FunctionType):  # a method, a partial, a callable object
        return torch_compiled(lambda *args, **kwargs: fn(*args, **kwargs), options, found)
    copy = FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__kwdefaults__ = fn.__kwdefaults__
    backend = partial(checked_inductor, [] if found is None else found)
    return torch.compile(copy, dynamic=False, fullgraph=True, options=options, backend=backend)


def checked_inductor(found: list[Appends | None], graph: fx.GraphModule, inputs: list[Any]) -> Callable:
    """The inductor backend. Adds to `found` how the graph changes a donated cache; raises the errors of `appends`."""
    from torch._dynamo.backends.registry import lookup_backend

    found.append(appends(graph.graph))
    return lookup_backend("inductor")(graph, inputs)


def returned_cache(results: Any) -> Cache:
    """The only cache among the results. Raises SettingError if there is none or more than one."""
    leaves = pytree.tree_leaves(results, is_leaf=lambda x: isinstance(x, Cache))
    caches = [x for x in leaves if isinstance(x, Cache)]
    if len(caches) != 1:
        raise SettingError(
            f"the function returns {len(caches)} caches, expected one: the continuation of the donated one"
        )
    return caches[0]


def check_appends(cache: Cache, new: Cache) -> None:
    """Raise SettingError if `new` differs from the cache in slots before the cache's length."""
    visible = torch.arange(cache.slots, device=cache.length.device) < rearrange(cache.length, "b -> b 1")
    for old, after in zip(buffers(cache), buffers(new), strict=True):
        if old.shape != after.shape or not torch.allclose(old[visible], after[visible], rtol=0, atol=0, equal_nan=True):
            raise SettingError(f"the function changes a donated cache before its length: {REORDER}")
    if (new.length < cache.length).any():
        raise SettingError("the function makes a donated cache shorter: it may only append to it; see pg.rewind")


def explain_error(error: Exception, name: str) -> SettingError | None:
    """A one-line error if torch.compile cannot compile the function `name`; None for any other error."""
    from torch._dynamo import exc

    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, SettingError):
        return inner
    known = exc.Unsupported, exc.UserError, exc.TorchRuntimeError, exc.ObservedException, exc.InternalTorchDynamoError
    if not isinstance(error, known):
        return None
    text, stack = str(error), getattr(error, "real_stack", None)
    if "ata-dependent" in text:  # PyTorch writes both "Data-dependent" and "data-dependent"
        reason = "it branches on a number in a tensor; use torch.where, or branch outside of the function"
    else:
        reason = match[1] if (match := re.search(r"Explanation: (.+)", text)) else first_line(error)
    where = f" ({Path(stack[-1].filename).name}, line {stack[-1].lineno})" if stack else ""
    return SettingError(f"{name} cannot be compiled{where}: {reason}")
