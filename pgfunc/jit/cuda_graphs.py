"""CUDA graphs of a function: all of its kernels launched at once, where a launch each would take longer than they do.

A graph reads and writes fixed places in memory. Inputs lie where the caller has them. Of those that change places from
call to call few are copied, into places of the graph's own; when most of the bytes lie elsewhere, other weights, say,
another graph is captured. Results are copied out of it. So what goes in and comes out are values, as without a graph.
Owns where things lie. Knows nothing about caches or models.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pgfunc.jit.arguments import shape

FEW = 0.25  # of all bytes that go in: so many may be copied
KEPT = 4  # graphs

Fn = Callable[[list[Tensor]], Any]
Groups = Iterable[Iterable[int]]  # the inputs of an argument each, by their numbers
Flat = tuple[list[Any], pytree.TreeSpec]  # results, as leaves and their structure


class Captured(NamedTuple):
    replay: Callable[[], None]
    own: dict[int, Tensor]  # the inputs that are copied, by their numbers
    results: list[Any]
    structure: pytree.TreeSpec  # of the results


def capture(fn: Fn, inputs: list[Tensor]) -> tuple[Callable[[], None], Any]:
    """`fn` on these inputs as a CUDA graph, and where its results will lie."""
    graph, device = torch.cuda.CUDAGraph(), inputs[0].device
    stream = torch.cuda.Stream(device)  # torch's own is on the device of the first graph of all
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        results = fn(inputs)
    return graph.replay, results


def possible(leaves: Iterable[Any]) -> bool:
    """Whether all of these are tensors on one device, which has graphs."""
    leaves = list(leaves)
    alike = all(isinstance(leaf, Tensor) and leaf.is_cuda and leaf.device == leaves[0].device for leaf in leaves)
    return bool(leaves) and alike


class Direct:
    """`fn` as it is, where there are no graphs."""

    def __init__(self, fn: Fn):
        self.fn = fn
        self.written: frozenset[int] = frozenset()

    def flat(self, tensors: list[Tensor], *unused: Any) -> Flat:
        return pytree.tree_flatten(self.fn(tensors))


class Replayed:
    """`fn` by graphs: a call with inputs that lie elsewhere and are not copied runs it as it is, the next captures it.

    `fn` is a pure function of tensors of fixed shapes on one device, but that it may write into the inputs numbered in
    `written`, where doing so again changes nothing; these are not copied, nor are others that together are more than
    the share `few` of all bytes. What it closes over must be on the device too, and stay alive. A function that gives
    results elsewhere always runs as it is. The last `KEPT` graphs are kept, with the memory that they compute in; of
    the inputs they hold nothing. For one thread and one stream at a time.
    """

    def __init__(self, fn: Fn, written: Iterable[int] = (), few: float = FEW):
        self.fn, self.written, self.few = fn, frozenset(written), few
        self.last: list[int] = []  # where the inputs of the last call lay, 0 for those that are copied
        self.moving: set[int] = set()  # the inputs that are copied
        self.graphs: OrderedDict[tuple[int, ...], Captured] = OrderedDict()
        self.graph: Captured | None = None  # that of the last call, if its inputs lay where a graph reads them
        self.stays = True  # whether results are where graphs are

    def __call__(self, tensors: list[Tensor], new: Groups = ()) -> Any:
        """What `fn` gives. `new` are groups that are others than those of the last call, even if they lie in the same
        places: such a group is copied as a whole, or not at all."""
        results, structure = self.flat(tensors, [*map(Tensor.data_ptr, tensors)], new)
        return pytree.tree_unflatten(results, structure)

    def flat(self, tensors: list[Tensor], places: list[int], new: Groups, other: Groups = ()) -> Flat:
        """What `fn` gives, as leaves and their structure. The inputs lie in these places, a list that is kept.

        `other` are groups like those of `new` that may be those of the last call.
        """
        seen = self.look(tensors, places, new, other)
        if self.graph is None:
            key = tuple(self.last)
            if key not in self.graphs:
                if not (seen and self.stays):
                    results, structure = pytree.tree_flatten(self.fn(tensors))
                    self.stays = possible([tensors[0], *(x for x in results if isinstance(x, Tensor))])
                    return results, structure
                self.graphs[key] = self.captured(tensors)
                if len(self.graphs) > KEPT:
                    self.graphs.popitem(last=False)
            self.graphs.move_to_end(key)
            self.graph = self.graphs[key]
        if self.graph.own:
            copy(list(self.graph.own.values()), [narrow(tensors[i]) for i in self.graph.own])
        self.graph.replay()
        return copied(self.graph.results), self.graph.structure

    def captured(self, tensors: list[Tensor]) -> Captured:
        with torch.inference_mode(False), torch.no_grad():  # else they could be written in inference mode alone
            own = {i: twin(narrow(tensors[i])) for i in self.moving}
        inputs = [own[i].expand(x.shape) if i in own else x for i, x in enumerate(tensors)]
        self.fn(inputs)  # whatever must be compiled or tuned for these must not be so during the capture
        replay, results = capture(self.fn, inputs)
        leaves, structure = pytree.tree_flatten(results)
        return Captured(replay, own, [x.detach() if isinstance(x, Tensor) else x for x in leaves], structure)

    def look(self, tensors: list[Tensor], places: list[int], new: Groups, other: Groups = ()) -> bool:
        """Notes where the inputs lie; whether those that are not copied lay there at the last call."""
        last = self.last  # all in few passes: of hundreds of inputs, before each token
        for i in self.moving:
            places[i] = 0
        changed = {i for i, before in enumerate(last) if places[i] != before} if places != last else set()
        together = [{*each} for each in new]
        together += [{*each} for each in other if not changed.isdisjoint(each)] if changed else []
        alone = [{i} for i in changed.difference(*together)]
        groups = [group for each in together + alone if (group := each - self.written - self.moving)]
        if last and groups:
            size = {i: x.nbytes for i, x in enumerate(tensors)}
            room = self.few * sum(size.values())
            for group in sorted(groups, key=lambda group: sum(size[i] for i in group)):
                if sum(size[i] for i in self.moving | group) <= room:
                    self.moving |= group
                    self.graphs.clear()  # each of them takes one of these where it lay
                    self.graph = None
            for i in self.moving:
                places[i] = 0
        if places != last:
            self.last, self.graph = places, None
        return bool(last) and changed <= self.moving


def narrow(x: Tensor) -> Tensor:
    """The part of an expanded tensor that is in memory."""
    return x[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())]


def twin(x: Tensor) -> Tensor:
    """A copy with the same strides, also where a clone would be dense."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def copy(places: list[Tensor], tensors: list[Tensor]) -> None:
    """The tensors into the places, all of a dtype at once: of several PyTorch copies one after another."""
    for dtype in {x.dtype for x in tensors}:
        chosen = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        torch._foreach_copy_([places[i] for i in chosen], [tensors[i] for i in chosen])  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def copied(results: list[Any]) -> list[Any]:
    """The results with copies of the tensors among them, made at once."""
    old = [x for x in results if isinstance(x, Tensor)]
    new = [*map(torch.empty_like, old)]
    copy(new, old)
    rest = iter(new)
    return [next(rest) if isinstance(x, Tensor) else x for x in results]


def graphed(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, a pure function of trees of tensors: where all are on one GPU by a graph for each of their shapes, inputs
    copied."""
    made: dict[Any, Replayed] = {}

    def call(*trees: Any) -> Any:
        leaves, structure = pytree.tree_flatten(trees)
        if not possible(leaves):
            return fn(*trees)
        key = structure, tuple(map(shape, leaves))
        if key not in made:
            made[key] = Replayed(lambda given: fn(*pytree.tree_unflatten(given, structure)), few=inf)
        return made[key](leaves)

    return call
