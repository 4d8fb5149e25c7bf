"""Functions -> compiled code, by torch.compile: whole, or a block at a time. What cannot be compiled is one line.

A function that is given a cache to append to must do nothing else with it. That is read off the graph of its
operations: the buffers that come back must be those that went in, but for elements that were written over.
"""

import re
from collections.abc import Callable
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
from pgfunc.jit.arguments import Kind
from pgfunc.jit.closures import Closed, closed, reachable
from pgfunc.jit.donation import buffers

for fn in (einops.rearrange, einops.repeat, einops.reduce, einops.einsum):
    torch.compiler.allow_in_graph(fn)  # whole: to trace how a pattern is parsed took most of a compilation
CACHE = "\0the continuation"  # stands for it among the results of compiled code
# operations whose result is their first argument, with some elements written over
OVER = {"index_put", "index_copy", "index_fill", "scatter", "slice_scatter", "select_scatter", "masked_fill",
        "masked_scatter", "clone", "contiguous", "detach"}  # fmt: skip
IN_PLACE = {"setitem", "index_put_", "index_copy_", "index_fill_", "scatter_", "masked_fill_", "masked_scatter_"}
REORDER = "it may append to it alone; reorder rows outside of the function, by pg.reorder"


class Code:
    """Compiled code: a function of tensors, of which it reads the first `count`."""

    def __init__(self, run: Callable[[list[Tensor]], Any], count: int, extra: Callable[[], list[Tensor] | None]):
        self.run, self.count = run, count
        self.extra = extra  # the tensors that it closes over; None where it is not for what is closed over now

    def __call__(self, tensors: list[Tensor]) -> Any:
        return self.run(tensors[: self.count])


def compiled(fn: Callable[..., Any], donate: str | None, kinds: dict[str, Kind], count: int) -> Code:
    """A function of `count` tensors alone, those of each argument and then of the donated cache: the results of `fn`,
    and the length of the continuation, whose buffers are those that went in."""

    def body(tensors: list[Tensor]):
        given, at = {}, 0
        for name, kind in kinds.items():
            given[name] = kind.rebuilt(tensors[at : at + len(kind.shapes)])
            at += len(kind.shapes)
        if donate is None:
            return fn(**given), ()
        layers = (len(tensors) - at) // 2
        cache = Cache(tuple(tensors[at : at + layers]), tuple(tensors[at + layers : -1]), tensors[-1])
        results = fn(**given, **{donate: cache})
        new = continuation(results)
        for old, after in zip(buffers(cache), buffers(new), strict=True):
            old.copy_(after)  # inductor leaves nothing of it but the writing of the new slots
        return pytree.tree_map(lambda x: CACHE if x is new else x, results, is_leaf=lambda x: x is new), new.length

    noted: list[Closed] = []

    def note(guards: list[Any]) -> list[bool]:
        noted[:] = [closed(guards, {"fn": fn, "kinds": kinds, "G": body.__globals__})]
        return [False] * len(guards)

    # torch.compile would compare all inputs before each call, which takes longer than a layer: they are in the key
    return Code(whole(body, {"guard_filter_fn": note}), count, lambda: noted[0].tensors())


def regional(fn: Callable[..., Any], kinds: dict[str, Kind], count: int) -> Code:
    """`compiled`, of a function that takes `wrap`: what it wraps is compiled, once for each of its shapes."""
    made: dict[Callable, Callable] = {}

    def wrap(part: Callable) -> Callable:
        if part not in made:
            made[part] = whole(part)
        return made[part]

    def body(tensors: list[Tensor]):
        rest = iter(tensors)
        given = {name: kind.rebuilt([next(rest) for _ in kind.shapes]) for name, kind in kinds.items()}
        with torch._dynamo.config.patch(recompile_limit=1000):  # a tap has code of its own in each layer
            return fn(**given, wrap=wrap), ()

    functions = [fn, *(leaf for kind in kinds.values() for leaf in kind.fixed if callable(leaf))]
    _, then = reachable(functions)

    def extra() -> list[Tensor] | None:  # code that is not compiled reads them itself; a CUDA graph, at their addresses
        tensors, now = reachable(functions)
        return tensors if now == then else None

    return Code(body, count, extra)


