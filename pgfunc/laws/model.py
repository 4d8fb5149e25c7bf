"""The laws of the model: the cache, what a token attends to, batches, pictures, purity."""

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch.utils import _pytree as pytree

from pgfunc.laws.law import law
from pgfunc.laws.strategies import Rows, Split, Strategies, splits
from pgfunc.laws.strategies import prompt as random_prompt
from pgfunc.laws.system import System
from pgfunc.prompt import Prompt

REORDERED = "the same sums in another order"


class Answer(NamedTuple):
    """Prompts, and the numbers of random tokens in the two parts of an answer to each."""

    rows: Rows
    first: int
    second: int


class Position(NamedTuple):
    """Prompts, and a token position in the first of them, as a share of the range of positions that the law allows."""

    rows: Rows
    share: float

    def between(self, first: int, last: int) -> int:
        """The position at that share of the range from first to last, both included."""
        return min(last, first + int(self.share * (last - first + 1)))


def prompt_for(system: System, rows: Rows) -> Prompt:
    """The prompts that `rows` describes, for the vocabulary and picture size of the system."""
    return random_prompt(rows, system.vocab, system.image_size)


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the standard deviation of `expected`; inf if a number is not finite."""
    if not actual.numel():
        return 0.0
    if not (actual.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    spread = expected.double().std(correction=0).clamp(min=1e-12) if expected.numel() > 1 else 1.0
    return float((actual.double() - expected.double()).abs().max() / spread)


def bitwise_difference(actual: Any, expected: Any) -> float:
    """0 if two trees of tensors are equal bit for bit; else the largest `difference` of two leaves, never 0."""
    pairs = list(zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True))
    unequal = [(one, other) for one, other in pairs if isinstance(one, Tensor) and not torch.equal(one, other)]
    return max((difference(one.float(), other.float()) or 1.0 for one, other in unequal), default=0.0)


def any_rows(system: System, strategies: Strategies) -> SearchStrategy[Rows]:
    return strategies.rows


def with_suffix(system: System, strategies: Strategies) -> SearchStrategy[Rows]:
    """Prompts with at least one suffix token in each row."""
    return strategies.rows.filter(lambda rows: min(rows.suffix) > 0)


def with_pictures(system: System, strategies: Strategies) -> SearchStrategy[Rows]:
    """Prompts with at least two pictures."""
    return strategies.rows.filter(lambda rows: rows.images > 1)


def split(system: System, strategies: Strategies) -> SearchStrategy[Split]:
    return splits(with_suffix(system, strategies))


def answers(system: System, strategies: Strategies) -> SearchStrategy[Answer]:
    return st.builds(Answer, strategies.rows, st.integers(1, 4), st.integers(1, 4))


def positions(system: System, strategies: Strategies) -> SearchStrategy[Position]:
    return st.builds(Position, with_suffix(system, strategies), st.floats(0, 1))


def random_tokens(system: System, rows: Rows, count: int) -> Tensor:
    """`count` random tokens for each row, independent of the tokens of the prompt."""
    generator = torch.Generator().manual_seed(rows.seed + 1)
    return torch.randint(0, system.vocab, (len(rows.prefix), count), generator=generator)


def truncated(prompt: Prompt, lengths: Tensor) -> Prompt:
    """The prompts with only the first `lengths` tokens of each row."""
    width = int(lengths.max())
    valid = torch.arange(width) < lengths[:, None]
    return Prompt(prompt.pixels, prompt.tokens[:, :width], valid, prompt.causal[:, :width] & valid)


def changed_logits(system: System, prompt: Prompt, row: int, position: int) -> Tensor:
    """For each position of a row, whether any bit of its logits changes if the token at `position` is replaced."""
    tokens = prompt.tokens.clone()
    tokens[row, position] = (tokens[row, position] + 1) % system.vocab
    before, after = (system.forward(each)[row] for each in (prompt, prompt._replace(tokens=tokens)))
    return (before != after).any(-1)


# --- the cache --------------------------------------------------------------------------------------------------------


@law("Decoding a token gives the same logits as prefilling one more token, at every split of the suffix.",
     needs="forward prefill decode", domain=split, roundings=1.0, reason=REORDERED)  # fmt: skip
def decode_equals_longer_prefill(system: System, example: Split) -> float:
    prompt = prompt_for(system, example.rows)
    expected, worst = system.forward(prompt), 0.0
    length, split, rows = torch.tensor(example.rows.lengths), torch.tensor(example.at), torch.arange(len(example.at))
    steps = int((length - split).max())
    logits, cache = system.prefill(truncated(prompt, split), steps)
    for step in range(steps + 1):
        end, unfinished = (split + step).clamp(max=length), split + step <= length
        worst = max(worst, difference(logits[unfinished], expected[rows, end - 1][unfinished]))
        if step < steps:  # a row that has ended goes on with tokens whose logits are ignored
            logits, cache = system.decode(prompt.tokens[rows, end.clamp(max=prompt.tokens.shape[1] - 1)], cache)
    return worst


@law("Prefill returns the logits that forward gives at the last valid token of each row.",
     needs="forward prefill", domain=any_rows, roundings=1.0, reason=REORDERED)  # fmt: skip
def prefill_equals_forward(system: System, rows: Rows) -> float:
    prompt = prompt_for(system, rows)
    logits, _ = system.prefill(prompt, 1)
    last = torch.tensor(rows.lengths) - 1
    return difference(logits, system.forward(prompt)[torch.arange(len(rows.prefix)), last])


@law("Appending tokens in two parts gives the same logits as appending them at once.",
     needs="prefill extend", domain=answers, roundings=1.0, reason=REORDERED)  # fmt: skip
def chunks_equal_whole(system: System, example: Answer) -> float:
    tokens = random_tokens(system, example.rows, example.first + example.second)
    _, cache = system.prefill(prompt_for(system, example.rows), tokens.shape[1])
    at_once, _ = system.extend(tokens, cache)
    first, middle = system.extend(tokens[:, : example.first], cache)
    second, _ = system.extend(tokens[:, example.first :], middle)
    return difference(torch.cat([first, second], 1), at_once)


@law("A cache gives the same logits after it was continued: appending changes nothing that an older handle reads.",
     needs="prefill decode", domain=answers)  # fmt: skip
def an_old_handle_stays_valid(system: System, example: Answer) -> float:
    tokens = random_tokens(system, example.rows, example.first + 1)
    _, cache = system.prefill(prompt_for(system, example.rows), tokens.shape[1])
    first, newer = system.decode(tokens[:, 0], cache)
    for i in range(1, example.first):
        _, newer = system.decode(tokens[:, i], newer)
    again, _ = system.decode(tokens[:, 0], cache)
    return bitwise_difference(again, first)


@law("Two continuations of one cache do not change each other.",
     needs="prefill decode", domain=any_rows, roundings=1.0, reason="other code may compute a fork")  # fmt: skip
def forks_are_apart(system: System, rows: Rows) -> float:
    tokens, prompt = random_tokens(system, rows, 4), prompt_for(system, rows)

    def alone(first: int, second: int) -> Tensor:
        _, cache = system.prefill(prompt, 4)
        _, cache = system.decode(tokens[:, first], cache)
        return system.decode(tokens[:, second], cache)[0]

    expected = alone(0, 2), alone(1, 3)
    _, cache = system.prefill(prompt, 4)
    _, one = system.decode(tokens[:, 0], cache)
    _, other = system.decode(tokens[:, 1], cache)
    actual = system.decode(tokens[:, 2], one)[0], system.decode(tokens[:, 3], other)[0]
    return max(difference(*pair) for pair in zip(actual, expected, strict=True))


# --- what a token attends to ------------------------------------------------------------------------------------------


@law("A token of the suffix changes no logit before it.", needs="forward", domain=positions)
def a_suffix_is_causal(system: System, example: Position) -> float:
    start, end = example.rows.prefix[0], example.rows.lengths[0]
    position = example.between(start, end - 1)
    return float(changed_logits(system, prompt_for(system, example.rows), 0, position)[:position].any())


@law("A token of the prefix changes the logits before it too: the prefix sees itself in both directions.",
     needs="forward", domain=positions)  # fmt: skip
def a_prefix_sees_itself(system: System, example: Position) -> float:
    position = example.between(0, example.rows.prefix[0] - 1)
    return float(not changed_logits(system, prompt_for(system, example.rows), 0, position)[: position + 1].all())


@law("The tokens at padded positions change no logit of a valid token.", needs="forward", domain=any_rows)
def padding_is_not_read(system: System, rows: Rows) -> float:
    prompt = prompt_for(system, rows)
    tokens = torch.where(prompt.valid, prompt.tokens, (prompt.tokens + 7) % system.vocab)
    before, after = (system.forward(each)[prompt.valid] for each in (prompt, prompt._replace(tokens=tokens)))
    return bitwise_difference(after, before)


@law("A row has the same logits alone, without padding, as in a batch.",
     needs="forward", domain=any_rows, roundings=1.0, reason=REORDERED)  # fmt: skip
def a_row_is_alone(system: System, rows: Rows) -> float:
    prompt, worst = prompt_for(system, rows), 0.0
    batch = system.forward(prompt)
    for row, length in enumerate(rows.lengths):
        alone = Prompt(prompt.pixels[row : row + 1], *(leaf[row : row + 1, :length] for leaf in prompt[1:]))
        worst = max(worst, difference(system.forward(alone)[0], batch[row, :length]))
    return worst


@law("If the rows of a batch are reordered, their logits are reordered in the same way.",
     needs="forward", domain=any_rows, roundings=1.0, reason=REORDERED)  # fmt: skip
def the_order_of_rows_does_not_matter(system: System, rows: Rows) -> float:
    prompt = prompt_for(system, rows)
    order = torch.randperm(len(rows.prefix), generator=torch.Generator().manual_seed(rows.seed))
    permuted = Prompt(*(leaf[order] for leaf in prompt))
    return difference(system.forward(permuted)[permuted.valid], system.forward(prompt)[order][permuted.valid])


@law("If the pictures of a prompt are reordered, its logits change.", needs="forward", domain=with_pictures)
def the_order_of_pictures_matters(system: System, rows: Rows) -> float:
    prompt = prompt_for(system, rows)
    flipped = prompt._replace(pixels=prompt.pixels.flip(1))
    before, after = (system.forward(each)[prompt.valid] for each in (prompt, flipped))
    # the change must exceed that of a reordered sum; in half precision the limit is below that, because pictures may
    # change the logits of a few tokens by less
    return float(difference(after, before) <= min(10 * system.rounding, 1e-2))


@law("A window that covers the whole sequence gives the same logits as full attention.",
     needs="windowed image_tokens", domain=any_rows, roundings=1.0, reason=REORDERED)  # fmt: skip
def a_window_over_everything_is_none(system: System, rows: Rows) -> float:
    prompt = prompt_for(system, rows)
    length = rows.images * system.image_tokens + max(rows.lengths)
    windowed, full = (system.windowed(prompt, size)[prompt.valid] for size in (length, 0))
    return difference(windowed, full)


# --- purity -----------------------------------------------------------------------------------------------------------


@law("Two calls of forward give the same bits, and the prompt is not changed.", needs="forward", domain=any_rows)
def forward_is_pure(system: System, rows: Rows) -> float:
    prompt, copy = prompt_for(system, rows), prompt_for(system, rows)
    first, second = system.forward(prompt), system.forward(prompt)
    return max(bitwise_difference(second, first), bitwise_difference(prompt, copy))


@law("Two calls of a decode step give the same bits, and neither the token nor the cache is changed.",
     needs="prefill decode", domain=any_rows)  # fmt: skip
def a_step_is_pure(system: System, rows: Rows) -> float:
    token, (_, cache) = random_tokens(system, rows, 1)[:, 0], system.prefill(prompt_for(system, rows), 2)
    copy = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (token, cache))
    (first, _), (second, _) = system.decode(token, cache), system.decode(token, cache)
    return max(bitwise_difference(second, first), bitwise_difference((token, cache), copy))


@law("Two implementations with the same weights give the same logits.",
     needs="forward reference", domain=any_rows, roundings=1.0, reason=REORDERED)  # fmt: skip
def logits_are_those_of_the_reference(system: System, rows: Rows) -> float:
    prompt = prompt_for(system, rows)
    return difference(system.forward(prompt)[prompt.valid], system.reference(prompt)[prompt.valid])


MODEL = (
    decode_equals_longer_prefill, prefill_equals_forward, chunks_equal_whole, an_old_handle_stays_valid,
    forks_are_apart, a_suffix_is_causal, a_prefix_sees_itself, padding_is_not_read, a_row_is_alone,
    the_order_of_rows_does_not_matter, the_order_of_pictures_matters, forward_is_pure, a_step_is_pure,
    logits_are_those_of_the_reference, a_window_over_everything_is_none,
)  # fmt: skip
