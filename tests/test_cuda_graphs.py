"""A graph returns what its function returns, wherever the inputs are. Here graphs are simulated on the CPU."""

from collections import Counter

import pytest
import torch
from graphs import simulate_graphs
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from pgfunc.jit import cuda_graphs
from pgfunc.jit.cuda_graphs import GraphedFunction


@pytest.fixture
def graphs(monkeypatch) -> Counter:
    return simulate_graphs(monkeypatch)


SMALL, BIG = torch.arange(4.0), torch.arange(float(1 << 18))  # a megabyte


def mixed(tensors):
    return {"sum": tensors[0] + tensors[1][:4], "parts": (tensors[1][-1] * tensors[0], "a word")}


def equal(one, other) -> bool:
    return all(
        a == b if isinstance(a, str) else torch.equal(a, b)
        for a, b in zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    )


# which small and which large input each call gets; 0 to 2 are kept, 3 is a new tensor
calls = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20)


@given(calls)
def test_any_sequence_of_inputs_returns_what_the_function_returns(calls):
    run, small, big = GraphedFunction(mixed), [SMALL + i for i in range(3)], [BIG + i for i in range(3)]
    results, expected = [], []
    with pytest.MonkeyPatch.context() as patch:
        simulate_graphs(patch)
        for i, (one, other) in enumerate(calls):
            inputs = [small[one] if one < 3 else SMALL * i, big[other] if other < 3 else BIG * i]
            results.append(run(inputs))
            expected.append(mixed(inputs))
    assert all(equal(*pair) for pair in zip(results, expected, strict=True))  # older results too


def test_a_loop_that_feeds_back_a_small_result_captures_once(graphs):
    run, x = GraphedFunction(mixed), SMALL
    for _ in range(10):
        x = run([x, BIG])["sum"]
    assert torch.equal(x, SMALL + 10 * BIG[:4])
    assert graphs == {"captured": 1, "replayed": 9}


def test_new_inputs_are_copied_from_the_second_call_on_whatever_their_addresses(graphs):
    run = GraphedFunction(mixed)
    for _ in range(3):  # at the same address
        run([SMALL, BIG], new_groups=[[0]])
    assert equal(run([SMALL + 1, BIG], new_groups=[[0]]), mixed([SMALL + 1, BIG]))
    assert graphs == {"captured": 1, "replayed": 3}


@pytest.mark.parametrize("cut", [lambda x: x[:, ::2], lambda x: x.T, lambda x: x[:1].expand(4, -1)])
def test_copied_inputs_keep_their_strides(graphs, cut):
    strides = []
    run = GraphedFunction(lambda tensors: strides.append(tensors[0].stride()) or tensors[0] + 1, max_copied=1.0)
    for i in range(4):
        x = cut(torch.arange(24.0).view(4, 6) * i)
        assert torch.equal(run([x], new_groups=[[0]]), x + 1)
    assert set(strides) == {x.stride()}
    assert graphs["captured"] == 1


def test_other_weights_have_another_graph_and_are_not_copied(graphs):
    run = GraphedFunction(lambda tensors: torch.stack([x.sum() for x in tensors]))
    trees = [[torch.full((size,), float(seed)) for size in (1, 2, 3, 50, 60)] for seed in range(2)]
    for seed in (0, 0, 1, 1, 0, 1):
        sums = run([torch.tensor([7.0]), *trees[seed]], new_groups=[[0], range(1, 6)])
        assert sums.tolist() == [7.0, *(x.sum().item() for x in trees[seed])]
    assert run.copied_indices == {0}
    assert graphs["captured"] == 2


def test_small_inputs_are_copied_and_large_ones_are_not():
    """A batch of pictures has a new address at each call; weights keep theirs until they are replaced."""
    run = GraphedFunction(mixed)
    small, picture, weights = torch.zeros(4), torch.zeros(100), torch.zeros(1000)
    calls = [[small.clone(), picture.clone(), weights.clone()] for _ in range(3)]  # all alive, so addresses differ
    for tensors in calls:
        run.track(tensors, [x.data_ptr() for x in tensors], ())
    assert run.copied_indices == {0, 1}


