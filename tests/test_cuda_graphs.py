"""What a graph gives is what its function gives, wherever inputs lie; here a graph is played by the function itself."""

from collections import Counter

import pytest
import torch
from graphs import played
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from pgfunc.jit import cuda_graphs


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
    run, small, big = cuda_graphs.Replayed(mixed), [SMALL + i for i in range(3)], [BIG + i for i in range(3)]
    results, expected = [], []
    with pytest.MonkeyPatch.context() as patch:
        played(patch)
        for i, (one, other) in enumerate(calls):
            given = [small[one] if one < 3 else SMALL * i, big[other] if other < 3 else BIG * i]
            results.append(run(given))
            expected.append(mixed(given))
    assert all(equal(*pair) for pair in zip(results, expected, strict=True))  # older results too


def test_a_loop_that_feeds_back_what_is_small_captures_once(graphs):
    run, x = cuda_graphs.Replayed(mixed), SMALL
    for _ in range(10):
        x = run([x, BIG])["sum"]
    assert torch.equal(x, SMALL + 10 * BIG[:4])
    assert graphs == {"captured": 1, "replayed": 9}


def test_inputs_that_come_anew_are_copied_from_the_second_call_on_wherever_they_lie(graphs):
    run = cuda_graphs.Replayed(mixed)
    for _ in range(3):  # in one place, by chance
        run([SMALL, BIG], new=[[0]])
    assert equal(run([SMALL + 1, BIG], new=[[0]]), mixed([SMALL + 1, BIG]))
    assert graphs == {"captured": 1, "replayed": 3}


@pytest.mark.parametrize("cut", [lambda x: x[:, ::2], lambda x: x.T, lambda x: x[:1].expand(4, -1)])
def test_copies_have_the_strides_of_what_they_are_copies_of(graphs, cut):
    strides, run = (
        [],
        cuda_graphs.Replayed(lambda tensors: strides.append(tensors[0].stride()) or tensors[0] + 1, few=1.0),
    )
    for i in range(4):
        x = cut(torch.arange(24.0).view(4, 6) * i)
        assert torch.equal(run([x], new=[[0]]), x + 1)
    assert set(strides) == {x.stride()}
    assert graphs["captured"] == 1


def test_other_weights_are_another_graph_and_none_of_them_is_copied(graphs):
    run = cuda_graphs.Replayed(lambda tensors: torch.stack([x.sum() for x in tensors]))
    trees = [[torch.full((size,), float(seed)) for size in (1, 2, 3, 50, 60)] for seed in range(2)]
    for seed in (0, 0, 1, 1, 0, 1):
        found = run([torch.tensor([7.0]), *trees[seed]], new=[[0], range(1, 6)])
        assert found.tolist() == [7.0, *(x.sum().item() for x in trees[seed])]
    assert run.moving == {0}
    assert graphs["captured"] == 2


def test_few_bytes_are_copied_and_more_are_not():
    """A batch of pictures moves from call to call, and weights stay until there are others."""
    run = cuda_graphs.Replayed(mixed)
    small, picture, weights = torch.zeros(4), torch.zeros(100), torch.zeros(1000)
    calls = [[small.clone(), picture.clone(), weights.clone()] for _ in range(3)]  # all alive: in places of their own
    for tensors in calls:
        run.look(tensors, [x.data_ptr() for x in tensors], ())
    assert run.moving == {0, 1}


def test_as_many_graphs_are_kept_as_said(graphs):
    run, places = cuda_graphs.Replayed(mixed), [BIG + i for i in range(cuda_graphs.KEPT + 1)]
    for x in places:
        for _ in range(2):  # the first call in a new place is no graph's
            run([SMALL, x])
    assert graphs["captured"] == len(places)
    assert len(run.graphs) == cuda_graphs.KEPT


def test_what_is_written_stays_where_it_is(graphs):
    def note(tensors):
        tensors[0][int(tensors[1])] = tensors[1]
        return tensors[0].sum()

    run, mine, other = cuda_graphs.Replayed(note, written=[0]), torch.zeros(5), torch.zeros(5)
    for i in range(5):
        assert run([mine, torch.tensor(float(i))]) == sum(range(i + 1))
    assert run([other, torch.tensor(3.0)]) == 3
    assert mine.tolist() == [0, 1, 2, 3, 4]
    assert other.tolist() == [0, 0, 0, 3, 0]


def test_inputs_that_begin_to_move_leave_no_graph_that_no_call_can_find(graphs):
    run, small = (
        cuda_graphs.Replayed(lambda tensors: torch.stack(tensors).sum()),
        [torch.tensor(float(i)) for i in range(6)],
    )
    for first in range(6):
        for _ in range(3):
            small = [x.clone() if i == first else x for i, x in enumerate(small)]
            assert run(small) == 15
    assert len(run.graphs) == 1


def test_results_elsewhere_are_no_graphs(graphs, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "possible", lambda leaves: len(leaves) == 1)  # as if only inputs were there
    run = cuda_graphs.Replayed(lambda tensors: tensors[0] + 1)
    assert [int(run([torch.tensor(i)])) for i in range(4)] == [1, 2, 3, 4]
    assert not graphs


def test_other_shapes_are_other_graphs(graphs):
    total = cuda_graphs.graphed(lambda x: x.sum() + torch.zeros(4))
    for size in (4, 4, 4, 1, 1, 1, 4):
        assert torch.equal(total(torch.full((size,), 2.0)), torch.full((4,), 2.0 * size))
    assert graphs["captured"] == 2


def test_a_function_of_trees_is_captured_once_a_structure(graphs):
    @cuda_graphs.graphed
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
    run = cuda_graphs.graphed(lambda x: called.append(x) or x + 1)
    assert [run(torch.tensor(i)).item() for i in range(3)] == [1, 2, 3]
    assert len(called) == 3
