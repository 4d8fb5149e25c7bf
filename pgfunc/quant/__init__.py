"""Trees with quantized weights: plain in, quantized out, and back.

    small = pg.quant.quantize(model.params, "int4")     # the language model in 4 bits, its embedding in 8
    pg.quant.errors(model.params, small)                # how far each weight moved

A quantized matrix stands in the tree as an `Int8`, a `Float8` or an `Int4` of `lowbit`, whose tensors are leaves; every
function of the model takes such a tree. It is not for training: nothing moves through rounded weights. Owns which
weights of a tree are quantized, and what is said when that cannot be.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pgfunc import tree
from pgfunc.errors import NumericalError, SettingError
from pgfunc.quant import lowbit
from pgfunc.quant.lowbit import BLOCK, GROUPS, Int4, Quantized

T = TypeVar("T")

TABLE = "language.embed"  # rows of it are looked up: 8 bits at least
FP8 = 8, 9  # the first compute capability that has it
PLAIN = {"vision.position", "projector"}  # a sum, and what tells the dtype of the activations


def quantize(params: T, method: str = "int8", patterns: Sequence[str] = ("language.*",)) -> T:
    """The tree with its matrices in 8 or 4 bits, on whatever device they are; the given one is not changed.

    method: "int8" or "fp8", a scale for each output; "int4", "int4-64" or "int4-32", a scale and a zero for each output
    and 128, 64 or 32 inputs. "fp8" is for GPUs that have it; on a CPU the weights are made anew for each product.
    patterns: which matrices, by fnmatch on whole paths, such as `language.layers.*.gate`; vectors that match stay as
    they are. The embedding, which is also the head, never has fewer than 8 bits. What is quantized by this method
    already stays. Raises SettingError for another method, fp8 on a GPU without it, a pattern that matches no matrix, a
    matrix that is quantized otherwise, or has a size that int4 does not take; NumericalError for numbers that are not
    finite, or so large that their levels would not be.
    """
    chosen = {path for pattern in patterns for path in tree.matching(matrices(params), pattern)}
    return apply(params, {path: "int8" if path == TABLE and GROUPS.get(method) else method for path in chosen})


def apply(params: T, methods: Mapping[str, str]) -> T:
    """The tree with the matrices at the given paths quantized, each by its method, see `quantize`."""
    known = matrices(params)
    for path in methods:
        if path not in known:
            raise SettingError(f"{path} is no matrix that can be quantized (pgfunc inspect lists all parameters)")
    made = {path: quantized(path, w, methods[path]) for path, w in weights(params).items() if path in methods}
    return _map(lambda path, w: made.get(path, w), params)


def quantized(path: str, w: Tensor | Quantized, method: str) -> Quantized:
    """One matrix of a tree in the given form, or a reason why not that names its path."""
    if method not in GROUPS:
        raise SettingError(f"quantize is {method!r}, expected one of {', '.join(GROUPS)}")
    if isinstance(w, Quantized):
        if (found := lowbit.method(w)) != method:
            raise SettingError(f"{path} is {found} already, expected plain weights or {method}; dequantize it first")
        return w
    check_device(method, w.device)
    outputs, inputs = w.shape
    if (group := GROUPS[method]) and (outputs % BLOCK or inputs % group):
        raise SettingError(
            f"{path}: {method} takes outputs in multiples of {BLOCK} and inputs in multiples of {group}, "
            f"found {outputs} x {inputs}; take int8, or leave it out"
        )
    made = lowbit.quantize(w, method)
    if not w.is_meta and not lowbit.finite(made):
        raise NumericalError(f"{path}: has numbers that are not finite, or too large for {method} in {w.dtype}")
    return made


def dequantize(params: T) -> T:
    """The tree with plain weights again: those that the quantized ones stand for."""
    return _map(lambda path, w: lowbit.dequantize(w) if isinstance(w, Quantized) else w, params)


def arranged(params: T, device: torch.device) -> T:
    """The tree with its matrices in 4 bits on a device, and in the order in which that device reads them fast.

    `quantize` and `load` do so for where the weights are; a tree that is moved by hand keeps the order, and is right,
    but slow. Raises SettingError where it has weights in fp8 and the device does not.
    """
    for found in set(methods(params).values()):
        check_device(found, device)
    return _map(lambda path, w: lowbit.arranged(w, device) if isinstance(w, Int4) else w, params)


def check_device(method: str, device: torch.device) -> None:
    """Raise SettingError for a GPU that has no fp8: what is compiled for it could not read it."""
    if method != "fp8" or device.type != "cuda" or torch.version.hip is not None:
        return
    if (found := torch.cuda.get_device_capability(device)) < FP8:
        have, need = (".".join(map(str, each)) for each in (found, FP8))
        raise SettingError(f"fp8 needs a GPU of compute capability {need} or more, {device} has {have}; take int8")


def methods(params: Any) -> dict[str, str]:
    """Path -> method of every matrix that is quantized."""
    return {path: lowbit.method(w) for path, w in weights(params).items() if isinstance(w, Quantized)}


def errors(params: Any, quantized: Any) -> dict[str, float]:
    """Path -> how far a quantized matrix is from the plain one: the norm of the difference over the norm."""
    given, found = weights(params), weights(dequantize(quantized))
    return {
        path: ((found[path].double() - given[path].double()).norm() / given[path].double().norm()).item()
        for path in methods(quantized)
    }


def check_plain(params: Any, what: str) -> None:
    """Raise SettingError where a weight is quantized, for `what` needs plain ones."""
    for path, found in methods(params).items():
        raise SettingError(f"{what} needs plain weights, {path} is {found}; take the original, or quant.dequantize")


def matrices(params: Any) -> list[str]:
    """The paths of the weights that can be quantized, or are."""
    return [
        path for path, w in weights(params).items() if path not in PLAIN and (isinstance(w, Quantized) or w.dim() == 2)
    ]


def weights(params: Any) -> dict[str, Any]:
    """Path -> weight, a quantized matrix being one."""
    found, _ = pytree.tree_flatten_with_path(params, is_leaf=lambda node: isinstance(node, Quantized))
    return {tree.join(path): w for path, w in found}


def _map(fn: Any, params: T) -> T:
    return pytree.tree_map_with_path(
        lambda path, w: fn(tree.join(path), w), params, is_leaf=lambda node: isinstance(node, Quantized)
    )
