"""What a function does to a donated cache, read from the graph of its operations.

Compiled code writes a donated cache in place. Older handles on the same buffers stay values if it only appends: each
buffer that it returns is the one that it was given, with elements overwritten at or after the cache's length, and the
new length is not below the old one. A function that changes buffers in any other way is refused. Positions and lengths
may depend on the arguments of a call, so for these there is an answer that holds for every call: whether the graph
proves that they are never below the length.

The graph is TorchDynamo's, before decompositions: it has the operations that the function calls, by their names.
"""

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from pgfunc.errors import SettingError

REORDER = "it may only append to it; reorder rows outside of the function, by pg.reorder"
# operations whose result is their first argument with some elements overwritten, and which argument says where;
# 0: nowhere
OVERWRITING = {"index_put": 1, "index_copy": 2, "index_fill": 2, "scatter": 2, "slice_scatter": 3, "select_scatter": 3,
               "masked_fill": 1, "masked_scatter": 1, "clone": 0, "contiguous": 0, "detach": 0}  # fmt: skip
OVERWRITING_IN_PLACE = {"setitem": 1, "index_put_": 1, "index_copy_": 2, "index_fill_": 2, "scatter_": 2,
                        "masked_fill_": 1, "masked_scatter_": 1}  # fmt: skip
# operations whose result has the elements of their first argument, or, for clamp, those that are inside the cache
RESHAPING = {"rearrange", "view", "reshape", "unsqueeze", "squeeze", "expand", "to", "long", "clone", "contiguous",
             "detach", "clamp"}  # fmt: skip


class Appends(NamedTuple):
    """Whether the graph proves, for every call, that the function only appends."""

    positions: bool  # it writes nothing before the length
    length: bool  # the new length is not below the old one


def appends(graph: fx.Graph) -> Appends | None:
    """How the graph changes the donated cache; None if it is the graph of a function without one.

    Raises SettingError if it does more than overwrite elements of the cache's buffers, and if there is no cache and the
    graph copies into an argument.
    """
    lengths = [node for node in graph.nodes if operation_name(node) == "expand_as" and is_input(node.args[1])]
    copies = [node for node in graph.nodes if node.target == "copy_" and is_input(node.args[0])]
    if not lengths:
        if copies:
            raise SettingError("the function copies into an argument: return a new tensor instead")
        return None
    new, old = lengths[-1].args  # `compilation.compile_whole` adds this node
    positions = True
    for node in copies:  # and these
        positions &= overwrites_from(node.args[0], node.args[1], node, old)
    return Appends(positions, at_least(new, old))


def overwrites_from(buffer: fx.Node, new: Any, write_back: fx.Node, length: fx.Node) -> bool:
    """Whether `new` is the buffer with elements overwritten at or after the length, as far as the graph proves it.

    `write_back` is the node that copies `new` to the buffer. Raises SettingError if `new` is anything else than the
    buffer with some elements overwritten.
    """
    if not isinstance(new, fx.Node):
        raise refusal(str(new))
    proved = True
    for user in new.users:
        name = operation_name(user)
        if user is not write_back and writes_into(user, new):
            if new is buffer or name not in OVERWRITING_IN_PLACE:
                raise refusal(name)
            proved &= any_at_least(argument(user, OVERWRITING_IN_PLACE[name]), length)
        elif is_operator_that_writes(user):
            proved &= all(at_least(x, length) for x in user.args if is_index(x))
    name = operation_name(new)
    if new is buffer:
        return proved
    if name == "where":  # finished rows may keep their old content
        return proved & overwrites_either(buffer, new, write_back, length)
    if name not in OVERWRITING:
        raise refusal(name)
    if OVERWRITING[name]:
        proved &= any_at_least(argument(new, OVERWRITING[name]), length)
    return proved & overwrites_from(buffer, new.args[0], write_back, length)


def overwrites_either(buffer: fx.Node, choice: fx.Node, write_back: fx.Node, length: fx.Node) -> bool:
    """`overwrites_from` for a choice between two values, where one may be any other tensor."""
    proved, refusals = [], []
    for value in choice.args[1:]:
        try:
            proved.append(overwrites_from(buffer, value, write_back, length))
        except SettingError as error:
            refusals.append(error)
    if not proved:
        raise refusals[0]
    return not refusals and all(proved)


def any_at_least(where: Any, length: fx.Node) -> bool:
    """Whether one of the indices of a write is at least the length; the others select rows, for example."""
    return any(at_least(x, length) for x in (where if isinstance(where, (tuple, list)) else (where,)))


def at_least(x: Any, length: fx.Node) -> bool:
    """Whether the graph proves that x is at least the length of its row, for every call."""
    if not isinstance(x, fx.Node) or x is length:
        return x is length
    name, args = operation_name(x), x.args
    if name in RESHAPING or (name == "getitem" and keeps_all(args[1])):
        return at_least(args[0], length)
    if name in ("add", "iadd") and not x.kwargs:
        return any(at_least(a, length) and is_never_negative(b) for a, b in (args[:2], args[1::-1]))
    if name == "where":
        return all(at_least(value, length) for value in args[1:])
    if name in ("maximum", "minimum"):
        return (any if name == "maximum" else all)(at_least(value, length) for value in args)
    return False


def is_never_negative(x: Any) -> bool:
    """Whether the graph proves that x is never below 0: a number, or an `arange` from 0."""
    if not isinstance(x, fx.Node):
        return isinstance(x, (int, float)) and x >= 0
    name, args = operation_name(x), x.args
    if name in RESHAPING or (name == "getitem" and keeps_all(args[1])):
        return name != "clamp" and is_never_negative(args[0])
    return name == "arange" and (len(args) == 1 or is_never_negative(args[0]))


def keeps_all(index: Any) -> bool:
    """Whether an index selects all elements in order, and only adds axes."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)


def argument(node: fx.Node, index: int) -> Any:
    """A positional argument of a node; None if it was not given by position."""
    return node.args[index] if index < len(node.args) else None


def is_input(x: Any) -> bool:
    return isinstance(x, fx.Node) and x.op == "placeholder"


def is_index(x: Any) -> bool:
    """Whether x is a tensor of indices."""
    value = x.meta.get("example_value") if isinstance(x, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype == torch.int64


def is_operator_that_writes(node: fx.Node) -> bool:
    """Whether a node is a registered operator, such as a kernel, that writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def operation_name(node: fx.Node) -> str:
    """The name of an operation, such as `index_put`, whether it is called as a function or as a method."""
    if node.op in ("placeholder", "get_attr"):
        return "a copy of another tensor"  # completes "changes a donated cache by"
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target)).split(".")[0]


def writes_into(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user of a tensor modifies it in place."""
    if user.target is operator.setitem:
        return user.args[0] is node
    name = operation_name(user)
    return user.args[:1] == (node,) and name.endswith("_") and not name.endswith("__")


def refusal(operation: str) -> SettingError:
    return SettingError(f"the function changes a donated cache by {operation}: {REORDER}")
