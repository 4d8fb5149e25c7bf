"""Parts of the findings' figures."""

from collections.abc import Sequence
from typing import Any

from examples.lab.common import Estimate


def band(
    axes: Any, x: Sequence[float], values: Sequence[Estimate], label: str, colour: str | None = None, style: str = "o-"
) -> None:
    """A line through means, and a band between the ends of their intervals."""
    (line,) = axes.plot(x, [each.mean for each in values], style, ms=4, lw=1.6, label=label, color=colour)
    low, high = zip(*((each.low, each.high) for each in values), strict=True)
    axes.fill_between(x, low, high, alpha=0.2, color=line.get_color(), lw=0)


def spread(values: Sequence[Estimate]) -> tuple[list[float], list[list[float]]]:
    """Means, and the lengths of the error bars below and above them."""
    means = [each.mean for each in values]
    return means, [[e.mean - e.low for e in values], [e.high - e.mean for e in values]]
