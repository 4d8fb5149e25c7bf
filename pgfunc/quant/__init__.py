"""Quantize the weights of a tree, and dequantize them.

    quantized = pg.quant.quantize(model.params, "int4")  # the language model in 4 bits, its embedding in 8
    pg.quant.errors(model.params, quantized)             # the relative error of each matrix

In the tree, a quantized matrix is an `Int8`, a `Float8` or an `Int4` (`lowbit`), whose tensors are leaves. Every
function of the model accepts a quantized tree. It cannot be trained: rounding has no useful gradient. This module
decides which weights of a tree are quantized, and explains why some cannot be.
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

TABLE = "language.embed"  # `ops.embedding` looks up single rows, which needs 8 bits or more
FP8 = 8, 9  # the first compute capability with fp8
PLAIN = {"vision.position", "projector"}  # never quantized: one is added, the other decides the activations' dtype


def quantize(params: T, method: str = "int8", patterns: Sequence[str] = ("language.*",)) -> T:
    """A tree with its matrices in 8 or 4 bits, on their device. The given tree does not change.

    method: "int8" and "fp8" have a scale for each output; "int4", "int4-64" and "int4-32" have a scale and a zero for
    each output and each 128, 64 or 32 inputs. "fp8" is for GPUs that support it; a CPU dequantizes the weights for each
    product. patterns: which matrices, by fnmatch on whole paths, such as `language.layers.*.gate`; vectors that match
    are left alone. The embedding, which is also the head, always has 8 bits or more. Matrices that are quantized by
    this method already are left alone.

    Raises SettingError for an unknown method, fp8 on a GPU without it, a pattern that matches no matrix, a matrix that
    is quantized by another method, and a matrix whose size int4 does not support. Raises NumericalError for numbers
    that are not finite, or too large to quantize.
    """
    chosen = {path for pattern in patterns for path in tree.matching(matrices(params), pattern)}
    return apply(params, {path: "int8" if path == TABLE and GROUPS.get(method) else method for path in chosen})


def apply(params: T, methods: Mapping[str, str]) -> T:
    """The tree with the matrices at these paths quantized, each by its method, see `quantize`."""
    available = matrices(params)
    for path in methods:
        if path not in available:
            raise SettingError(f"{path} is no matrix that can be quantized (pgfunc inspect lists all parameters)")
    replaced = {path: quantized(path, w, methods[path]) for path, w in weights(params).items() if path in methods}
    return _map(lambda path, w: replaced.get(path, w), params)


def quantized(path: str, w: Tensor | Quantized, method: str) -> Quantized:
    """One matrix of a tree, quantized. Errors name its path, see `quantize`."""
    if method not in GROUPS:
        raise SettingError(f"quantize is {method!r}, expected one of {', '.join(GROUPS)}")
    if isinstance(w, Quantized):
        if (present := lowbit.method(w)) != method:
            raise SettingError(f"{path} is {present} already, expected plain weights or {method}; dequantize it first")
        return w
    check_device(method, w.device)
    outputs, inputs = w.shape
    if (group := GROUPS[method]) and (outputs % BLOCK or inputs % group):
        raise SettingError(
            f"{path}: {method} takes outputs in multiples of {BLOCK} and inputs in multiples of {group}, "
            f"found {outputs} x {inputs}; take int8, or leave it out"
        )
    rounded = lowbit.quantize(w, method)
    if not w.is_meta and not lowbit.finite(rounded):
        raise NumericalError(f"{path}: has numbers that are not finite, or too large for {method} in {w.dtype}")
    return rounded


def dequantize(params: T) -> T:
    """The tree with plain weights: those that the quantized matrices represent."""
    return _map(lambda path, w: lowbit.dequantize(w) if isinstance(w, Quantized) else w, params)


def to_device_layout(params: T, device: torch.device) -> T:
    """The tree with its 4-bit matrices on a device, in the layout that this device reads fastest.

    `quantize` and `load` do this for the device of the weights. A tree that is moved by hand keeps its layout, which is
    correct but slow on another kind of device. Raises SettingError for fp8 weights if the device has no fp8.
    """
    for method in set(methods(params).values()):
        check_device(method, device)
    return _map(lambda path, w: lowbit.to_device_layout(w, device) if isinstance(w, Int4) else w, params)


arranged = to_device_layout  # the old public name: kept for code that uses it


def check_device(method: str, device: torch.device) -> None:
    """Raise SettingError for fp8 on a GPU that does not support it."""
    if method != "fp8" or device.type != "cuda" or torch.version.hip is not None:
        return
    if (capability := torch.cuda.get_device_capability(device)) < FP8:
        have, need = (".".join(map(str, each)) for each in (capability, FP8))
        raise SettingError(f"fp8 needs a GPU of compute capability {need} or more, {device} has {have}; take int8")


def methods(params: Any) -> dict[str, str]:
    """Path -> method, for every quantized matrix."""
    return {path: lowbit.method(w) for path, w in weights(params).items() if isinstance(w, Quantized)}


def errors(params: Any, quantized: Any) -> dict[str, float]:
    """Path -> relative error of a quantized matrix: the norm of its difference from the plain one, over the norm."""
    plain, rounded = weights(params), weights(dequantize(quantized))
    return {
        path: ((rounded[path].double() - plain[path].double()).norm() / plain[path].double().norm()).item()
        for path in methods(quantized)
    }


def check_plain(params: Any, what: str) -> None:
    """Raise SettingError if a weight is quantized; `what` names the operation that needs plain weights."""
    if by_path := methods(params):
        path, method = next(iter(by_path.items()))
        raise SettingError(f"{what} needs plain weights, {path} is {method}; take the original, or quant.dequantize")


def matrices(params: Any) -> list[str]:
    """The paths of the weights that are quantized or can be."""
    return [
        path for path, w in weights(params).items() if path not in PLAIN and (isinstance(w, Quantized) or w.dim() == 2)
    ]


def weights(params: Any) -> dict[str, Any]:
    """Path -> weight; a quantized matrix is one weight."""
    pairs, _ = pytree.tree_flatten_with_path(params, is_leaf=lambda node: isinstance(node, Quantized))
    return {tree.join(path): w for path, w in pairs}


def _map(fn: Any, params: T) -> T:
    return pytree.tree_map_with_path(
        lambda path, w: fn(tree.join(path), w), params, is_leaf=lambda node: isinstance(node, Quantized)
    )
