"""The pi0 in `examples/pi0.py`: its velocity is that of joint attention, and it never changes the prefix's cache."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import CONFIGS, bits, made, params, prompt, seeds
from hypothesis import given
from hypothesis import strategies as st
from test_masks import drawing, rows_of
from torch.utils import _pytree as pytree

import pgfunc as pg
from examples import pi0
from pgfunc import laws, paligemma

CFG = CONFIGS["gemma"]
EXPERT = replace(CFG.text, width=12, hidden=20)
STATE, ACTION, ACTIONS = 5, 3, 4  # numbers of the state and of an action, and how many actions
ATOL = 1e-5  # float32, 3 layers, velocities of order 1


def expert(seed: int = 0) -> pi0.Params:
    """Random parameters in which vectors are not zero either, so that every leaf affects the velocity."""
    generator = torch.Generator().manual_seed(seed)

    def perturbed(leaf: torch.Tensor) -> torch.Tensor:
        return leaf + 0.2 * torch.randn(leaf.shape, generator=generator) if leaf.dim() == 1 else leaf

    return pg.tree.map(perturbed, pi0.init(EXPERT, STATE, ACTION, seed))


def inputs(rows: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """A state, actions, noise and a time for each row."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, STATE), (rows, ACTIONS, ACTION), (rows, ACTIONS, ACTION)
    return *(torch.randn(shape, generator=generator) for shape in shapes), torch.rand(rows, generator=generator)


def prefilled(tree: pg.Params, rows: pg.Prompt | None = None, free: int = 0) -> pg.Cache:
    """The cache of a prefix, by default of two rows of different lengths, with so many free slots."""
    return pg.prefill(tree, prompt(CFG, [3, 1], [0, 0], padding=2) if rows is None else rows, CFG, free)[1]


# --- a reference without a cache: both experts, layer by layer, with one attention over the whole sequence ------------


def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CFG.text.eps).sqrt() * (1 + scale)


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    angles = positions[:, :, None, None] * CFG.text.theta ** -(torch.arange(half) / half)
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1)


