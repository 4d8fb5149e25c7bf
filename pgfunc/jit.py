"""Compile a pure function; a donated cache is appended to in place, and the meaning stays that of the pure function.

    step = pg.jit(pg.decode, donate="cache")
    logits, cache = step(params, token, cache, cfg)

A cache is append-only: a handle does not see what is written behind its length. So its buffers may be written in place
there, unless a newer handle on them is alive (`handles.py`). A continuation keeps the trees alive that came again and
again while it was made: a loop comes with the same ones. Knows nothing about models.

A function that takes `wrap`, which it applies to the blocks that it repeats, is compiled a block at a time: the code of
one serves all layers, and what stands around them runs as it is.

On CUDA compiled code is captured in a graph and replayed (`replay.py`), on one stream. There the last few sets of
buffers are kept, and used again when all handles on them are gone: a loop over the next prompt finds the graph of the
last.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from types import FunctionType
from typing import Any, Generic, ParamSpec, TypeVar

import einops
import torch
from einops import rearrange
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from pgfunc import replay
from pgfunc.arguments import Argument, Arguments, Kind, as_input, repeated, shape
from pgfunc.cache import Cache
from pgfunc.codefolder import code_in
from pgfunc.errors import SettingError
from pgfunc.handles import buffers, continued, lineage_of, writable
from pgfunc.ops import transformed

P = ParamSpec("P")
R = TypeVar("R")
for operation in (einops.rearrange, einops.repeat, einops.reduce, einops.einsum):
    torch.compiler.allow_in_graph(operation)  # whole: to trace how a pattern is parsed took most of a compilation
CACHE = "the continuation"  # stands for it among the results of compiled code


# by the length of a continuation: who made it of which arguments, for they are likely to come again
_origins: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()


def jit(fn: Callable[P, R], donate: str | None = None) -> "Jitted[P, R]":
    """`fn`, compiled: the same arguments, the same results, without gradients.

    `fn` is a pure function of trees of tensors. What else is among its arguments (a config, a number) is fixed in the
    code, which is compiled once for each combination of those with the tensors' shapes, strides and dtypes and with
    PyTorch's own settings; what it closes over is fixed when that is done. Tensors are values: between the steps of a
    loop their memory must not be exchanged (`x.data = ...`).

    Where `fn` has an argument `wrap`, and donates nothing, it is compiled a block at a time: it is given a `wrap` to
    apply to the functions that it calls for each layer, which compiles them, and runs as it is around them.

    `donate` names an argument that is a `Cache`, of which `fn` returns the continuation as one of its results: it
    appends behind the length of each row and leaves the rest alone, so rows are reordered outside. Caches have
    `bucket(slots)` slots in compiled code, so that prompts of many lengths share it; one that was not made by compiled
    code is copied whenever it is continued. A row must have room: beyond it, what happens is up to the device.

    Raises SettingError where `fn` has no such argument, or does not return a continuation, or is seen to change what
    stands before its length: it runs once as it is before it is compiled, on the first arguments. So does a call within
    a transform of torch.func, or one that gives `wrap`.
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
    """A compiled function. `compilations` says how often it was compiled."""

    def __init__(self, fn: Callable[P, R], donate: str | None = None):
        self.fn: Callable[..., R] = fn
        self.donate, self.signature = donate, inspect.signature(fn)
        self._arguments = Arguments()
        self._compiled: dict[Any, replay.Replayed | replay.Direct] = {}
        self._arena: deque[Cache] = deque(maxlen=replay.KEPT)  # buffers that graphs write, to be used again
        self._lock = RLock()  # from the choice of buffers until a handle on them is known
        named = [
            p.name for p in self.signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        if len(named) < len(self.signature.parameters):
            raise SettingError("the function has arguments without a name of their own (*args, **kwargs or before a /)")
        kinds = {p.kind for p in self.signature.parameters.values()}
        self._positional = named if kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD} else []
        required = sum(p.default is p.empty for p in self.signature.parameters.values())
        self._enough = range(max(1, required), len(self._positional) + 1)  # how many may be given by place alone
        self.blocks = donate is None and "wrap" in named
        if donate is not None and donate not in named:
            raise SettingError(f"donate is {donate!r}, expected one of {', '.join(named)}")

    @property
    def compilations(self) -> int:
        return len(self._compiled)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock, torch.no_grad():
            return self._call(*args, **kwargs)

    def _call(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if transformed():
            raise SettingError(
                "compiled code cannot be transformed by vmap, grad or jvp; transform what goes into pg.jit"
            )
        given = self._named(args, kwargs)
        if self.blocks and "wrap" in given:
            raise SettingError("wrap is given by pg.jit, to compile a block at a time; leave it out")
        if self.donate is None:
            results, _ = pytree.tree_unflatten(*self._run(given, self._read(given, {}), None))
            return results
        cache = given.pop(self.donate, ())
        if not isinstance(cache, Cache):
            raise SettingError(f"{self.donate} is a {type(cache).__name__}, expected a Cache")
        maker, made = _origins.get(cache.length) or (None, {})
        read = self._read(given, made if maker is self else {})
        cache = writable(cache, self._arena)
        leaves, structure = self._run(given, read, cache)
        lineage = lineage_of(cache)
        new = continued(cache, leaves[-1], lineage)
        _origins[new.length] = self, {name: (given[name], each) for name, each in read.items() if each.known}

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

    def _run(self, given: dict[str, Any], read: dict[str, Argument], cache: Cache | None) -> replay.Flat:
        """The results of the code for these arguments, which is compiled where there is none."""
        tensors, places, fresh, known = [], [], [], []
        for each in read.values():
            (known if each.known else fresh).append(range(len(tensors), len(tensors) + len(each.tensors)))
            tensors += each.tensors
            places += each.places
        count, donated, shapes = len(tensors), [], ()
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
        run = self._compiled.get(key)
        if run is None:
            if cache is not None:
                check_appends(cache, continuation(self.fn(**given, **{str(self.donate): cache})))
            kinds = {name: self._arguments.kinds[each.kind] for name, each in read.items()}
            code = regional(self.fn, kinds) if self.blocks else compiled(self.fn, self.donate, kinds)
            graphs = replay.possible(tensors)
            run = replay.Replayed(code, range(count, len(tensors) - 1)) if graphs else replay.Direct(code)
        found = run.flat(tensors, places, fresh, known)
        self._compiled[key] = run
        return found

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by their names."""
        if not kwargs and len(args) in self._enough:  # quicker
            return dict(zip(self._positional, args, strict=False))
        return dict(self.signature.bind(*args, **kwargs).arguments)


def compiled(fn, donate: str | None, kinds: dict[str, Kind]) -> Callable:
    """A function of the tensors alone, those of each argument and then of the donated cache: the results of `fn`, and
    the length of the continuation, whose buffers are those that went in."""

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

    # torch.compile would compare all inputs before each call, which takes longer than a layer: they are in the key
    return whole(body, {"guard_filter_fn": lambda guards: [False] * len(guards)})


def regional(fn, kinds: dict[str, Kind]) -> Callable:
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

    return body


def whole(fn: Callable, options: dict[str, Any] | None = None) -> Callable:
    """The function, compiled without a break. Torch keeps a few versions of a code object, so it has one of its own."""
    copy = FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__kwdefaults__ = fn.__kwdefaults__
    return torch.compile(copy, dynamic=False, fullgraph=True, options=options)


def surroundings() -> tuple[Any, ...]:
    """What else code is compiled for: the settings of PyTorch that change what operations do."""
    autocast = (torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda"))
    exact = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    return *autocast, *exact, torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()


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
            raise SettingError("the function changes a donated cache before its length: it may append to it alone")
    if (new.length < cache.length).any():
        raise SettingError("the function makes a donated cache shorter: it may append to it alone")
