"""Uniform numbers become tokens with the probabilities of the logits; filters exclude the tokens that they should."""

from collections.abc import Callable
from itertools import takewhile

import numpy as np
import pytest
import torch
from cases import seeds
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from pgfunc import sample
from pgfunc.errors import SettingError
from pgfunc.generate import uniform
from pgfunc.sample import Settings

INF = float("inf")
VOCAB = 257_152

# integers make ties; -inf is a token that an earlier filter excluded
numbers = st.floats(-30, 30, width=32) | st.integers(-3, 3).map(float) | st.just(-INF)
rows = st.lists(numbers, min_size=1, max_size=12).filter(lambda row: max(row) > -INF).map(torch.tensor)
shares = st.floats(0.01, 1)


def probabilities(logits: Tensor) -> np.ndarray:
    weights = np.exp(logits.double().numpy() - logits.double().numpy().max())
    return weights / weights.sum()


def grid(count: int) -> Tensor:
    """`count` evenly spaced numbers in [0, 1]."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def frequencies(logits: Tensor, settings: Settings, count: int = 1000) -> np.ndarray:
    """How often each token is chosen when u runs over a grid."""
    tokens = sample.choose(logits.expand(count, -1), grid(count), settings)
    return np.bincount(tokens.numpy(), minlength=len(logits))


# --- draw


@given(rows)
def test_a_grid_of_u_draws_each_token_as_often_as_its_probability(logits):
    counts = np.bincount(sample.draw(logits.expand(1000, -1), grid(1000)), minlength=len(logits))
    assert len(counts) == len(logits), "every token is in the vocabulary"
    # an interval of length p contains p x 1000 points of the grid, rounded up or down
    assert np.abs(counts - 1000 * probabilities(logits)).max() <= 1 + 1e-6


@given(rows, st.floats(0, 1))
def test_the_drawn_token_is_the_first_whose_cumulative_probability_exceeds_u(logits, u):
    token = int(sample.draw(logits, torch.tensor(u, dtype=torch.float64)))
    ends = np.cumsum(probabilities(logits))
    # two float64 softmaxes of 12 terms; u = 1 lies in the last interval
    assert ends[token] - probabilities(logits)[token] <= u + 1e-14
    assert u < ends[token] + 1e-14


def test_random_numbers_draw_tokens_with_their_probabilities():
    """Pearson's chi-square test. Correct draws fail for one seed in 10,000; the seed is fixed."""
    logits, count = torch.tensor([2.0, 0.0, -1.0, 1.5, -INF, -3.0, 0.5, 0.0]), 100_000
    counts = np.bincount(sample.draw(logits.expand(count, -1), uniform(0, [0], count)[0]), minlength=8)
    kept = [0, 1, 2, 3, 5, 6, 7]
    expected = count * probabilities(logits)[kept]
    statistic = ((counts[kept] - expected) ** 2 / expected).sum()
    assert counts.sum() == counts[kept].sum()
    assert torch.special.gammaincc(torch.tensor(3.0), torch.tensor(statistic / 2)) > 1e-4  # 6 degrees of freedom


@given(rows)
def test_zero_and_one_draw_the_first_and_the_last_token_with_a_probability_above_zero(logits):
    for dtype in (torch.float64, torch.float32):
        first, last = sample.draw(logits.expand(2, -1), torch.tensor([0.0, 1.0], dtype=dtype)).tolist()
        assert first == next(i for i, logit in enumerate(logits) if logit > -INF)
        # a probability below the rounding error of a sum near 1 is indistinguishable from 0
        assert last in (i for i, p in enumerate(probabilities(logits)) if p > 0)
        assert probabilities(logits)[last + 1 :].sum() < 1e-14


@given(rows, st.floats(0, 1) | st.sampled_from([0.0, 1.0, 1 - 2**-53, 1 - 2**-24]))
def test_a_token_of_probability_zero_is_never_drawn(logits, u):
    padded = torch.cat([torch.full((3,), -INF), logits, torch.full((3,), -INF)])
    token = sample.draw(padded, torch.tensor(u, dtype=torch.float64))
    assert padded[token] > -INF


def test_every_token_in_the_tail_of_a_large_vocabulary_can_be_drawn():
    """One likely token and 257,151 of probability 1e-9, drawn at the middles of their intervals."""
    tail = torch.tensor(1e-9, dtype=torch.float64)
    logits = torch.full((VOCAB,), float(tail.log()))
    logits[0] = 0.0
    exact = probabilities(logits)
    tokens = torch.arange(1, VOCAB, 12_345)
    u = exact[0] + (tokens.double() - 0.5) * exact[1]
    assert torch.equal(sample.draw(logits.expand(len(u), -1), u), tokens)
    in_float32 = torch.searchsorted(logits.softmax(-1).cumsum(-1), u.float(), right=True)
    assert (in_float32 == tokens).float().mean() < 0.1, "float32 is precise enough, so the test shows nothing"


