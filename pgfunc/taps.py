"""What a caller can put into the model: taps, which see and replace activations, and wraps, which replace blocks.

A tap is a function of a name and a value. The model passes each activation through it, and continues with the result:
`x = tap("language.3.resid_post", x)`. A tap with a method `asks(name)` says which names it needs. It gets those, and
perhaps others, which it returns unchanged. If it needs nothing from a layer, that layer is computed as if there were no
tap, and stays on its fast path. A tap without that method gets all names but `COSTLY`. `pgfunc.lab` makes taps.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
Tap = Callable[[str, Any], Any]  # takes an activation's name and value; its result replaces the value
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]  # takes a block, and returns its replacement

COSTLY = frozenset({"mask", "attn_scores", "pattern"})  # made only for a tap that asks for them by `asks`


def identity(name: str, x: T) -> T:
    """The default tap: asks for nothing, and returns the value unchanged."""
    return x


def plain(fn: T) -> T:
    """The default `wrap` of a transformer block: returns it unchanged. Gradient checkpointing is another `wrap`."""
    return fn


def asks(tap: Tap, *names: str) -> bool:
    """Whether a tap asks for one of these values."""
    if tap is identity:
        return False
    if hasattr(tap, "asks"):
        return any(tap.asks(name) for name in names)  # pyright: ignore[reportFunctionMemberAccess]
    return any(name.rpartition(".")[2] not in COSTLY for name in names)


class Within(NamedTuple):
    """A tap for one part of the model: it puts the part's name before each name."""

    part: str
    tap: Tap

    def __call__(self, name: str, x: T) -> T:
        return self.tap(f"{self.part}.{name}", x)

    def asks(self, name: str) -> bool:
        return asks(self.tap, f"{self.part}.{name}")


def within(part: str, tap: Tap, names: Iterable[str]) -> Tap:
    """A tap for one part of the model, which has these names; `identity` if the tap asks for none of them."""
    if tap is identity:  # first, because an eager step calls this for each layer
        return identity
    return Within(part, tap) if asks(tap, *(f"{part}.{name}" for name in names)) else identity


def bind(tap: Tap, names: list[str]) -> Tap:
    """The tap for a loop of calls whose activations have these names; its method `bind`, if it has one, checks them."""
    return tap.bind(names) if hasattr(tap, "bind") else tap  # pyright: ignore[reportFunctionMemberAccess]
