"""Masks are what the drawings say, and what one rule says."""

import math
import re

import torch
from hypothesis import given
from hypothesis import strategies as st

from pgfunc import masks


def bits(text: str) -> torch.Tensor:
    """`1 . 1` as booleans."""
    return torch.tensor([c in "1" for c in text.split()])


def drawing(rows: list[str]) -> torch.Tensor:
    return torch.stack([bits(row) for row in rows])


def rows_of(doc: str, start: str) -> list[str]:
    """The 0/1 grid to the right of `start` in a docstring, down to the next blank line."""
    lines = doc[doc.index(start) :].split("\n\n")[0].rstrip().splitlines()
    return [re.findall(r"(?:[1.] ?)+$", line.rstrip())[0] for line in lines]


def test_the_prefix_lm_drawing_is_true():
    expected = drawing(rows_of(masks.__doc__, "sees  1 1 1"))
    found = masks.prefix_lm(torch.ones(1, 5, dtype=torch.bool), bits(". . . 1 1")[None])
    assert torch.equal(found[0], expected)


def test_the_window_drawing_is_true():
    expected = drawing(rows_of(masks.window.__doc__, "sees  1 1 1"))
    found = masks.window(torch.ones(1, 5, dtype=torch.bool), bits(". . . 1 1")[None], 2)
    assert torch.equal(found[0], expected)


def test_the_cache_drawings_are_true():
    full, window = masks.cached(torch.tensor([2]), tokens=2, slots=5, size=2)
    doc = masks.cached.__doc__
    lines = doc[doc.index("sees") :].splitlines()[:2]
    rows = [re.findall(r"[1.](?: [1.]){4}", line) for line in lines]
    assert torch.equal(full[0], drawing([left for left, _ in rows]))
    assert torch.equal(window[0], drawing([right for _, right in rows]))


flags = st.integers(1, 9).flatmap(lambda n: st.tuples(*[st.lists(st.booleans(), min_size=n, max_size=n)] * 2))


@given(flags, st.integers(1, 9))
def test_masks_equal_the_rule_written_as_loops(flags, size):
    valid, causal = flags
    n = len(valid)
    block = [sum(causal[: i + 1]) for i in range(n)]
    place = [max(sum(valid[: i + 1]) - 1, 0) for i in range(n)]
    found = masks.prompt(torch.tensor([valid]), torch.tensor([causal]), size)
    for q in range(n):
        for k in range(n):
            full = block[k] <= block[q] and valid[k] and valid[q]
            near = block[k] == block[q] or place[q] - place[k] < size
            assert found.full[0, q, k] == full
            assert found.window[0, q, k] == (full and near)


@given(st.integers(0, 6), st.integers(1, 4), st.integers(1, 8))
def test_the_cached_mask_is_the_last_rows_of_the_prompt_mask(length, tokens, size):
    total = length + tokens
    whole = masks.prompt(torch.ones(1, total, dtype=torch.bool), torch.ones(1, total, dtype=torch.bool), size)
    part = masks.cached(torch.tensor([length]), tokens, total, size)
    assert torch.equal(part.full, whole.full[:, length:])
    assert torch.equal(part.window, whole.window[:, length:])


def test_no_window_makes_no_windowed_mask():
    valid = torch.ones(1, 3, dtype=torch.bool)
    assert masks.prompt(valid, valid, 0).window == ()
    assert masks.cached(torch.tensor([1]), 1, 3, 0).window == ()


def test_positions_count_valid_tokens_from_zero():
    assert masks.positions(bits("1 1 . 1")[None]).tolist() == [[0, 1, 1, 2]]


def test_a_prepared_mask_is_a_bias_in_which_an_empty_query_reads_all_keys():
    seen = torch.tensor([[[True, False], [False, False]]])
    prepared = masks.prepared(masks.Masks(seen, ()), torch.bfloat16)
    assert prepared.window == ()
    assert prepared.full.seen is seen
    assert prepared.full.bias.dtype == torch.bfloat16
    assert prepared.full.bias.tolist() == [[[0.0, -math.inf], [0.0, 0.0]]]
    assert prepared.full.empty.tolist() == [[[False], [True]]]
    spans = masks.spans(masks.Masks(seen, seen))
    assert masks.prepared(spans, torch.float32) is not spans
    assert all(mask is same for mask, same in zip(masks.prepared(spans, torch.float32), spans, strict=True))