@given(seeds, st.sampled_from([(), (1,), (3,), (2, 3), (0,)]), st.integers(1, 50))
def test_a_batch_equals_a_loop(seed, shape, vocab):
    generator = torch.Generator().manual_seed(seed)
    logits, u = 3 * torch.randn(*shape, vocab, generator=generator), torch.rand(shape, generator=generator)
    settings = Settings(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01)
    for run in (sample.draw, lambda logits, u: sample.choose(logits, u, settings)):
        tokens = run(logits, u)
        assert tokens.shape == shape
        assert tokens.dtype == torch.int64
        expected = [run(row, one) for row, one in zip(logits.reshape(-1, vocab), u.flatten(), strict=True)]
        assert tokens.flatten().tolist() == [int(token) for token in expected]


def test_nan_logits_draw_a_token_of_the_vocabulary():
    tokens = sample.draw(torch.full((2, 3), float("nan")), torch.tensor([0.0, 1.0]))
    assert ((tokens >= 0) & (tokens < 3)).all()


def test_memory_layout_does_not_matter():
    logits, u = torch.randn(4, 3, 5), torch.rand(4, 3)
    torch.set_warn_always(True)  # otherwise PyTorch warns about layouts only once in a process
    try:
        tokens = sample.draw(logits.permute(2, 1, 0).contiguous().permute(2, 1, 0), u.T.contiguous().T)
    finally:
        torch.set_warn_always(False)
    assert torch.equal(tokens, sample.draw(logits, u))


# --- filters, each compared with a simple implementation

Filter = Callable[[Tensor], Tensor]


def kept_by_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    return np.array([(logits > logit).sum() < k for logit in logits])


def kept_by_top_p(logits: Tensor, p: float) -> np.ndarray:
    shares = probabilities(logits)
    order = sorted(range(len(shares)), key=lambda i: -logits[i])
    before = [sum(shares[order[:i]]) for i in range(len(order))]
    assume(all(abs(share - p) > 1e-12 for share in before))  # rounding decides about a sum that equals p
    least = min(logits[i] for i, _ in takewhile(lambda pair: pair[1] < p, zip(order, before, strict=True)))
    return (logits >= least).numpy()


def kept_by_min_p(logits: Tensor, p: float) -> np.ndarray:
    shares = probabilities(logits)
    assume(all(abs(share / shares.max() / p - 1) > 1e-5 for share in shares))  # float32 logits up to 30 round by 2e-6
    return shares >= p * shares.max()


def check(filtered: Tensor, logits: Tensor, kept: np.ndarray) -> None:
    """Kept logits are unchanged, and the others are -inf."""
    assert torch.equal(filtered, torch.where(torch.from_numpy(kept), logits, -INF))


@given(rows, st.integers(1, 15))
def test_top_k_keeps_logits_that_fewer_than_k_others_exceed(logits, k):
    check(sample.top_k(logits, k), logits, kept_by_top_k(logits.numpy(), k))


@given(rows, shares)
def test_top_p_keeps_the_fewest_tokens_that_sum_to_p_and_ties(logits, p):
    check(sample.top_p(logits, p), logits, kept_by_top_p(logits, p))


@given(rows, shares)
def test_min_p_keeps_tokens_at_least_p_times_as_probable_as_the_best(logits, p):
    check(sample.min_p(logits, p), logits, kept_by_min_p(logits, p))


def test_filters_keep_ties_with_the_last_kept_token():
    logits = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0])
    tied = torch.tensor([1.0, 2.0, 1.0, -INF, 1.0])
    assert torch.equal(sample.top_k(logits, 2), tied)
    assert torch.equal(sample.top_p(logits, 0.5), tied)  # the best alone has 0.445
    assert torch.equal(sample.min_p(logits, 0.3), tied)  # e^-1 is 0.37, e^-2 is 0.14
    level = torch.zeros(4)
    for p in (0.01, 0.25, 0.5, 1.0):
        assert torch.equal(sample.top_p(level, p), level)


def test_top_p_stops_when_the_sum_reaches_p():
    logits = torch.tensor([0.125, 0.5, 0.125, 0.25], dtype=torch.float64).log()
    assert sample.top_p(logits, 0.5).isfinite().tolist() == [False, True, False, False]
    assert sample.top_p(logits, 0.75).isfinite().tolist() == [False, True, False, True]
    assert sample.top_p(logits, 0.7500001).isfinite().all()


