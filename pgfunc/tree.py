"""Trees of tensors: paths, map, replace, stack and unstack; the abstract tree that a declaration describes; a start.

A tree is any nesting of NamedTuples, tuples, lists and dicts; `()` marks an absent part and has no leaves. A path names
a leaf by its fields and indices: `language.layers.3.q`. Nothing here knows about models.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pgfunc.errors import NumericalError, SettingError, printable

T = TypeVar("T")

WIDTH, LINES = 100, 20  # the longest summary: so many characters a line, so many lines
FEW = 8  # numbers that a summary shows


def flatten(tree: Any) -> dict[str, Any]:
    """Path -> leaf, in the order of the tree."""
    return {join(path): leaf for path, leaf in pytree.tree_leaves_with_path(tree)}


def join(path: Iterable[Any]) -> str:
    """The dotted form of a torch pytree key path."""
    return ".".join(str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path)


def map(fn: Callable[..., Any], tree: T, *rest: T) -> T:
    """Apply `fn` leaf by leaf to trees of one structure."""
    return pytree.tree_map(fn, tree, *rest)


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Like `map`; `fn` gets the leaf's path first."""
    return pytree.tree_map_with_path(lambda path, *leaves: fn(join(path), *leaves), tree, *rest)


def matching(paths: Iterable[str], pattern: str) -> list[str]:
    """The paths that match a pattern, by fnmatch on whole paths; a SettingError where there are none."""
    paths = list(paths)
    if found := [path for path in paths if fnmatchcase(path, pattern)]:
        return found
    raise SettingError(f"{pattern!r} matches none of {len(paths)} paths such as {paths[0]} (pgfunc inspect lists them)")


def replace(tree: T, leaves: Mapping[str, Any]) -> T:
    """The tree with the leaves at the given paths exchanged. A path that is not there is a KeyError that names it."""
    missing = leaves.keys() - flatten(tree).keys()
    if missing:
        raise KeyError(f"no leaf at {sorted(missing)[0]}")
    return map_with_path(lambda path, leaf: leaves.get(path, leaf), tree)


def stack(trees: Sequence[T]) -> T:
    """Trees of one structure -> one tree whose leaves carry a leading axis, as `torch.func.vmap` takes an ensemble."""
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
    """The bytes of all leaves, counted leaf by leaf."""
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(tree))


def check_finite(tree: Any, where: str) -> None:
    """Raise NumericalError, naming the first leaf that has nan or infinity in it; `where` is what holds the tree."""
    if (path := not_finite(tree)) is not None:
        raise NumericalError(f"{where}: {path} holds nan or infinity, and is not saved")


def not_finite(tree: Any) -> str | None:
    """The path of the first leaf that has nan or infinity in it: a pass over memory that copies nothing.

    A sum is finite only where all its terms are; where it is not, it may have overflowed, and each number is looked at.
    """
    leaves = {path: leaf.detach() for path, leaf in flatten(tree).items() if leaf.is_floating_point()}
    wide = {path: leaf if leaf.dtype.itemsize > 1 else leaf.float() for path, leaf in leaves.items()}  # fp8 has no sum
    if not wide:
        return None
    device = next(iter(wide.values())).device
    sums = torch.stack([leaf.sum().to(device, torch.float32) for leaf in wide.values()])  # a GPU is waited for once
    suspects = [leaf for leaf, finite in zip(wide.items(), sums.isfinite().tolist(), strict=True) if not finite]
    return next((path for path, leaf in suspects if not leaf.isfinite().all()), None)


def abstract(declaration: type[T], sizes: Mapping[str, int], **given: Any) -> T:
    """A tree on the meta device, shaped as the fields of a NamedTuple declare.

    A field `q: Float[Tensor, "nh d"]` becomes an empty tensor of shape (sizes["nh"], sizes["d"]). `given` fills the
    fields that are trees of their own, or absent.
    """
    hints = get_type_hints(declaration)
    declared = {
        name: torch.empty([sizes[axis] for axis in hint.dim_str.split()], dtype=torch.float32, device="meta")
        for name, hint in hints.items()
        if name not in given
    }
    return declaration(**declared, **given)


