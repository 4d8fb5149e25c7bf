"""Trees of tensors: paths, map, replace, stack and unstack, abstract trees, random initialization, short reprs.

A tree is any nesting of NamedTuples, tuples, lists and dicts; `()` marks an absent part and has no leaves. A path names
a leaf by its fields and indices: `language.layers.3.q`. This module knows nothing about models.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pgfunc.errors import NumericalError, SettingError, printable

T = TypeVar("T")

WIDTH, LINES = 100, 20  # the limits of a summary: characters per line, and lines
FEW = 8  # a summary shows the numbers of tensors with at most this many elements


def flatten(tree: Any) -> dict[str, Any]:
    """A dict from path to leaf, in the order of the tree."""
    return {join(path): leaf for path, leaf in pytree.tree_leaves_with_path(tree)}


def join(path: Iterable[Any]) -> str:
    """The dotted form of a torch pytree key path."""
    return ".".join(str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path)


def map(fn: Callable[..., Any], tree: T, *rest: T) -> T:
    """Apply `fn` to the corresponding leaves of trees that have the same structure."""
    return pytree.tree_map(fn, tree, *rest)


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Like `map`, but `fn` takes the path of the leaf as its first argument."""
    return pytree.tree_map_with_path(lambda path, *leaves: fn(join(path), *leaves), tree, *rest)


def matching(paths: Iterable[str], pattern: str) -> list[str]:
    """The paths that match a pattern. `fnmatch` compares the pattern with the whole path.

    Raises SettingError if no path matches.
    """
    paths = list(paths)
    if matches := [path for path in paths if fnmatchcase(path, pattern)]:
        return matches
    example = f" such as {paths[0]}" if paths else ""
    raise SettingError(f"{pattern!r} matches none of {len(paths)} paths{example} (pgfunc inspect lists them)")


def replace(tree: T, leaves: Mapping[str, Any]) -> T:
    """The tree with new leaves at some paths: `leaves` maps path to leaf.

    Raises KeyError, which names the path, if the tree has no leaf there.
    """
    missing = leaves.keys() - flatten(tree).keys()
    if missing:
        raise KeyError(f"no leaf at {sorted(missing)[0]}")
    return map_with_path(lambda path, leaf: leaves.get(path, leaf), tree)


def stack(trees: Sequence[T]) -> T:
    """One tree from trees of the same structure. Its leaves have a new leading axis, for `torch.func.vmap`."""
    return map(lambda *leaves: torch.stack(leaves), trees[0], *trees[1:])


def unstack(tree: T) -> list[T]:
    """The inverse of `stack`; the leaves are views."""
    leaves, structure = pytree.tree_flatten(tree)
    return [
        pytree.tree_unflatten(list(row), structure) for row in zip(*(leaf.unbind(0) for leaf in leaves), strict=True)
    ]


def count(tree: Any) -> int:
    """The number of elements in all leaves."""
    return sum(leaf.numel() for leaf in pytree.tree_leaves(tree))


def nbytes(tree: Any) -> int:
    """The sum of the bytes of all leaves. Memory that two leaves share is counted twice."""
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(tree))


def check_finite(tree: Any, where: str) -> None:
    """Raise NumericalError if a leaf contains nan or infinity. The message names `where` and the path of the leaf."""
    if (path := not_finite(tree)) is not None:
        raise NumericalError(f"{where}: {path} holds nan or infinity, and is not saved")


def not_finite(tree: Any) -> str | None:
    """The path of the first leaf that contains nan or infinity, or None. Reads the memory once and copies nothing.

    A sum is finite only if all its terms are. If a sum is not finite it may only have overflowed, so then every element
    of that leaf is checked.
    """
    leaves = {path: leaf.detach() for path, leaf in flatten(tree).items() if leaf.is_floating_point()}
    # PyTorch cannot sum fp8
    leaves = {path: leaf if leaf.dtype.itemsize > 1 else leaf.float() for path, leaf in leaves.items()}
    if not leaves:
        return None
    device = next(iter(leaves.values())).device
    sums = torch.stack([leaf.sum().to(device, torch.float32) for leaf in leaves.values()])  # one wait for the GPU
    suspects = [item for item, finite in zip(leaves.items(), sums.isfinite().tolist(), strict=True) if not finite]
    return next((path for path, leaf in suspects if not leaf.isfinite().all()), None)


def abstract(declaration: type[T], sizes: Mapping[str, int], **subtrees: Any) -> T:
    """A tree on the meta device, with the shapes that the fields of a NamedTuple declare.

    A field `q: Float[Tensor, "nh d"]` becomes an empty float32 tensor of shape (sizes["nh"], sizes["d"]). `subtrees`
    are the values of the fields that are trees themselves, or `()` if absent.
    """
    hints = get_type_hints(declaration)
    declared = {
        name: torch.empty([sizes[axis] for axis in hint.dim_str.split()], dtype=torch.float32, device="meta")
        for name, hint in hints.items()
        if name not in subtrees
    }
    return declaration(**declared, **subtrees)


