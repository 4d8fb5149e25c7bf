"""An argument is read as what it is, whether or not it, or something that looks like it, was read before."""

import gc
import weakref
from typing import NamedTuple

import pytest
import torch
from cases import CONFIGS, params
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from pgfunc.jit.arguments import Arguments


class Pair(NamedTuple):
    left: object
    right: object


KEPT = [torch.arange(float(n)) for n in (2, 2, 3)]
fleeting = st.integers(2, 3).map(lambda n: torch.arange(float(n)))
leaves = st.one_of(st.sampled_from([*KEPT, "word", 2, 2.0, True, (), None]), fleeting)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner), st.tuples(inner, inner), st.builds(Pair, inner, inner), st.lists(inner, max_size=2),
        st.dictionaries(st.sampled_from("ab"), inner),
    ),
    max_leaves=6,
)  # fmt: skip


def described(tree):
    """What must differ where code must: structure, fixed leaves with their types, shapes."""
    found, structure = pytree.tree_flatten(tree)
    return structure, [(x.shape if isinstance(x, torch.Tensor) else x, type(x)) for x in found]


@given(st.lists(trees, min_size=2, max_size=6))
def test_kinds_are_equal_where_structures_constants_and_shapes_are_and_tensors_are_the_trees_own(values):
    arguments = Arguments()
    read = [arguments.read("x", value) for value in values]
    for value, argument in zip(values, read, strict=True):
        mine = [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
        assert [id(x) for x in argument.tensors] == [id(x) for x in mine]
        assert described(arguments.kinds[argument.kind].rebuilt(argument.tensors)) == described(value)
    for one, first in zip(values, read, strict=True):
        for other, second in zip(values, read, strict=True):
            assert (first.kind == second.kind) == (described(one) == described(other))


def test_a_tree_that_comes_back_is_not_flattened_again(monkeypatch):
    tree, arguments = params(CONFIGS["gemma"]), Arguments()
    first = arguments.read("params", tree)
    monkeypatch.setattr(pytree, "tree_flatten", None)
    again = arguments.read("params", tree)
    assert again.kind == first.kind
    assert [id(x) for x in again.tensors] == [id(x) for x in first.tensors]


def test_nothing_is_kept_alive_and_what_died_is_not_taken_for_nothing():
    arguments, tree = Arguments(), (torch.zeros(5), (torch.zeros(6),))
    seen = [weakref.ref(x) for x in (tree[0], tree[1][0])]
    first = arguments.read("x", tree).kind
    del tree
    gc.collect()
    assert [each() for each in seen] == [None, None]
    assert arguments.read("x", (None, (None,))).kind != first


def test_what_changes_while_it_stays_is_read_anew():
    arguments, changing = Arguments(), [torch.zeros(2)]
    first = arguments.read("x", (changing, 1))
    changing.append(torch.zeros(3))
    second = arguments.read("x", (changing, 1))
    assert (len(first.tensors), len(second.tensors)) == (1, 2)
    assert first.kind != second.kind


def test_a_parameter_that_asks_for_a_gradient_is_read_without():
    arguments, tree = Arguments(), (torch.zeros(2, requires_grad=True),)
    for _ in range(2):
        (x,) = arguments.read("x", tree).tensors
        assert not x.requires_grad
        assert x.data_ptr() == tree[0].data_ptr()


@pytest.mark.parametrize("step", [2, 3])
def test_a_slice_of_one_axis_is_read_dense(step):
    tree = (torch.arange(12.0)[::step],)
    (x,) = Arguments().read("x", tree).tensors
    assert x.stride() == (1,)
    assert torch.equal(x, tree[0])
