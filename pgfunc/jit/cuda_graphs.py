"""CUDA graphs of a function: one launch for all of its kernels, where launching each would take longer than running it.

A graph reads and writes fixed addresses. Large inputs are read where the caller keeps them; if most of the bytes are at
new addresses, for example other weights, another graph is captured. Small inputs whose addresses change from call to
call are copied into memory of the graph before each replay. Results are copied out of it. So callers pass and receive
values, as without a graph. This module owns the addresses of inputs, and knows nothing about caches or models.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from math import inf
from typing import Any, NamedTuple
from warnings import warn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pgfunc.errors import first_line
from pgfunc.jit.arguments import layout

MAX_COPIED = 0.25  # greatest share of all input bytes that is copied before a replay
MAX_GRAPHS = 4  # graphs kept per function

Fn = Callable[[list[Tensor]], Any]
Groups = Iterable[Iterable[int]]  # for each argument, the indices of its tensors among the inputs
Flat = tuple[list[Any], pytree.TreeSpec]  # results, as leaves and their structure


class CapturedGraph(NamedTuple):
    replay: Callable[[], None]
    static_inputs: dict[int, Tensor]  # index -> memory that an input is copied to before a replay
    results: list[Any]  # leaves, in the graph's memory
    structure: pytree.TreeSpec  # of the results


def capture(fn: Fn, inputs: list[Tensor]) -> tuple[Callable[[], None], Any]:
    """Capture `fn` on these inputs: a function that replays the graph, and the results that each replay overwrites."""
    graph, device = torch.cuda.CUDAGraph(), inputs[0].device
    stream = torch.cuda.Stream(device)  # torch's default capture stream is on the device of the process's first graph
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        results = fn(inputs)
    return graph.replay, results


def can_capture(leaves: Iterable[Any]) -> bool:
    """Whether all leaves are tensors on the same CUDA device."""
    leaves = list(leaves)
    alike = all(isinstance(leaf, Tensor) and leaf.is_cuda and leaf.device == leaves[0].device for leaf in leaves)
    return bool(leaves) and alike


class DirectFunction:
    """`fn` without graphs, with the interface of `GraphedFunction`."""

    def __init__(self, fn: Fn):
        self.fn = fn
        self.written: frozenset[int] = frozenset()

    def call_flat(self, tensors: list[Tensor], *unused: Any) -> Flat:
        return pytree.tree_flatten(self.fn(tensors))


class GraphedFunction:
    """`fn`, replayed from graphs.

    The first call with inputs at new addresses runs `fn` directly; the second call with the same addresses captures a
    graph. Inputs that are copied may have any address.

    `fn` is a pure function of tensors with fixed shapes on one device. It may write into the inputs with the indices
    `written`, if repeating the write changes nothing. Those are never copied, and copied inputs together have at most
    the share `max_copied` of all bytes. Tensors that `fn` closes over must stay alive. If `fn` gets, makes or returns
    tensors on another device, it always runs directly; for those that it makes, `name` is warned of. The last
    `MAX_GRAPHS` graphs are kept, with the memory that they compute in but without references to the inputs. To be used
    by one thread and one stream at a time.
    """

    def __init__(
        self, fn: Fn, written: Iterable[int] = (), max_copied: float = MAX_COPIED, name: str = "a compiled function"
    ):
        self.fn, self.written, self.max_copied, self.name = fn, frozenset(written), max_copied, name
        self.last_addresses: list[int] = []  # of the inputs of the last call, 0 for those that are copied
        self.copied_indices: set[int] = set()  # of the inputs that are copied
        self.graphs: OrderedDict[tuple[int, ...], CapturedGraph] = OrderedDict()
        self.graph: CapturedGraph | None = None  # of the last call, if there is one for its addresses
        self.capturable = True  # whether all tensors are on one device, as far as they were seen

    def __call__(self, tensors: list[Tensor], new_groups: Groups = ()) -> Any:
        """The results of `fn`.

        The tensors of `new_groups` differ from those of the last call even if they have the same addresses. A new group
        is copied as a whole or not at all.
        """
        results, structure = self.call_flat(tensors, [*map(Tensor.data_ptr, tensors)], new_groups)
        return pytree.tree_unflatten(results, structure)

    def call_flat(
        self, tensors: list[Tensor], addresses: list[int], new_groups: Groups, other_groups: Groups = ()
    ) -> Flat:
        """The results of `fn`, as leaves and their structure. Keeps and modifies the list `addresses`.

        `other_groups` are also copied as a whole or not at all, but may hold the tensors of the last call.
        """
        repeated = self.track(tensors, addresses, new_groups, other_groups)
        if self.graph is None:
            key = tuple(self.last_addresses)
            if key not in self.graphs:
                self.capturable = self.capturable and can_capture(tensors)
                captured = self.capture_graph(tensors) if repeated and self.capturable else None
                if captured is None:
                    results, structure = pytree.tree_flatten(self.fn(tensors))
                    self.capturable &= can_capture([tensors[0], *(x for x in results if isinstance(x, Tensor))])
                    return results, structure
                self.graphs[key] = captured
                if len(self.graphs) > MAX_GRAPHS:
                    self.graphs.popitem(last=False)
            self.graphs.move_to_end(key)
            self.graph = self.graphs[key]
        if self.graph.static_inputs:
            static = self.graph.static_inputs
            copy_all([*static.values()], [unexpanded(tensors[i]) for i in static])
        self.graph.replay()
        return copy_results(self.graph.results), self.graph.structure

    def capture_graph(self, tensors: list[Tensor]) -> CapturedGraph | None:
        """A graph of this call; None, with a warning, if it copies between the CPU and the GPU."""
        with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode can be written only there
            static = {i: clone_strided(unexpanded(tensors[i])) for i in self.copied_indices}
        inputs = [static[i].expand(x.shape) if i in static else x for i, x in enumerate(tensors)]
        self.fn(inputs)  # compiling and tuning must not happen during the capture
        try:
            replay, results = capture(self.fn, inputs)
        except RuntimeError as error:
            if "copy between CPU and CUDA" not in str(error):
                raise
            self.capturable = False
            message = f"{self.name} runs slowly, without CUDA graphs; make on the GPU what it makes on the CPU"
            warn(f"{message} ({first_line(error)})", RuntimeWarning, stacklevel=2)
            return None
        leaves, structure = pytree.tree_flatten(results)
        return CapturedGraph(replay, static, [x.detach() if isinstance(x, Tensor) else x for x in leaves], structure)

    def track(self, tensors: list[Tensor], addresses: list[int], new_groups: Groups, other_groups: Groups = ()) -> bool:
        """Record the addresses, and choose which inputs are copied.

        Returns whether all inputs that are not copied had the same addresses at the last call.
        """
        last = self.last_addresses  # few passes, as this runs on hundreds of inputs before each token
        for i in self.copied_indices:
            addresses[i] = 0
        moved = {i for i, before in enumerate(last) if addresses[i] != before} if addresses != last else set()
        together = [{*each} for each in new_groups]
        together += [{*each} for each in other_groups if not moved.isdisjoint(each)] if moved else []
        alone = [{i} for i in moved.difference(*together)]
        groups = [group for each in together + alone if (group := each - self.written - self.copied_indices)]
        if last and groups:
            size = {i: x.nbytes for i, x in enumerate(tensors)}
            limit = self.max_copied * sum(size.values())
            for group in sorted(groups, key=lambda group: sum(size[i] for i in group)):
                if sum(size[i] for i in self.copied_indices | group) <= limit:
                    self.copied_indices |= group
                    self.graphs.clear()  # the old graphs read a newly copied input at its old address
                    self.graph = None
            for i in self.copied_indices:
                addresses[i] = 0
        if addresses != last:
            self.last_addresses, self.graph = addresses, None
        return bool(last) and moved <= self.copied_indices


def unexpanded(x: Tensor) -> Tensor:
    """The part of an expanded tensor that is in memory."""
    return x[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())]


def clone_strided(x: Tensor) -> Tensor:
    """A copy with the same strides, also where `clone` would make it dense."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source to its target, in one call for each dtype: PyTorch copies mixed dtypes one by one."""
    for dtype in {x.dtype for x in sources}:
        chosen = [i for i, x in enumerate(sources) if x.dtype == dtype]
        torch._foreach_copy_([targets[i] for i in chosen], [sources[i] for i in chosen])  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def copy_results(results: list[Any]) -> list[Any]:
    """The results, with all tensors among them copied at once."""
    tensors = [x for x in results if isinstance(x, Tensor)]
    copies = [*map(torch.empty_like, tensors)]
    copy_all(copies, tensors)
    rest = iter(copies)
    return [next(rest) if isinstance(x, Tensor) else x for x in results]


def graphed(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, a pure function of trees of tensors, with a CUDA graph for each combination of shapes.

    All inputs are copied. Runs `fn` directly unless all tensors are on one GPU.
    """
    functions: dict[Any, GraphedFunction] = {}

    def call(*trees: Any) -> Any:
        leaves, structure = pytree.tree_flatten(trees)
        if not can_capture(leaves):
            return fn(*trees)
        key = structure, tuple(map(layout, leaves))
        if key not in functions:
            functions[key] = GraphedFunction(
                lambda tensors: fn(*pytree.tree_unflatten(tensors, structure)), max_copied=inf
            )
        return functions[key](leaves)

    return call
