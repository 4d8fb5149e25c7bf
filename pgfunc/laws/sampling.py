"""The laws of sampling: which tokens the filters keep, and which token a uniform number draws."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from pgfunc.laws.law import law
from pgfunc.laws.strategies import Strategies
from pgfunc.laws.system import System

# the smallest p-value that passes, by the limiting chi-square distribution; about one correct example in 1e7 fails
SMALLEST_P = 1e-9
DRAWS = 2000


class Filtered(NamedTuple):
    """Logits, and the settings of top-k, top-p and min-p."""

    logits: tuple[float, ...]
    k: int
    p: float
    least: float


class Drawn(NamedTuple):
    """Logits, and uniform numbers that each draw a token."""

    logits: tuple[float, ...]
    u: tuple[float, ...]


class Sampled(NamedTuple):
    """Logits, and the seed of random uniform numbers."""

    logits: tuple[float, ...]
    seed: int


def filtered(system: System, strategies: Strategies) -> SearchStrategy[Filtered]:
    least = st.integers(0, 30).map(lambda tenths: 10 ** (-tenths / 10))  # 1 to a thousandth
    return st.builds(Filtered, strategies.logits, st.integers(1, 8), st.floats(0.01, 1), least)


def drawn(system: System, strategies: Strategies) -> SearchStrategy[Drawn]:
    return st.builds(
        Drawn, strategies.logits, st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=20).map(tuple)
    )


def sampled(system: System, strategies: Strategies) -> SearchStrategy[Sampled]:
    return st.builds(Sampled, strategies.logits, strategies.seeds)


def row(logits: tuple[float, ...]) -> Tensor:
    return torch.tensor([logits])


def probabilities(logits: Tensor) -> Tensor:
    return logits.double().softmax(-1)


def kept(logits: Tensor) -> Tensor:
    """Which tokens are not excluded."""
    return logits > float("-inf")


def changes_logits(filtered: Tensor, logits: Tensor) -> bool:
    """Whether a filter changed the logit of a token that it keeps."""
    return not torch.equal(filtered[kept(filtered)], logits[kept(filtered)])


@law("Top-k keeps the k largest logits and those that tie with the smallest of them, and does not change them.",
     needs="top_k", domain=filtered)  # fmt: skip
def top_k_keeps_the_k_largest(system: System, example: Filtered) -> float:
    logits = row(example.logits)
    result, least = system.top_k(logits, example.k), sorted(example.logits)[-min(example.k, len(example.logits))]
    return float(changes_logits(result, logits) or not torch.equal(kept(result), kept(logits) & (logits >= least)))


@law("Top-p keeps the fewest tokens of total probability p or more, and ties of the least probable of them.",
     needs="top_p", domain=filtered)  # fmt: skip
def top_p_keeps_the_fewest_of_that_probability(system: System, example: Filtered) -> float:
    logits = row(example.logits)
    result, p = system.top_p(logits, example.p), probabilities(logits)
    inside = kept(result)
    least = logits[inside].min()
    without = float(p[logits > least].sum())  # must be less than p; else the least probable token is not needed
    enough = float(p[inside].sum()) >= example.p - 1e-12
    ties = torch.equal(inside, kept(logits) & (logits >= least))
    return float(changes_logits(result, logits) or not ties or not enough or without >= example.p + 1e-12)


@law("Min-p keeps the tokens that are at least min_p times as probable as the most probable one.",
     needs="min_p", domain=filtered)  # fmt: skip
def min_p_keeps_what_is_near_the_best(system: System, example: Filtered) -> float:
    logits = row(example.logits)
    result, ratio = system.min_p(logits, example.least), probabilities(logits) / probabilities(logits).max()
    sure, never = ratio > example.least * (1 + 1e-6), ratio < example.least * (1 - 1e-6)
    wrong = (sure & kept(logits) & ~kept(result)) | (never & kept(result))
    return float(changes_logits(result, logits) or bool(wrong.any()))


@law("Top-k and min-p exclude the same tokens in either order.", needs="top_k min_p", domain=filtered)
def filters_commute(system: System, example: Filtered) -> float:
    logits = row(example.logits)
    one = system.min_p(system.top_k(logits, example.k), example.least)
    return float(not torch.equal(one, system.top_k(system.min_p(logits, example.least), example.k)))


@law("A larger uniform number never draws an earlier token.", needs="draw", domain=drawn)
def drawing_is_monotone(system: System, example: Drawn) -> float:
    u = torch.tensor(sorted(example.u), dtype=torch.float64)
    tokens = system.draw(row(example.logits).expand(len(u), -1), u)
    return float((tokens.diff() < 0).any())


@law("A uniform number draws the first token whose cumulative probability exceeds it, and never one of probability 0.",
     needs="draw", domain=drawn, within=1e-12, reason="two float64 sums of 12 terms")  # fmt: skip
def drawing_inverts_the_distribution(system: System, example: Drawn) -> float:
    u = torch.tensor(example.u, dtype=torch.float64)
    tokens, p = system.draw(row(example.logits).expand(len(u), -1), u), probabilities(row(example.logits))[0]
    ends = p.cumsum(0)
    missed = torch.maximum(u - ends[tokens], ends[tokens] - p[tokens] - u).clamp(min=0)
    return float(missed.max()) + float((p[tokens] == 0).any())


@law("A temperature of 0, or close to 0, draws a token of the highest probability.",
     needs="choose", domain=sampled, within=1e-10,
     reason="a token within a hundred temperatures of the largest logit may be drawn too")  # fmt: skip
def cold_is_greedy(system: System, example: Sampled) -> float:
    logits = row(example.logits)
    u = torch.rand(1, generator=torch.Generator().manual_seed(example.seed), dtype=torch.float64)
    tokens = [int(system.choose(logits, u, temperature)) for temperature in (0.0, 5e-324, 1e-40, 1e-12)]
    return float((logits.double().max() - logits[0, tokens].double()).max())


@law("A very high temperature draws all tokens that are not excluded with equal probability.",
     needs="choose", domain=drawn, within=1e-9,
     reason="a difference of 60 between logits, divided by the temperature")  # fmt: skip
def heat_is_uniform(system: System, example: Drawn) -> float:
    logits, u = row(example.logits), torch.tensor(example.u, dtype=torch.float64)
    tokens = torch.stack([system.choose(logits.expand(len(u), -1), u, temperature) for temperature in (1e12, 1e308)])
    possible = kept(logits)[0]
    ends = possible.double().cumsum(0) / possible.sum()
    missed = torch.maximum(u - ends[tokens], ends[tokens] - 1 / possible.sum() - u).clamp(min=0)
    return float(missed.max()) + float((~possible[tokens]).any())


@law("Tokens drawn by random numbers have frequencies that fit their probabilities.",
     needs="draw", domain=sampled, within=1.0,
     reason="Pearson's chi-square test: about one correct example in ten million fails")  # fmt: skip
def frequencies_fit_probabilities(system: System, example: Sampled) -> float:
    generator = torch.Generator().manual_seed(example.seed)
    logits, u = row(example.logits), torch.rand(DRAWS, generator=generator, dtype=torch.float64)
    counts = torch.bincount(system.draw(logits.expand(DRAWS, -1), u), minlength=logits.shape[-1]).double()
    expected = probabilities(logits)[0] * DRAWS
    large = expected >= 20  # there the statistic is close to its limit; the rarer tokens are counted as one
    rare = expected[~large].sum() >= 20
    observed, mean = (
        torch.cat([side[large], side[~large].sum()[None]])[: None if rare else -1] for side in (counts, expected)
    )
    if len(mean) < 2:
        return 0.0
    mean = mean * observed.sum() / mean.sum()
    statistic = ((observed - mean).square() / mean).sum()
    tail = torch.special.gammaincc(torch.tensor((len(mean) - 1) / 2, dtype=torch.float64), statistic / 2)
    return float(tail.clamp(min=1e-300).log() / torch.tensor(SMALLEST_P, dtype=torch.float64).log())


SAMPLING = (
    top_k_keeps_the_k_largest, top_p_keeps_the_fewest_of_that_probability, min_p_keeps_what_is_near_the_best,
    filters_commute, drawing_is_monotone, drawing_inverts_the_distribution, cold_is_greedy, heat_is_uniform,
    frequencies_fit_probabilities,
)  # fmt: skip
