"""The laws of the parts: RMSNorm, rotary positions, softcap, attention, masks."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from pgfunc.laws.law import law
from pgfunc.laws.model import difference
from pgfunc.laws.strategies import Strategies
from pgfunc.laws.system import System


class Scaled(NamedTuple):
    """Random numbers, and a factor."""

    seed: int
    by: float


class Shifted(NamedTuple):
    """Two random vectors, their positions, and by how much both positions are shifted."""

    seed: int
    one: int
    other: int
    by: int


class Heads(NamedTuple):
    """Random attention: the numbers of queries, keys, key-value heads, and query heads for each key-value head."""

    seed: int
    queries: int
    keys: int
    kv_heads: int
    groups: int


class Flags(NamedTuple):
    """One row of tokens, which of them are valid, which of them begin a new causal block, and a window."""

    valid: tuple[bool, ...]
    causal: tuple[bool, ...]
    window: int


def normal(seed: int, *shape: int) -> Tensor:
    """Normally distributed random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scaled(system: System, strategies: Strategies) -> SearchStrategy[Scaled]:
    return st.builds(Scaled, strategies.seeds, st.floats(0.125, 64))


def shifted(system: System, strategies: Strategies) -> SearchStrategy[Shifted]:
    return st.builds(Shifted, strategies.seeds, st.integers(0, 50), st.integers(0, 50), st.integers(0, 4000))


def heads(system: System, strategies: Strategies) -> SearchStrategy[Heads]:
    count = st.integers(1, 5)
    return st.builds(Heads, strategies.seeds, count, count, st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]))


def flags(system: System, strategies: Strategies) -> SearchStrategy[Flags]:
    def of(size: int) -> SearchStrategy[Flags]:
        row = st.tuples(*[st.booleans()] * size)
        return st.builds(Flags, row, row, st.integers(1, 9))

    return st.integers(1, 9).flatmap(of)


@law("RMSNorm gives the same result for an input multiplied by a positive number.",
     needs="rms_norm", domain=scaled, within=1e-4,
     reason="epsilon, which changes the result by 3e-5 at a mean square of 1/64")  # fmt: skip
def rms_norm_is_scale_invariant(system: System, example: Scaled) -> float:
    x, scale = normal(example.seed, 3, 64), normal(example.seed + 1, 64)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    plain, multiplied = (system.rms_norm(each, scale) for each in (x, x * example.by))
    return float(((multiplied - plain).abs() / plain.abs().clamp(min=1e-2)).max())


@law("The result of RMSNorm has a mean square of 1, if its learned scale is neutral.",
     needs="rms_norm", domain=scaled, within=1e-4, reason="epsilon, relative to a mean square of 1/64")  # fmt: skip
def rms_norm_gives_unit_mean_square(system: System, example: Scaled) -> float:
    x = normal(example.seed, 3, 64)
    x = x / x.square().mean(-1, keepdim=True).sqrt() * example.by
    return float((system.rms_norm(x, torch.zeros(64)).square().mean(-1) - 1).abs().max())


@law("The inner product of two rotated vectors depends only on the difference of their positions.",
     needs="rotate", domain=shifted, within=1e-3,
     reason="float32 angles: at position 4,050 their last bit is 2**-12")  # fmt: skip
def rope_depends_on_differences(system: System, example: Shifted) -> float:
    q, k = (normal(example.seed + i, 1, 1, 1, 16) for i in range(2))

    def product(by: int) -> Tensor:
        pairs = ((q, example.one + by), (k, example.other + by))
        rotated = [system.rotate(x, torch.tensor([[position]])).double() for x, position in pairs]
        return (rotated[0] * rotated[1]).sum()

    return float((product(example.by) - product(0)).abs() / (q.norm() * k.norm()))


@law("Rotation keeps the length of a vector, and position 0 leaves the vector unchanged.",
     needs="rotate", domain=shifted, within=1e-5, reason="float32, sums of 16 squares")  # fmt: skip
