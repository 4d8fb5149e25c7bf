"""The compiled function: finds the code for a call, or compiles it, and returns values.

A cache is append-only: a handle does not see the slots after its length. So a donated cache is written in place there,
unless a newer handle on its buffers is alive (`donation.py`). Most arguments of a loop, such as the weights, stay the
same. Each continuation remembers the arguments it was made with, so that the next step need not read them again.

A function that takes `wrap`, which it applies to its repeated blocks, is compiled a block at a time: all layers share
the code of one block, and the rest of the function runs eagerly.

On CUDA, compiled code is captured in a graph and replayed on one stream (`cuda_graphs.py`). The last few sets of cache
buffers are kept and used again when all handles on them are dead, so the loop over the next prompt replays the graph of
the last loop.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from threading import RLock
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar
from warnings import warn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from pgfunc.cache import Cache
from pgfunc.errors import CacheFullError, SettingError
from pgfunc.jit import compilation, cuda_graphs, reasons
from pgfunc.jit.arguments import Argument, ArgumentReader, ArgumentSpec, Parameters, aliasing, as_input, layout
from pgfunc.jit.donation import Arena, appends_in_place, buffers, continuation, copy_cache, find_lineage, lineage_of
from pgfunc.jit.overwriting import Appends
from pgfunc.lowering import on_host, transformed

P = ParamSpec("P")
R = TypeVar("R")
WARN_FROM = 8  # from this number of compilations of one function on, each warns
CLOSURE_CHANGED = "a value that the function closes over has changed"

Runner = cuda_graphs.GraphedFunction | cuda_graphs.DirectFunction

_checking: ContextVar[bool] = ContextVar("checking", default=False)  # whether a function runs eagerly to be checked

# length of a continuation -> the function that made it, and that call's arguments, which the next call likely repeats
_origins: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()


def jit(fn: Callable[P, R], donate: str | None = None) -> "Jitted[P, R]":
    """`fn`, compiled: the same results for the same arguments, without gradients.

    `fn` is a pure function of trees of tensors. It is compiled once for each combination of the tensors' shapes,
    strides and dtypes, all other arguments (a config, a number), PyTorch's own settings, and the numbers and functions
    that it closes over. Tensors that it closes over are read at each call, like arguments. `why` says how the last
    call that was compiled differed from the most similar earlier one; a function that is compiled again and again
    warns. Tensors are values: between the steps of a loop, do not exchange their memory (`x.data = ...`). A compiled
    function that is called by another one is compiled with it.

    If `fn` has an argument `wrap` and donates nothing, it is compiled a block at a time: `jit` passes a `wrap` that
    compiles the functions that `fn` calls for each layer. The rest of `fn` runs eagerly.

    `donate` names an argument that is a `Cache`. `fn` must return its continuation among its results: it appends after
    the length of each row and leaves the other slots alone. Reorder rows outside of `fn`, by `pg.reorder`. In compiled
    code a cache has `bucket(slots)` slots, so that prompts of many lengths share the code; a cache that compiled code
    did not make is copied each time it is continued, and so is every cache if arguments decide where `fn` writes (a
    rewind by a number, for example). Buffers are written in place. A detached view of a handle
    (`cache.k[0].detach()`, `.numpy()`, `.data`) does not keep it alive and may be overwritten; clone it.

    A token without a free slot, or outside the vocabulary, is not written, and its logits are nan. On a CPU a full row
    raises CacheFullError; on a GPU `Cache.overflowed` marks it.

    Before each compilation a function that donates runs once eagerly, to check its result. Raises SettingError if the
    function has no argument named by `donate`, returns no continuation, or does more than append (according to that
    result or to the graph of its operations); if PyTorch cannot compile it; within a transform of torch.func; and if
    the caller passes `wrap`.
    """
    return Jitted(fn, donate)


class Inputs(NamedTuple):
    """The arguments of a call as tensors, those of the donated cache last."""

    tensors: list[Tensor]
    addresses: list[int]
    new_groups: list[range]  # for each argument that differs from the last call's: the indices of its tensors
    other_groups: list[range]  # for each argument that is unchanged
    donated: list[Tensor]  # the cache's buffers and length; empty without a cache
    key: Any  # what the code is compiled for


class Jitted(Generic[P, R]):
    """A compiled function.

    `compilations` counts how often it was compiled. `why` says how the last call that was compiled differed from the
    most similar earlier one. `copies` counts copies of a cache: it was not made by compiled code, or it was forked.
    """

    def __init__(self, fn: Callable[P, R], donate: str | None = None):
        self.fn: Callable[..., R] = fn
        self.donate, self._parameters = donate, Parameters(fn)
        self.why, self.copies = "", 0
        self._reader = ArgumentReader()
        self._compiled: dict[Any, list[tuple[compilation.Code, Runner]]] = {}
        self._descriptions: list[reasons.Description] = []  # of the compiled calls
        self._proved = Appends(True, True)  # what the graphs of all compiled code prove
        self._arena = Arena()
        self._lock = RLock()  # one call at a time
        # the caller's stack level for a warning in: _note, _compile, _run, (_append,) _call, __call__, the caller
        self._depth = 6 + (donate is not None)
        if inspect.isgeneratorfunction(fn) or inspect.iscoroutinefunction(fn):
            raise SettingError(f"{self.name} is a generator or a coroutine: compile the step that it repeats")
        names = self._parameters.names
        self.blocks = donate is None and "wrap" in names
        if donate is not None and donate not in names:
            raise SettingError(f"donate is {donate!r}, expected one of {', '.join(names)}")

    @property
    def name(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    @property
    def compilations(self) -> int:
        return len(self._descriptions)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or _checking.get():  # part of another function, which is compiled as one
            return self.fn(*args, **kwargs)
        with self._lock, torch.no_grad():
            return self._call(*args, **kwargs)

    def _call(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if transformed():
            raise SettingError(
                "compiled code cannot be transformed by vmap, grad or jvp; transform what goes into pg.jit"
            )
        arguments = self._parameters.bind(args, kwargs)
        if self.blocks and arguments.pop("wrap") is not self._parameters.default("wrap"):
            raise SettingError("wrap is given by pg.jit, to compile a block at a time; leave it out")
        if self.donate is None:
            results, _ = pytree.tree_unflatten(*self._run(arguments, self._read(arguments, {}), None))
            return results
        cache = arguments.pop(self.donate)
        if not isinstance(cache, Cache):
            raise SettingError(f"{self.donate} is a {type(cache).__name__}, expected a Cache")
        maker, origin = _origins.get(cache.length) or (None, {})
        read = self._read(arguments, origin if maker is self else {})
        lineage = find_lineage(cache)
        with lineage.lock if lineage else nullcontext():  # another function may continue the same handle
            if not self._proved.positions or not appends_in_place(cache):
                cache, self.copies = copy_cache(cache, self._arena), self.copies + 1
            return self._append(arguments, read, cache)

    def _append(self, arguments: dict[str, Any], read: dict[str, Argument], cache: Cache) -> R:
        """The results for a cache that is appended to in place."""
        leaves, structure = self._run(arguments, read, cache)
        lineage, length = lineage_of(cache), leaves[-1].detach()  # a new object, to which nothing else refers
        if on_host(length):
            if (length > cache.slots).any():  # no slot that a handle sees was written
                raise CacheFullError(f"a row has no room in {cache.slots} slots; prefill with a larger size")
            if (length < cache.length).any():
                raise SettingError("the function makes a donated cache shorter: rewind it outside of the function")
        new = continuation(cache, length, lineage, rewound=not self._proved.length and not on_host(length))
        origin = {
            name: (arguments[name], each)
            for name, each in read.items()
            if each.unchanged and not isinstance(arguments[name], Cache)  # else older and older caches stay alive
        }
        _origins[new.length] = self, origin

        def as_value(leaf: Any) -> Any:
            """Replace the placeholder by the continuation, and copy a result that shares the cache's buffers."""
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in lineage.addresses:
                return leaf.clone()
            return new if isinstance(leaf, str) and leaf == compilation.CONTINUATION else leaf

        results, _ = pytree.tree_unflatten([*map(as_value, leaves[:-1]), leaves[-1]], structure)
        return results

    def _read(self, arguments: dict[str, Any], origin: dict[str, tuple[Any, Argument]]) -> dict[str, Argument]:
        """Read the arguments, except those that the handle was made with."""
        return {
            name: origin[name][1] if name in origin and origin[name][0] is value else self._reader.read(name, value)
            for name, value in arguments.items()
        }

    def _run(self, arguments: dict[str, Any], read: dict[str, Argument], cache: Cache | None) -> cuda_graphs.Flat:
        """Run the code for these arguments, compiling it if there is none."""
        inputs = gather(read, cache)
        versions = self._compiled.get(inputs.key, [])
        for code, runner in versions:
            if (free := code.free_tensors()) is not None:
                addresses = [*inputs.addresses, *map(Tensor.data_ptr, free)]
                return runner.call_flat(inputs.tensors + free, addresses, inputs.new_groups, inputs.other_groups)
        if cache is not None:
            self._check_appends(arguments, cache)
        specs = {name: self._reader.specs[each.spec_index] for name, each in read.items()}
        return self._compile(arguments, specs, inputs)

    def _compile(self, arguments: dict[str, Any], specs: dict[str, ArgumentSpec], inputs: Inputs) -> cuda_graphs.Flat:
        """Compile code for these arguments, and run it."""
        count, donated = len(inputs.tensors), inputs.donated
        if self.blocks:
            code = compilation.compile_blocks(self.fn, specs, count)
        else:
            code = compilation.compile_whole(self.fn, self.donate, specs, count)
        written = range(count - len(donated), count - 1)
        graphs = cuda_graphs.can_capture(inputs.tensors)
        if graphs:
            runner = cuda_graphs.GraphedFunction(code, written, name=self.name)
        else:
            runner = cuda_graphs.DirectFunction(code)
        try:
            # new objects: if the function also closes over an argument, PyTorch would treat the two as one tensor
            new = {id(x): x.detach() for x in inputs.tensors}
            results = runner.call_flat(
                [new[id(x)] for x in inputs.tensors], inputs.addresses, inputs.new_groups, inputs.other_groups
            )
        except Exception as error:
            if explanation := compilation.explain_error(error, self.name):
                if not donated and not self.blocks:
                    self.fn(**arguments)  # if it raises an error of its own, that is the better one
                raise explanation from None
            raise
        self._proved = Appends(*map(all, zip(self._proved, *filter(None, code.appends), strict=True)))
        free = code.free_tensors() or []
        runner.written |= {*range(count, count + len(free))}
        versions = self._compiled.setdefault(inputs.key, [])
        description = reasons.describe(specs, self.donate, [*map(layout, donated)], reasons.compile_context())
        why = CLOSURE_CHANGED if versions else reasons.difference(description, self._descriptions)
        versions.append((code, runner))
        self._note(description, why)
        self._warn_of_devices(specs, free)
        return results

    def _check_appends(self, arguments: dict[str, Any], cache: Cache) -> None:
        """Raise SettingError if the function, run eagerly, does more than append to this cache."""
        token = _checking.set(True)
        try:
            results = self.fn(**arguments, **{str(self.donate): cache})
            compilation.check_appends(cache, compilation.returned_cache(results))
        finally:
            _checking.reset(token)

    def _note(self, description: reasons.Description, why: str) -> None:
        """Record a compilation, and warn if there are many."""
        self.why = why
        self._descriptions.append(description)
        if self.compilations >= WARN_FROM:
            message = f"{self.name} was compiled {self.compilations} times, this time because {why}"
            warn(message, RuntimeWarning, stacklevel=self._depth)

    def _warn_of_devices(self, specs: dict[str, ArgumentSpec], free: list[Tensor]) -> None:
        """Warn if some arguments, or tensors that the function closes over, are on the CPU and others on a GPU."""
        devices = {name: {device.type for *_, device in spec.layouts} for name, spec in specs.items()}
        devices["the tensors that it closes over"] = {x.device.type for x in free}
        on_cpu = [name for name, types in devices.items() if "cpu" in types]
        if on_cpu and any("cuda" in types for types in devices.values()):
            message = f"{self.name} runs slowly, without CUDA graphs; move to the GPU: {', '.join(on_cpu)}"
            warn(message, RuntimeWarning, stacklevel=self._depth)


def gather(read: dict[str, Argument], cache: Cache | None) -> Inputs:
    """The tensors of the arguments and of the donated cache, in one list."""
    tensors, addresses, new_groups, other_groups = [], [], [], []
    for each in read.values():
        group = range(len(tensors), len(tensors) + len(each.tensors))
        (other_groups if each.unchanged else new_groups).append(group)
        tensors += each.tensors
        addresses += each.addresses
    donated, layouts = [], ()
    if cache is not None:
        donated, lineage = [*buffers(cache), as_input(cache.length)], lineage_of(cache)
        tensors += donated
        addresses += [*lineage.addresses, donated[-1].data_ptr()]
        new_groups.append(range(len(tensors) - 1, len(tensors)))  # the length
        layouts = lineage.layouts, layout(donated[-1])
    key = (
        tuple((name, each.spec_index) for name, each in read.items()), layouts,
        aliasing([*((each.tensors, each.ids) for each in read.values()), (donated, {*map(id, donated)})]),
        reasons.compile_context(),
    )  # fmt: skip
    return Inputs(tensors, addresses, new_groups, other_groups, donated, key)
