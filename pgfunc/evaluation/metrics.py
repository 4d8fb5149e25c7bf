"""A metric: its value, an interval of 95% confidence, and what was counted. Knows nothing about tasks.

Every metric with an interval is a ratio of two sums over the answers, such as edits over characters, so one function
makes them all. A share of answers has Wilson's interval (Wilson 1927). Other ratios have a bootstrap interval: the
answers are drawn again with replacement, which also holds where one answer counts several objects.
"""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np

RESAMPLES, SEED = 1000, 0  # of the bootstrap
Z = 1.959964  # a normal variable is within ±Z of its mean with a probability of 95%


class Metric(NamedTuple):
    """A value, and the ends of its interval where it has one. The value is None if there was nothing to measure."""

    value: float | None
    low: float | None
    high: float | None
    counted: int  # the number of things in `unit`
    unit: str  # what was counted: answers, objects, characters, ...
    interval: str  # "Wilson", "bootstrap", or "" if there is none


class Measured(NamedTuple):
    """The metrics of some answers, and a score for each answer: the higher, the better."""

    metrics: dict[str, Metric]
    scores: list[float]
    scored: str  # what the scores are, for people
    perfect: list[bool]  # whether no answer could be better


def fractions(metrics: dict[str, Metric], scores: list[float], scored: str) -> Measured:
    """Metrics with scores that are 1 for a perfect answer."""
    return Measured(metrics, scores, scored, [score == 1 for score in scores])


def single(value: float | None, counted: int, unit: str) -> Metric:
    """A metric without an interval."""
    return Metric(value, None, None, counted, unit, "")


def share(hits: Sequence[bool], unit: str = "answers") -> Metric:
    """The share of answers that are right, with Wilson's interval."""
    if not hits:
        return single(None, 0, unit)
    p, n = sum(hits) / len(hits), len(hits)
    center, half = p + Z**2 / (2 * n), Z * sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = ((center + side) / (1 + Z**2 / n) for side in (-half, half))
    return Metric(p, max(low, 0.0), min(high, 1.0), n, unit, "Wilson")


def ratio(parts: Sequence[float | int], wholes: Sequence[int], unit: str) -> Metric:
    """Σ parts / Σ wholes over the answers, with a bootstrap interval. `wholes` count the things in `unit`."""
    total = sum(wholes)
    if not total:
        return single(None, 0, unit)
    above, below = np.array(parts, dtype=float), np.array(wholes)
    rng, ratios = np.random.default_rng(SEED), list[float]()
    for _ in range(RESAMPLES):
        rows = rng.integers(len(below), size=len(below))
        if (whole := below[rows].sum()) > 0:
            ratios.append(above[rows].sum() / whole)
    low, high = np.percentile(ratios, [2.5, 97.5]).tolist()
    return Metric(sum(parts) / total, low, high, total, unit, "bootstrap")


def mean(values: Sequence[float], unit: str = "answers") -> Metric:
    """The mean over the answers, with a bootstrap interval."""
    return ratio(values, [1] * len(values), unit)