@given(rows)
def test_filters_at_their_limits_keep_all_or_only_the_best(logits):
    best = torch.where(logits == logits.max(), logits, -INF)
    for everything in (sample.top_k(logits, len(logits)), sample.top_k(logits, 10**6), sample.top_p(logits, 1.0)):
        assert torch.equal(everything, logits)
    assert torch.equal(sample.min_p(logits, 0.0), logits)
    for only in (sample.top_k(logits, 1), sample.top_p(logits, 1e-12), sample.min_p(logits, 1.0)):
        assert torch.equal(only, best)


def test_a_top_p_of_one_keeps_even_tokens_whose_probability_float64_rounds_away():
    logits = torch.tensor([100.0, 0.0, -1.0])  # e^-100 is 4e-44
    assert torch.equal(sample.top_p(logits, 1.0), logits)
    assert sample.top_p(logits, 1 - 1e-9).isfinite().tolist() == [True, False, False]


FILTERS: dict[str, Filter] = {
    "top_k": lambda logits: sample.top_k(logits, 3),
    "top_p": lambda logits: sample.top_p(logits, 0.8),
    "min_p": lambda logits: sample.min_p(logits, 0.1),
}


@pytest.mark.parametrize("name", FILTERS)
@given(row=rows, order=st.randoms(use_true_random=False))
def test_filters_are_equivariant_under_permutations(name, row, order):
    logits = row.double()  # so that the order of summation does not matter
    permutation = list(range(len(row)))
    order.shuffle(permutation)
    kept_by_top_p(row, 0.8)  # assumes that rounding does not decide about 0.8
    assert torch.equal(FILTERS[name](logits[permutation]), FILTERS[name](logits)[permutation])


@pytest.mark.parametrize("name", FILTERS)
def test_filtering_a_batch_equals_filtering_its_rows(name):
    logits = 3 * torch.randn(2, 3, 7)
    expected = torch.stack([FILTERS[name](row) for row in logits.reshape(6, 7)]).reshape(2, 3, 7)
    assert torch.equal(FILTERS[name](logits), expected)


def test_top_p_of_a_large_vocabulary_includes_the_tail():
    """One token has half of the probability, 257,151 share the rest. p = 0.75 needs half of those, which all tie."""
    logits = torch.zeros(VOCAB)
    logits[7] = float(torch.tensor(float(VOCAB - 1)).log())
    assert sample.top_p(logits, 0.75).isfinite().all()
    assert sample.top_p(logits, 0.49).isfinite().nonzero().flatten().tolist() == [7]
    falling = torch.linspace(0, -1, VOCAB, dtype=torch.float64)
    before = np.cumsum(probabilities(falling)) - probabilities(falling)
    kept = int(sample.top_p(falling, 0.5).isfinite().sum())
    assert abs(kept - (before < 0.5).sum()) <= 1  # two float64 sums of 257,152 terms


# --- log-probabilities


@given(rows, st.data())
@example(torch.tensor([-INF, -INF, 2.0, 1.0, -INF, -INF]), None)  # the first and last of its three parts are excluded
@example(torch.tensor([-1e30, 1e30, 3.0]), None)
def test_a_logprob_equals_the_log_softmax_of_the_row(logits, data):
    for token in range(len(logits)) if data is None else [data.draw(st.integers(0, len(logits) - 1))]:
        logprob = sample.logprob(logits, torch.tensor(token))
        expected = logits.double().log_softmax(-1)[token]
        torch.testing.assert_close(logprob.double(), expected, atol=1e-5, rtol=1e-6)  # float32


@pytest.mark.parametrize("vocab", [1, 30, 1024, 1413, 1536])
def test_logprobs_of_a_batch_equal_the_log_softmax_in_float32(vocab):
    logits = (3 * torch.randn(2, 3, vocab)).bfloat16()
    token = torch.randint(0, vocab, (2, 3))
    logprobs = sample.logprob(logits, token)
    expected = logits.float().log_softmax(-1).gather(-1, token[..., None])[..., 0]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-6)
    assert logprobs.dtype == torch.float32


@pytest.mark.parametrize("vocab", [1, 30, 513, 1024, 1413, 1536])
def test_greedy_chooses_the_most_probable_token_of_a_vocabulary_of_any_size(vocab):
    logits = torch.randn(20, vocab)
    assert sample.greedy(logits).tolist() == logits.numpy().argmax(-1).tolist()
    assert (sample.greedy(torch.full((2, vocab), -INF)) == 0).all()


# --- settings


@given(rows, st.floats(0, 1))
def test_temperature_zero_takes_the_first_of_the_most_probable_tokens(logits, u):
    token = sample.choose(logits, torch.tensor(u), Settings())
    assert int(token) == int(np.argmax(logits.numpy())) == int(sample.greedy(logits))


