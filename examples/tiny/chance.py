"""Draw one value from a short list, as numpy's `choice` does, but without making an array of the list each time."""

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """Draw one of the items; all are equally likely."""
    return items[int(rng.random() * len(items))]


def weighted(rng: np.random.Generator, items: Sequence[T], shares: Sequence[float]) -> T:
    """Draw one of the items; each has its probability in `shares`, whose sum is 1."""
    return items[min(bisect(list(accumulate(shares)), rng.random()), len(items) - 1)]
