"""The cache: appending writes where it should, and nowhere else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgfunc.cache import Cache, append, check_room, pad, slots_behind
from pgfunc.errors import CacheFullError


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 3))
def test_append_writes_at_each_rows_length_and_changes_nothing_else(lengths, tokens):
    batch, slots = len(lengths), 7
    buffer, new = torch.randn(batch, slots, 2, 3), torch.randn(batch, tokens, 2, 3)
    before = buffer.clone()
    out = append(buffer, new, slots_behind(torch.tensor(lengths), tokens, 7))
    expected = before.clone()
    for row, length in enumerate(lengths):
        expected[row, length : length + tokens] = new[row]
    assert torch.equal(out, expected)
    assert torch.equal(buffer, before), "the old buffer is what it was"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 4))
def test_a_token_without_a_slot_is_written_nowhere(lengths, tokens):
    buffer, new = torch.randn(len(lengths), 7, 2, 3), torch.randn(len(lengths), tokens, 2, 3)
    out, expected = append(buffer, new, slots_behind(torch.tensor(lengths), tokens, 7)), buffer.clone()
    for row, length in enumerate(lengths):
        for i in range(tokens):
            if length + i < 7:
                expected[row, length + i] = new[row, i]
    assert torch.equal(out, expected)


def test_a_full_row_is_an_error_where_lengths_are_known_and_told_for_ever_where_they_are_not():
    buffers = (torch.zeros(2, 3, 1, 2),)
    with pytest.raises(CacheFullError, match=r"a row of 2 tokens has no room for 2 more in 3 slots"):
        check_room(torch.tensor([1, 2]), 2, 3)
    check_room(torch.tensor([1, 2]), 1, 3)
    assert Cache(buffers, buffers, torch.tensor([3, 4])).overflowed.tolist() == [False, True]


def test_pad_adds_empty_slots_behind():
    buffer = torch.randn(2, 3, 1, 4)
    wider = pad(buffer, 2)
    assert torch.equal(wider[:, :3], buffer)
    assert wider.shape == (2, 5, 1, 4)
    assert not wider[:, 3:].any()
    assert pad(buffer, 0) is buffer, "nothing is copied"
    assert Cache((wider,), (wider,), torch.tensor([3, 3])).slots == 5


def test_appending_no_tokens_changes_nothing():
    buffer = torch.randn(2, 3, 1, 2)
    assert torch.equal(append(buffer, torch.randn(2, 0, 1, 2), slots_behind(torch.tensor([1, 3]), 0, 3)), buffer)