def init(abstract: T, seed: int, dtype: torch.dtype) -> T:
    """Random leaves to train from: matrices normal with variance 1 / fan-in, `..._scale` 1, all other vectors 0.

    Fan-in is the product of all axes but the first, and the width for embeddings, so that activations start near 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(path: str, leaf: torch.Tensor) -> torch.Tensor:
        if leaf.dim() < 2:
            return torch.full(leaf.shape, float(path.endswith("_scale")), dtype=dtype, device="cpu")
        drawn = torch.randn(leaf.shape, generator=generator, dtype=torch.float32, device="cpu")
        return (drawn * leaf[0].numel() ** -0.5).to(dtype)

    return map_with_path(draw, abstract)


def summary(tree: Any) -> str:
    """A few lines about a tree, for `__repr__`: its size, its dtypes and devices, then one line for each part.

    Cache(2.69 k elements, 10.8 kB, float32 and int64 on cpu)
      k: 3 x float32[2, 14, 2, 8] on cpu
      v: 3 x float32[2, 14, 2, 8] on cpu
      length: int64[2] on cpu: 9, 7

    There are at most `LINES` lines of `WIDTH` characters. The only numbers that are read are up to `FEW` integers on a
    CPU, so a summary never waits for a GPU. It never raises an error, whatever the leaves are.
    """
    parts = [] if _repeated(tree) else _parts(tree)
    lines = [_line(tree)] + [f"  {name}: {_line(part)}" for name, part in parts]
    if len(lines) > LINES:
        lines[LINES - 1 :] = [f"  ... and {len(lines) - LINES + 1} more parts"]
    return "\n".join(_cut(line) for line in lines)


def _parts(tree: Any) -> list[tuple[str, Any]]:
    """The names and values of the branches of a node; none for a leaf."""
    if isinstance(tree, dict):
        return [(key if isinstance(key, str) else _repr(key), value) for key, value in tree.items()]
    if isinstance(tree, (tuple, list)):
        names = getattr(tree, "_fields", range(len(tree)))
        return [(str(name), value) for name, value in zip(names, tree, strict=True)]
    return []


def _line(tree: Any) -> str:
    """One line about a tree: a leaf, equal parts, or the type of a node and the totals of its tensors."""
    if isinstance(tree, Tensor):
        return _tensor(tree)
    if repeated := _repeated(tree):
        return repeated
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    if tensors or hasattr(tree, "_fields"):
        return f"{type(tree).__name__}({_totals(tensors)})"
    return _repr(tree)


def _repeated(tree: Any) -> str:
    """`18 x ...` for a tuple or list whose parts all have the same line, else "". A NamedTuple is never shown so."""
    if not isinstance(tree, (tuple, list)) or hasattr(tree, "_fields"):
        return ""
    lines = {_line(part) for part in tree}
    return f"{len(tree)} x {lines.pop()}" if len(lines) == 1 else ""


def _totals(tensors: list[Tensor]) -> str:
    """The number of elements and bytes in all tensors, then their dtypes and devices."""
    if not tensors:
        return "no tensors"
    elements, sizes = [x.numel() for x in tensors], [x.numel() * x.dtype.itemsize for x in tensors]
    # a symbolic size, which PyTorch has while it traces, is not read: that would fix it
    known = all(isinstance(size, int) for size in sizes)
    size = f"{_si(sum(elements))} elements, {_si(sum(sizes))}B" if known else f"{len(tensors)} tensors"
    dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in tensors})
    devices = sorted({str(x.device) for x in tensors})
    return f"{size}, {' and '.join(dtypes)} on {' and '.join(devices)}"


def _tensor(x: Tensor) -> str:
    """`int64[2] on cpu: 9, 7`. The numbers are shown for a few integers on a CPU, outside of compiled code."""
    try:
        line = f"{str(x.dtype).removeprefix('torch.')}{[*x.shape]} on {x.device}"
    except RuntimeError:  # a nested tensor has no shape
        return type(x).__name__
    plain = type(x) is Tensor and x.layout is torch.strided and not torch.compiler.is_compiling()
    integers = not (x.is_floating_point() or x.is_complex() or x.dtype is torch.bool)
    if not (plain and integers and x.device.type == "cpu" and x.dim() < 2 and 0 < x.numel() <= FEW):
        return line
    try:
        return f"{line}: {', '.join(str(number) for number in x.flatten().tolist())}"
    except RuntimeError:  # inside vmap x stands for a batch of tensors
        return line


def _si(number: int | float) -> str:
    """A number in three digits, with the prefix of its unit: `2.92 G`."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} E"


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # an object of the caller's
        return type(value).__name__


def _cut(line: str) -> str:
    """The line without what breaks it, and no longer than `WIDTH`."""
    indent = line[: len(line) - len(line.lstrip())]
    line = indent + printable(" ".join(line.split()))
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..."
