"""What a graph gives is what its function gives, wherever inputs lie; here a graph is played by the function itself."""

from collections import Counter

import pytest
import torch
from graphs import played
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from pgfunc import replay


@pytest.fixture
def graphs(monkeypatch) -> Counter:
    return played(monkeypatch)


SMALL, BIG = torch.arange(4.0), torch.arange(float(1 << 18))  # a megabyte


def mixed(tensors):
    return {"sum": tensors[0] + tensors[1][:4], "parts": (tensors[1][-1] * tensors[0], "a word")}


def equal(one, other) -> bool:
    return all(
        a == b if isinstance(a, str) else torch.equal(a, b)
        for a, b in zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    )


# which small and which large input each call gets; 0 to 2 are kept, 3 is made anew
calls = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20)


@given(calls)
def test_any_sequence_of_inputs_gives_what_the_function_gives(calls):
    run, small, big = replay.Replayed(mixed), [SMALL + i for i in range(3)], [BIG + i for i in range(3)]
    results, expected = [], []
    with pytest.MonkeyPatch.context() as patch:
        played(patch)
        for i, (one, other) in enumerate(calls):
            given = [small[one] if one < 3 else SMALL * i, big[other] if other < 3 else BIG * i]
            results.append(run(given))
            expected.append(mixed(given))
    assert all(equal(*pair) for pair in zip(results, expected, strict=True))  # older results too


def test_a_loop_that_feeds_back_what_is_small_captures_once(graphs):
    run, x = replay.Replayed(mixed), SMALL
    for _ in range(10):
        x = run([x, BIG])["sum"]
    assert torch.equal(x, SMALL + 10 * BIG[:4])
    assert graphs == {"captured": 1, "replayed": 9}


def test_as_many_graphs_are_kept_as_said(graphs):
    run, places = replay.Replayed(mixed), [BIG + i for i in range(replay.KEPT + 1)]
    for x in places:
        for _ in range(2):  # the first call in a new place is no graph's
            run([SMALL, x])
    assert graphs["captured"] == len(places)
    assert len(run.graphs) == replay.KEPT


def test_what_is_written_stays_where_it_is(graphs):
    def count(tensors):
        tensors[0].add_(tensors[1])
        return tensors[0].sum()

    run, mine, other = replay.Replayed(count, written=[0]), torch.zeros(3), torch.zeros(3)
    for i in range(4):
        assert run([mine, torch.ones(3) * i]) == 3 * mine[0]
    assert run([other, torch.ones(3)]) == 3
    # capturing runs the function once more here, as it does not on a GPU
    assert mine.tolist() == [0 + 1 + 1 + 2 + 3] * 3
    assert other.tolist() == [1] * 3


def test_a_function_of_trees_is_captured_once_a_structure(graphs):
    @replay.graphed
    def step(params, batch):
        return {"w": params["w"] - 0.5 * batch[0]}, {"seen": batch[1].sum()}

    params, expected = {"w": torch.ones(2, 2)}, torch.ones(2, 2)
    for i in range(5):
        batch = (torch.full((2, 2), float(i)), torch.full((3,), i))
        params, seen = step(params, batch)
        expected = expected - 0.5 * batch[0]
        assert torch.equal(params["w"], expected)
        assert seen["seen"] == 3 * i
    assert graphs["captured"] == 1


def test_without_a_gpu_the_function_runs_as_it_is():
    called = []
    run = replay.graphed(lambda x: called.append(x) or x + 1)
    assert [run(torch.tensor(i)).item() for i in range(3)] == [1, 2, 3]
    assert len(called) == 3