def rope_keeps_lengths(system: System, example: Shifted) -> float:
    x = normal(example.seed, 1, 1, 2, 16)
    rotated, at_zero = (system.rotate(x, torch.tensor([[position]])) for position in (example.by, 0))
    return float(torch.maximum((rotated.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max(), (at_zero - x).abs().max()))


@law("A softcap never exceeds its cap, never decreases, and is close to the identity near zero.",
     needs="softcap", domain=scaled, within=4e-5, reason="x - x³ / 3c² at a hundredth of the cap")  # fmt: skip
def softcap_is_bounded_and_monotone(system: System, example: Scaled) -> float:
    cap = example.by
    x = (normal(example.seed, 50) * 3 * cap).sort().values
    y, small = system.softcap(x, cap), x / x.abs().max() * cap * 1e-2
    violation = (y.abs() - cap).clamp(min=0).max() / cap + (-y.diff()).clamp(min=0).max() / cap
    return float(violation) + float((system.softcap(small, cap) - small).abs().max() / (cap * 1e-2))


@law("Attention with shared keys and values equals attention with the keys and values repeated for each head.",
     needs="attend", domain=heads, within=1e-4, reason="float32, computed by other products")  # fmt: skip
def grouped_queries_equal_repeated_keys(system: System, example: Heads) -> float:
    q, k, v, mask = attention(example)
    repeated = (x.repeat_interleave(example.groups, dim=2) for x in (k, v))
    return difference(system.attend(q, k, v, mask), system.attend(q, *repeated, mask))


@law("Attention is a weighted mean: if all values are equal, it returns that value.",
     needs="attend", domain=heads, within=1e-5, reason="the sum of the weights in float32")  # fmt: skip
def attention_is_a_mean(system: System, example: Heads) -> float:
    q, k, v, mask = attention(example)
    equal = v[:, :1].expand_as(v)
    expected = equal[:, :1].repeat_interleave(example.groups, dim=2).expand_as(q)
    return float((system.attend(q, k, equal, mask) - expected).abs().max())


@law("Keys and values that the mask hides from a query do not change its result.", needs="attend", domain=heads)
def hidden_keys_are_not_read(system: System, example: Heads) -> float:
    q, k, v, mask = attention(example)
    hidden = ~mask[:, 0, :, None, None]  # from the first query, whose result is compared
    replaced = (torch.where(hidden, normal(example.seed + 9, *x.shape), x) for x in (k, v))
    return float((system.attend(q, *replaced, mask) - system.attend(q, k, v, mask))[:, 0].abs().max())


def attention(example: Heads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a random mask. Each query sees the first key; if there are two or more keys, none sees the last."""
    seed, kv = example.seed, (1, example.keys, example.kv_heads, 8)
    q = normal(seed, 1, example.queries, example.kv_heads * example.groups, 8)
    mask = normal(seed + 3, 1, example.queries, example.keys) > 0
    mask[..., -1] = False
    mask[..., 0] = True
    return q, normal(seed + 1, *kv), normal(seed + 2, *kv), mask


@law("The mask with a window that covers the whole sequence equals the mask without a window.",
     needs="mask", domain=flags)  # fmt: skip
def a_window_that_covers_all_is_none(system: System, example: Flags) -> float:
    valid, causal = (torch.tensor([side]) for side in example[:2])
    full, size = system.mask(valid, causal, 0), len(example.valid)
    return float(any((system.mask(valid, causal, window) != full).any() for window in (size, size + example.window)))


@law("A valid token sees the valid tokens of its own block, and those of earlier blocks inside the window, if any.",
     needs="mask", domain=flags)  # fmt: skip
def masks_are_their_rule(system: System, example: Flags) -> float:
    valid, causal, size = example
    block = [sum(causal[: i + 1]) for i in range(len(valid))]
    position = [max(sum(valid[: i + 1]) - 1, 0) for i in range(len(valid))]

    def sees(q: int, k: int, window: int) -> bool:
        near = not window or block[k] == block[q] or position[q] - position[k] < window
        return block[k] <= block[q] and valid[k] and valid[q] and near

    indices = range(len(valid))
    for window in (0, size):
        mask = system.mask(torch.tensor([valid]), torch.tensor([causal]), window)[0].tolist()
        if mask != [[sees(q, k, window) for k in indices] for q in indices]:
            return 1.0
    return 0.0


PARTS = (
    rms_norm_is_scale_invariant, rms_norm_gives_unit_mean_square, rope_depends_on_differences, rope_keeps_lengths,
    softcap_is_bounded_and_monotone, grouped_queries_equal_repeated_keys, attention_is_a_mean,
    hidden_keys_are_not_read, a_window_that_covers_all_is_none, masks_are_their_rule,
)  # fmt: skip
