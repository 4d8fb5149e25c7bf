"""Reading an argument gives the same result whether or not it, or a similar value, was read before."""

import gc
import weakref
from typing import NamedTuple

import pytest
import torch
from cases import CONFIGS, params
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from pgfunc.jit.arguments import ArgumentReader


class Pair(NamedTuple):
    left: object
    right: object


TENSORS = [torch.arange(float(n)) for n in (2, 2, 3)]
new_tensors = st.integers(2, 3).map(lambda n: torch.arange(float(n)))
leaves = st.one_of(st.sampled_from([*TENSORS, "word", 2, 2.0, True, (), None]), new_tensors)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner), st.tuples(inner, inner), st.builds(Pair, inner, inner), st.lists(inner, max_size=2),
        st.dictionaries(st.sampled_from("ab"), inner),
    ),
    max_leaves=6,
)  # fmt: skip


def description(tree):
    """What must differ if the code must differ: structure, constants with their types, shapes."""
    leaves, structure = pytree.tree_flatten(tree)
    return structure, [(x.shape if isinstance(x, torch.Tensor) else x, type(x)) for x in leaves]


@given(st.lists(trees, min_size=2, max_size=6))
def test_specs_are_equal_exactly_if_structures_constants_and_shapes_are(values):
    reader = ArgumentReader()
    arguments = [reader.read("x", value) for value in values]
    for value, argument in zip(values, arguments, strict=True):
        tensors = [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
        assert [id(x) for x in argument.tensors] == [id(x) for x in tensors]
        assert description(reader.specs[argument.spec_index].rebuild(argument.tensors)) == description(value)
    for one, first in zip(values, arguments, strict=True):
        for other, second in zip(values, arguments, strict=True):
            assert (first.spec_index == second.spec_index) == (description(one) == description(other))


def test_an_unchanged_tree_is_not_flattened_again(monkeypatch):
    tree, reader = params(CONFIGS["gemma"]), ArgumentReader()
    first = reader.read("params", tree)
    monkeypatch.setattr(pytree, "tree_flatten", None)
    again = reader.read("params", tree)
    assert again.spec_index == first.spec_index
    assert [id(x) for x in again.tensors] == [id(x) for x in first.tensors]


@pytest.mark.parametrize("length", [256, 257, 1000])
def test_an_unchanged_long_tuple_is_not_flattened_again(monkeypatch, length):
    """Python has one int object per number up to 256 only, so the length needs an identity of its own."""
    tree, reader = (tuple(torch.zeros(1) for _ in range(length)), torch.zeros(2)), ArgumentReader()
    first = reader.read("params", tree)
    monkeypatch.setattr(pytree, "tree_flatten", None)
    again = reader.read("params", tree)
    assert again.unchanged
    assert again.spec_index == first.spec_index


def test_the_reader_keeps_no_tensor_alive_and_does_not_take_none_for_a_dead_one():
    reader, tree = ArgumentReader(), (torch.zeros(5), (torch.zeros(6),))
    references = [weakref.ref(x) for x in (tree[0], tree[1][0])]
    first = reader.read("x", tree).spec_index
    del tree
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert reader.read("x", (None, (None,))).spec_index != first


def test_a_container_that_was_changed_is_read_again():
    reader, changing = ArgumentReader(), [torch.zeros(2)]
    first = reader.read("x", (changing, 1))
    changing.append(torch.zeros(3))
    second = reader.read("x", (changing, 1))
    assert (len(first.tensors), len(second.tensors)) == (1, 2)
    assert first.spec_index != second.spec_index


def test_a_parameter_that_requires_a_gradient_is_read_without_it():
    reader, tree = ArgumentReader(), (torch.zeros(2, requires_grad=True),)
    for _ in range(2):
        (x,) = reader.read("x", tree).tensors
        assert not x.requires_grad
        assert x.data_ptr() == tree[0].data_ptr()


@pytest.mark.parametrize("step", [2, 3])
def test_a_strided_slice_is_read_as_a_dense_tensor(step):
    tree = (torch.arange(12.0)[::step],)
    (x,) = ArgumentReader().read("x", tree).tensors
    assert x.stride() == (1,)
    assert torch.equal(x, tree[0])
