"""The laws of the model: prompts, caches, rows, pictures."""

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch.utils import _pytree as pytree

from pgfunc.laws.law import law
from pgfunc.laws.strategies import Rows, Split, Strategies, prompt, splits
from pgfunc.laws.system import System
from pgfunc.prompt import Prompt

AGAIN = "the same numbers in another order"


class Answer(NamedTuple):
    """Prompts, and so many random tokens after each in two parts."""

    rows: Rows
    first: int
    second: int


class Place(NamedTuple):
    """Prompts, and a place in the first of them: a share of the places that come into question."""

    rows: Rows
    share: float

    def among(self, first: int, last: int) -> int:
        return min(last, first + int(self.share * (last - first + 1)))


def made(system: System, rows: Rows) -> Prompt:
    return prompt(rows, system.vocab, system.image_size)


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the standard deviation of what is expected; inf where one is not finite."""
    if not found.numel():
        return 0.0
    if not (found.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    spread = expected.double().std(correction=0).clamp(min=1e-12) if expected.numel() > 1 else 1.0
    return float((found.double() - expected.double()).abs().max() / spread)


def unlike(found: Any, expected: Any) -> float:
    """0 where two trees of tensors are equal to the bit, else the largest difference, inf where one is not finite."""
    pairs = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True))
    differing = [(one, other) for one, other in pairs if isinstance(one, Tensor) and not torch.equal(one, other)]
    return max((apart(one.float(), other.float()) or 1.0 for one, other in differing), default=0.0)


def rows_of(system: System, strategies: Strategies) -> SearchStrategy[Rows]:
    return strategies.rows


def with_suffix(system: System, strategies: Strategies) -> SearchStrategy[Rows]:
    """Prompts with a token of suffix at least in each row."""
    return strategies.rows.filter(lambda rows: min(rows.suffix) > 0)


def with_pictures(system: System, strategies: Strategies) -> SearchStrategy[Rows]:
    """Prompts with two pictures or more."""
    return strategies.rows.filter(lambda rows: rows.images > 1)


def split(system: System, strategies: Strategies) -> SearchStrategy[Split]:
    return splits(with_suffix(system, strategies))


def answers(system: System, strategies: Strategies) -> SearchStrategy[Answer]:
    return st.builds(Answer, strategies.rows, st.integers(1, 4), st.integers(1, 4))


def places(system: System, strategies: Strategies) -> SearchStrategy[Place]:
    return st.builds(Place, with_suffix(system, strategies), st.floats(0, 1))


def drawn(system: System, rows: Rows, count: int) -> Tensor:
    """So many random tokens a row, drawn apart from those of the prompt."""
    generator = torch.Generator().manual_seed(rows.seed + 1)
    return torch.randint(0, system.vocab, (len(rows.prefix), count), generator=generator)


def cut(whole: Prompt, lengths: Tensor) -> Prompt:
    """The first so many tokens of each row."""
    width = int(lengths.max())
    kept = torch.arange(width) < lengths[:, None]
    return Prompt(whole.pixels, whole.tokens[:, :width], kept, whole.causal[:, :width] & kept)


def changed(system: System, given: Prompt, row: int, place: int) -> Tensor:
    """Where the logits of a row change, bit by bit, when the token in a place is another."""
    tokens = given.tokens.clone()
    tokens[row, place] = (tokens[row, place] + 1) % system.vocab
    one, other = (system.forward(each)[row] for each in (given, given._replace(tokens=tokens)))
    return (one != other).any(-1)


# --- the cache --------------------------------------------------------------------------------------------------------


@law("Decoding a token gives what prefilling one token more gives, at every split of the suffix.",
     needs="forward prefill decode", domain=split, roundings=1.0, reason=AGAIN)  # fmt: skip
def decode_equals_longer_prefill(system: System, example: Split) -> float:
    whole = made(system, example.rows)
    expected, worst = system.forward(whole), 0.0
    length, split, rows = torch.tensor(example.rows.lengths), torch.tensor(example.at), torch.arange(len(example.at))
    steps = int((length - split).max())
    logits, cache = system.prefill(cut(whole, split), steps)
    for step in range(steps + 1):
        here, live = (split + step).clamp(max=length), split + step <= length
        worst = max(worst, apart(logits[live], expected[rows, here - 1][live]))
        if step < steps:  # a row that is through goes on with tokens that nobody looks at
            logits, cache = system.decode(whole.tokens[rows, here.clamp(max=whole.tokens.shape[1] - 1)], cache)
    return worst


@law("The logits after a prompt are those of its last valid token.",
     needs="forward prefill", domain=rows_of, roundings=1.0, reason=AGAIN)  # fmt: skip
def prefill_equals_forward(system: System, rows: Rows) -> float:
    given = made(system, rows)
    logits, _ = system.prefill(given, 1)
    return apart(logits, system.forward(given)[torch.arange(len(rows.prefix)), torch.tensor(rows.lengths) - 1])


@law("Appending tokens in two parts gives what appending them at once gives.",
     needs="prefill extend", domain=answers, roundings=1.0, reason=AGAIN)  # fmt: skip
def chunks_equal_whole(system: System, example: Answer) -> float:
    tokens = drawn(system, example.rows, example.first + example.second)
    _, cache = system.prefill(made(system, example.rows), tokens.shape[1])
    at_once, _ = system.extend(tokens, cache)
    one, middle = system.extend(tokens[:, : example.first], cache)
    two, _ = system.extend(tokens[:, example.first :], middle)
    return apart(torch.cat([one, two], 1), at_once)


@law("A cache gives the same logits after it was continued: appending changes nothing that an older handle sees.",
     needs="prefill decode", domain=answers)  # fmt: skip
def an_old_handle_stays_valid(system: System, example: Answer) -> float:
    tokens = drawn(system, example.rows, example.first + 1)
    _, cache = system.prefill(made(system, example.rows), tokens.shape[1])
    first, newer = system.decode(tokens[:, 0], cache)
    for i in range(1, example.first):
        _, newer = system.decode(tokens[:, i], newer)
    again, _ = system.decode(tokens[:, 0], cache)
    return unlike(again, first)


@law("Two continuations of one cache do not disturb one another.",
     needs="prefill decode", domain=rows_of, roundings=1.0, reason="a fork may be computed by other code")  # fmt: skip
def forks_are_apart(system: System, rows: Rows) -> float:
    tokens, given = drawn(system, rows, 4), made(system, rows)

    def alone(first: int, second: int) -> Tensor:
        _, cache = system.prefill(given, 4)
        _, cache = system.decode(tokens[:, first], cache)
        return system.decode(tokens[:, second], cache)[0]

    expected = alone(0, 2), alone(1, 3)
    _, cache = system.prefill(given, 4)
    _, one = system.decode(tokens[:, 0], cache)
    _, other = system.decode(tokens[:, 1], cache)
    found = system.decode(tokens[:, 2], one)[0], system.decode(tokens[:, 3], other)[0]
    return max(apart(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


# --- who sees whom ----------------------------------------------------------------------------------------------------


@law("A token of the suffix changes no logit before it.", needs="forward", domain=places)
def a_suffix_is_causal(system: System, example: Place) -> float:
    start, end = example.rows.prefix[0], example.rows.lengths[0]
    place = example.among(start, end - 1)
    return float(changed(system, made(system, example.rows), 0, place)[:place].any())


@law("A token of the prefix changes the logits before it too: the prefix sees itself in both directions.",
     needs="forward", domain=places)  # fmt: skip
def a_prefix_sees_itself(system: System, example: Place) -> float:
    place = example.among(0, example.rows.prefix[0] - 1)
    return float(not changed(system, made(system, example.rows), 0, place)[: place + 1].all())


@law("What stands in padded places does not matter.", needs="forward", domain=rows_of)
def padding_is_not_read(system: System, rows: Rows) -> float:
    given = made(system, rows)
    other = torch.where(given.valid, given.tokens, (given.tokens + 7) % system.vocab)
    one, two = (system.forward(each)[given.valid] for each in (given, given._replace(tokens=other)))
    return unlike(two, one)


@law("A row alone, without padding, has the logits that it has in a batch.",
     needs="forward", domain=rows_of, roundings=1.0, reason=AGAIN)  # fmt: skip
def a_row_is_alone(system: System, rows: Rows) -> float:
    given, worst = made(system, rows), 0.0
    together = system.forward(given)
    for row, length in enumerate(rows.lengths):
        alone = Prompt(given.pixels[row : row + 1], *(leaf[row : row + 1, :length] for leaf in given[1:]))
        worst = max(worst, apart(system.forward(alone)[0], together[row, :length]))
    return worst


@law("Rows in another order have their logits in that order.",
     needs="forward", domain=rows_of, roundings=1.0, reason=AGAIN)  # fmt: skip
def the_order_of_rows_does_not_matter(system: System, rows: Rows) -> float:
    given = made(system, rows)
    order = torch.randperm(len(rows.prefix), generator=torch.Generator().manual_seed(rows.seed))
    permuted = Prompt(*(leaf[order] for leaf in given))
    return apart(system.forward(permuted)[permuted.valid], system.forward(given)[order][permuted.valid])


@law("Pictures in another order give other logits.", needs="forward", domain=with_pictures)
def the_order_of_pictures_matters(system: System, rows: Rows) -> float:
    given = made(system, rows)
    one, two = (system.forward(each)[given.valid] for each in (given, given._replace(pixels=given.pixels.flip(1))))
    # else a sum in another order would do; in half precision it may, for what pictures say to a few tokens is not more
    return float(apart(two, one) <= min(10 * system.rounding, 1e-2))


@law("A window that covers the sequence gives the logits of full attention.",
     needs="windowed image_tokens", domain=rows_of, roundings=1.0, reason=AGAIN)  # fmt: skip
def a_window_over_everything_is_none(system: System, rows: Rows) -> float:
    given = made(system, rows)
    length = rows.images * system.image_tokens + max(rows.lengths)
    windowed, full = (system.windowed(given, size)[given.valid] for size in (length, 0))
    return apart(windowed, full)


# --- values -----------------------------------------------------------------------------------------------------------


@law("Two calls agree to the bit, and nothing that goes in is changed.", needs="forward", domain=rows_of)
def forward_is_pure(system: System, rows: Rows) -> float:
    given, kept = made(system, rows), made(system, rows)
    one, two = system.forward(given), system.forward(given)
    return max(unlike(two, one), unlike(given, kept))


@law("A step taken twice gives the same to the bit, and neither the token nor the cache is changed.",
     needs="prefill decode", domain=rows_of)  # fmt: skip
def a_step_is_pure(system: System, rows: Rows) -> float:
    token, (_, cache) = drawn(system, rows, 1)[:, 0], system.prefill(made(system, rows), 2)
    kept = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (token, cache))
    (one, _), (two, _) = system.decode(token, cache), system.decode(token, cache)
    return max(unlike(two, one), unlike((token, cache), kept))


@law("Two implementations with the same weights give the same logits.",
     needs="forward reference", domain=rows_of, roundings=1.0, reason=AGAIN)  # fmt: skip
def logits_are_those_of_the_reference(system: System, rows: Rows) -> float:
    given = made(system, rows)
    return apart(system.forward(given)[given.valid], system.reference(given)[given.valid])


MODEL = (
    decode_equals_longer_prefill, prefill_equals_forward, chunks_equal_whole, an_old_handle_stays_valid,
    forks_are_apart, a_suffix_is_causal, a_prefix_sees_itself, padding_is_not_read, a_row_is_alone,
    the_order_of_rows_does_not_matter, the_order_of_pictures_matters, forward_is_pure, a_step_is_pure,
    logits_are_those_of_the_reference, a_window_over_everything_is_none,
)  # fmt: skip
