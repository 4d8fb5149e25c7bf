"""Trees: paths name leaves, replace changes only what it names, stack and unstack are inverse."""

import pytest
import torch
from cases import CONFIGS, params

from pgfunc import tree


def test_paths_name_leaves():
    paths = tree.flatten(params(CONFIGS["gemma2"]))
    assert {"vision.layers.1.q_bias", "projector", "language.layers.2.post_mlp_norm", "language.embed"} <= paths.keys()
    assert not any("post_mlp_norm" in path for path in tree.flatten(params(CONFIGS["gemma"]))), "() has no leaf"


def test_replace_changes_one_leaf_and_shares_the_rest():
    old = params(CONFIGS["gemma"])
    new = tree.replace(old, {"language.norm": torch.zeros(16)})
    assert not new.language.norm.any()
    before, after = tree.flatten(old), tree.flatten(new)
    assert all(after[path] is before[path] for path in before.keys() - {"language.norm"})


def test_replace_names_the_path_that_is_not_there():
    with pytest.raises(KeyError, match=r"language\.nrom"):
        tree.replace(params(CONFIGS["gemma"]), {"language.nrom": torch.zeros(16)})


def test_unstack_inverts_stack():
    trees = [params(CONFIGS["gemma"], seed) for seed in range(3)]
    for before, after in zip(trees, tree.unstack(tree.stack(trees)), strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(tree.flatten(before).values(), tree.flatten(after).values(), strict=True)
        )


def test_count_and_bytes():
    leaves = {"a": torch.zeros(2, 3), "b": (torch.zeros(4, dtype=torch.bfloat16), ())}
    assert tree.count(leaves) == 10
    assert tree.nbytes(leaves) == 24 + 8