def test_a_limited_number_of_graphs_is_kept(graphs):
    run, inputs = GraphedFunction(mixed), [BIG + i for i in range(cuda_graphs.MAX_GRAPHS + 1)]
    for x in inputs:
        for _ in range(2):  # the first call at a new address runs directly
            run([SMALL, x])
    assert graphs["captured"] == len(inputs)
    assert len(run.graphs) == cuda_graphs.MAX_GRAPHS


def test_written_inputs_are_written_where_they_are(graphs):
    def note(tensors):
        tensors[0][int(tensors[1])] = tensors[1]
        return tensors[0].sum()

    run, mine, other = GraphedFunction(note, written=[0]), torch.zeros(5), torch.zeros(5)
    for i in range(5):
        assert run([mine, torch.tensor(float(i))]) == sum(range(i + 1))
    assert run([other, torch.tensor(3.0)]) == 3
    assert mine.tolist() == [0, 1, 2, 3, 4]
    assert other.tolist() == [0, 0, 0, 3, 0]


def test_graphs_that_no_call_can_use_any_more_are_dropped(graphs):
    """An input that starts to be copied has address 0 in later keys, so earlier keys never match again."""
    run = GraphedFunction(lambda tensors: torch.stack(tensors).sum())
    inputs = [torch.tensor(float(i)) for i in range(6)]
    for first in range(6):
        for _ in range(3):
            inputs = [x.clone() if i == first else x for i, x in enumerate(inputs)]
            assert run(inputs) == 15
    assert len(run.graphs) == 1


def test_a_function_with_results_on_another_device_is_not_captured(graphs, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "can_capture", lambda leaves: len(leaves) == 1)  # True for the inputs only
    run = GraphedFunction(lambda tensors: tensors[0] + 1)
    assert [int(run([torch.tensor(i)])) for i in range(4)] == [1, 2, 3, 4]
    assert not graphs


def test_each_shape_has_its_own_graph(graphs):
    total = cuda_graphs.graphed(lambda x: x.sum() + torch.zeros(4))
    for size in (4, 4, 4, 1, 1, 1, 4):
        assert torch.equal(total(torch.full((size,), 2.0)), torch.full((4,), 2.0 * size))
    assert graphs["captured"] == 2


def test_a_function_of_trees_is_captured_once_for_each_structure(graphs):
    @cuda_graphs.graphed
    def step(params, batch):
        return {"w": params["w"] - 0.5 * batch[0]}, {"sum": batch[1].sum()}

    params, expected = {"w": torch.ones(2, 2)}, torch.ones(2, 2)
    for i in range(5):
        batch = (torch.full((2, 2), float(i)), torch.full((3,), i))
        params, metrics = step(params, batch)
        expected = expected - 0.5 * batch[0]
        assert torch.equal(params["w"], expected)
        assert metrics["sum"] == 3 * i
    assert graphs["captured"] == 1


def test_without_a_gpu_the_function_runs_directly():
    calls = []
    run = cuda_graphs.graphed(lambda x: calls.append(x) or x + 1)
    assert [run(torch.tensor(i)).item() for i in range(3)] == [1, 2, 3]
    assert len(calls) == 3


def test_a_function_that_copies_between_devices_runs_directly_and_says_so(graphs, monkeypatch):
    def refused(fn, inputs):
        raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")

    monkeypatch.setattr(cuda_graphs, "capture", refused)
    run = GraphedFunction(mixed, name="step")
    assert equal(run([SMALL, BIG]), mixed([SMALL, BIG]))
    with pytest.warns(RuntimeWarning, match=r"^step runs slowly, without CUDA graphs; make on the GPU what it makes"):
        assert equal(run([SMALL, BIG]), mixed([SMALL, BIG]))
    for _ in range(3):  # warnings are errors here
        assert equal(run([SMALL, BIG]), mixed([SMALL, BIG]))
    assert not run.graphs


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Offset increment outside graph capture encountered")],
)
def test_other_errors_of_a_capture_are_raised(graphs, monkeypatch, error):
    def failed(fn, inputs):
        raise error

    monkeypatch.setattr(cuda_graphs, "capture", failed)
    run = GraphedFunction(mixed)
    run([SMALL, BIG])
    with pytest.raises(type(error), match=str(error)):
        run([SMALL, BIG])
