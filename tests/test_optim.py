"""AdamW, clipping and learning rates equal those of torch, and change no argument."""

from itertools import pairwise
from math import cos, pi

import pytest
import torch
from cases import CONFIGS, params
from hypothesis import given
from hypothesis import strategies as st

from pgfunc import tree
from pgfunc.train import optim
from pgfunc.train.optim import Settings

CFG = CONFIGS["gemma2"]
STEPS = 30


def noise(like, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda leaf: torch.randn(leaf.shape, generator=generator), like)


def torch_run(start, settings: Settings, rates: list[float]):
    """The same steps by torch.optim.AdamW, with vectors in a separate group."""
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), tree.flatten(start))
    decayed = [leaf for leaf in leaves.values() if settings.decay_vectors or leaf.dim() > 1]
    plain = [leaf for leaf in leaves.values() if not settings.decay_vectors and leaf.dim() == 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True,
    )  # fmt: skip
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for leaf, grad in zip(leaves.values(), tree.flatten(noise(start, step)).values(), strict=True):
            leaf.grad = grad
        optimizer.step()
    return tree.map(lambda leaf: leaf.detach(), leaves)


@pytest.mark.parametrize("settings", [
    Settings(), Settings(weight_decay=0.1), Settings(weight_decay=0.1, decay_vectors=True),
    Settings(beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.02),
], ids=repr)  # fmt: skip
def test_adamw_is_bitwise_equal_to_torchs_over_many_steps(settings):
    values, rates = params(CFG), [optim.cosine(step, 0.03, 5, STEPS) for step in range(STEPS)]
    start, state = values, optim.init(values)
    for step, rate in enumerate(rates):
        values, state = optim.update(noise(start, step), state, values, rate, settings)
    expected = torch_run(start, settings, rates)
    assert all(torch.equal(leaf, expected[path]) for path, leaf in tree.flatten(values).items())
    assert int(state.step) == STEPS


def test_an_update_changes_no_argument_and_can_be_repeated():
    start = params(CFG)
    grads = noise(start, 0)
    _, state = optim.update(grads, optim.init(start), start, 0.1)
    before = tree.map(torch.clone, (start, grads, state))
    first = optim.update(grads, state, start, 0.1)
    second = optim.update(grads, state, start, 0.1)
    for one, other in (((start, grads, state), before), (first, second)):
        assert all(torch.equal(a, b) for a, b in zip(*(tree.flatten(x).values() for x in (one, other)), strict=True))


def test_leaves_that_are_left_out_have_no_state():
    values = params(CFG)
    chosen = {path: leaf for path, leaf in tree.flatten(values).items() if path.startswith("language.layers.0.")}
    state = optim.init(chosen)
    assert tree.count(state) == 2 * tree.count(chosen) + 1
    assert state.first.keys() == chosen.keys()


def test_gradients_with_another_tree_structure_are_refused():
    values = tree.flatten(params(CFG))
    with pytest.raises(ValueError):
        optim.update({"a": torch.zeros(2)}, optim.init(values), values, 0.1)  # type: ignore[type-var]


@given(seed=st.integers(0, 2**31), norm=st.floats(1e-3, 1e3))
def test_clipping_equals_torchs(seed, norm):
    grads = noise(params(CFG), seed)
    leaves = [torch.zeros_like(leaf).requires_grad_() for leaf in tree.flatten(grads).values()]
    for leaf, grad in zip(leaves, tree.flatten(grads).values(), strict=True):
        leaf.grad = grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(leaves, norm)
    clipped, total = optim.clip(grads, norm)
    assert torch.equal(total, expected)
    assert all(torch.equal(a, b.grad) for a, b in zip(tree.flatten(clipped).values(), leaves, strict=True))  # type: ignore[arg-type]


@given(peak=st.floats(1e-6, 1.0), warmup=st.integers(0, 20), steps=st.integers(1, 50))
def test_rates_rise_to_the_peak_and_fall_to_zero(peak, warmup, steps):
    total = warmup + steps
    rates = [optim.cosine(step, peak, warmup, total) for step in range(total + 1)]
    assert 0 < rates[0] <= rates[warmup] == peak == max(rates)
    assert all(a < b for a, b in pairwise(rates[: warmup + 1]))
    assert all(a > b for a, b in pairwise(rates[warmup:]))
    assert rates[-1] == 0
    flat = [optim.constant(step, peak, warmup) for step in range(total)]
    assert flat[: warmup + 1] == rates[: warmup + 1]
    assert set(flat[warmup:]) == {peak}


def test_the_cosine_at_known_steps():
    assert optim.cosine(10, 2.0, 0, 20) == pytest.approx(1.0)  # halfway
    assert optim.cosine(15, 1.0, 10, 20) == pytest.approx(0.5)
    assert optim.cosine(12, 1.0, 10, 20) == pytest.approx(0.5 + 0.5 * cos(0.2 * pi))
    assert optim.constant(0, 1.0, 3) == pytest.approx(0.25)