def whole(fn: Callable, options: dict[str, Any] | None = None) -> Callable:
    """The function, compiled without a break. Torch keeps a few versions of a code object, so it has one of its own."""
    if not isinstance(fn, FunctionType):  # a method, a partial, an object that is called
        return whole(lambda *args, **kwargs: fn(*args, **kwargs), options)
    copy = FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__kwdefaults__ = fn.__kwdefaults__
    return torch.compile(copy, dynamic=False, fullgraph=True, options=options, backend=checked)


def checked(graph: fx.GraphModule, inputs: list[Any]) -> Callable:
    """Inductor, for a graph that does no more than append to the buffers which it writes."""
    from torch._dynamo.backends.registry import lookup_backend

    for node in graph.graph.nodes:
        written = node.target == "copy_" and node.args[0].op == "placeholder"
        if written and (name := offence(node.args[0], node.args[1], node)):
            raise SettingError(f"the function changes a donated cache by {name}: {REORDER}")
    return lookup_backend("inductor")(graph, inputs)


def offence(old: fx.Node, new: Any, last: fx.Node) -> str:
    """The operation by which a buffer is more than an older one with some elements written over; "" for none.

    `last` is the node that writes the buffer back, which is ours.
    """
    if not isinstance(new, fx.Node):
        return str(new)
    for user in new.users:
        if user is not last and in_place(user, new) and (new is old or operation(user) not in IN_PLACE):
            return operation(user)
    if new is old:
        return ""
    if operation(new) == "where":  # rows that have ended may stay what they were
        found = [offence(old, x, last) for x in new.args[1:]]
        return "" if "" in found else found[0]
    return offence(old, new.args[0], last) if operation(new) in OVER else operation(new)


def operation(node: fx.Node) -> str:
    """The name of an operation: `index_put`, however it is called."""
    if node.op in ("placeholder", "get_attr"):
        return "another tensor"
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target)).split(".")[0]


def in_place(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user of a tensor writes into it."""
    name = operation(user)
    return user.args[:1] == (node,) and (name == "setitem" or (name.endswith("_") and not name.endswith("__")))


def continuation(results: Any) -> Cache:
    """The one cache among the results."""
    found = [x for x in pytree.tree_leaves(results, is_leaf=lambda x: isinstance(x, Cache)) if isinstance(x, Cache)]
    if len(found) != 1:
        raise SettingError(f"the function returns {len(found)} caches, expected one: the donated one, continued")
    return found[0]


def check_appends(cache: Cache, new: Cache) -> None:
    """Raise SettingError where a continuation differs from the cache in what a handle on it sees."""
    seen = torch.arange(cache.slots, device=cache.length.device) < rearrange(cache.length, "b -> b 1")
    for old, after in zip(buffers(cache), buffers(new), strict=True):
        if old.shape != after.shape or not torch.allclose(old[seen], after[seen], rtol=0, atol=0, equal_nan=True):
            raise SettingError(f"the function changes a donated cache before its length: {REORDER}")
    if (new.length < cache.length).any():
        raise SettingError("the function makes a donated cache shorter: it may append to it alone; see pg.rewind")


def explained(error: Exception, name: str) -> SettingError | None:
    """A line for what torch.compile says of a function that it cannot compile; None for other trouble of a compiler."""
    from torch._dynamo import exc

    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, SettingError):
        return inner
    known = exc.Unsupported, exc.UserError, exc.TorchRuntimeError, exc.ObservedException, exc.InternalTorchDynamoError
    if not isinstance(error, known):
        return None
    said, stack = str(error), getattr(error, "real_stack", None)
    if "ata-dependent" in said:
        what = "it branches on a number in a tensor; take torch.where, or branch outside of the function"
    else:
        what = match[1] if (match := re.search(r"Explanation: (.+)", said)) else first_line(error)
    where = f" ({Path(stack[-1].filename).name}, line {stack[-1].lineno})" if stack else ""
    return SettingError(f"{name} cannot be compiled{where}: {what}")
