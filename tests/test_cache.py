"""The cache: appending writes where it should, and nowhere else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgfunc.cache import Cache, append, pad


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 3))
def test_append_writes_at_each_rows_length_and_changes_nothing_else(lengths, tokens):
    batch, slots = len(lengths), 7
    buffer, new = torch.randn(batch, slots, 2, 3), torch.randn(batch, tokens, 2, 3)
    before = buffer.clone()
    out = append(buffer, new, torch.tensor(lengths))
    expected = before.clone()
    for row, length in enumerate(lengths):
        expected[row, length : length + tokens] = new[row]
    assert torch.equal(out, expected)
    assert torch.equal(buffer, before), "the old buffer is what it was"


def test_a_full_row_is_an_error():
    with pytest.raises(IndexError):
        append(torch.zeros(1, 3, 1, 2), torch.ones(1, 2, 1, 2), torch.tensor([2]))


def test_pad_adds_empty_slots_behind():
    buffer = torch.randn(2, 3, 1, 4)
    wider = pad(buffer, 2)
    assert torch.equal(wider[:, :3], buffer)
    assert wider.shape == (2, 5, 1, 4)
    assert not wider[:, 3:].any()
    assert pad(buffer, 0) is buffer, "nothing is copied"
    assert Cache((wider,), (wider,), torch.tensor([3, 3])).slots == 5
