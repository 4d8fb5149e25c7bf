"""Trees of tensors: paths, map, replace, stack and unstack; the abstract tree that a declaration describes; a start.

A tree is any nesting of NamedTuples, tuples, lists and dicts; `()` marks an absent part and has no leaves. A path names
a leaf by its fields and indices: `language.layers.3.q`. Nothing here knows about models.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar, get_type_hints

import torch
from torch.utils import _pytree as pytree

from pgfunc.errors import NumericalError, SettingError

T = TypeVar("T")


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