def suffix(p: pi0.Params, state: torch.Tensor, noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The expert's input: one token at a time, and one number of the time's embedding at a time."""
    half, tokens = EXPERT.width // 2, [state @ p.state[0].T + p.state[1]]
    angles = [2 * torch.pi * time.double() / (4e-3 * (4.0 / 4e-3) ** (i / (half - 1))) for i in range(half)]
    waves = torch.stack([angle.sin() for angle in angles] + [angle.cos() for angle in angles], -1).float()
    for action in noisy.unbind(1):
        mixed = torch.cat([action @ p.action[0].T + p.action[1], waves], -1) @ p.mix_in[0].T + p.mix_in[1]
        tokens.append(mixed * mixed.sigmoid() @ p.mix_out[0].T + p.mix_out[1])
    return torch.stack(tokens, 1)


def joint_velocity(
    tree: pg.Params, p: pi0.Params, rows: pg.Prompt, state: torch.Tensor, noisy: torch.Tensor, time: torch.Tensor
) -> torch.Tensor:
    """The velocity, if prefix and suffix are computed together. Padding stays in the middle, where no token sees it."""
    prefix = paligemma.join(tree, paligemma.encode_images(tree, rows.pixels, CFG), rows, CFG)
    xs, length = [prefix.x, suffix(p, state, noisy, time)], prefix.x.shape[1]
    valid = torch.cat([prefix.valid, torch.ones(len(state), 1 + ACTIONS, dtype=torch.bool)], 1)
    block = torch.tensor([0] * length + [1] + [2] * ACTIONS)
    hidden = ~(valid[:, None, :] & (block[None, :, None] >= block[None, None, :]))
    positions, cfg = valid.long().cumsum(1) - 1, CFG.text
    for pair in zip(tree.language.layers, p.expert.layers, strict=True):
        normed = [norm(x, layer.attention_norm) for layer, x in zip(pair, xs, strict=True)]
        q, k, v = (
            torch.cat([x @ getattr(layer, name).T for layer, x in zip(pair, normed, strict=True)], 1)
            .unflatten(-1, (-1, cfg.head_dim))
            .repeat_interleave(1 if name == "q" else cfg.heads // cfg.kv_heads, dim=2)
            for name in "qkv"
        )
        scores = torch.einsum("btnh,bsnh->bnts", rotated(q, positions), rotated(k, positions)) * cfg.query_scale
        weights = scores.masked_fill(hidden[:, None], -1e9).softmax(-1)
        z = torch.einsum("bnts,bsnh->btnh", weights, v).flatten(2)
        for i, (layer, added) in enumerate(zip(pair, (z[:, :length], z[:, length:]), strict=True)):
            x = xs[i] + added @ layer.out.T
            inside = norm(x, layer.mlp_norm)
            gate = F.gelu(inside @ layer.gate.T, approximate="tanh")
            xs[i] = x + (gate * (inside @ layer.up.T)) @ layer.down.T
    return norm(xs[1], p.expert.norm)[:, 1:] @ p.velocity[0].T + p.velocity[1]


@given(laws.ragged(suffix=0), seeds, st.integers(0, 7))
def test_the_velocity_equals_joint_attention_over_prefix_and_suffix(rows, seed, free):
    tree, p, batch = params(CFG, seed), expert(seed), made(rows, CFG)
    state, noisy, _, time = inputs(len(rows.prefix), seed)
    expected = joint_velocity(tree, p, batch, state, noisy, time)
    found = pi0.velocity(p, state, noisy, time, prefilled(tree, batch, free), EXPERT)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=ATOL)


# --- the mask, sampling and the loss ----------------------------------------------------------------------------------


def test_the_drawing_of_the_mask_is_true():
    seen = pi0.block_causal(torch.tensor([[2, 3, 4]]), slots=6, window=0)
    assert torch.equal(seen.full[0], drawing(rows_of(pi0.block_causal.__doc__, "sees  1 1 1")))
    assert seen.window == ()


def test_sampling_does_not_change_the_cache_and_is_repeatable():
    cache, p = prefilled(params(CFG), free=1 + ACTIONS), expert()
    state, _, noise, _ = inputs(2)
    before = bits(cache)
    one, two = (
        pi0.integrate(lambda x, time: pi0.velocity(p, state, x, time, cache, EXPERT), noise, 3) for _ in range(2)
    )
    assert bits(cache) == before
    assert torch.equal(one, two)
    assert not torch.equal(one, noise)


def test_the_loss_is_zero_for_the_right_velocity_and_its_squared_error_for_another():
    p, constant = expert(), torch.tensor([0.5, -1.0, 2.0])
    p = p._replace(velocity=(torch.zeros_like(p.velocity[0]), constant))  # the same for every input
    state, actions, _, time = inputs(2)
    cache = prefilled(params(CFG))
    assert pi0.loss(p, state, actions, actions + constant, time, cache, EXPERT) < 1e-12  # float32 rounds the difference
    other = pi0.loss(p, state, actions, actions, time, cache, EXPERT)
    torch.testing.assert_close(other, constant.square().mean())


def test_the_loss_asks_at_the_point_between_actions_and_noise(monkeypatch):
    state, actions, noise, time = inputs(2)
    asked = []
    monkeypatch.setattr(pi0, "velocity", lambda p, state, x, t, *rest: asked.append((x, t)) or torch.zeros_like(x))
    pi0.loss(expert(), state, actions, noise, time, prefilled(params(CFG)), EXPERT)
    t = time[:, None, None]
    torch.testing.assert_close(asked, [(t * noise + (1 - t) * actions, time)])


def test_the_gradient_of_the_loss_reaches_the_expert_and_through_the_cache_the_language_model():
    def tracked(tree):
        return pg.tree.map(lambda leaf: leaf.clone().requires_grad_(), tree)

    tree, p = tracked(params(CFG)), tracked(expert())
    cache = prefilled(tree)
    error = pi0.loss(p, *inputs(2), cache, EXPERT)
    language = [
        tree.vision.layers[0].q,
        tree.projector,
        *(w for layer in tree.language.layers for w in (layer.k, layer.v)),
    ]
    grads = torch.autograd.grad(error, [*pytree.tree_leaves(p), *language])
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_a_constant_velocity_is_integrated_exactly_from_noise_to_actions(steps):
    _, actions, noise, _ = inputs(2)
    times = []
    found = pi0.integrate(lambda x, time: times.append(time) or noise - actions, noise, steps)
    torch.testing.assert_close(found, actions, atol=1e-6, rtol=0)  # float32, at most 10 sums
    torch.testing.assert_close(torch.stack(times), torch.linspace(1, 1 / steps, steps)[:, None].expand(-1, 2))


def test_the_example_has_fewer_than_80_lines():
    lines = Path(pi0.__file__).read_text().splitlines()
    assert len(lines) < 80
    assert max(map(len, lines)) <= 120