def init(abstract: T, seed: int, dtype: torch.dtype) -> T:
    """A tree of random parameters to train from scratch, on the CPU, with the shapes of an abstract tree.

    Matrices are normal with variance 1 / fan-in, vectors named `..._scale` are 1 and all other vectors are 0. Fan-in is
    the product of all axes except the first. For an embedding it is the width, so that activations start near 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(path: str, leaf: torch.Tensor) -> torch.Tensor:
        if leaf.dim() < 2:
            return torch.full(leaf.shape, float(path.endswith("_scale")), dtype=dtype, device="cpu")
        normal = torch.randn(leaf.shape, generator=generator, dtype=torch.float32, device="cpu")
        return (normal * leaf[0].numel() ** -0.5).to(dtype)

    return map_with_path(draw, abstract)


def summary(tree: Any) -> str:
    """A tree as a few lines of text, for `__repr__`: size, dtypes and devices of the tree, then a line for each part.

    Cache(2.69 k elements, 10.8 kB, float32 and int64 on cpu)
      k: 3 x float32[2, 14, 2, 8] on cpu
      v: 3 x float32[2, 14, 2, 8] on cpu
      length: int64[2] on cpu: 9, 7

    The text has at most `LINES` lines of at most `WIDTH` characters. Only vectors of at most `FEW` integers on the CPU
    are read, so this function never waits for a GPU. It raises no error, whatever the leaves are.
    """
    parts = [] if _repeated(tree) else _parts(tree)
    lines = [_line(tree)] + [f"  {name}: {_line(part)}" for name, part in parts]
    if len(lines) > LINES:
        lines[LINES - 1 :] = [f"  ... and {len(lines) - LINES + 1} more parts"]
    return "\n".join(_cut(line) for line in lines)


def _parts(tree: Any) -> list[tuple[str, Any]]:
    """The (name, value) pairs directly below a node; an empty list for a leaf."""
    if isinstance(tree, dict):
        return [(key if isinstance(key, str) else _repr(key), value) for key, value in tree.items()]
    if isinstance(tree, (tuple, list)):
        names = getattr(tree, "_fields", range(len(tree)))
        return [(str(name), value) for name, value in zip(names, tree, strict=True)]
    return []


def _line(tree: Any) -> str:
    """A tree as one line: a leaf, a repeated part, or the type of the node and the totals of its tensors."""
    if isinstance(tree, Tensor):
        return _tensor(tree)
    if repeated := _repeated(tree):
        return repeated
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    if tensors or hasattr(tree, "_fields"):
        return f"{type(tree).__name__}({_totals(tensors)})"
    return _repr(tree)


def _repeated(tree: Any) -> str:
    """`18 x ...` for a tuple or list in which all parts have the same line; "" for everything else, NamedTuples too."""
    if not isinstance(tree, (tuple, list)) or hasattr(tree, "_fields"):
        return ""
    lines = {_line(part) for part in tree}
    return f"{len(tree)} x {lines.pop()}" if len(lines) == 1 else ""


def dtype_name(x: Tensor | torch.dtype) -> str:
    """The name of a dtype, or of a tensor's dtype, in files and options, such as `bfloat16`."""
    return str(x.dtype if isinstance(x, Tensor) else x).removeprefix("torch.")


def _totals(tensors: list[Tensor]) -> str:
    """The number of elements and bytes of all tensors, then their dtypes and devices."""
    if not tensors:
        return "no tensors"
    elements, sizes = [x.numel() for x in tensors], [x.numel() * x.dtype.itemsize for x in tensors]
    # while PyTorch traces, sizes may be symbolic: formatting one would specialize the trace to it
    known = all(isinstance(size, int) for size in sizes)
    size = f"{_si(sum(elements))} elements, {_si(sum(sizes))}B" if known else f"{len(tensors)} tensors"
    dtypes = sorted({dtype_name(x) for x in tensors})
    devices = sorted({str(x.device) for x in tensors})
    return f"{size}, {' and '.join(dtypes)} on {' and '.join(devices)}"


def _tensor(x: Tensor) -> str:
    """`int64[2] on cpu: 9, 7`. Only short integer vectors on the CPU show numbers, and not in compiled code."""
    try:
        line = f"{dtype_name(x)}{[*x.shape]} on {x.device}"
    except RuntimeError:  # a strided nested tensor has no shape
        return type(x).__name__
    plain = type(x) is Tensor and x.layout is torch.strided and not torch.compiler.is_compiling()
    integers = not (x.is_floating_point() or x.is_complex() or x.dtype is torch.bool)
    if not (plain and integers and x.device.type == "cpu" and x.dim() < 2 and 0 < x.numel() <= FEW):
        return line
    try:
        return f"{line}: {', '.join(str(number) for number in x.flatten().tolist())}"
    except RuntimeError:  # inside vmap, x is a whole batch
        return line


def _si(number: int | float) -> str:
    """A number with three digits and an SI prefix: `2.92 G`. A unit can follow directly."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} E"


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # the object is the caller's, and its `__repr__` may raise anything
        return type(value).__name__


def _cut(line: str) -> str:
    """The line without line breaks or unprintable characters, shortened to `WIDTH` characters."""
    indent = line[: len(line) - len(line.lstrip())]
    line = indent + printable(" ".join(line.split()))
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..."
