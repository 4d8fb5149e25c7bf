"""Compile a pure function; a donated cache is appended to in place, and the meaning stays that of the pure function.

    step = pg.jit(pg.decode, donate="cache")
    logits, cache = step(params, token, cache, cfg)

A cache is append-only: a handle does not see what is written behind its length. So its buffers may be written in place
there, unless a newer handle on them is alive (`donation.py`). A continuation keeps the trees alive that came again and
again while it was made: a loop comes with the same ones. Knows nothing about models.

A function that takes `wrap`, which it applies to the blocks that it repeats, is compiled a block at a time: the code of
one serves all layers, and what stands around them runs as it is.

On CUDA compiled code is captured in a graph and replayed (`cuda_graphs.py`), on one stream. There the last few sets of
buffers are kept, and used again when all handles on them are gone: a loop over the next prompt finds the graph of the
last.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from threading import RLock
from typing import Any, Generic, ParamSpec, TypeVar
from warnings import warn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from pgfunc.cache import Cache
from pgfunc.errors import CacheFullError, SettingError
from pgfunc.jit import cuda_graphs, reasons
from pgfunc.jit.arguments import Argument, Arguments, Kind, as_input, repeated, shape
from pgfunc.jit.code_folder import code_in
from pgfunc.jit.compilation import CACHE, Code, check_appends, compiled, continuation, explained, regional
from pgfunc.jit.donation import Arena, buffers, continued, copied, is_newest, known, lineage_of
from pgfunc.lowering import on_host, transformed

P = ParamSpec("P")
R = TypeVar("R")
MANY = 8  # compilations of one function, from which on each is worth a warning


_within: ContextVar[bool] = ContextVar("within", default=False)  # whether a function runs as it is, to be checked

# by the length of a continuation: who made it of which arguments, for they are likely to come again
_origins: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()


def jit(fn: Callable[P, R], donate: str | None = None) -> "Jitted[P, R]":
    """`fn`, compiled: the same arguments, the same results, without gradients.

    `fn` is a pure function of trees of tensors. It is compiled once for each combination of the tensors' shapes,
    strides and dtypes with everything else among its arguments (a config, a number), with PyTorch's own settings, and
    with the numbers and functions that it closes over. Tensors that it closes over are read at each call, as arguments
    are. `why` says in what a call differed from those before; a function that is compiled again and again warns.
    Tensors are values: between the steps of a loop their memory must not be exchanged (`x.data = ...`). A compiled
    function that another one calls is compiled with it.

    Where `fn` has an argument `wrap`, and donates nothing, it is compiled a block at a time: it is given a `wrap` to
    apply to the functions that it calls for each layer, which compiles them, and runs as it is around them.

    `donate` names an argument that is a `Cache`, of which `fn` returns the continuation as one of its results: it
    appends behind the length of each row and leaves the rest alone; rows are reordered outside, by `pg.reorder`. Caches
    have `bucket(slots)` slots in compiled code, so that prompts of many lengths share it; one that was not made by
    compiled code is copied whenever it is continued. Buffers are written in place: a detached view of a handle
    (`cache.k[0].detach()`, `.numpy()`, `.data`) is not seen to be a part of it, and may be overwritten; clone it.

    A token without a slot, or outside the vocabulary, is written nowhere and has nan for its logits; on a CPU a row
    without room is a CacheFullError, and `Cache.overflowed` tells such rows on a GPU.

    Before each compilation a function that donates runs once as it is, and its result is looked at. Raises SettingError
    where it has no such argument, or does not return a continuation, or does more than append, by that result or by the
    graph of its operations; for what PyTorch cannot compile; within a transform of torch.func; where `wrap` is given.
    """
    return Jitted(fn, donate)


@contextmanager
def compiled_in(folder: str | Path) -> Iterator[None]:
    """In here compiled code is looked for in a folder, and left there: PyTorch's own caches, of one's own choice.

        with pg.compiled_in("code"):
            pg.generate(model, images, prefixes, compile=True)

    Another process, or another machine with the same PyTorch and kind of device, starts with a copy of it in seconds.
    What lies there is run: use a folder only if you trust whoever made it. Raises SettingError for one in which other
    users can write, or where another thread is in a folder of its own: PyTorch has one for the whole process, set in
    `os.environ`. Files that are damaged are thrown away, and made again.
    """
    with code_in(Path(folder).absolute()):
        yield


class Jitted(Generic[P, R]):
    """A compiled function.

    `compilations` says how often it was compiled, and `why` in what the last call that had no code differed from the
    nearest that had. `copies` says how often the buffers of a cache were copied: it was not made here, or forked.
    """

    def __init__(self, fn: Callable[P, R], donate: str | None = None):
        self.fn: Callable[..., R] = fn
        self.donate, self.signature = donate, inspect.signature(fn)
        self.why, self.copies = "", 0
        self._arguments = Arguments()
        self._compiled: dict[Any, list[tuple[Code, cuda_graphs.Replayed | cuda_graphs.Direct]]] = {}
        self._met: list[reasons.Description] = []
        self._arena = Arena()  # buffers that graphs write, to be used again
        self._lock = RLock()  # one call at a time
        parameters = self.signature.parameters.values()
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if len(named) < len(parameters):
            raise SettingError("the function has arguments without a name of their own (*args, **kwargs or before a /)")
        if inspect.isgeneratorfunction(fn) or inspect.iscoroutinefunction(fn):
            raise SettingError(f"{self.name} is a generator or a coroutine: compile the step that it repeats")
        by_place = all(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters)
        self._positional = named if by_place else []
        defaults = [p.default for p in parameters]
        self._defaults = defaults if by_place and parameters else []
        required = sum(each is inspect.Parameter.empty for each in defaults)
        self._enough = range(max(1, required), len(self._positional) + 1)  # how many may be given by place alone
        self._depth = 5 + (donate is not None)  # calls between a warning and the caller
        self.blocks = donate is None and "wrap" in named
        if donate is not None and donate not in named:
            raise SettingError(f"donate is {donate!r}, expected one of {', '.join(named)}")

    @property
    def name(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    @property
    def compilations(self) -> int:
        return len(self._met)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or _within.get():  # a part of another function, with which it is compiled
            return self.fn(*args, **kwargs)
        with self._lock, torch.no_grad():
            return self._call(*args, **kwargs)

    def _call(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if transformed():
            raise SettingError(
                "compiled code cannot be transformed by vmap, grad or jvp; transform what goes into pg.jit"
            )
        given = self._named(args, kwargs)
        if self.blocks and given.pop("wrap") is not self.signature.parameters["wrap"].default:
            raise SettingError("wrap is given by pg.jit, to compile a block at a time; leave it out")
        if self.donate is None:
            results, _ = pytree.tree_unflatten(*self._run(given, self._read(given, {}), None))
            return results
        cache = given.pop(self.donate)
        if not isinstance(cache, Cache):
            raise SettingError(f"{self.donate} is a {type(cache).__name__}, expected a Cache")
        maker, made = _origins.get(cache.length) or (None, {})
        read = self._read(given, made if maker is self else {})
        lineage = known(cache)
        with lineage.lock if lineage else nullcontext():  # another function may continue the same handle
            if not is_newest(cache):
                cache, self.copies = copied(cache, self._arena), self.copies + 1
            return self._continued(given, read, cache)

    def _continued(self, given: dict[str, Any], read: dict[str, Argument], cache: Cache) -> R:
        """The results for a cache that may be written behind its length."""
        leaves, structure = self._run(given, read, cache)
        lineage, length = lineage_of(cache), leaves[-1].detach()  # an object of its own, which nothing else keeps
        if on_host(length):
            if (length > cache.slots).any():  # nothing was written that a handle sees
                raise CacheFullError(f"a row has no room in {cache.slots} slots; prefill with a larger size")
            if (length < cache.length).any():
                raise SettingError("the function makes a donated cache shorter: rewind it outside of the function")
        new = continued(cache, length, lineage)
        _origins[new.length] = (
            self,
            {
                name: (given[name], each)
                for name, each in read.items()
                if each.known and not isinstance(given[name], Cache)  # which has an origin, and that one another
            },
        )

        def own(leaf: Any) -> Any:
            """A result as a value: the continuation in its place, a copy of what is written later."""
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in lineage.places:
                return leaf.clone()
            return new if isinstance(leaf, str) and leaf == CACHE else leaf

        results, _ = pytree.tree_unflatten([*map(own, leaves[:-1]), leaves[-1]], structure)
        return results

    def _read(self, given: dict[str, Any], made: dict[str, tuple[Any, Argument]]) -> dict[str, Argument]:
        """The arguments as tensors; those of which the handle was made need not be looked at again."""
        return {
            name: made[name][1] if name in made and made[name][0] is value else self._arguments.read(name, value)
            for name, value in given.items()
        }

    def _run(self, given: dict[str, Any], read: dict[str, Argument], cache: Cache | None) -> cuda_graphs.Flat:
        """The results of the code for these arguments, which is compiled where there is none."""
        tensors, places, fresh, again = [], [], [], []
        for each in read.values():
            (again if each.known else fresh).append(range(len(tensors), len(tensors) + len(each.tensors)))
            tensors += each.tensors
            places += each.places
        donated, shapes = [], ()
        if cache is not None:
            donated, lineage = [*buffers(cache), as_input(cache.length)], lineage_of(cache)
            tensors += donated
            places += [*lineage.places, donated[-1].data_ptr()]
            fresh.append(range(len(tensors) - 1, len(tensors)))  # the length
            shapes = lineage.shapes, shape(donated[-1])
        key = (
            tuple((name, each.kind) for name, each in read.items()), shapes,
            repeated([*((each.tensors, each.ids) for each in read.values()), (donated, {*map(id, donated)})]),
            surroundings(),
        )  # fmt: skip
        others = self._compiled.get(key, [])
        for code, run in others:
            if (extra := code.extra()) is not None:
                return run.flat(tensors + extra, [*places, *map(Tensor.data_ptr, extra)], fresh, again)
        if cache is not None:
            self._check(given, cache)
        kinds = {name: self._arguments.kinds[each.kind] for name, each in read.items()}
        count = len(tensors)
        code = regional(self.fn, kinds, count) if self.blocks else compiled(self.fn, self.donate, kinds, count)
        written = range(count - len(donated), count - 1)
        run = cuda_graphs.Replayed(code, written) if cuda_graphs.possible(tensors) else cuda_graphs.Direct(code)
        try:
            # other objects than those that the function may close over, or PyTorch would take them for one
            apart = {id(x): x.detach() for x in tensors}
            results = run.flat([apart[id(x)] for x in tensors], places, fresh, again)
        except Exception as error:
            if said := explained(error, self.name):
                if cache is None and not self.blocks:
                    self.fn(**given)  # where it raises an error of its own, that one
                raise said from None
            raise
        run.written |= {*range(count, count + len(code.extra() or ()))}
        self._compiled[key] = [*others, (code, run)]
        new = reasons.described(
            kinds, self.donate, lineage_of(cache).shapes if cache is not None else (), surroundings()
        )
        self._note(new, "a value that it closes over is another" if others else reasons.difference(new, self._met))
        self._warn_of_devices(kinds)
        return results

    def _check(self, given: dict[str, Any], cache: Cache) -> None:
        """Raise SettingError where the function, run as it is, does not append to this cache."""
        token = _within.set(True)
        try:
            check_appends(cache, continuation(self.fn(**given, **{str(self.donate): cache})))
        finally:
            _within.reset(token)

    def _note(self, new: reasons.Description, why: str) -> None:
        """Count a compilation, and warn of many."""
        self.why = why
        self._met.append(new)
        if self.compilations >= MANY:
            warn(f"{self.name} was compiled, time {self.compilations}: {why}", RuntimeWarning, stacklevel=self._depth)

    def _warn_of_devices(self, kinds: dict[str, Kind]) -> None:
        """Warn of what is on the CPU where the rest is not."""
        devices = {name: {each[-1].type for each in kind.shapes} for name, kind in kinds.items()}
        slow = [name for name, found in devices.items() if "cpu" in found]
        if slow and any("cuda" in found for found in devices.values()):
            said = f"{self.name} runs without CUDA graphs, and slowly: on the CPU is {', '.join(slow)}; move it"
            warn(said, RuntimeWarning, stacklevel=self._depth)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by their names, those left out by their defaults."""
        if not kwargs and len(args) in self._enough:  # quicker
            return dict(zip(self._positional, (*args, *self._defaults[len(args) :]), strict=True))
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)


def surroundings() -> tuple[Any, ...]:
    """What else code is compiled for: the settings of PyTorch that change what operations do."""
    autocast = (torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda"))
    exact = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    return *autocast, *exact, torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()