@given(rows, st.floats(0.05, 20))
def test_temperature_divides_logits(logits, temperature):
    counts = frequencies(logits, Settings(temperature=temperature))
    expected = 1000 * probabilities(logits.double() / temperature)
    assert np.abs(counts - expected).max() <= 1 + 1e-6  # as for draw


# kept of probabilities 0.5, 0.3, 0.2; in another order, each combination would keep other tokens
ORDER = {
    "temperature, then top-p: 0.66 alone is enough": (Settings(0.5, top_p=0.6), [0]),
    "top-p alone": (Settings(1.0, top_p=0.6), [0, 1]),
    "top-k, then top-p: 0.5 / 0.8 is enough": (Settings(1.0, top_k=2, top_p=0.6), [0]),
    "top-p, then min-p: 0.3 is 0.5 times 0.5 or more": (Settings(1.0, top_p=0.6, min_p=0.5), [0, 1]),
    "temperature, then min-p: 0.3 is not half of 0.5, squared": (Settings(0.5, min_p=0.5), [0]),
    "top-k alone": (Settings(1.0, top_k=2), [0, 1]),
    "min-p alone": (Settings(1.0, min_p=0.5), [0, 1]),
    "no filter": (Settings(1.0), [0, 1, 2]),
}


@pytest.mark.parametrize("case", ORDER)
def test_settings_apply_as_temperature_top_k_top_p_min_p(case):
    settings, kept = ORDER[case]
    counts = frequencies(torch.tensor([0.5, 0.3, 0.2]).log(), settings)
    assert counts.nonzero()[0].tolist() == kept


@given(
    rows,
    st.floats(0, 1),
    st.floats(0.01, 5),
    st.none() | st.integers(1, 15),
    st.none() | shares,
    st.none() | st.floats(0, 1),
)
def test_choose_composes_the_filters(logits, u, temperature, k, p, m):
    number = torch.tensor(u, dtype=torch.float64)
    token = int(sample.choose(logits, number, Settings(temperature, k, p, m)))
    filtered = logits.double() / temperature
    filtered = filtered if k is None else sample.top_k(filtered, k)
    filtered = filtered if p is None else sample.top_p(filtered, p)
    filtered = filtered if m is None else sample.min_p(filtered, m)
    assert filtered[token] > -INF
    ends = np.cumsum(probabilities(filtered))
    assume(np.abs(ends - u).min() > 1e-12)  # rounding decides about a u at the border of two intervals
    assert token == int(sample.draw(filtered, number))


WRONG = {
    "temperature": [-1.0, -1e-9, float("nan"), INF, -INF],
    "top_k": [0, -1],
    "top_p": [0.0, -0.1, 1.0000001, float("nan"), INF],
    "min_p": [-0.1, 1.0000001, float("nan"), INF],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_settings_outside_their_range_are_refused_by_name(name, value):
    with pytest.raises(SettingError) as error:
        Settings(**{name: value})
    text = str(error.value)
    assert text.isprintable(), "it is one line"
    assert name.replace("_", "-") in text
    assert str(value) in text


def test_settings_at_the_ends_of_their_ranges_are_accepted():
    logits = torch.tensor([0.0, 3.0, 1.0])
    for settings in (
        Settings(temperature=0.0),
        Settings(temperature=1e300, top_k=1, top_p=1.0, min_p=1.0),
        Settings(temperature=5e-324, top_k=10**9, top_p=1e-300, min_p=0.0),
    ):
        assert sample.choose(logits, torch.tensor(0.5), settings) == 1, "each keeps only the most probable token"


def test_choosing_and_filtering_do_not_change_their_arguments():
    logits, u = torch.randn(3, 9), torch.rand(3)
    before, settings = (logits.clone(), u.clone()), Settings(0.5, top_k=5, top_p=0.9, min_p=0.1)
    sample.choose(logits, u, settings)
    sample.choose(logits, u, Settings(1.0))
    for run in FILTERS.values():
        run(logits)
    assert torch.equal(logits, before[0])
    assert torch.equal(u, before[1])


@pytest.mark.parametrize(("size", "parts"), [
    (16, (1, 16)), (512, (1, 512)), (576, (9, 64)), (640, (5, 128)), (1000, (2, 512)), (257_152, (2009, 128)),
])  # fmt: skip
def test_a_vocabulary_is_split_into_equal_parts_and_padded_only_if_it_does_not_divide_well(size, parts):
    logits = torch.randn(2, size)
    split = sample.split_vocabulary(logits)
    assert split.shape == (2, *parts)
    assert torch.equal(split.flatten(1)[:, :size], logits)
    assert (split.flatten(1)[:, size:] == -INF).all()
